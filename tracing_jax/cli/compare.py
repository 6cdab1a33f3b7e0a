"""`tracing-jax compare`: the verdict on one or more models against a base."""

import argparse

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.program import EXIT_STATUS, ProgramOptions, run_experiment
from tracing_jax.dataclass_options import replaced
from tracing_jax.options import COMPARE, RunOptions

USAGE = "BASE FT [FT ...]"
MODEL = "a folder, a Hub id org/name or org/name@revision, or demo:<member>"
LAYOUT = "A file that says where the parts of the model are stored; it is then read by its weights alone."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.epilog = EXIT_STATUS
    parser.add_argument("base", metavar="BASE", help=f"base model: {MODEL}")
    parser.add_argument("ft", metavar="FT", nargs="+", help="the models that may descend from it")
    add_options(parser, ProgramOptions())
    add_options(parser, COMPARE, without=("base_model_id", "ft_model_id", "ft_model_ids"))


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    options = replaced(COMPARE, given(parsed, RunOptions) | {"base_model_id": parsed.base})
    if len(parsed.ft) == 1:
        options = replaced(options, {"ft_model_id": parsed.ft[0]})
    else:
        options = replaced(options, {"ft_model_ids": tuple(parsed.ft)})
    run_experiment(options, ProgramOptions(**given(parsed, ProgramOptions)))
