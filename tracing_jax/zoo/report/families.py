"""Families, which are models connected by related pairs, and in each the tree of closest relatives.

Numbers of different measures are never compared with one another.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from tracing_jax.zoo.report.pair_rows import PairRow

_UNKNOWN_EVIDENCE = 0.0


def families(models: Iterable[str], rows: Sequence[PairRow]) -> list[tuple[str, ...]]:
    """Returns the connected components of the related pairs, each sorted; the largest first, then by name.

    A component of one model is a model that belongs to no family.
    """
    names = sorted(models)
    at = {name: i for i, name in enumerate(names)}
    links = np.array([[at[row.base], at[row.ft]] for row in rows if row.is_related], int).reshape(-1, 2)
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(len(names), len(names)))
    labels = connected_components(graph, directed=False)[1] if names else np.zeros(0, int)
    found: dict[int, list[str]] = {}
    for name, label in zip(names, labels, strict=True):
        found.setdefault(int(label), []).append(name)
    return sorted((tuple(members) for members in found.values()), key=lambda members: (-len(members), members))


def clustered(components: Sequence[tuple[str, ...]], rows: Sequence[PairRow]) -> list[str]:
    """Returns all models, the families one after another, and the members of each in the order of a clustering.

    Inside a family, models are clustered by average linkage on how far they are apart: by the divergence of their
    predictions where every pair of the family has one, else by the strength of the evidence.
    """
    inside = {frozenset(row.models): row for row in rows if row.state == "done"}
    return [name for members in components for name in _clustered(members, inside)]


def _clustered(members: tuple[str, ...], rows: dict[frozenset[str], PairRow]) -> list[str]:
    if len(members) < 3:
        return list(members)
    n = len(members)
    pairs = [[rows.get(frozenset((members[i], members[j]))) for j in range(n)] for i in range(n)]
    known = [pairs[i][j] for i in range(n) for j in range(i)]
    by_jsd = all(row is not None and row.jsd is not None for row in known)
    distance = np.array([[0.0 if i == j else _apart(pairs[i][j], by_jsd) for j in range(n)] for i in range(n)])
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=n <= 60)
    return [members[i] for i in leaves_list(tree)]


def _apart(row: PairRow | None, by_jsd: bool) -> float:
    """Returns a distance in [0, 1] of a pair inside a family."""
    if by_jsd and row is not None and row.jsd is not None:
        return float(np.sqrt(row.jsd))  # the root of the divergence is a metric (Endres & Schindelin 2003)
    log10_p = row.adjusted_log10_p if row is not None else None
    return 1.0 / (1.0 - (_UNKNOWN_EVIDENCE if log10_p is None else log10_p))


SAME_FUNCTION = 1e-5
"""Nats per token of Jensen-Shannon divergence, below which two models compute the same function.

Float32 arithmetic alone gives some 1e-8 between a model and its disguised copy; a light fine-tune 1e-3 and more.
"""

NEARLY_AS_CLOSE = 1.25
"""Of several models from which one may have been made, those within this factor of the closest count as equally close.

Models that learn from similar text move in similar directions, so that a fine-tune is a little nearer to its trained
siblings than to their common parent. See docs/zoo.md for its effect.
"""


@dataclass(frozen=True)
class Measure:
    """A measure of the distance of two relatives.

    Attributes:
      name: what is measured, with its unit, as shown on the page.
      of: row -> the number to show; None where it was not measured, or does not apply to the pair.
      sign: +1 if a smaller number is closer, else -1.
    """

    name: str
    of: Callable[[PairRow], float | None]
    sign: int = 1


BY_COPY = Measure("divergence of predictions", lambda row: row.jsd if (row.jsd or 0.0) < SAME_FUNCTION else None)
WEIGHTS = Measure("distance of weights", lambda row: row.l2 if row.in_place else None)
PREDICTIONS = Measure("divergence of predictions, nats per token", lambda row: row.jsd)
UNITS = Measure("share of MLP units that agree", lambda row: row.units, -1)
EVIDENCE = Measure("log10 p after Holm", lambda row: row.adjusted_log10_p)

MEASURES = (BY_COPY, WEIGHTS, PREDICTIONS, UNITS, EVIDENCE)
"""From the one that distinguishes relatives best to the one that every related pair has. A tree is joined by the first
as far as it goes; what that leaves apart, by the next. Weights can be subtracted while units are in the same order; the
predictions of disguised and pruned members still show which is closest, and shared units only roughly.
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
        return self.measure is BY_COPY


@dataclass(frozen=True)
class Lineage:
    """The tree of a family: one edge fewer than models."""

    models: tuple[str, ...]
    edges: tuple[Edge, ...]


def lineage(members: Sequence[str], rows: Sequence[PairRow], trained: Mapping[str, float]) -> Lineage:
    """Returns the tree of a family over its related pairs.

    Models that compute the same function are equally close to everything else, to rounding. Such copies are attached to
    the one whose units are in the order of most other relatives, and that one represents them in the tree.
    Among models whose weights can be subtracted, each is attached to the closest one that was trained less, where that
    is known of all; otherwise, and by all other measures, the tree is a minimum spanning tree.

    Args:
      members: of the family.
      rows: pairs of the zoo; those inside the family that are related count.
      trained: model -> how far its training went, in an order of its own, where that was measured.
    """
    inside = sorted(
        (row for row in rows if row.is_related and {*row.models} <= {*members}),
        key=lambda row: sorted(row.models),
    )
    representative = representatives(members, inside)
    copies = _edges(BY_COPY, inside)
    stars = [
        edge
        for edge in copies
        if representative[edge.row.base] == representative[edge.row.ft]
        and representative[edge.row.ft] in edge.row.models
    ]
    between = [row for row in inside if all(representative[name] == name for name in row.models)]
    candidates = [*stars, *copies, *_by_training(_edges(WEIGHTS, between), trained)]
    for measure in MEASURES[1:]:
        candidates += _edges(measure, between)
    return Lineage(tuple(members), tuple(_spanning([*candidates, *_edges(EVIDENCE, inside)])))


def closest(rows: Sequence[PairRow]) -> Edge | None:
    """Returns the closest pair by the first of `MEASURES` that applies to any; None if there is none."""
    return next((edges[0] for measure in MEASURES if (edges := _edges(measure, rows))), None)


def representatives(members: Sequence[str], rows: Sequence[PairRow]) -> Mapping[str, str]:
    """Returns for each model the representative of it and all its copies; itself if it has none."""
    group = {name: {name} for name in members}
    for edge in _edges(BY_COPY, rows):
        merged = group[edge.row.base] | group[edge.row.ft]
        group |= dict.fromkeys(merged, merged)
    return {
        name: min(group[name], key=lambda m: (-len(relatives_in_place(m, rows, group[name])), m)) for name in members
    }


def relatives_in_place(name: str, rows: Sequence[PairRow], but: set[str]) -> list[str]:
    """Returns the relatives, but those in `but`, whose units are in the same order as those of this model."""
    return [row.other(name) for row in rows if name in row.models and row.other(name) not in but and row.in_place]


def _edges(measure: Measure, rows: Sequence[PairRow]) -> list[Edge]:
    """Returns the pairs to which a measure applies, the closest first."""
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
