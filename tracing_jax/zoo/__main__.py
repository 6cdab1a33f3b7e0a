"""The command line of zoos: `python -m tracing_jax.zoo report DIR`."""

import argparse
import sys
from collections.abc import Sequence

from tracing_jax.zoo.folder import ZooFolder
from tracing_jax.zoo.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one subcommand."""
    parser = argparse.ArgumentParser(prog="python -m tracing_jax.zoo", description="Work on the folder of a zoo.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser("report", help="write report.html, report.csv and report.json into the folder")
    report.add_argument("folder", metavar="DIR", help="the folder of a zoo, which launch.py makes")
    report.set_defaults(run=_report)
    given = parser.parse_args(argv)
    try:
        given.run(given)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _report(given: argparse.Namespace) -> None:
    print(write_report(ZooFolder(given.folder)))


if __name__ == "__main__":
    main()
