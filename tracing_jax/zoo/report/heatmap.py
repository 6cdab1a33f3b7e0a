"""The heatmap of all pairs: hue by the verdict after Holm, depth by log10 p; one lower triangle as inline SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from tracing_jax.report.formatting import log10_cell, p_cell
from tracing_jax.zoo.plan import PAIRS
from tracing_jax.zoo.report.rows import PairRow

DEPTHS: Mapping[str, tuple[float, ...]] = {
    "identical": (),
    "related": (-6, -12, -25, -50, -100, -300),
    "undecided": (),
    "no_evidence": (-0.3, -1.3),
    "not_testable": (),
    "not_asked": (),
}
"""Verdict -> log10 p from which on the next deeper tint of its hue is used."""

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
            cells.append((left * cell, top * cell, tint, in_words(row), link(row)))
    longest = max((len(name) for name in order), default=0)
    return Heatmap(
        cell, n * cell + longest * _LETTER * font + 8, n * cell, font, cells,
        {tint: "".join(found) for tint, found in sorted(paths.items())},
        [(i * cell + 5, (i + 0.5) * cell, name) for name, i in at.items()],
        [(cell * min(map(at.__getitem__, f)), cell * len(f), f"Family {i}") for i, f in enumerate(families, 1)],
    )  # fmt: skip


def tint_of(row: PairRow) -> str:
    """Returns the class of a cell: its state, or its verdict with a depth, `related-3`."""
    if row.verdict is None:
        return row.state
    steps = DEPTHS[row.verdict]
    return f"{row.verdict}-{sum((row.log10_p or 0.0) < step for step in steps)}"


def in_words(row: PairRow) -> str:
    """Returns the tooltip of a pair's cell."""
    models = f"{row.base} and {row.ft}"
    if row.verdict is None:
        return f"{models}: {row.state}" + (f" ({row.error})" if row.error else "")
    if row.log10_p is None:
        return f"{models}: {row.word}"
    log10_p, adjusted = row.shown_log10_ps
    text = f"{models}: {row.word}; p = {p_cell(log10_p)}, {p_cell(adjusted)} after Holm over all pairs"
    text += f"; log10 p {log10_cell(log10_p)}, by {row.statistic}"
    return text + ("" if row.jsd is None else f"; divergence of predictions {row.jsd:.3g} nats")


def link(row: PairRow) -> str:
    """Returns the address of a pair's own page, relative to the report; empty where there is none."""
    return f"{PAIRS}/{quote(row.pair)}.html" if row.state == "done" else ""


LEGEND: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("related", tuple(
        (f"related-{i}", text) for i, text in enumerate(("log10 p ≥ −6", "−12", "−25", "−50", "−100", "−300", "lower"))
    )),
    ("identical", (("identical-0", ""),)),
    ("undecided", (("undecided-0", ""),)),
    ("no evidence", (("no_evidence-0", "p > .5"), ("no_evidence-1", "p > .05"), ("no_evidence-2", "lower"))),
    ("no test", (("not_testable-0", "applies"), ("not_asked-0", "asked for"))),
    ("not done", tuple((state, state) for state in ("running", "failed", "missing"))),
)  # fmt: skip
"""Verdict -> its tints and what they mean."""
