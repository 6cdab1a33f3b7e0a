"""Flags of `main.py`, `launch.py` and `generate.py`, made from options dataclasses, and their error messages."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from tracing_jax.cli.arguments import RENAMED, program_version
from tracing_jax.cli.process import end_interrupted, prepare_process
from tracing_jax.cli.startup import prepare_libraries
from tracing_jax.dataclass_options import Option, options_of, parse, suggestion
from tracing_jax.options import STATISTICS, unknown_option

_HELP = {"help", "helpshort", "helpfull", "h", "?"}


def define_flags(options: type) -> None:
    """Defines a flag for every option of a dataclass; those that are not given have the value None."""
    for found in options_of(options):
        if found.kind is bool:
            flags.DEFINE_boolean(found.name, None, found.meaning)
        elif found.kind is int:
            flags.DEFINE_integer(found.name, None, found.meaning)
        elif found.kind is float:
            flags.DEFINE_float(found.name, None, found.meaning)
        elif found.is_list:
            flags.DEFINE_multi_string(found.name, None, found.meaning)
        else:
            flags.DEFINE_string(found.name, None, found.meaning)


def given_flags(options: type) -> dict[str, Any]:
    """Returns dotted name -> value of the options of a dataclass that were given as flags; lists in full.

    Raises:
      ValueError: a list whose elements are no numbers.
    """
    values = {found: flags.FLAGS[found.name].value for found in options_of(options)}
    return {found.name: _typed(found, value) for found, value in values.items() if value is not None}


def run_program(main: Callable[[Sequence[str]], None], argv: Sequence[str], print_help: Callable[[], None]) -> None:
    """Runs a program: `--help` and `--version` print and end with status 0, a mistake in a flag ends in one line.

    Args:
      main: takes what is left of argv after its flags.
      argv: the command line, program first.
      print_help: prints what `--help` shows.
    """
    prepare_process()
    given = {argument.lstrip("-").split("=")[0] for argument in argv[1:] if argument.startswith("-")}
    if given & _HELP:
        print_help()
        return
    if "version" in given:
        print(program_version())
        return
    prepare_libraries(argv[1:])
    try:
        app.run(main, argv=list(argv), flags_parser=parse_flags)
    except KeyboardInterrupt:
        end_interrupted()


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags and returns what is left of argv; a mistake ends the program in one line, with status 2."""
    try:
        for argument in argv[1:]:
            _check(argument)
        return flags.FLAGS(list(argv))
    except flags.Error as error:
        message = _without_traceback(str(error))
    except Exception as error:  # whatever a config file raises
        message = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    print(f"error: {message}\n({argv[0]} --help lists every option)", file=sys.stderr)
    sys.exit(2)


def _without_traceback(message: str) -> str:
    """Returns a message of ml_collections with the last line alone of the traceback of a config file."""
    text, found, trace = message.partition("\n\nTraceback (most recent call last):\n")
    return f"{text} {trace.strip().splitlines()[-1]}" if found else message


def _check(argument: str) -> None:
    """Raises ValueError if the argument sets an option of a config that there is not, or names no config file."""
    if found := re.match(r"--?(?:no)?config\.([^=]+)(=?)", argument):
        if line := unknown_option(found[1] + found[2]):
            raise ValueError(f"--config.{line}")
    elif new := _new_name(f"--{argument.lstrip('-').split('=')[0]}"):
        raise ValueError(f"{argument.split('=')[0]}: that option is {new} now")
    elif found := re.match(r"--?config=([^:]*)", argument):
        file = Path(found[1])
        if not file.is_file():
            raise ValueError(f"--config={file}: {_no_file(file)}")


def _new_name(name: str) -> str | None:
    """Returns the name that an option of a former name has now; None if the program has none of either name."""
    new = RENAMED.get(name, "").replace("--no-", "--no")  # as absl names a switch that is off
    known = new.removeprefix("--").removeprefix("no") in flags.FLAGS or new.removeprefix("--") in flags.FLAGS
    return new if new and known and name.removeprefix("--") not in flags.FLAGS else None


def _no_file(file: Path) -> str:
    if file.stem in STATISTICS:
        return f"there is no such file; a statistic needs no config of its own: --stat={file.stem}"
    beside = [str(other) for other in file.parent.glob("*.py")] if file.parent.is_dir() else []
    return f"there is no such file{suggestion(str(file), beside)}"


def _typed(found: Option, value: Any) -> Any:
    if not found.is_list:
        return value
    elements: list[Any] = []
    for text in value:
        try:
            elements += parse(found.kind, text)
        except ValueError as error:
            raise ValueError(f"--{found.name}={text}: {error}") from None
    return tuple(elements)
