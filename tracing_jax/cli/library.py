"""`tracing-jax library`: a folder of signatures, its files and its index."""

import argparse
import sys

from tracing_jax.cli.compare import LAYOUT
from tracing_jax.cli.errors import configure_logging, exit_on_usage_error, exit_on_user_error

USAGE = "add|list|check LIBRARY [FILE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "action",
        choices=("add", "list", "check"),
        help="add: copy signature files into the library and list them in its index; list: what is in it; check: "
        "whether every file can be read and is as it was listed",
    )
    parser.add_argument("library", metavar="LIBRARY", help="a folder; list: or org/name of a data set on the Hub")
    parser.add_argument("files", metavar="FILE", nargs="*", help="add: signature files")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="check: make the signature of this model anew, and say which file of the library it is [not set]",
    )
    parser.add_argument("--layout", metavar="FILE", help=f"check --model: {LAYOUT} [not set]")


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    configure_logging()
    with exit_on_usage_error():
        if (parsed.action == "add") != bool(parsed.files):
            raise ValueError("add takes signature files after the library, list and check take none")
        if parsed.model and parsed.action != "check":
            raise ValueError("--model belongs to check")
        if parsed.layout and not parsed.model:
            raise ValueError("--layout belongs to --model")
    with exit_on_user_error():
        from pathlib import Path

        from tracing_jax.library import add_to_library, library_folder, read_library

        if parsed.action == "add":
            names = add_to_library(Path(parsed.library).expanduser(), [Path(name) for name in parsed.files])
            print(f"{parsed.library}: {', '.join(names)} added")
        elif parsed.action == "list":
            for name, signature in read_library(library_folder(parsed.library)).items():
                print(f"{name}: {signature.model}, {signature.facts['family']}, {signature.digest[:12]}")
        else:
            _check(parsed.library, parsed.model, parsed.layout)


def _check(where: str, model: str | None, layout: str | None) -> None:
    from pathlib import Path

    from tracing_jax.library import indexed, library_folder, read_library

    folder = library_folder(where)
    own = Path(where).expanduser().is_dir()
    checked = indexed(folder, write=own)
    for line in checked.problems:
        print(f"problem: {line}")
    for group in checked.same:
        print(f"the same model, or the same units: {', '.join(group)}")
    for name in checked.new:
        print(f"{'new, listed now' if own else 'not listed in the index'}: {name}")
    print(f"{where}: {len(checked.names)} signatures, {len(checked.problems)} problems")
    if model is not None:
        from tracing_jax.experiment.signing import signature_of
        from tracing_jax.library import is_same

        made = signature_of(model, layout=layout)
        same = [name for name, found in read_library(folder).items() if is_same(made, found)]
        print(f"{model}: its signature is {', '.join(same) if same else 'not in the library'}")
        if not same:
            sys.exit(1)
    if checked.problems:
        sys.exit(1)
