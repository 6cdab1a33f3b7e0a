"""Command-line arguments made from options dataclasses, for argparse and for absl; nothing heavy is imported here."""

import argparse
import functools
import operator
import re
from collections.abc import Iterable
from dataclasses import MISSING
from typing import Any, NoReturn

from tracing_jax.dataclass_options import EXPECTED, Option, options_of, parse, sections_of, suggestion


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with the option that may be meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", functools.partial(argparse.HelpFormatter, max_help_position=34, width=110))
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Ends the program with the message and exit status 2."""
        if found := re.match(r"unrecognized arguments: (--\S+)", message):
            name = found[1].split("=")[0]
            message = f"{name}: there is no such option{suggestion(name, self._option_string_actions)}"
        self.exit(2, f"error: {message}\n({self.prog} --help lists every option)\n")


def add_options(
    parser: argparse.ArgumentParser, defaults: Any, *, without: Iterable[str] = (), only: Iterable[str] | None = None
) -> None:
    """Adds an argument for every option of an options dataclass, in the groups and sections that it declares.

    Args:
      parser: values that are given stand in its result under the dotted name; those that are not are absent.
      defaults: an instance, whose values `--help` shows as the defaults.
      without: names of options and of sections to leave out.
      only: the only options and sections to add.
    """
    sections, groups = sections_of(type(defaults)), {}
    for found in options_of(type(defaults)):
        section = found.name.partition(".")[0]
        title = section if section in sections else found.group
        if {section, found.name} & set(without) or (only is not None and not {section, found.name} & set(only)):
            continue
        if title not in groups:
            meaning = _first_line(sections[title]) if title in sections else None
            groups[title] = parser.add_argument_group(title or "options", meaning)
        _add(groups[title], found, operator.attrgetter(found.name)(defaults) if not found.required else MISSING)


def given(parsed: argparse.Namespace, options: type) -> dict[str, Any]:
    """Returns dotted name -> value of the options that were given."""
    return {found.name: vars(parsed)[found.name] for found in options_of(options) if found.name in vars(parsed)}


def described(found: Option, default: Any) -> str:
    """Returns the meaning of an option with its choices and its default."""
    choices = f" One of {', '.join(found.choices)}." if found.choices and not found.is_list else ""
    choices = f" Of {', '.join(found.choices)}." if found.choices and found.is_list else choices
    return f"{found.meaning}{choices} {_shown(default)}"


def _add(group: Any, found: Option, default: Any) -> None:
    meaning = described(found, default).replace("%", "%%")
    flag, common = f"--{found.name}", {"dest": found.name, "default": argparse.SUPPRESS, "help": meaning}
    if found.kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    else:
        group.add_argument(flag, type=_converter(found), metavar=_metavar(found), required=found.required, **common)


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
