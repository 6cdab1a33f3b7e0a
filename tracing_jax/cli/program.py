"""Runs an experiment as a program: as one of several processes if need be, with output and an exit status."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracing_jax.cli.compilation_cache import keep_compiled_programs
from tracing_jax.cli.errors import configure_logging, exit_on_user_error
from tracing_jax.dataclass_options import checked, option


@dataclass(frozen=True)
class ProgramOptions:
    """Options of the programs that run an experiment."""

    quiet: bool = option(False, "Print only the verdict on each pair.", group="program")
    json: bool = option(False, "Print the record as JSON, and nothing else, on standard output.", group="program")
    fail_on: tuple[str, ...] = option(
        (),
        "Exit with status 3 if the verdict on any pair is one of these; related stands for identical too.",
        choices=("identical", "related", "no_evidence", "undecided", "not_testable"),
        group="program",
    )
    no_compile_cache: bool = option(
        False, "Do not keep compiled programs for later runs in ~/.cache/tracing_jax/xla.", group="program"
    )
    coordinator: str | None = option(
        None, "host:port of process 0, of several that srun does not start.", group="program"
    )
    num_processes: int | None = option(
        None, "How many processes there are, with coordinator.", at_least=1, group="program"
    )
    process_id: int | None = option(
        None, "Which of them this is, from 0, with coordinator.", at_least=0, group="program"
    )


def run_experiment(config: Any, program: ProgramOptions) -> list[dict[str, Any]]:
    """Runs an experiment, prints what it found, and returns its records; exits with status 3 on the verdict `fail_on`.

    An error that a user can correct ends the program with one message.

    Args:
      config: options or a config, as `experiment.run` takes them.
      program: how to run it.
    """
    configure_logging()
    with exit_on_user_error():
        checked(program)
        if not program.no_compile_cache:
            keep_compiled_programs()
        from tracing_jax import experiment
        from tracing_jax.distributed import initialized, is_main_process

        with initialized(program.coordinator, program.num_processes, program.process_id), exit_on_user_error():
            records = experiment.run(config)
            if is_main_process():
                print(_output(records, program))
            if any(_fails(record["verdict"]["verdict"], program.fail_on) for record in records):
                sys.exit(3)
    return records


def _fails(verdict: str, fail_on: Sequence[str]) -> bool:
    return verdict in fail_on or (verdict == "identical" and "related" in fail_on)


def _output(records: Sequence[Mapping[str, Any]], program: ProgramOptions) -> str:
    """Returns what is printed: the record as JSON, of several pairs a list; the verdicts; or the whole summary."""
    from tracing_jax.report import summary

    if program.json:
        return json.dumps(records[0] if len(records) == 1 else records, indent=1, ensure_ascii=False)
    if program.quiet:
        return "\n".join(summary([record]).splitlines()[0] for record in records)
    return summary(records)
