"""`tracing-jax verify`: is a record as it was written, are the model files, and does its decisive test hold?"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracing_jax.cli.errors import configure_logging, exit_on_usage_error, exit_on_user_error
from tracing_jax.cli.startup import keep_compiled_programs

USAGE = "RECORD [--base MODEL] [--ft MODEL]"
_STATUS = {"holds": 0, "changed": 3, "missing": 4}
_SUMMARY = {0: "the record holds", 3: "the record does not hold", 4: "what could be checked holds; not all could be"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.epilog = (
        "exit status:\n"
        "  0    the record holds: its content, its verdict, the files of the models, and the test that decided\n"
        "  1    an error that is named in one message\n"
        "  2    a mistake in the command line\n"
        "  3    the record was changed, the files are others, or the test comes out otherwise\n"
        "  4    something is missing: files, hashes, or the text\n"
        "  130  interrupted"
    )
    parser.add_argument("record", metavar="RECORD", type=Path, help="the .json that compare wrote")
    parser.add_argument("--base", metavar="MODEL", help="where the base model is now [its place in the record]")
    parser.add_argument("--ft", metavar="MODEL", help="where the other model is now [its place in the record]")


def _content(record: Mapping[str, Any]) -> str:
    """Returns what a record says was compared, and its verdict, as `compare` printed them."""
    from tracing_jax.report import record_text

    try:
        return f"{record_text(record, ('Compared', 'Verdict'))}\n\nChecks"
    except (LookupError, TypeError, ValueError, AttributeError):  # its checks say what is wrong with it
        return "Checks"


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    configure_logging()
    with exit_on_user_error():
        keep_compiled_programs()
        from tracing_jax.experiment.verifying import read_records, verify

        records, status = read_records(parsed.record), 0
        if len(records) > 1 and parsed.ft:
            with exit_on_usage_error():
                raise ValueError(
                    f"--ft={parsed.ft}: {parsed.record} has {len(records)} pairs; verify the records of its .run"
                )
        for record in records:
            print(_content(record), flush=True)
            for check in verify(record, parsed.base, parsed.ft):
                print(f"  {check.outcome.upper():8} {check.name}: {check.text}", flush=True)
                status = max(status, _STATUS[check.outcome], key=(0, 4, 3).index)
        print(f"\n{_SUMMARY[status]}")
    if status:
        sys.exit(status)
