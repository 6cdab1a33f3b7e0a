"""Traces one pair of checkpoints, or one base against several: `python main.py --config=configs/mode.py`.

Every option is a flag, and overrides that of the config, which is `configs/mode.py` where none is named:

    python main.py --base_model_id A --ft_model_id B --permute --align --dataset wikitext --stat mode --save results.p
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from tracing_jax.cli.absl_flags import define_flags, given_flags, run_program
from tracing_jax.cli.arguments import Parser, add_options
from tracing_jax.cli.errors import configure_logging, exit_on_usage_error
from tracing_jax.cli.program import EXIT_STATUS, ProgramOptions, run_experiment
from tracing_jax.cli.startup import import_transformers_without_torch
from tracing_jax.dataclass_options import from_values, replaced
from tracing_jax.options import RunOptions
from tracing_jax.progress import reporting

_CONFIGS = Path(__file__).parent / "configs"
_CONFIG_HELP = "A file of configs/, with :demo for the demo family; --config.NAME sets an option too."
_ALONG_PATH = {
    "attn": "mode, perm_mode_l2: move attention along the path too.",
    "emb": "mode, perm_mode_l2: move embeddings, head and final norm along the path too.",
}
_CONFIG = config_flags.DEFINE_config_file("config", help_string=_CONFIG_HELP)
define_flags(RunOptions)
define_flags(ProgramOptions)
for _name, _help in _ALONG_PATH.items():
    flags.DEFINE_boolean(_name, None, _help)


def with_default_config(argv: Sequence[str]) -> list[str]:
    """Returns argv with `--config=configs/mode.py` put in front if no config is named.

    Where no statistic is named either, the default verdict is printed beside the loss along the path: `--verdict=auto`.
    """
    names = {argument.lstrip("-").split("=")[0] for argument in argv[1:]}
    if "config" in names:
        return list(argv)
    beside = [] if names & {"stat", "verdict"} else ["--verdict=auto"]
    return [argv[0], f"--config={_CONFIGS / 'mode.py'}", *beside, *argv[1:]]


def run_options() -> RunOptions:
    """Returns the options of the config, with those that were given as flags.

    Raises:
      ConfigError: a config file sets what is no option, or to a value of the wrong type.
    """
    given = given_flags(RunOptions)
    for name in _ALONG_PATH:
        if (value := flags.FLAGS[name].value) is not None:
            given |= {f"mode.{name}": value, f"perm_mode_l2.{name}": value}
    if "ft_model_id" in given:
        given.setdefault("ft_model_ids", ())
    if "ft_model_ids" in given:
        given.setdefault("ft_model_id", None)
    return replaced(RunOptions.from_config(_CONFIG.value), given)


def main(argv: Sequence[str]) -> None:
    """Runs the experiment of the config and prints its summary."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    with exit_on_usage_error():
        program = from_values(ProgramOptions, given_flags(ProgramOptions))
        options = run_options()
    configure_logging(0 if flags.FLAGS["verbosity"].using_default_value and not program.quiet else None)
    import_transformers_without_torch()
    with reporting():
        run_experiment(options, program)


def _print_help() -> None:
    usage = "main.py [--config=FILE[:demo]] [--NAME=VALUE ...]"
    parser = Parser("main.py", usage=usage, description=__doc__.split("\n")[0], add_help=False)
    parser.add_argument("--config", metavar="FILE[:demo]", help=f"{_CONFIG_HELP} [configs/mode.py]")
    for name, meaning in _ALONG_PATH.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    add_options(parser, RunOptions(), negation="--no")
    add_options(parser, ProgramOptions(), negation="--no")
    parser.epilog = EXIT_STATUS
    parser.print_help()


if __name__ == "__main__":
    run_program(main, with_default_config(sys.argv), _print_help)
