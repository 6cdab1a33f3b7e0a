"""Numbers and results in words, the same in the figures, on the page and in the terminal."""

from collections.abc import Mapping
from typing import Any

SIDES = {"non_aligned": "non-aligned", "aligned": "aligned"}
ABSENT = "–"


def cell(value: Any) -> str:
    """A value of a record as it stands in a table: five significant digits, thousands set off, a dash for None."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) or ABSENT
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value)) or ABSENT
    return str(value)


def p_text(log10_p: float) -> str:
    """A p-value from its decimal logarithm: `p = 0.031`, or `p = 10^-4312.7` where a decimal would be unreadable."""
    return f"p = {10**log10_p:.2g}" if log10_p > -4 else f"p = 10^{log10_p:.1f}"


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """A verdict with its grounds: `RELATED (csu, p = 10^-41.3 after Holm; layers 0 to 3), level 0.001`."""
    if verdict["statistic"] is None:
        return f"{verdict['verdict']}: {verdict['meaning']}"
    layers = f"; {', '.join(verdict['layers'])}" if verdict["layers"] else ""
    grounds = f"{verdict['statistic']}, {p_text(float(verdict['adjusted_log10_p']))} after Holm{layers}"
    return f"{verdict['verdict']} at level {verdict['level']:g} ({grounds}): {verdict['meaning']}"


def results_by_side(sides: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a statistic that ran and applied, keyed `non-aligned` and `aligned`."""
    results = {word: sides.get(side) for side, word in SIDES.items()}
    return {word: result for word, result in results.items() if result and not result.get("not_applicable")}


def subject(name: str, sides: Mapping[str, Any]) -> str:
    """A statistic and what it measures: `mode: midpoint loss (nats per token)`."""
    labels = (result.get("label") for result in results_by_side(sides).values())
    label = next((label for label in labels if label), None)
    return f"{name}: {label}" if label else name


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
