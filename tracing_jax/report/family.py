"""One base against several models: the figure of all their paths, and the summary for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from tracing_jax.report.plots import path_figure
from tracing_jax.report.tables import text_table
from tracing_jax.report.wording import outcome, results_by_side, subject, verdict_text

_SAME_NATS = 0.01  # an aligned curve nowhere further than this from the one before it is the same line


def figure_of_family(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss along the path from the base of the records to each of their models, before and after alignment.

    An aligned curve that alignment did not change is left out.
    """
    curves: dict[str, Mapping[str, Any]] = {}
    for record in records:
        name = model_name(record, "ft")
        sides = results_by_side(record["statistics"].get("mode", {}))
        before, after = (sides.get(side, {}).get("curve") for side in ("non-aligned", "aligned"))
        if before:
            curves[name] = before
        if after and not (before and _same(before, after)):
            curves[f"{name}, aligned"] = after
    title = f"Loss along the path from {model_name(records[0], 'base')}"
    groups = next(iter(curves.values()))["groups"] if curves else ()
    return path_figure(curves, groups=groups, title=title)


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """What the runs found, for the terminal: a table of the paths if there are any, and a line per statistic."""
    lines = []
    for record in records:
        lines.append(f"{model_name(record, 'base')} and {model_name(record, 'ft')}")
        if judged := record.get("verdict"):
            lines.append(f"  verdict: {verdict_text(judged)}")
        lines += [f"  {subject(name, sides)}: {outcome(sides)}" for name, sides in record["statistics"].items()]
        lines += [f"  note: {note}" for note in record["notes"]]
    rows = [row for record in records for row in _path_rows(record)]
    if rows:
        lines += ["", text_table(rows, ["base", "other model", "path", "base loss", "midpoint", "barrier", "end loss"])]
    return "\n".join(lines)


def model_name(record: Mapping[str, Any], side: str) -> str:
    """The name by which a report calls a model: what was asked for, without the folders before it."""
    asked = str(record["args"].get(f"{side}_model_id") or record["models"][side]["id"])
    return asked.rstrip("/").split("/")[-1].removeprefix("demo:")


def _path_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    rows = []
    for side, result in results_by_side(record["statistics"].get("mode", {})).items():
        curve = result["curve"]
        ends = [curve["loss"][0], curve["midpoint"], curve["barrier"], curve["loss"][-1]]
        rows.append([model_name(record, "base"), model_name(record, "ft"), side, *map(_three, ends)])
    return rows


def _three(value: float | str) -> float:
    return round(float(value), 3)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = zip(one["loss"], other["loss"], strict=True)
    return all(abs(float(a) - float(b)) <= _SAME_NATS for a, b in pairs)
