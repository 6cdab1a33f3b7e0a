"""Linear assignment: which unit of ft belongs to which unit of base, for one axis or an axis with another inside it."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from tracing_jax.matching.row_reducers import HostView, View
from tracing_jax.matching.sparse_assignment import optimal_assignment, plain_assignment, surveyed

_SMALL = 2**21
"""Entries of a matrix that scipy assigns sooner than candidates are found, if plain maxima do not decide; see
`benchmarks/assignment.py`."""

Blocks = Callable[[int, int], Float[np.ndarray, "G G2"]]
"""(unit i of base, unit j of ft) -> how alike the units inside the two are, at [g, h]."""


def assign(similarity: Float[np.ndarray, "n m"] | View) -> Int[np.ndarray, " n"]:
    """Returns for every row its own column, such that the similarities picked have the greatest possible sum.

    Equal optima are told apart by the order of rows and columns. For the proof see `optimal_assignment`, which solves
    all but small matrices; there scipy's solver is the faster.

    Raises:
      ValueError: more rows than columns, or similarities that are not finite.
    """
    view = HostView(similarity) if isinstance(similarity, np.ndarray) else similarity
    n, m = view.shape
    if n * m > _SMALL:
        return optimal_assignment(view).columns
    plain = plain_assignment(surveyed(view))
    if plain is not None:
        return plain.columns
    return linear_sum_assignment(view.sample(n), maximize=True)[1].astype(np.int32)


def assign_nested(
    inner: Blocks, outer: Float[np.ndarray, "K K2"]
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, "K G"]]:
    """Returns p and r of greatest `sum_k outer[k, p[k]] + sum_kg inner(k, p[k])[g, r[k, g]]`, exactly.

    Once unit k is paired with k', the best order of the units inside the two no longer depends on the other pairs. So
    a pair is worth its outer part plus its best inner assignment, and the pairs themselves are one more assignment.
    No pair is worth more than with the best partner for every inner unit by itself, and that bound is cheap: an inner
    assignment is solved only for pairs that are chosen by bounds, until every chosen pair is known exactly.

    Raises:
      ValueError: as `assign`.
    """
    worth = np.array(outer, np.float64)
    for k, other in np.ndindex(worth.shape):
        worth[k, other] += inner(k, other).max(axis=1).sum(dtype=np.float64)
    orders: dict[tuple[int, int], np.ndarray] = {}
    while True:
        p = assign(worth)
        chosen = [(k, int(other)) for k, other in enumerate(p)]
        if not (unknown := [pair for pair in chosen if pair not in orders]):
            return p, np.stack([orders[pair] for pair in chosen])
        for pair in unknown:
            similarity = inner(*pair)
            orders[pair] = assign(similarity)
            picked = np.take_along_axis(similarity, orders[pair][:, None], axis=1)
            worth[pair] = outer[pair] + picked.sum(dtype=np.float64)
