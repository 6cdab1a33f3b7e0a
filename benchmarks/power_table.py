"""The detection rates of the power benchmark as a table, to and from Markdown, and as a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from benchmarks.intervals import clopper_pearson
from tracing_jax.report.panels import INK

_ABSENT = "–"


@dataclass(frozen=True)
class Rates:
    """Of how many pairs which share was detected, by statistic; None where it does not apply, absent if unmeasured."""

    pairs: int
    shares: Mapping[str, float | None]


def to_markdown(table: Mapping[str, Rates], columns: Sequence[str]) -> str:
    """Returns the table, a row for each thing done, with the intervals of the rates 0 and 1."""
    lines = ["| what was done | pairs | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for row, rates in table.items():
        cells = [_cell(rates, name, "{:.2f}", 1) for name in columns]
        lines.append(f"| {row} | {rates.pairs} | " + " | ".join(cells) + " |")
    fewest = min(rates.pairs for rates in table.values())
    (_, none), (every, _) = clopper_pearson(0, fewest), clopper_pearson(fewest, fewest)
    note = (
        f"With {fewest} pairs a rate of 0 has the 95 % interval 0.00 to {none:.2f}, a rate of 1 {every:.2f} to 1.00 "
        "(Clopper-Pearson)."
    )
    return "\n".join([*lines, "", note]) + "\n"


def from_markdown(text: str) -> dict[str, Rates]:
    """Returns the table that `to_markdown` has written."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    if not cells:
        return {}
    columns = cells[0][2:]
    return {
        row: Rates(int(pairs), {name: None if x == _ABSENT else float(x) for name, x in zip(columns, shares) if x})
        for row, pairs, *shares in cells[2:]
    }


def figure(table: Mapping[str, Rates], columns: Sequence[str], title: str) -> Figure:
    """The rates as a map, a row for each thing done and a column for each statistic."""
    texts = [[_cell(rates, name, "{:.0f}", 100) for name in columns] for rates in table.values()]
    shares = [[rates.shares.get(name) for name in columns] for rates in table.values()]
    shown = np.array([[np.nan if share is None else share for share in row] for row in shares], np.float64)
    drawn = Figure(figsize=(8.6, 0.33 * len(table) + 1.7), facecolor="white")
    drawn.set_layout_engine("constrained")
    axes = drawn.subplots()
    axes.set_facecolor("#f0f0f0")
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for (i, j), value in np.ndenumerate(shown):
        axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=8.5, color="white" if value > 0.7 else INK)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="left", fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(table)), list(table), fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    return drawn


def _cell(rates: Rates, name: str, form: str, factor: float) -> str:
    """A share as text; empty where it was not measured."""
    if name not in rates.shares:
        return ""
    share = rates.shares[name]
    return _ABSENT if share is None else form.format(factor * share)
