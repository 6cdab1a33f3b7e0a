"""Error messages about a checkpoint: alike ones in one line, and never longer than a person reads."""

import itertools
import re
from collections.abc import Iterable, Sequence

MAX_CHARS = 3900
"""The most characters of a whole message."""

_MAX_LINE = 600
_MAX_LISTED = 8
_NUMBER = re.compile(r"(?<=[./])\d{1,9}(?=[./ ,;:'\"]|$)")
"""A number that is a component of a name: that of a layer, or of an expert."""


def shortened(text: object, limit: int = 120) -> str:
    """Returns the text on one line, its middle left out where it is longer than `limit`."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else f"{line[: limit * 2 // 3]} ... {line[-limit // 4 :]}"


def listed(items: Iterable[object], most: int = _MAX_LISTED) -> str:
    """Returns the first items with commas between them, and how many more there are."""
    found = list(items)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(shortened(item) for item in found[:most]) + more


def counted(number: int, one: str, many: str) -> str:
    """Returns a number with its noun, and a verb if they have one: `1 tensor is`, `3 tensors are`."""
    return f"{number:,} {one if number == 1 else many}"


def listed_and(items: Iterable[object]) -> str:
    """Returns a few items for a sentence: `2, 3 and 4`."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def joined(lines: Sequence[str]) -> str:
    """Returns the lines as a list of at most `MAX_CHARS` characters; what is left out is counted."""
    bullet = "- " if len(lines) > 1 else ""
    shown, length = [], 0
    for line in lines:
        text = bullet + _cut(line)
        length += len(text) + 1
        if length > MAX_CHARS - 100:
            break
        shown.append(text)
    left_out = len(lines) - len(shown)
    return "\n".join(shown + ([f"- and {left_out} more"] if left_out else []))


def _cut(line: str) -> str:
    """Returns the line, cut where it is far too long; breaks that its author made stay."""
    return line if len(line) <= _MAX_LINE * 4 else f"{line[: _MAX_LINE * 3]} ... {line[-_MAX_LINE // 2 :]}"


def grouped(lines: Iterable[str]) -> list[str]:
    """Returns the lines, those that differ in numbers of layers and experts alone as one: `layers.{0..31}.weight`."""
    groups: dict[str, list[list[int]]] = {}
    for line in lines:
        groups.setdefault(_NUMBER.sub("\0", line), []).append([int(found) for found in _NUMBER.findall(line)])
    return [_as_one(template, numbers) for template, numbers in groups.items()]


def _as_one(template: str, numbers: Sequence[Sequence[int]]) -> str:
    sets = [sorted(set(place)) for place in zip(*numbers)]
    parts = template.split("\0")
    line = "".join(itertools.chain(*itertools.zip_longest(parts, map(_span, sets), fillvalue="")))
    return line if len(numbers) == 1 else f"{line} ({len(numbers)} of them)"


def _span(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if values[-1] - values[0] == len(values) - 1:
        return f"{{{values[0]}..{values[-1]}}}"
    more = ",..." if len(values) > _MAX_LISTED else ""
    return f"{{{','.join(map(str, values[:_MAX_LISTED]))}{more}}}"
