"""`tracing-jax merge`: which parents a model was merged of, and in what shares."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.compare import MODEL
from tracing_jax.cli.errors import configure_logging, exit_on_usage_error, exit_on_user_error
from tracing_jax.dataclass_options import from_values, option, option_of
from tracing_jax.options import RunOptions, download_option

USAGE = "CHILD --parents A B ... [--base O] [--library LIBRARY]"


@dataclass(frozen=True)
class MergeOptions:
    """What is estimated, and what is written."""

    library: str | None = option(
        None,
        "A folder of signatures, or a data set of them on the Hub: the child's relatives in it may be parents too; "
        "those that explain nothing are left out.",
    )
    candidates: int = option(8, "So many relatives of a library are read at most, the closest first.", at_least=1)
    align: tuple[str, ...] = option(
        ("auto",), "Undone first where the child is in none of the others' places: kinds of alignment, all, auto, none."
    )
    seed: int = option_of(RunOptions, "seed")
    save: str | None = option(None, "A .json file for the record; the figure is written beside it.")
    json: bool = option(False, "Print the record as JSON, and nothing else, on standard output.")
    download_dir: str | None = download_option()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("child", metavar="CHILD", help=f"the model that may be a merge: {MODEL}")
    parser.add_argument("--parents", metavar="PARENT", nargs="+", help="models that may have a part")
    parser.add_argument("--base", metavar="ORIGIN", help="the model that the parents were made from, if it is known")
    add_options(parser, MergeOptions)


def check_save(save: str) -> None:
    """Makes sure that the record and the figure can be written.

    Raises:
      ValueError, OSError: the path does not end in .json, or cannot be written.
    """
    from tracing_jax.record import check_writable

    path = Path(save)
    if path.suffix != ".json":
        raise ValueError(f"--save={save}: expected a file that ends in .json; the figure is written beside it")
    for suffix in (".json", ".png", ".yaml"):
        check_writable(path.with_suffix(suffix))


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    configure_logging()
    with exit_on_usage_error():
        options = from_values(MergeOptions, given(parsed, MergeOptions))
        if not (parsed.parents or options.library):
            raise ValueError("no parents are named: give --parents A B ..., or --library, whose models may be parents")
        if options.save:
            check_save(options.save)
    with exit_on_user_error():
        from tracing_jax.experiment.merging import report_on_merge

        kinds = () if options.align == ("none",) else options.align
        found = report_on_merge(
            parsed.child,
            parsed.parents or (),
            parsed.base,
            library=options.library,
            candidates=options.candidates,
            align=kinds,
            seed=options.seed,
            download_dir=options.download_dir,
        )
        if options.save:
            found.save(options.save)
        print(json.dumps(found.record, indent=1, ensure_ascii=False) if options.json else found)
