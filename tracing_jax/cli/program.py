"""Runs an experiment as a program: as one of several processes if need be, with a summary and an exit status."""

import sys
from dataclasses import dataclass
from typing import Any

from tracing_jax.cli.errors import configure_logging, exit_on_user_error
from tracing_jax.dataclass_options import option


@dataclass(frozen=True)
class ProgramOptions:
    """Options of the programs that run an experiment."""

    fail_on: str | None = option(
        None, "Exit with status 3 if the verdict on any pair is this.", choices=("related",), group="program"
    )
    coordinator: str | None = option(
        None, "host:port of process 0, of several that srun does not start.", group="program"
    )
    num_processes: int | None = option(None, "How many processes there are, with coordinator.", group="program")
    process_id: int | None = option(None, "Which of them this is, from 0, with coordinator.", group="program")


def run_experiment(config: Any, program: ProgramOptions) -> None:
    """Runs an experiment and prints its summary; a mistake that a user can mend ends the program in one message.

    Args:
      config: options or a config, as `experiment.run` takes them.
      program: how to run it.
    """
    configure_logging()
    with exit_on_user_error():
        from tracing_jax import experiment
        from tracing_jax.distributed import initialized, is_main_process
        from tracing_jax.report import summary

        with initialized(program.coordinator, program.num_processes, program.process_id), exit_on_user_error():
            records = experiment.run(config)
            if is_main_process():
                print(summary(records))
            if program.fail_on in [record["verdict"]["verdict"] for record in records]:
                sys.exit(3)
