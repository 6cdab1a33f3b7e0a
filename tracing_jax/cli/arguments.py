"""Command-line arguments made from options dataclasses, for argparse and for absl; nothing heavy is imported here."""

import argparse
import functools
import operator
import re
from collections.abc import Iterable
from dataclasses import MISSING
from importlib import metadata
from typing import Any, NoReturn

from tracing_jax.dataclass_options import EXPECTED, Option, options_of, parse, sections_of, suggestion

RENAMED = {
    "--cache_dir": "--download_dir",
    "--mesh_data": "--mesh.data",
    "--mesh_model": "--mesh.model",
    "--no_compile_cache": "--no-compile_cache",
    "--no-no_compile_cache": "--compile_cache",
}
"""Options by their former names -> by the names that they have now, in the verbs that have such an option."""


def program_version() -> str:
    """Returns the name and the version of the package, as `--version` prints them."""
    return f"tracing-jax {metadata.version('tracing_jax')}"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with the option that may be meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        layout = functools.partial(argparse.HelpFormatter, max_help_position=34, width=110)
        super().__init__(*args, **{"formatter_class": layout, "allow_abbrev": False, **kwargs})

    def format_help(self) -> str:
        """Returns the help, with the epilog as it is written."""
        epilog, self.epilog = self.epilog, None
        text = super().format_help()
        self.epilog = epilog
        return f"{text}\n{epilog}\n" if epilog else text

    def option_strings(self) -> tuple[str, ...]:
        """Returns the names of all options, with their dashes."""
        return tuple(self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and exit status 2."""
        if found := re.match(r"unrecognized arguments: (--\S+)", message):
            name = found[1].split("=")[0]
            if (new := RENAMED.get(name)) in self.option_strings():
                message = f"{name}: that option is {new} now"
            else:
                message = f"{name}: there is no such option{suggestion(name, self.option_strings())}"
        elif found := re.match(r"argument VERB: invalid choice: '([^']*)' \(choose from (.*)\)$", message):
            verbs = re.findall(r"[\w-]+", found[2])
            message = f"{found[1]}: there is no such verb{suggestion(found[1], verbs)}"
        self.exit(2, f"error: {message}\n({self.prog} --help lists every option)\n")


def add_options(
    parser: argparse.ArgumentParser, options: Any, *, without: Iterable[str] = (), negation: str = "--no-"
) -> None:
    """Adds an argument for every option of an options dataclass, in the groups and sections that it declares.

    Args:
      parser: its result has the given values under their dotted names, and none for the others.
      options: an instance, whose values `--help` shows as the defaults, or the class, for its own.
      without: names of options and of sections to leave out.
      negation: prefix of the name of a switch that sets it to false; absl has `--no`.
    """
    kind = options if isinstance(options, type) else type(options)
    sections = {name: section for name, section in sections_of(kind).items() if name not in without}
    groups: dict[str, Any] = {"": parser}
    for found in options_of(kind):
        section = found.name.rpartition(".")[0]
        if found.name in without or section in without:
            continue
        if section and section not in groups:
            for name in list(sections)[: list(sections).index(section) + 1]:  # those without options too
                groups[name] = groups.get(name) or parser.add_argument_group(name, _first_line(sections[name]))
        title = section or found.group
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        default = found.default if options is kind else operator.attrgetter(found.name)(options)
        _add(groups[title], found, default, negation)


def given(parsed: argparse.Namespace, options: type) -> dict[str, Any]:
    """Returns dotted name -> value of the options that were given."""
    values = {found.name: vars(parsed)[found.name] for found in options_of(options) if found.name in vars(parsed)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def described(found: Option, default: Any) -> str:
    """Returns the meaning of an option with its choices and its default."""
    choices = f" One of {', '.join(found.choices)}." if found.choices and not found.is_list else ""
    choices = f" Of {', '.join(found.choices)}." if found.choices and found.is_list else choices
    return f"{found.meaning}{choices} {_shown(default)}"


def _add(group: Any, found: Option, default: Any, negation: str) -> None:
    meaning = described(found, default).replace("%", "%%")
    flag, common = f"--{found.name}", {"dest": found.name, "default": argparse.SUPPRESS, "help": meaning}
    if found.kind is bool:
        group.add_argument(flag, f"{negation}{found.name}", action=_Switch, **common)
    else:
        common |= {"action": "extend"} if found.is_list else {}  # a list given in two places is the whole of both
        group.add_argument(flag, type=_converter(found), metavar=_metavar(found), required=found.required, **common)


class _Switch(argparse.Action):
    """Sets an option to true, or to false by its second name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def _converter(found: Option) -> Any:
    def convert(text: str) -> Any:
        try:
            return parse(found.kind, text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {EXPECTED[found.kind]}, found {text!r}") from None

    return convert


def _metavar(found: Option) -> str:
    name = {int: "N", float: "X", str: "TEXT"}.get(found.kind, "A,B,...")
    return "NAME" if found.choices and name == "TEXT" else name


def _shown(default: Any) -> str:
    if default is MISSING:
        return "[required]"
    if isinstance(default, tuple):
        default = ",".join(map(str, default)) or None
    return "[not set]" if default is None else f"[{default}]"


def _first_line(section: type) -> str:
    return (section.__doc__ or "").split("\n")[0]
