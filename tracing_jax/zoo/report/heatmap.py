"""All pairs as inline SVG: the hue of a pair is its verdict after Holm, its depth the share of units or p.

Where most pairs of the models were asked for, one lower triangle with a cell for each; else the models in a column, and
an arc for each pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from tracing_jax.report.formatting import p_cell
from tracing_jax.zoo.plan import PAIRS
from tracing_jax.zoo.report.pair_rows import PairRow

_SHARES = (0.25, 0.5, 0.75, 0.95)
"""Of MLP units that agree, from which on a related pair has the next deeper tint. p-values of most are alike: tiny."""

_LOG10_PS = (-0.3, -1.3)
"""log10 p, below which a pair without evidence has the next deeper tint."""

_WIDTH = 640.0  # pixels that a small zoo's cells share
_CELL = (8.0, 34.0)
_LETTER = 0.58  # of the font's size: an average letter's width
_EACH_ITS_OWN = 1500
"""Cells beyond so many are not all elements of their own: pairs without evidence of one tint are then one path."""


@dataclass(frozen=True)
class Heatmap:
    """What the template draws: cells of `cell` pixels, each `[left, top, class, text, link]`, labels and frames."""

    cell: float
    width: float
    height: float
    font: float
    cells: Sequence[tuple[float, float, str, str, str]]
    paths: Mapping[str, str]
    labels: Sequence[tuple[float, float, str]]
    frames: Sequence[tuple[float, float, str]]


def heatmap(order: Sequence[str], families: Sequence[Sequence[str]], rows: Sequence[PairRow]) -> Heatmap:
    """Returns the heatmap of models in this order; every planned pair has a cell, whatever its state."""
    n = len(order)
    cell = min(max(_WIDTH / max(n, 1), _CELL[0]), _CELL[1])
    font = min(13.0, 0.92 * cell)
    at = {name: i for i, name in enumerate(order)}
    grouped = len(rows) > _EACH_ITS_OWN
    cells: list[tuple[float, float, str, str, str]] = []
    paths: dict[str, list[str]] = {}
    for row in rows:
        left, top = sorted((at[row.base], at[row.ft]))
        tint = tint_of(row)
        if grouped and row.verdict == "no_evidence":
            paths.setdefault(tint, []).append(f"M{left} {top}h1v1h-1z")
        else:
            cells.append((left * cell, top * cell, tint, pair_sentence(row), link(row)))
    longest = max((len(name) for name in order), default=0)
    return Heatmap(
        cell, n * cell + longest * _LETTER * font + 8, n * cell, font, cells,
        {tint: "".join(found) for tint, found in sorted(paths.items())},
        [(i * cell + 5, (i + 0.5) * cell, name) for name, i in at.items()],
        [(cell * min(map(at.__getitem__, f)), cell * len(f), f"Family {i}") for i, f in enumerate(families, 1)],
    )  # fmt: skip


def tint_of(row: PairRow) -> str:
    """Returns the class of a pair: its state, or its verdict with a depth, `related-3`."""
    if row.verdict is None:
        return row.state
    depth = 0
    if row.verdict == "related":
        depth = sum((row.units or 0.0) >= share for share in _SHARES)
    elif row.verdict == "no_evidence":
        depth = sum((row.log10_p or 0.0) < log10_p for log10_p in _LOG10_PS)
    return f"{row.verdict}-{depth}"


def pair_sentence(row: PairRow) -> str:
    """Returns the tooltip of a pair's cell."""
    models = f"{row.base} and {row.ft}"
    if row.verdict is None:
        return f"{models}: {row.state}" + (f" ({row.error})" if row.error else "")
    if row.log10_p is None:
        return f"{models}: {row.word}"
    text = f"{models}: {row.word}" + (f" ({row.parts_text})" if row.parts else "")
    if row.units is not None:
        text += f"; {row.units:.0%} of MLP units agree"
    text += f"; p after Holm over all pairs {p_cell(row.shown_log10_ps[1])}, by {row.statistic}"
    return text + ("" if row.jsd is None else f"; divergence of predictions {row.jsd:.3g} nats")


def link(row: PairRow) -> str:
    """Returns the address of a pair's own page, relative to the report; empty where there is none."""
    return f"{PAIRS}/{quote(row.pair)}.html" if row.state == "done" else ""


_SPARSE, _FEW_MODELS = 0.4, 8
_ROW, _FONT = 18.0, 12.0  # pixels of a model's row in the graph
_WIDEST_ARC = 150.0


@dataclass(frozen=True)
class Arcs:
    """What the template draws of a sparse list: names in a column, an arc for each pair with its class, text and link.

    Arcs without evidence come first, so that the others lie on top.
    """

    width: float
    height: float
    left: float
    font: float
    arcs: Sequence[tuple[str, str, str, str]]
    labels: Sequence[tuple[float, str]]


def is_sparse(order: Sequence[str], rows: Sequence[PairRow]) -> bool:
    """Returns whether so few of all pairs of these models were asked for that a triangle would be empty."""
    n = len(order)
    return n >= _FEW_MODELS and len(rows) < _SPARSE * n * (n - 1) / 2


def arcs(order: Sequence[str], rows: Sequence[PairRow]) -> Arcs:
    """Returns the graph of the pairs over models in this order."""
    at = {name: i for i, name in enumerate(order)}
    left = max((len(name) for name in order), default=0) * _LETTER * _FONT + 12
    drawn = []
    for row in sorted(rows, key=lambda row: (row.verdict is not None, row.verdict != "no_evidence")):
        top, bottom = sorted((at[row.base], at[row.ft]))
        height = (bottom - top) * _ROW / 2
        path = f"M{left:.1f} {(top + 0.5) * _ROW:g}a{_reach(height):.1f} {height:.1f} 0 0 1 0 {2 * height:g}"
        drawn.append((path, tint_of(row), pair_sentence(row), link(row)))
    spans = [abs(at[row.base] - at[row.ft]) * _ROW / 2 for row in rows]
    width = left + max(map(_reach, spans), default=0.0) + 4
    labels = [((i + 0.5) * _ROW, name) for name, i in at.items()]
    return Arcs(width, len(order) * _ROW, left, _FONT, drawn, labels)


def _reach(height: float) -> float:
    """Returns how far to the right an arc of half this height goes."""
    return min(_WIDEST_ARC, 6 + 4.2 * height**0.62)


LEGEND: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("related", tuple(
        (f"related-{i}", text)
        for i, text in enumerate(("below 25 % of units agree, or not measured", "25 %", "50 %", "75 %", "95 %"))
    )),
    ("identical", (("identical-0", ""),)),
    ("undecided", (("undecided-0", ""),)),
    ("no evidence", (("no_evidence-0", "p > .5"), ("no_evidence-1", "p > .05"), ("no_evidence-2", "lower"))),
    ("no test", (("not_testable-0", "applies"), ("not_asked-0", "asked for"))),
    ("not done", tuple((state, state) for state in ("running", "failed", "missing"))),
)  # fmt: skip
"""Verdict -> its tints and what they mean."""
