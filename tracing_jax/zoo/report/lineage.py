"""Inside a family: the tree of closest relatives. Numbers of different measures are never held against one another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tracing_jax.zoo.report.rows import PairRow

SAME_FUNCTION = 1e-5
"""Nats per token of Jensen-Shannon divergence, below which two models compute the same function.

Float32 arithmetic alone gives some 1e-8 between a model and its disguised copy; a light fine-tune 1e-3 and more.
"""

NEARLY_AS_CLOSE = 1.25
"""Of several models from which one may have been made, those within this factor of the closest count as equally close.

Models that learn from similar text move in similar directions, so that a fine-tune lies a little nearer to its trained
siblings than to their common parent. See docs/zoo.md for what this mends.
"""


@dataclass(frozen=True)
class Measure:
    """A way to say how far two relatives are apart.

    Attributes:
      name: what is measured, with its unit, as a page calls it.
      of: row -> the number to show; None where it was not measured, or says nothing of the pair.
      sign: +1 if a smaller number is closer, else -1.
    """

    name: str
    of: Callable[[PairRow], float | None]
    sign: int = 1


COPY = Measure("divergence of predictions", lambda row: row.jsd if (row.jsd or 0.0) < SAME_FUNCTION else None)
WEIGHTS = Measure("distance of weights", lambda row: row.l2 if row.in_place else None)
PREDICTIONS = Measure("divergence of predictions, nats per token", lambda row: row.jsd)
UNITS = Measure("share of MLP units found again", lambda row: row.units, -1)
EVIDENCE = Measure("log10 p after Holm", lambda row: row.adjusted_log10_p)

MEASURES = (COPY, WEIGHTS, PREDICTIONS, UNITS, EVIDENCE)
"""From the one that tells relatives apart best to the one that every related pair has. A tree is joined by the first as
far as it goes; what that leaves apart, by the next. Weights can be subtracted while units stand in their places; the
predictions of disguised and pruned members still tell who is closest, and shared units only roughly.
"""


@dataclass(frozen=True)
class Edge:
    """Two closest relatives, and the measure by which they are."""

    row: PairRow
    measure: Measure
    value: float

    @property
    def same_function(self) -> bool:
        """Whether one is the other's copy, disguised or not."""
        return self.measure is COPY


@dataclass(frozen=True)
class Lineage:
    """The tree of a family: one edge fewer than models."""

    models: tuple[str, ...]
    edges: tuple[Edge, ...]


def lineage(members: Sequence[str], rows: Sequence[PairRow], trained: Mapping[str, float]) -> Lineage:
    """Returns the tree of a family over its related pairs.

    Models that compute the same function are equally close to everything else, to rounding. Such copies hang on one of
    them, the one whose units stand in the places of most other relatives, and that one stands for them in the tree.
    Among models whose weights can be subtracted, each hangs on the closest one that was trained less, where that is
    known of all; otherwise, and by all other measures, the tree is a minimum spanning tree.

    Args:
      members: of the family.
      rows: pairs of the zoo; those inside the family that are related count.
      trained: model -> how far its training went, in an order of its own, where that was measured.
    """
    inside = sorted(
        (row for row in rows if row.verdict == "related" and {*row.models} <= {*members}),
        key=lambda row: sorted(row.models),
    )
    head = heads(members, inside)
    stars = [e for e in _edges(COPY, inside) if head[e.row.base] == head[e.row.ft] and head[e.row.base] in e.row.models]
    between = [row for row in inside if all(head[name] == name for name in row.models)]
    candidates = [*stars, *_edges(COPY, inside), *_by_training(_edges(WEIGHTS, between), trained)]
    for measure in MEASURES[1:]:
        candidates += _edges(measure, between)
    return Lineage(tuple(members), tuple(_spanning([*candidates, *_edges(EVIDENCE, inside)])))


def heads(members: Sequence[str], rows: Sequence[PairRow]) -> Mapping[str, str]:
    """Returns for each model the one that stands for it and all its copies; itself if it has none."""
    group = {name: {name} for name in members}
    for edge in _edges(COPY, rows):
        merged = group[edge.row.base] | group[edge.row.ft]
        group |= dict.fromkeys(merged, merged)
    return {name: min(group[name], key=lambda m: (-len(kin_in_place(m, rows, group[name])), m)) for name in members}


def kin_in_place(name: str, rows: Sequence[PairRow], but: set[str]) -> list[str]:
    """Returns the relatives, but those in `but`, whose units stand where the units of this model stand."""
    return [row.other(name) for row in rows if name in row.models and row.other(name) not in but and row.in_place]


def _edges(measure: Measure, rows: Sequence[PairRow]) -> list[Edge]:
    """Returns the pairs that a measure tells something of, the closest first."""
    found = [Edge(row, measure, value) for row in rows if (value := measure.of(row)) is not None]
    return sorted(found, key=lambda edge: measure.sign * edge.value)


def _by_training(edges: Sequence[Edge], trained: Mapping[str, float]) -> list[Edge]:
    """Returns for each model its edge to the least trained of the nearly closest that were trained less than itself."""
    if not all(name in trained for edge in edges for name in edge.row.models):
        return []
    above: dict[str, list[tuple[str, Edge]]] = {}
    for edge in edges:
        less, more = sorted(edge.row.models, key=lambda name: (trained[name], name))
        above.setdefault(more, []).append((less, edge))
    chosen = []
    for found in above.values():
        near = [item for item in found if item[1].value <= NEARLY_AS_CLOSE * found[0][1].value]
        chosen.append(min(near, key=lambda item: (trained[item[0]], item[0]))[1])
    return sorted(chosen, key=lambda edge: edge.value)


def _spanning(ordered: Sequence[Edge]) -> list[Edge]:
    """Returns the edges, of those in order, that connect what the ones before did not. Source: Kruskal 1956."""
    part: dict[str, str] = {}

    def root(name: str) -> str:
        while (above := part.setdefault(name, name)) != name:
            part[name] = name = part.setdefault(above, above)
        return name

    kept = []
    for edge in ordered:
        one, other = root(edge.row.base), root(edge.row.ft)
        if one != other:
            part[one] = other
            kept.append(edge)
    return kept
