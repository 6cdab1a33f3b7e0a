"""Runs an experiment as a program: as one of several processes if need be, with output and an exit status."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracing_jax.cli.errors import configure_logging, exit_on_usage_error, exit_on_user_error
from tracing_jax.cli.profiling import profiled
from tracing_jax.cli.startup import keep_compiled_programs
from tracing_jax.dataclass_options import checked, option, suggestion
from tracing_jax.options import RunOptions

EXIT_STATUS = """exit status:
  0    done; a claim, if there is one, holds
  1    an error that is named in one message
  2    a mistake in the command line
  3    the claim is contradicted, or a verdict is one of --fail_on
  4    the claim cannot be tested on this pair
  130  interrupted"""
"""What the exit status of a program means, for `--help`."""

EXPORTS = ("cyclonedx", "sarif", "in-toto")
"""Formats of `--export`; the names of `report.exports.FORMATS`."""

_SYNONYMS = {"independent": "no_evidence"}


@dataclass(frozen=True)
class ProgramOptions:
    """Options of the programs that run an experiment."""

    quiet: bool = option(False, "Print only the verdict on each pair.", group="program")
    json: bool = option(False, "Print the record as JSON, and nothing else, on standard output.", group="program")
    fail_on: tuple[str, ...] = option(
        (),
        "Exit with status 3 if the verdict on any pair is one of these; related includes identical, and "
        "independent is no_evidence.",
        choices=("identical", "related", "no_evidence", "undecided", "not_testable", "independent"),
        group="program",
    )
    export: tuple[str, ...] = option(
        (),
        "Files to write for other tools, as FORMAT:FILE: cyclonedx (an ML-BOM), sarif (annotations in CI), in-toto (an "
        "unsigned statement).",
        group="program",
    )
    compile_cache: bool = option(
        True, "Keep compiled programs for later runs in ~/.cache/tracing_jax/xla.", group="program"
    )
    profile: str | None = option(None, "Folder for a table of where the time went, and a JAX trace.", group="program")
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
    """Runs an experiment, prints what it found, and returns its records; exits with the status of `EXIT_STATUS`.

    An error that a user can correct ends the program with one message.

    Args:
      config: options or a config, as `experiment.run` takes them.
      program: how to run it.
    """
    configure_logging()
    with exit_on_usage_error():
        checked(program)
        options = checked(RunOptions.from_config(config).with_save_path())
        exports = export_files(program.export)
        check_outputs(options, program, exports)
    with exit_on_user_error():
        if program.compile_cache:
            keep_compiled_programs()
        from tracing_jax import experiment
        from tracing_jax.distributed import initialized, is_main_process

        with initialized(program.coordinator, program.num_processes, program.process_id), exit_on_user_error():
            with exit_on_usage_error():
                options = experiment.check_config(options)
            try:
                with profiled(program.profile):
                    records = experiment.run(options)
            except experiment.NotSavedError as error:
                _print(error.records, program, saved=False)
                raise
            if is_main_process():
                _print(records, program)
                _write_exports(records, exports, program.fail_on)
            if status := exit_status(records, program.fail_on):
                sys.exit(status)
    return records


def export_files(asked: Sequence[str]) -> dict[Path, str]:
    """Returns file -> format of the exports that were asked for.

    Raises:
      ValueError: another form than FORMAT:FILE, no such format, or two exports to one file.
    """
    found: dict[Path, str] = {}
    for text in asked:
        form, _, file = text.partition(":")
        if form not in EXPORTS or not file:
            hint = suggestion(form, EXPORTS)
            raise ValueError(f"export={text}: expected FORMAT:FILE with a format of {', '.join(EXPORTS)}{hint}")
        path = Path(file).expanduser()
        if (same := next((other for other in found if other.resolve() == path.resolve()), None)) is not None:
            raise ValueError(f"export={text}: {found[same]} goes to that file already; name another")
        found[path] = form
    return found


def check_outputs(options: RunOptions, program: ProgramOptions, exports: Mapping[Path, str]) -> None:
    """Makes sure that everything a run is to write can be written, before anything heavy is imported.

    Raises:
      ValueError, OSError: a path that is no place for such a file, or that cannot be written.
    """
    from tracing_jax.record import RunFiles, check_writable

    if options.save is not None:
        RunFiles.from_save(options.save)  # that they can be written is checked with the other options, all at once
    folders = {"save_aligned": options.save_aligned, "profile": program.profile}
    for name, folder in folders.items():
        if folder is not None and (path := Path(folder).expanduser()).exists() and not path.is_dir():
            raise NotADirectoryError(f"{name}={folder}: it is a file, expected a folder; choose another path")
    if "in-toto" in exports.values() and options.ft_model_ids:
        raise ValueError("export=in-toto: a statement is on the files of one model; compare one at a time")
    for file in exports:
        check_writable(file)
    if options.save_aligned is not None and not Path(options.save_aligned).expanduser().exists():
        check_writable(Path(options.save_aligned).expanduser())


def _write_exports(records: Sequence[Mapping[str, Any]], files: Mapping[Path, str], fail_on: Sequence[str]) -> None:
    from tracing_jax.record import atomic_write
    from tracing_jax.report.exports import exported

    sys.stdout.flush()  # an export may go where the summary went
    failing = [exit_status([record], fail_on) == 3 for record in records]
    for file, form in files.items():
        atomic_write(file, exported(form, records, failing).encode())


def exit_status(records: Sequence[Mapping[str, Any]], fail_on: Sequence[str]) -> int:
    """Returns the exit status of a run that ended: 0, 3 or 4, see `EXIT_STATUS`; of several pairs the worst."""
    wanted = {_SYNONYMS.get(word, word) for word in fail_on}
    wanted |= {"identical"} if "related" in wanted else set()
    outcomes = {(record.get("claim") or {}).get("outcome") for record in records}
    if "contradicted" in outcomes or any(record["verdict"]["verdict"] in wanted for record in records):
        return 3
    return 4 if "not_testable" in outcomes else 0


def _print(records: Sequence[Mapping[str, Any]], program: ProgramOptions, saved: bool = True) -> None:
    """Prints the record as JSON, of several pairs a list; the verdicts; or the whole summary."""
    from tracing_jax.report import print_summary, verdict_lines

    if program.json:
        print(json.dumps(records[0] if len(records) == 1 else records, indent=1, ensure_ascii=False))
    elif program.quiet:
        print("\n".join(line for record in records for line in verdict_lines(record)))
    else:
        print_summary(records, sys.stdout, saved)
