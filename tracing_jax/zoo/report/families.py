"""Families: models that are connected through related pairs; and the order in which all models are shown."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from tracing_jax.zoo.report.rows import PairRow

_UNKNOWN_EVIDENCE = 0.0


def families(models: Iterable[str], rows: Sequence[PairRow]) -> list[tuple[str, ...]]:
    """Returns the connected components of the related pairs, each sorted; the largest first, then by name.

    A component of one model is a model that belongs to no family.
    """
    names = sorted(models)
    at = {name: i for i, name in enumerate(names)}
    links = np.array([[at[row.base], at[row.ft]] for row in rows if row.verdict == "related"], int).reshape(-1, 2)
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
