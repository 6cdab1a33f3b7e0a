"""Has models write text: `python generate.py --models=org/a,org/b --prompts=prompts.txt --save=runs/generated`.

One file for each model, `<id>_gentext.json`: a list of {prompt, text, tokens, seed}. `main.py --dataset=generated`
reads such files. `tracing-jax generate` is the same.
"""

import sys
from collections.abc import Sequence

from absl import app

from tracing_jax.cli.absl_flags import define_flags, given_flags, run_program
from tracing_jax.cli.arguments import Parser, add_options
from tracing_jax.cli.errors import exit_on_usage_error
from tracing_jax.cli.generate import GenerateOptions, write_texts
from tracing_jax.dataclass_options import from_values

define_flags(GenerateOptions)


def main(argv: Sequence[str]) -> None:
    """Writes the texts."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    with exit_on_usage_error():
        options = from_values(GenerateOptions, given_flags(GenerateOptions))
    write_texts(options)


def _print_help() -> None:
    usage, meaning = "generate.py [--NAME=VALUE ...]", __doc__.split("\n")[0]
    parser = Parser("generate.py", usage=usage, description=meaning, add_help=False)
    add_options(parser, GenerateOptions, negation="--no")
    parser.print_help()


if __name__ == "__main__":
    run_program(main, sys.argv, _print_help)
