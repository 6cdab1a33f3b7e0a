"""`tracing-jax signature`: a file of 256 KiB by which relatives of a model can be found, without its weights."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.compare import LAYOUT, MODEL
from tracing_jax.cli.errors import configure_logging, exit_on_usage_error, exit_on_user_error
from tracing_jax.cli.startup import keep_compiled_programs
from tracing_jax.dataclass_options import REQUIRED, from_values, option
from tracing_jax.options import download_option

USAGE = "MODEL -o FILE"


@dataclass(frozen=True)
class SignatureOptions:
    """What is written, and under which name."""

    save: str = option(REQUIRED, "The file to write.")
    name: str | None = option(None, "What the model is called in it; by default as on the command line.")
    layout: str | None = option(None, LAYOUT)
    download_dir: str | None = download_option()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help=f"model: {MODEL}")
    parser.add_argument(
        "-o", "--save", metavar="FILE", required=True, help="the file to write, best named NAME.signature.safetensors"
    )
    add_options(parser, SignatureOptions, without=("save",))


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    configure_logging()
    with exit_on_usage_error():
        options = from_values(SignatureOptions, given(parsed, SignatureOptions))
        from tracing_jax.record import check_writable

        check_writable(Path(options.save).expanduser())
    with exit_on_user_error():
        keep_compiled_programs()
        from tracing_jax.experiment.signing import signature_of
        from tracing_jax.library import to_bytes, write_signature

        signature = signature_of(parsed.model, options.download_dir, options.name, options.layout)
        path = Path(options.save).expanduser()
        write_signature(signature, path)
        sampled = ", ".join(map(str, signature.facts["layers"]))
        print(f"{path}: {len(to_bytes(signature)):,} bytes; layers {sampled}, {len(signature.tokens)} token strings")
