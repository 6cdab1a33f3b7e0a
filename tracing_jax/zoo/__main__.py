"""`python -m tracing_jax.zoo run DIR`: a worker of a zoo. `python -m tracing_jax.zoo report DIR`: its report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tracing_jax.cli.errors import configure_logging, exit_on_user_error
from tracing_jax.cli.startup import keep_compiled_programs, keep_freed_memory
from tracing_jax.dataclass_options import comma_list
from tracing_jax.zoo.folder import ZooFolder
from tracing_jax.zoo.report import write_report
from tracing_jax.zoo.worker import run_worker


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a worker, or writes the report."""
    parser = argparse.ArgumentParser(
        prog="python -m tracing_jax.zoo", description="Works on a zoo that launch.py made."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("run", help="trace pairs that are not done, one after another")
    worker.add_argument("--pairs", default="", help="names with commas; - reads them from standard input, one a line")
    report = commands.add_parser("report", help="write report.html, csv and json")
    for command in (worker, report):
        command.add_argument("folder", type=Path, help="of the zoo")
    given = parser.parse_args(argv)
    configure_logging()
    keep_compiled_programs()
    keep_freed_memory()
    with exit_on_user_error():
        folder = ZooFolder(given.folder)
        if given.command == "report":
            print(write_report(folder))
            return
        names = sys.stdin.read().split() if given.pairs == "-" else comma_list(given.pairs)
        run_worker(folder.path, names or folder.plan.by_name)


if __name__ == "__main__":
    main()
