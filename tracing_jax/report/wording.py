"""Numbers and results in words, the same in the figures, on the page and in the terminal."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

SIDES = {"non_aligned": "non-aligned", "aligned": "aligned"}
ABSENT = "–"

_NUMBER = re.compile(r"\d+")
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
    """A decimal logarithm as it stands in a table: two decimals, a dash for None."""
    return ABSENT if log10_p is None else f"{round(float(log10_p), 2) + 0.0:.6g}"


def places_text(places: Sequence[str], at_most: int = 6) -> str:
    """Places with runs of numbers as ranges, `layers 0-3, 7`; runs beyond `at_most` are counted.

    Numbers run where all numbers of a place grow by one: `layer 2 : layer 3` and `layer 3 : layer 4` are a run too.
    """
    by_pattern: dict[str, list[tuple[int, ...]]] = {}
    for place in places:
        numbers = tuple(map(int, _NUMBER.findall(place)))
        by_pattern.setdefault(_NUMBER.sub("{}", place.replace("{", "(").replace("}", ")")), []).append(numbers)
    words = []
    for pattern, found in by_pattern.items():
        runs = _runs(sorted(found))
        if pattern == "layer {}":
            words.append(f"layer{'s' if len(found) > 1 else ''} {', '.join(run for (run,) in runs)}")
        else:
            words += [pattern.format(*run) for run in runs]
    return ", ".join([*words[:at_most], f"and {len(words) - at_most} more"] if len(words) > at_most else words)


def _runs(numbers: Sequence[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Each run of tuples that grow by one in every part, as ranges; a tuple without numbers stands alone."""
    groups = itertools.groupby(enumerate(numbers), lambda item: tuple(n - item[0] for n in item[1]) or item[0])
    runs = [[found for _, found in group] for _, group in groups]
    return [tuple(f"{a}-{b}" if a != b else str(a) for a, b in zip(run[0], run[-1], strict=True)) for run in runs]


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
