"""The command line `tracing-jax`, and what it shares with the programs at the root of the repository.

Nothing heavy is imported before a verb runs, so that `--help` answers at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from tracing_jax.cli.arguments import Parser, program_version
from tracing_jax.cli.errors import configure_logging
from tracing_jax.cli.process import end_interrupted, prepare_process
from tracing_jax.cli.startup import import_transformers_without_torch, prepare_libraries

VERBS = {
    "compare": "trace one or more models to a base: the verdict, and the layers behind it",
    "verify": "check a record: its content, the files of its models, and the test that decided",
    "inspect": "print what is found of a model by its weights alone, in the form of a layout file",
    "align": "align a model to a base, and write it as a checkpoint",
    "merge": "find which parents a model was merged of, and in what shares",
    "plane": "draw the loss over the plane through three models",
    "disguise": "write a checkpoint of the same function in other weights",
    "generate": "have models write text",
    "signature": "write a small file by which relatives of a model are found, without its weights",
    "scan": "find the relatives of a model in a library of signatures",
    "library": "add to a library of signatures, list or check it",
    "zoo": "trace every pair of a list of models, here or on Slurm, and end in one report",
}
"""Name of a verb, which is that of its module -> what it does."""

_VERBOSITY = "What is logged: -1 warnings, 0 progress too, 1 also where an error happened."


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line of this process, or the one given."""
    is_program = argv is None
    if is_program:
        prepare_process()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] and argv[0] in VERBS:
        try:
            _run_verb(argv[0], argv[1:], is_program)
        except KeyboardInterrupt:
            end_interrupted()
        return
    parser = Parser("tracing-jax", description="Were two language models trained independently, or does one descend "
                    "from the other?")  # fmt: skip
    parser.add_argument("--version", action="version", version=program_version())
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, meaning in VERBS.items():
        verbs.add_parser(name, help=meaning)
    parser.parse_args(argv[:1])


def parser_of(name: str) -> Parser:
    """Returns the parser of a verb's command line."""
    verb, meaning = importlib.import_module(f"tracing_jax.cli.{name}"), VERBS[name]
    usage = f"tracing-jax {name} {verb.USAGE} [--NAME VALUE ...]"
    parser = Parser(f"tracing-jax {name}", usage=usage, description=f"{meaning[0].upper()}{meaning[1:]}.")
    verb.add_arguments(parser)
    default = "[0, and -1 with --quiet]" if "--quiet" in parser.option_strings() else "[0]"
    parser.add_argument("--verbosity", metavar="N", type=int, default=argparse.SUPPRESS, help=f"{_VERBOSITY} {default}")
    return parser


def _run_verb(name: str, argv: Sequence[str], is_program: bool) -> None:
    verb = importlib.import_module(f"tracing_jax.cli.{name}")
    parsed = parser_of(name).parse_args(argv)
    if not is_program:
        verb.run(parsed)
        return
    prepare_libraries(argv)
    from tracing_jax.progress import reporting

    configure_logging(getattr(parsed, "verbosity", -1 if getattr(parsed, "quiet", False) else 0))
    import_transformers_without_torch()
    with reporting():
        verb.run(parsed)
