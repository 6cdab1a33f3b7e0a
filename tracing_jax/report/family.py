"""One base against several models: the figure of them all, and the summary for the terminal."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from tracing_jax.report.judgement import decided_by
from tracing_jax.report.plots import family_figure
from tracing_jax.report.tables import text_table
from tracing_jax.report.wording import ABSENT, asked, outcome, places_text, results_by_side, subject

_SAME_NATS = 0.01  # an aligned curve nowhere further than this from the one before it is the same line
_COLUMNS = 110  # of the terminal

PAIR_HEADERS = ("other model", "verdict", "statistic", "log10 p (pair)", "log10 p (all pairs)", "carried by")


def figure_of_family(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss along the path from the base of the records to each of their models, and the p-values of each pair.

    An aligned curve that alignment did not change is left out; so is a panel for which no record has anything.
    """
    curves: dict[str, Mapping[str, Any]] = {}
    names = pair_names(records)
    for name, record in zip(names, records, strict=True):
        sides = results_by_side(record["statistics"].get("mode", {}))
        before, after = (sides.get(side, {}).get("curve") for side in ("non-aligned", "aligned"))
        if before:
            curves[name] = before
        if after and not (before and _same(before, after)):
            curves[f"{name}, aligned"] = after
    verdicts = [record.get("verdict") or {} for record in records]
    families = {name: judged["family"] for name, judged in zip(names, verdicts, strict=True) if judged.get("family")}
    level = next((math.log10(judged["level"]) for judged in verdicts if judged), None)
    return family_figure(curves, families, base=model_name(records[0], "base"), level=level)


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """What the runs found, for the terminal: the verdict on each pair and a line per statistic, then tables."""
    lines = [line for record in records for line in _pair_lines(record)]
    rows = [row for record in records for row in path_rows(record)]
    if rows:
        lines += ["", text_table(rows, ["base", "other model", "path", "base loss", "midpoint", "barrier", "end loss"])]
    if len(records) > 1 and all(record.get("verdict") for record in records):
        lines += ["", text_table(pair_rows(records), PAIR_HEADERS), *_wrapped(adjustment_text(records), "", "")]
    return "\n".join(lines)


def pair_rows(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The verdict on each pair as a row under `PAIR_HEADERS`; records without one are left out."""
    rows = []
    for name, record in zip(pair_names(records), records, strict=True):
        if judged := record.get("verdict"):
            ps = (judged["adjusted_log10_p"], judged.get("over_pairs_log10_p"))
            carried = places_text(judged["layers"], at_most=2) or ABSENT
            rows.append([name, judged["verdict"], judged["statistic"] or ABSENT, *map(_two, ps), carried])
    return rows


def adjustment_text(records: Sequence[Mapping[str, Any]]) -> str:
    """How the p-values of `pair_rows` were adjusted."""
    levels = {record["verdict"]["level"] for record in records if record.get("verdict")}
    level = ", ".join(f"{level:g}" for level in sorted(levels))
    return (
        "pair: p-values after Holm over the statistics of the pair, on which its verdict stands "
        f"(level {level}); all pairs: after Holm over the {len(records)} pairs side by side as well"
    )


def model_name(record: Mapping[str, Any], side: str) -> str:
    """The name by which a report calls a model: what was asked for, without the folders before it."""
    return asked(record, side).split("/")[-1].removeprefix("demo:")


def pair_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the models beside the base, each its own: models of one name are numbered."""
    names: list[str] = []
    for record in records:
        name = model_name(record, "ft")
        names.append(f"{name}-{len(names) + 1}" if name in names else name)
    return names


def _pair_lines(record: Mapping[str, Any]) -> list[str]:
    pair = f"{model_name(record, 'base')} and {model_name(record, 'ft')}"
    judged = record.get("verdict")
    lines = [pair]
    if judged:
        lines = _wrapped(f"{judged['verdict'].upper()}  {pair}: {judged['meaning']}", "", "  ")
        lines += _wrapped(decided_by(judged), "  ", "    ")
    width = max(map(len, record["statistics"]), default=0)
    for name, sides in record["statistics"].items():
        text = f"{subject(name, sides)}: {outcome(sides)}".removeprefix(name).removeprefix(": ")
        lines += _wrapped(text, f"  {name:<{width}}  ", " " * (width + 4))
    return [*lines, *(line for note in record["notes"] for line in _wrapped(f"note: {note}", "  ", "    "))]


def _wrapped(text: str, first: str, following: str) -> list[str]:
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def path_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    """Base, other model, path, and the losses at its base end, midpoint, barrier and other end; a row for each path."""
    rows = []
    for side, result in results_by_side(record["statistics"].get("mode", {})).items():
        curve = result["curve"]
        ends = [curve["loss"][0], curve["midpoint"], curve["barrier"], curve["loss"][-1]]
        rows.append([model_name(record, "base"), model_name(record, "ft"), side, *map(_three, ends)])
    return rows


def _two(value: float | str | None) -> float | None:
    return None if value is None else round(float(value), 2)


def _three(value: float | str) -> float:
    return round(float(value), 3)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = zip(one["loss"], other["loss"], strict=True)
    return all(abs(float(a) - float(b)) <= _SAME_NATS for a, b in pairs)
