"""Numbers and results in words, the same in the figures, on the page and in the terminal."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

SIDES = {"non_aligned": "non-aligned", "aligned": "aligned"}
ABSENT = "–"

_LAYER = re.compile(r"layer (\d+)")
_READABLE = -300.0  # log10 p, below which a program that reads the p-value back would find 0


def cell(value: Any) -> str:
    """A value of a record as it stands in a table: five significant digits, thousands set off, a dash for None."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value + 0.0:.5g}"  # -0.0 is 0
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) or ABSENT
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value)) or ABSENT
    return str(value)


def p_text(log10_p: float) -> str:
    """A p-value from its decimal logarithm: `p = 0.031`, or `p = 10^-4312.7` where a decimal would be unreadable."""
    return f"p = {10**log10_p:.2g}" if log10_p > -4 else f"p = 10^{log10_p:.1f}"


def p_cell(log10_p: Any) -> str:
    """A p-value as it stands in a table, from its decimal logarithm; a power of ten where it would underflow."""
    if log10_p is None:
        return ABSENT
    exponent = float(log10_p)
    return f"{10**exponent:.3g}" if exponent > _READABLE else f"10^{exponent:.1f}"


def log10_cell(log10_p: Any) -> str:
    """A decimal logarithm as it stands in a table: a dash for None, else two decimals."""
    return ABSENT if log10_p is None else f"{float(log10_p) + 0.0:.2f}".replace("-0.00", "0").removesuffix(".00")


def places_text(places: Sequence[str], at_most: int = 6) -> str:
    """Layers as ranges, `layers 0-3, 7`; other places by name, of which those beyond `at_most` are counted."""
    numbers = sorted({int(found[1]) for place in places if (found := _LAYER.fullmatch(place))})
    others = [place for place in places if not _LAYER.fullmatch(place)]
    words = [f"layer{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}"] if numbers else []
    words += others[:at_most]
    if len(others) > at_most:
        words.append(f"and {len(others) - at_most} more")
    return ", ".join(words)


def _ranges(numbers: Sequence[int]) -> str:
    runs = [
        [number for _, number in run] for _, run in itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def asked(record: Mapping[str, Any], side: str) -> str:
    """What a run was asked to compare: `demo:disguised`, a Hub id, or the last part of a local folder's path."""
    name = str(record["args"].get(f"{side}_model_id") or record["models"][side]["id"]).rstrip("/")
    return name.split("/")[-1] if name.startswith(("/", "~", ".")) else name


def results_by_side(sides: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a statistic that ran and applied, keyed `non-aligned` and `aligned`."""
    results = {word: sides.get(side) for side, word in SIDES.items()}
    return {word: result for word, result in results.items() if result and not result.get("not_applicable")}


def subject(name: str, sides: Mapping[str, Any]) -> str:
    """A statistic and what it measures: `mode: midpoint loss (nats per token)`."""
    measured = label(sides)
    return f"{name}: {measured}" if measured else name


def label(sides: Mapping[str, Any]) -> str:
    """What a statistic measures; empty where it has no result."""
    labels = (result.get("label") for result in results_by_side(sides).values())
    return next((label for label in labels if label), "")


def outcome(sides: Mapping[str, Any]) -> str:
    """What a statistic found on each side, `9.13 non-aligned, 2.33 aligned`, or why there is nothing to find."""
    if results := results_by_side(sides):
        return ", ".join(f"{_value(result)} {word}" for word, result in results.items())
    reasons = [(sides.get(side) or {}).get("not_applicable") for side in SIDES]
    return next((f"not applicable, {reason}" for reason in reasons if reason), "not run")


def _value(result: Mapping[str, Any]) -> str:
    log10_p = result.get("log10_p")
    value = cell(result.get("headline"))
    return value if log10_p is None else f"{value} ({p_text(float(log10_p))})"
