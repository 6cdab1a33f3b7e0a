"""Traces every pair of a list of models, on Slurm or on this machine, and ends in one report.

    python launch.py --config=configs/zoo.py:demo --models=configs/models/demo.yaml --save=runs/zoo --executor=local
    python launch.py --save=runs/zoo --status       # done, running, failed, missing
    python launch.py --save=runs/zoo --retry        # only what failed or is missing

Started again it goes on: a pair with a record of this config and these model files is not traced again.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app
from ml_collections import config_flags

from tracing_jax.cli.absl_flags import define_flags, given_flags, run_program
from tracing_jax.cli.arguments import Parser, add_options
from tracing_jax.cli.errors import exit_on_usage_error
from tracing_jax.cli.zoo import ZooOptions, launch
from tracing_jax.dataclass_options import from_values

_DEFAULT = Path(__file__).parent / "configs" / "zoo.py"
_CONFIG_HELP = "A file of configs/; its options hold for every pair, and --config.NAME sets one."
_CONFIG = config_flags.DEFINE_config_file("config", help_string=_CONFIG_HELP)
define_flags(ZooOptions)


def with_default_config(argv: Sequence[str]) -> list[str]:
    """Returns argv with `--config=configs/zoo.py` put in front if no config is named."""
    named = any(argument.lstrip("-").split("=")[0] == "config" for argument in argv[1:])
    return list(argv) if named else [argv[0], f"--config={_DEFAULT}", *argv[1:]]


def main(argv: Sequence[str]) -> None:
    """Plans, sends off what is left to do, waits, and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    with exit_on_usage_error():
        zoo = from_values(ZooOptions, given_flags(ZooOptions))
    launch(zoo, _CONFIG.value)


def _print_help() -> None:
    usage, meaning = "launch.py [--NAME=VALUE ...]", __doc__.split("\n")[0]
    parser = Parser("launch.py", usage=usage, description=meaning, add_help=False)
    parser.add_argument("--config", metavar="FILE[:demo]", help=f"{_CONFIG_HELP} [configs/zoo.py]")
    add_options(parser, ZooOptions, negation="--no")
    parser.print_help()


if __name__ == "__main__":
    run_program(main, with_default_config(sys.argv), _print_help)
