"""`tracing-jax align`: a model aligned to a base and written as a checkpoint."""

import argparse
import sys

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.compare import MODEL
from tracing_jax.cli.program import ProgramOptions, run_experiment
from tracing_jax.dataclass_options import options_of, replaced
from tracing_jax.options import ALIGN, RunOptions

USAGE = "BASE FT --save_aligned FOLDER"
_LEFT_OUT = ("base_model_id", "ft_model_id", "ft_model_ids", "control_model_ids", "save_aligned", "align", "permute",
             "permute_axes", "disguise")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("base", metavar="BASE", help=f"base model: {MODEL}")
    parser.add_argument("ft", metavar="FT", help="the model that is aligned to it")
    folder = next(found for found in options_of(RunOptions) if found.name == "save_aligned")
    parser.add_argument("--save_aligned", metavar="FOLDER", required=True, help=folder.meaning)
    add_options(parser, ProgramOptions())
    add_options(parser, ALIGN, without=_LEFT_OUT)


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    models = {"base_model_id": parsed.base, "ft_model_id": parsed.ft}
    options = replaced(ALIGN, given(parsed, RunOptions) | models)
    record = run_experiment(options, ProgramOptions(**given(parsed, ProgramOptions)))[0]
    if record["alignment"] is None:
        sys.exit(f"error: {next(note for note in record['notes'] if note.startswith('not aligned'))}")
