"""Linear assignment of a dense matrix through its best candidates, proved optimal against all entries.

Few entries can ever be part of an optimum. The assignment is solved on the best candidates of every row; its prices
are then held against all entries, and the entries that they do not cover join the candidates, until there are none.
Every pass over the matrix is a reduction; see `views`.

Source: column generation for assignments, as in Volgenant 1996 (LAPMOD, solved on a sparse core and checked against
the rest); the core here is chosen by approximate prices, and solved by `augmentation`.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from tracing_jax.matching.augmenting_paths import Augmentation, Edges
from tracing_jax.matching.prices import approximate_prices
from tracing_jax.matching.row_reducers import Best, Survey, View, not_finite

_CANDIDATES = 24
"""Per row at first. At 11,008 independent units 25 hold all but a few of the optimum's entries."""
_MORE = 8
"""Per row and pass that join at most, if they are not covered; twice as many after every pass that finds many."""
_SAMPLE = 512
_FLOAT64 = 1e-13
"""Of the greatest similarity: what rounding may leave uncovered."""
_PROVED = 1e-6
"""Of the sum of what is assigned, in size: the most that the bound may lie above it."""
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Assignment:
    """Rows assigned to columns, with the proof.

    Attributes:
      columns: of each row, its own.
      value: the sum of the similarities assigned.
      bound: what no assignment exceeds, by the prices of the columns.
      passes: over the matrix.
    """

    columns: Int[np.ndarray, " n"]
    value: float
    bound: float
    passes: int


def optimal_assignment(view: View) -> Assignment:
    """Returns the assignment of greatest sum, with the bound that proves it.

    It is exact to the rounding of float64, unless similarities are so much smaller than others that they are lost in
    the prices of these in float32; there the bound says by how much at most.

    Raises:
      ValueError: more rows than columns, or similarities that are not finite.
    """
    survey = surveyed(view)
    plain = plain_assignment(survey)
    return _generate(view, max(abs(survey.least), float(np.abs(survey.most).max())) or 1.0) if plain is None else plain


def surveyed(view: View) -> Survey:
    """Returns the extremes of similarities that can be assigned.

    Raises:
      ValueError: more rows than columns, or similarities that are not finite.
    """
    n, m = view.shape
    if n > m:
        raise ValueError(f"cannot assign {n} rows to {m} columns one to one; transpose, or leave rows out first")
    survey = view.survey()
    if survey.broken:
        raise ValueError(not_finite(survey.broken, n * m))
    return survey


def plain_assignment(survey: Survey) -> Assignment | None:
    """Returns every row with its most similar column, if no column is that of two rows and none ties; else None."""
    if len(np.unique(survey.best)) < len(survey.best) or survey.tied.any():
        return None
    total = float(survey.most.sum())
    return Assignment(survey.best.astype(np.int32), total, total, 1)


def _generate(view: View, scale: float) -> Assignment:
    """Returns the assignment by candidates that grow until their prices cover all entries of at most this size."""
    n, m = view.shape
    prices = scale * approximate_prices(view.sample(_SAMPLE) / np.float32(scale), n)
    diagonal = Edges(np.arange(n), np.arange(n), view.diagonal())  # lets every row have a column of its own
    edges = _joined(diagonal, view.best(prices, _CANDIDATES), m)
    state = Augmentation((n, m), prices if n == m else np.zeros(m))
    more, passes = _MORE, 2
    while True:
        state.solve(edges)
        found, passes = view.best(state.v, more), passes + 1
        over = found.values - state.v[found.columns] - state.u[found.rows]
        before, edges = len(edges.rows), _joined(edges, found.where(over > _FLOAT64 * scale), m)
        if len(edges.rows) == before:
            proved = _proved(state, edges, found, passes)
            size = np.abs(edges.weights[_assigned(state, edges)]).sum()
            if proved.bound - proved.value <= _PROVED * size + _TINY * n or more >= m:
                return proved
        if not before < len(edges.rows) <= before + n:
            more = min(2 * more, m)


def _joined(edges: Edges, found: Best, m: int) -> Edges:
    """Returns the edges in order, with those found among them."""
    keys = np.concatenate([edges.rows * m + edges.columns, found.rows * m + found.columns])
    keys, first = np.unique(keys, return_index=True)
    weights = np.concatenate([edges.weights, found.values]).astype(np.float64)[first]
    return Edges(*np.divmod(keys, m), weights)


def _proved(state: Augmentation, edges: Edges, found: Best, passes: int) -> Assignment:
    """Returns the assignment with the bound of its prices, whatever they are: that bound holds for any prices.

    The prices are those that the matrix was seen with, in float32: among `found` entries less prices are exact, and of
    the others, rounding keeps the order.
    """
    prices = state.v.astype(np.float32).astype(np.float64)
    most = np.nextafter(found.rest, np.float32(np.inf)).astype(np.float64)
    np.maximum.at(most, found.rows, found.values - prices[found.columns])
    bound = float(most.sum() + prices.sum() - (state.m - state.n) * prices.min())
    value = float(edges.weights[_assigned(state, edges)].sum())
    return Assignment(state.column_of.astype(np.int32), value, max(bound, value), passes)


def _assigned(state: Augmentation, edges: Edges) -> Bool[np.ndarray, " E"]:
    return state.column_of[edges.rows] == edges.columns
