"""Options declared as fields of frozen dataclasses: their ranges, and their values from text, mappings and configs.

`options.py` declares those of a run. Nothing heavy is imported here.
"""

import difflib
import functools
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")

_LIMITS: Mapping[str, Callable[[Any, Any], bool]] = {
    "at least": operator.ge, "above": operator.gt, "at most": operator.le
}  # fmt: skip

EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple[str, ...]: "names with commas between",
    tuple[float, ...]: "numbers with commas between",
}
"""Type of an option -> what a value of it is, in words."""


REQUIRED = MISSING
"""The default of an option that has none."""


class ConfigError(ValueError):
    """The options of a run name something that does not exist or does not fit; all findings at once."""

    @classmethod
    def of(cls, heading: str, lines: list[str]) -> "ConfigError":
        """Returns the error with one finding alone, or several as a list under the heading."""
        return cls("\n  ".join([heading, *lines]) if len(lines) > 1 else lines[0])


@dataclass(frozen=True)
class Option:
    """One option, as its dataclass declares it.

    Attributes:
      name: with a dot if it is in a section.
      kind: bool, int, float, str, or a tuple of strings or of numbers.
      optional: whether None is a value: not set.
      required: whether it has no default.
      default: of the dataclass.
      meaning: in one line.
      group: the heading under which `--help` lists it.
      choices: the only values, of a list those of its elements; empty if any will do.
    """

    name: str
    kind: Any
    optional: bool
    required: bool
    default: Any
    meaning: str
    group: str
    choices: tuple[str, ...]

    @property
    def is_list(self) -> bool:
        """Whether it takes several values, with commas between."""
        return typing.get_origin(self.kind) is tuple


def option(
    default: Any,
    meaning: str,
    *,
    group: str = "",
    choices: tuple[str, ...] = (),
    at_least: int | float | None = None,
    above: int | float | None = None,
    at_most: int | float | None = None,
) -> Any:
    """Declares a dataclass field as an option: its default, its meaning in one line, and the values that it may have.

    Args:
      default: immutable; `REQUIRED` for an option that must be given.
      meaning: shown by `--help`.
      group: the heading under which `--help` lists it.
      choices: the only values, of a list those of its elements.
      at_least: bound of a number, of a list that of its elements; as are the next two.
      above: exclusive.
      at_most: inclusive.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most}
    limits = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(default=default, metadata={"meaning": meaning, "group": group, "choices": choices, "limits": limits})


def option_of(owner: type, name: str, **changes: Any) -> Any:
    """Declares a dataclass field as an option that another dataclass has, outside of a group.

    Args:
      owner: the other dataclass.
      name: of the option there.
      changes: `default` and `meaning` where they are others here.

    Raises:
      KeyError: there is no such option.
    """
    there = {found.name: found for found in fields(owner)}[name]
    metadata = {**there.metadata, "group": "", "meaning": changes.get("meaning", there.metadata["meaning"])}
    return field(default=changes.get("default", there.default), metadata=metadata)


def options_of(section: type, prefix: str = "") -> Iterator[Option]:
    """Yields every option that a dataclass declares, those of its sections with dotted names."""
    for found in fields(section):
        kind, optional = _kind(section, found.name)
        name = f"{prefix}{found.name}"
        if is_dataclass(kind):
            yield from options_of(typing.cast(type, kind), f"{name}.")
        else:
            meaning, group, choices = (found.metadata[key] for key in ("meaning", "group", "choices"))
            required = found.default is MISSING
            yield Option(name, kind, optional, required, found.default, meaning, group, choices)


def sections_of(options: type) -> dict[str, type]:
    """Returns the sections of an options dataclass by name."""
    kinds = {found.name: _kind(options, found.name)[0] for found in fields(options)}
    return {name: typing.cast(type, kind) for name, kind in kinds.items() if is_dataclass(kind)}


def comma_list(text: str) -> tuple[str, ...]:
    """Returns the names in a list with commas; spaces around them do not count."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse(kind: Any, text: str) -> Any:
    """Returns the value of an option of this type from its text on a command line.

    Raises:
      ValueError: the text is no such value.
    """
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{text!r} is neither true nor false")
        return text.lower() == "true"
    if typing.get_origin(kind) is tuple:
        element = typing.get_args(kind)[0]
        return tuple(element(name) for name in comma_list(text.strip("()")))
    return kind(text)


def problems(options: Any, prefix: str = "") -> list[str]:
    """Returns what is out of range or no choice in an options dataclass and its sections; empty if all is well."""
    lines = []
    for found in fields(options):
        value, name = getattr(options, found.name), f"{prefix}{found.name}"
        if is_dataclass(value):
            lines += problems(value, f"{name}.")
        elif value is not None and found.metadata:
            lines += _value_problems(name, value, found.metadata)
    return lines


def from_mapping(options: type[T], values: Any, unknown: Callable[[str], str | None]) -> T:
    """Returns the options dataclass that a nested mapping describes; fields that it lacks have their defaults.

    Args:
      options: a dataclass whose fields are options and sections.
      values: a mapping, or an object with `keys` and `[]`; lists may be given as text with commas.
      unknown: returns why there is no option of a dotted name; None if there is one.

    Raises:
      ConfigError: unknown names and values of the wrong type, all at once.
    """
    lines: list[str] = []
    found = _section(options, values, "", unknown, lines)
    if lines:
        raise ConfigError.of("the config cannot be read:", lines)
    return found


def checked(options: T) -> T:
    """Returns the options dataclass as it is.

    Raises:
      ConfigError: values out of range or that are no choice, all at once.
    """
    if lines := problems(options):
        raise ConfigError.of("these options cannot be used:", lines)
    return options


def from_values(options: type[T], values: Mapping[str, Any]) -> T:
    """Returns the options dataclass with these values by dotted name; the other options have their defaults.

    Raises:
      ConfigError: options without a default are not among them, or values are out of range.
    """
    required = [found.name for found in options_of(options) if found.required]
    if missing := [f"--{name}" for name in required if name not in values]:
        raise ConfigError(f"not set: {', '.join(missing)}")
    return checked(replaced(options(**{name: values[name] for name in required}), values))


def replaced(options: T, values: Mapping[str, Any]) -> T:
    """Returns the options dataclass with other values of options, by dotted name."""
    own: dict[str, Any] = {}
    for name, value in values.items():
        section, _, rest = name.partition(".")
        own[section] = replaced(own.get(section, getattr(options, section)), {rest: value}) if rest else value
    return replace(options, **own)  # type: ignore[type-var]


def suggestion(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean X?` with the known name that is closest, or nothing if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _kind(section: type, name: str) -> tuple[Any, bool]:
    """Returns the type of a field when it is set, and whether it may be None."""
    found = _hints(section)[name]
    if not isinstance(found, types.UnionType):
        return found, False
    return next(part for part in typing.get_args(found) if part is not types.NoneType), True


def _value_problems(name: str, value: Any, metadata: Mapping[str, Any]) -> list[str]:
    values = value if isinstance(value, tuple) else (value,)
    shown = f"{name}={','.join(map(str, values))}"
    choices, limits = metadata["choices"], metadata["limits"]
    if choices and (strange := [v for v in values if v not in choices]):
        hint = suggestion(str(strange[0]), choices)
        return [f"{shown}: {', '.join(map(str, strange))} is none of {', '.join(choices)}{hint}"]
    if all(_LIMITS[word](v, bound) for word, bound in limits.items() for v in values):
        return []
    return [f"{shown}: {' and '.join(f'{word} {bound}' for word, bound in limits.items())}"]


def _section(section: type[T], values: Any, prefix: str, unknown: Callable[[str], str | None], lines: list[str]) -> T:
    """Returns one section; what is wrong goes into `lines`."""
    if not hasattr(values, "keys"):
        name = prefix.removesuffix(".")
        lines.append(unknown(f"{name}=") or f"{name}: it is a section, with options of its own")
        return section()
    lines += [line for name in values if (line := unknown(f"{prefix}{name}"))]
    typed: dict[str, Any] = {}
    for found in fields(section):  # type: ignore[arg-type]
        if found.name not in values:
            continue
        (kind, optional), value, name = _kind(section, found.name), values[found.name], f"{prefix}{found.name}"
        if is_dataclass(kind):
            typed[found.name] = _section(typing.cast(type, kind), value, f"{name}.", unknown, lines)
        elif optional and value in (None, ""):
            typed[found.name] = None
        else:
            try:
                typed[found.name] = _typed(kind, value)
            except (TypeError, ValueError):
                lines.append(f"{name}={value!r}: expected {EXPECTED[kind]}")
    return section(**typed)


def _typed(kind: Any, value: Any) -> Any:
    """Returns the value as an option of this type; raises TypeError or ValueError if it is none."""
    if typing.get_origin(kind) is tuple:
        if isinstance(value, str):
            return parse(kind, value)
        values = value if isinstance(value, tuple | list) else (value,)
        return tuple(_typed(typing.get_args(kind)[0], v) for v in values)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise TypeError
    return value
