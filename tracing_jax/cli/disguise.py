"""`tracing-jax disguise`: a checkpoint of the same function in other weights."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.compare import MODEL
from tracing_jax.cli.errors import exit_on_usage_error, exit_on_user_error
from tracing_jax.dataclass_options import REQUIRED, from_values, option, option_of
from tracing_jax.options import REWRITES, RunOptions, download_option

USAGE = "MODEL --disguise A,B,... --save FOLDER"


@dataclass(frozen=True)
class DisguiseOptions:
    """What is written, and how."""

    disguise: tuple[str, ...] = option(REQUIRED, "Rewrites, applied in order, or all.", choices=REWRITES)
    save: str = option(REQUIRED, "The folder to write.")
    seed: int = option_of(RunOptions, "seed")
    download_dir: str | None = download_option()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help=f"model: {MODEL}")
    add_options(parser, DisguiseOptions)


def check_new_folder(save: str) -> None:
    """Makes sure that a folder is not there yet and can be made.

    Raises:
      OSError: it is, or cannot.
    """
    from tracing_jax.record import check_writable

    folder = Path(save).expanduser()
    if folder.exists():
        raise FileExistsError(f"--save={save}: it is there already; remove it or choose another place to write to")
    check_writable(folder)


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    with exit_on_usage_error():
        options = from_values(DisguiseOptions, given(parsed, DisguiseOptions))
        check_new_folder(options.save)
    with exit_on_user_error():
        from tracing_jax.experiment.disguising import write_disguised
        from tracing_jax.experiment.models import resolve_model_id

        model = resolve_model_id(parsed.model)
        for line in write_disguised(model, options.disguise, options.seed, options.save, options.download_dir):
            print(line)
