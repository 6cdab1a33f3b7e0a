"""The assignment on a sparse graph, with prices that prove it.

Rows take columns, each pair worth its weight. Prices u of rows and v of columns cover every edge, `u + v >= w`, and are
exact where a pair is assigned; a column that is left over costs nothing. Then no assignment is worth more.

scipy assigns (LAPJVsp, Jonker and Volgenant 1987) and keeps its prices to itself, so they are found anew. A row's price
is what it gets less the price of its column; so a column must cost at least what any other row would gain by taking
it and giving up its own. The least such prices above those to start from are a fixed point, reached by raising what
costs too little until nothing does (Bellman 1958, On a routing problem).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

_ROUNDING = 1e-15
"""Of the greatest weight: rises of prices that rounding may cause."""


class Edges(NamedTuple):
    """The pairs that may be assigned, in order of rows and then of columns."""

    rows: Int[np.ndarray, " E"]
    columns: Int[np.ndarray, " E"]
    weights: Float[np.ndarray, " E"]


class Core(NamedTuple):
    """The assignment of greatest sum that some edges allow.

    Attributes:
      columns: of each row.
      weights: of each row's own edge.
      u, v: the prices of rows and of columns.
    """

    columns: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    u: Float[np.ndarray, " n"]
    v: Float[np.ndarray, " m"]


def solve_core(edges: Edges, prices: Float[np.ndarray, " m"]) -> Core:
    """Returns the assignment of greatest sum, with its prices, for at most as many rows as columns.

    Every row has an edge. Prices of the columns that are nearly right spare most of the work, if no column is to be
    left over; else they are not used.

    Raises:
      ValueError: the edges do not allow every row a column of its own.
    """
    rows, columns, weights = edges
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    n, m = len(starts), len(prices)
    start = prices if n == m else np.zeros(m)
    most = max(np.abs(weights).max(), np.abs(start).max()) or 1.0
    gains = weights - start[columns]
    costs = np.maximum.reduceat(gains, starts)[rows] - gains
    _, assigned = min_weight_full_bipartite_matching(csr_array((costs + most, (rows, columns)), shape=(n, m)))  # no 0s
    own = weights[columns == assigned[rows]]
    v = _covering(edges, starts, assigned, own, start, _ROUNDING * most)
    return Core(assigned, own, own - v[assigned], v)


def _covering(
    edges: Edges,
    starts: Int[np.ndarray, " n"],
    assigned: Int[np.ndarray, " n"],
    own: Float[np.ndarray, " n"],
    prices: Float[np.ndarray, " m"],
    rounding: float,
) -> Float[np.ndarray, " m"]:
    """Returns the least prices of columns, none below those given, that cover all edges; `own` weighs assigned ones."""
    n, v = len(own), prices.copy()
    counts = np.diff(starts, append=len(edges.rows))
    gains = edges.weights - own[edges.rows]
    row_of = np.full(len(v), -1)
    row_of[assigned] = np.arange(n)
    dearer = np.arange(n)  # rows whose own column has become dearer since their edges were last seen
    for _ in range(n):
        at = _ranges(starts[dearer], counts[dearer])
        worth = v.copy()
        np.maximum.at(worth, edges.columns[at], gains[at] + v[assigned[edges.rows[at]]])
        raised = np.flatnonzero(worth > v + rounding)
        v[raised] = worth[raised]
        dearer = row_of[raised]
        dearer = dearer[dearer >= 0]
        if not len(dearer):
            break
    return v


def _ranges(starts: Int[np.ndarray, " _"], counts: Int[np.ndarray, " _"]) -> Int[np.ndarray, " _"]:
    """Returns the numbers of all ranges, one after another."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
