"""Linear assignment of a similarity matrix, solved on its largest entries and proved optimal against all of them.

Few entries can be part of an optimum. The assignment is solved on the candidates of every row; its dual prices are then
compared with all entries, and entries that violate the dual constraints join the candidates, until none is left. Each
pass over the matrix is a reduction of its rows; see `row_reducers`.

Source: column generation for assignments, as in Volgenant 1996 (LAPMOD, solved on a sparse core and checked against
the rest); here approximate dual prices choose the core, and `augmenting_paths` solves it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from laprust import lapjv

from tracing_jax.matching.augmenting_paths import Edges, SparseAssignment
from tracing_jax.matching.row_reducers import HostRowReducer, RowReducer, RowStats, TopK
from tracing_jax.matching.sinkhorn import approximate_dual_prices

_SMALL = 2**24
"""Entries of a matrix that a dense solver assigns faster than candidates are found; see `benchmarks/assignment.py`."""
_CANDIDATES = 24
"""Per row at first. At 11,008 independent units 25 hold all but a few of the optimum's entries."""
_MORE = 8
"""Per row and pass that join at most, if they violate the constraints; twice as many after a pass that finds many."""
_SAMPLE = 512
_FLOAT64 = 1e-13
"""Of the greatest similarity: violations of the dual constraints that are put down to rounding."""
_PROVED = 1e-6
"""Of the sum of the absolute similarities assigned: the largest gap between the bound and the value."""
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Assignment:
    """Rows assigned to columns, with the proof.

    Attributes:
      columns: the column of each row.
      value: the sum of the similarities assigned.
      bound: an upper bound on the value of any assignment, by the dual prices of the columns.
      passes: over the matrix.
    """

    columns: Int[np.ndarray, " n"]
    value: float
    bound: float
    passes: int


def assign(similarity: Float[np.ndarray, "n m"] | RowReducer) -> Int[np.ndarray, " n"]:
    """Returns for each row a column of its own, `int32 [n]`, such that the sum of the similarities is greatest.

    Among equal optima the order of rows and columns decides. For the proof see `optimal_assignment`, which solves all
    but small matrices; on small ones a dense solver is faster.

    Raises:
      ValueError: more rows than columns, or similarities that are not finite.
    Source: Jonker & Volgenant 1987, as laprust has it, for small matrices.
    """
    reducer = HostRowReducer(similarity) if isinstance(similarity, np.ndarray) else similarity
    n, m = reducer.shape
    if n * m > _SMALL or n > m:
        return optimal_assignment(reducer).columns
    costs = -similarity if isinstance(similarity, np.ndarray) else -reducer.sample_rows(n)
    if not np.isfinite(costs).all():
        raise ValueError(_not_finite(int((~np.isfinite(costs)).sum()), n * m))
    # Square matrices are solved in float64 in any case.
    precision: Literal["native", "float64"] = "native" if n == m else "float64"
    return lapjv(costs, extend_cost=True, return_cost=False, precision=precision)[1].astype(np.int32)


def optimal_assignment(reducer: RowReducer) -> Assignment:
    """Returns the assignment of greatest sum, with the bound that proves it.

    It is exact to the rounding of float64, unless some similarities are so much smaller than others that they are lost
    in float32 beside the dual prices of these; there the bound limits the error.

    Raises:
      ValueError: more rows than columns, or similarities that are not finite.
    """
    stats = _checked_stats(reducer)
    row_maxima = _row_maxima_assignment(stats)
    if row_maxima is not None:
        return row_maxima
    return _column_generation(reducer, max(abs(stats.min), float(np.abs(stats.max).max())) or 1.0)


def _checked_stats(reducer: RowReducer) -> RowStats:
    """Returns the row statistics, or raises ValueError where nothing can be assigned."""
    n, m = reducer.shape
    if n > m:
        raise ValueError(f"cannot assign {n} rows to {m} columns one to one; transpose, or leave rows out first")
    stats = reducer.stats()
    if stats.non_finite:
        raise ValueError(_not_finite(stats.non_finite, n * m))
    return stats


def _not_finite(count: int, total: int) -> str:
    return (
        f"{count} of {total} similarities are NaN or infinite; look for such values in the weights or activations they "
        "come from"
    )


def _row_maxima_assignment(stats: RowStats) -> Assignment | None:
    """Returns each row with its greatest entry, if these are unique and in different columns; else None."""
    if len(np.unique(stats.argmax)) < len(stats.argmax) or stats.tied.any():
        return None
    total = float(stats.max.sum())
    return Assignment(stats.argmax.astype(np.int32), total, total, 1)


def _column_generation(reducer: RowReducer, scale: float) -> Assignment:
    """Returns the assignment by candidates that grow until their dual prices are feasible for the whole matrix.

    Args:
      reducer: the matrix.
      scale: the greatest absolute similarity.
    """
    n, m = reducer.shape
    prices = scale * approximate_dual_prices(reducer.sample_rows(_SAMPLE) / np.float32(scale), n)
    diagonal = Edges(np.arange(n), np.arange(n), reducer.diagonal())  # so that an assignment exists
    edges = _joined(diagonal, reducer.top_k(prices, _CANDIDATES), m)
    solver = SparseAssignment((n, m), prices if n == m else np.zeros(m))
    more, passes = _MORE, 2
    while True:
        solver.solve(edges)
        top, passes = reducer.top_k(solver.v, more), passes + 1
        violation = top.values - solver.v[top.columns] - solver.u[top.rows]
        before, edges = len(edges.rows), _joined(edges, top.where(violation > _FLOAT64 * scale), m)
        if len(edges.rows) == before:
            proved = _proved(solver, edges, top, passes)
            size = np.abs(edges.weights[_assigned(solver, edges)]).sum()
            if proved.bound - proved.value <= _PROVED * size + _TINY * n or more >= m:
                return proved
        if not before < len(edges.rows) <= before + n:
            more = min(2 * more, m)


def _joined(edges: Edges, top: TopK, m: int) -> Edges:
    """Returns the union of the edges and the entries found, sorted by row and column."""
    keys = np.concatenate([edges.rows * m + edges.columns, top.rows * m + top.columns])
    keys, first = np.unique(keys, return_index=True)
    weights = np.concatenate([edges.weights, top.values]).astype(np.float64)[first]
    return Edges(*np.divmod(keys, m), weights)


def _proved(solver: SparseAssignment, edges: Edges, top: TopK, passes: int) -> Assignment:
    """Returns the assignment with the bound that its column prices give; any prices give a valid bound.

    The prices are rounded to float32, as the reducer used them: among `top` the reduced similarities are exact, and of
    the other entries rounding keeps the order.
    """
    prices = solver.v.astype(np.float32).astype(np.float64)
    row_prices = np.nextafter(top.rest_at_most, np.float32(np.inf)).astype(np.float64)
    np.maximum.at(row_prices, top.rows, top.values - prices[top.columns])
    bound = float(row_prices.sum() + prices.sum() - (solver.m - solver.n) * prices.min())
    value = float(edges.weights[_assigned(solver, edges)].sum())
    return Assignment(solver.column_of.astype(np.int32), value, max(bound, value), passes)


def _assigned(solver: SparseAssignment, edges: Edges) -> Bool[np.ndarray, " E"]:
    return solver.column_of[edges.rows] == edges.columns
