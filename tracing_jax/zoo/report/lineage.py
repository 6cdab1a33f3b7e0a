"""Inside a family: the tree of closest relatives, by one measure of closeness that survives disguises."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tracing_jax.zoo.report.rows import PairRow

SAME_FUNCTION = 1e-5
"""Nats per token of Jensen-Shannon divergence, below which two models compute the same function.

Float32 arithmetic alone gives some 1e-8 between a model and its disguised copy; a fine-tune of a few steps 1e-3.
"""


@dataclass(frozen=True)
class Measure:
    """A way to say how far two relatives are apart; smaller is closer.

    Attributes:
      name: what is measured, with its unit, as a page calls it.
      of: row -> the number to show; None where it was not measured.
      distance: the number -> what is minimised.
    """

    name: str
    of: Callable[[PairRow], float | None]
    distance: Callable[[float], float]


MEASURES = (
    Measure("Jensen-Shannon divergence of the predictions, nats per token", lambda row: row.jsd, lambda x: x),
    Measure("share of MLP units that were found again", lambda row: row.units, lambda x: -x),
    Measure("log10 p, adjusted", lambda row: row.adjusted_log10_p, lambda x: x),
)
"""In order of preference. A family's tree is by the first that all its related pairs have: numbers of different
measures are never held against one another. The divergence of a disguised copy is zero, and it does not saturate, while
most fine-tunes share all units with what they were made from; the evidence grows with the size of the models as well.
"""


@dataclass(frozen=True)
class Edge:
    """Two closest relatives.

    Attributes:
      row: their pair.
      value: the measure of closeness between them.
      same_function: whether they compute the same function, so that one is the other's copy, disguised or not.
    """

    row: PairRow
    value: float
    same_function: bool


@dataclass(frozen=True)
class Lineage:
    """The tree of a family: one edge fewer than models, and the measure by which all its edges are closest."""

    models: tuple[str, ...]
    measure: Measure
    edges: tuple[Edge, ...]


def lineage(members: Sequence[str], rows: Sequence[PairRow]) -> Lineage:
    """Returns the minimum spanning tree of a family over its related pairs.

    Models that compute the same function are equally close to everything else, to rounding. Such copies hang on one of
    them, the one whose units stand in the places of most other relatives, and that one stands for them in the tree.
    """
    inside = sorted(
        (row for row in rows if row.verdict == "related" and {*row.models} <= {*members}),
        key=lambda row: sorted(row.models),
    )
    measure = next(m for m in MEASURES if all(m.of(row) is not None for row in inside))
    values = [(row, value) for row in inside if (value := measure.of(row)) is not None]
    copies = [(row, value) for row, value in values if row.jsd is not None and row.jsd < SAME_FUNCTION]
    head = heads(members, [row for row, _ in copies], inside)
    stars = [(row, value) for row, value in copies if head[row.base] in row.models]
    between = [(row, value) for row, value in values if head[row.base] != head[row.ft]]
    through_heads = [(row, value) for row, value in between if all(head[name] == name for name in row.models)]
    by_closeness = [
        sorted(found, key=lambda item: measure.distance(item[1])) for found in (stars, through_heads, between)
    ]
    edges = _spanning([item for found in by_closeness for item in found])
    same = {row.pair for row, _ in copies}
    return Lineage(tuple(members), measure, tuple(Edge(row, value, row.pair in same) for row, value in edges))


def heads(members: Sequence[str], copies: Sequence[PairRow], rows: Sequence[PairRow]) -> Mapping[str, str]:
    """Returns for each model the one that stands for it and all its copies; itself if it has none."""
    group = {name: {name} for name in members}
    for row in copies:
        merged = group[row.base] | group[row.ft]
        group |= dict.fromkeys(merged, merged)
    return {name: min(group[name], key=lambda m: (-len(kin_in_place(m, rows, group[name])), m)) for name in members}


def kin_in_place(name: str, rows: Sequence[PairRow], but: set[str]) -> list[str]:
    """Returns the relatives, but those in `but`, whose units stand where the units of this model stand."""
    return [
        row.other(name)
        for row in rows
        if name in row.models
        and row.other(name) not in but
        and row.in_place_log10_p is not None
        and row.level is not None
        and 10.0**row.in_place_log10_p < row.level
    ]


def _spanning(ordered: Sequence[tuple[PairRow, float]]) -> list[tuple[PairRow, float]]:
    """Returns the pairs, of those in order, that connect what the ones before did not. Source: Kruskal 1956."""
    part: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := part.setdefault(name, name)) != name:
            part[name] = name = part.setdefault(above, above)
        return name

    kept = []
    for row, value in ordered:
        one, other = root(row.base), root(row.ft)
        if one != other:
            part[one] = other
            kept.append((row, value))
    return kept
