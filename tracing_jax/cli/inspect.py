"""`tracing-jax inspect`: what is found of a model by the names, shapes and numbers of its tensors."""

import argparse
from dataclasses import dataclass

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.compare import LAYOUT, MODEL
from tracing_jax.cli.errors import exit_on_usage_error, exit_on_user_error
from tracing_jax.dataclass_options import from_values, option
from tracing_jax.options import COMPONENTS, download_option

USAGE = "MODEL"


@dataclass(frozen=True)
class InspectOptions:
    """What is inspected."""

    component: str | None = option(None, "A component of a multimodal model.", choices=COMPONENTS)
    layout: str | None = option(None, LAYOUT)
    download_dir: str | None = download_option()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help=f"model: {MODEL}")
    add_options(parser, InspectOptions)


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    with exit_on_usage_error():
        options = from_values(InspectOptions, given(parsed, InspectOptions))
    with exit_on_user_error():
        from tracing_jax.checkpoint import inspect_checkpoint
        from tracing_jax.experiment.models import resolve_model_id

        model = resolve_model_id(parsed.model)
        found = inspect_checkpoint(model, options.component, options.layout, options.download_dir)
        print("\n".join(f"# {line}" for line in found.lines()[1:]))
        print(found.as_yaml(), end="")
