"""Assignment on a sparse graph by shortest augmenting paths: many of them per search, with prices that prove it.

Rows take columns, each pair worth its weight. Prices u of rows and v of columns cover every edge, `u + v >= w`, and
those assigned exactly; then no assignment is worth more. A search from all rows without a column at once finds trees
of cheapest exchanges; trees of different rows share nothing, so that each of them hands its row a column.

With fewer rows than columns, one more holder keeps the columns that no row has. It takes any of them for nothing. Where
these are many, it takes them last: each tree that reached one would lead through the holder, and bar the way to others.

Source: Hung and Rom 1980, Solving the assignment problem by relaxation, which grows such a forest on dense matrices;
the prices are those of Edmonds and Karp 1972.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

from tracing_jax.matching.short_paths import ShortPaths

_MANY = 1 / 64
"""Of the columns: if more are left over, rows look for them one by one; see `short_paths`."""
_MISSES = 16
"""Rows with no such column near, after which the others are sought together."""
_ROUNDING = 1e-14
"""Of the greatest weight: an edge this close to its prices is covered exactly."""


class Edges(NamedTuple):
    """The pairs that may be assigned, in order of rows and then of columns; every row has one at least."""

    rows: Int[np.ndarray, " E"]
    columns: Int[np.ndarray, " E"]
    weights: Float[np.ndarray, " E"]


class Augmentation:
    """An assignment under way, which edges may join.

    Attributes:
      u, v: the prices of rows, and after them of the holder; of columns.
      column_of: the column of each row, -1 for none.
      row_of: the row of each column, -1 for none, n for the holder.
    """

    def __init__(self, shape: tuple[int, int], prices: Float[np.ndarray, " m"]) -> None:
        """Starts without edges, from prices of the columns that are all equal if there are fewer rows than columns."""
        n, m = shape
        self.n, self.m = n, m
        self.u, self.v = np.append(np.full(n, np.nan), -prices.min()), prices.astype(np.float64)
        self.column_of, self.row_of = np.full(n, -1), np.full(m, -1)

    def solve(self, edges: Edges) -> None:
        """Assigns every row, such that the sum of the weights is the greatest that these edges allow.

        Raises:
          ValueError: the edges do not allow every row a column of its own.
        """
        self._tolerance = _ROUNDING * max(np.abs(edges.weights).max(), np.abs(self.v).max())
        self._limit = np.inf
        self._cover(edges)
        self._take_free_columns(edges)
        if self.m - self.n > _MANY * self.m:
            self._take_near_columns(edges)
        self._hold()
        while len(sources := self._without_column()):
            self._search(edges, sources)

    def _cover(self, edges: Edges) -> None:
        """Raises prices of columns, or of rows where these are fewer, until they cover all edges; frees the others."""
        rows, columns, weights = edges
        short = weights - self.u[rows] - self.v[columns]
        bad = short > self._tolerance
        if np.isfinite(short).all() and len(np.unique(columns[bad])) < len(np.unique(rows[bad])):
            np.maximum.at(self.v, columns[bad], (weights - self.u[rows])[bad])
        starts = np.searchsorted(rows, np.arange(self.n))
        self.u[:-1] = np.maximum.reduceat(weights - self.v[columns], starts)
        self.u[-1] = -self.v.min()
        kept = np.zeros(self.m, bool)
        kept[columns[self._tight(edges) & (self.row_of[columns] == rows)]] = True
        self.row_of[~kept] = -1
        self.column_of[:] = -1
        held = np.flatnonzero(self.row_of >= 0)
        self.column_of[self.row_of[held]] = held

    def _take_free_columns(self, edges: Edges) -> None:
        """Gives rows columns that nobody has and that they pay the full price for."""
        at = np.flatnonzero(self._tight(edges))
        at = at[(self.column_of[edges.rows[at]] < 0) & (self.row_of[edges.columns[at]] < 0)]
        at = at[np.unique(edges.rows[at], return_index=True)[1]]
        at = at[np.unique(edges.columns[at], return_index=True)[1]]
        self.column_of[edges.rows[at]], self.row_of[edges.columns[at]] = edges.columns[at], edges.rows[at]

    def _take_near_columns(self, edges: Edges) -> None:
        """Gives rows, one by one, what the cheapest exchange frees, while that leaves enough for the holder."""
        n = self.n
        starts = np.searchsorted(edges.rows, np.arange(n + 1))
        paths = ShortPaths(starts, edges.columns, edges.weights, self.u[:n], self.v, self.column_of, self.row_of)
        left, missed = set(np.flatnonzero((self.row_of < 0) & self._tight_for_holder()).tolist()), 0
        for row in np.flatnonzero(self.column_of < 0).tolist():
            if len(left) <= self.m - n or missed == _MISSES:
                break
            column = paths.augment(row)
            left.discard(column)
            missed += column < 0
        self.u[:n], self.v[:], self.column_of[:], self.row_of[:] = paths.u, paths.v, paths.column_of, paths.row_of

    def _hold(self) -> None:
        """Gives the holder columns that nobody has, and that it pays the full price for, as many as it lacks."""
        left = np.flatnonzero((self.row_of < 0) & self._tight_for_holder())
        self.row_of[left[: self._missing()]] = self.n

    def _search(self, edges: Edges, sources: Int[np.ndarray, " _"]) -> None:
        """Finds the trees of cheapest exchanges from the sources, moves the prices, and exchanges along the trees."""
        n = self.n
        distance, before, root = dijkstra(
            self._graph(edges), indices=sources, min_only=True, return_predecessors=True, limit=self._limit
        )  # of all nodes: rows, the holder, columns
        free = np.flatnonzero(self.row_of < 0)
        free = free[np.isfinite(distance[n + 1 + free])]
        free = free[np.argsort(distance[n + 1 + free], kind="stable")]
        ends = free[np.unique(root[n + 1 + free], return_index=True)[1]]
        if not len(ends) and self._limit == np.inf:
            raise ValueError(f"the edges leave {len(sources)} of {n} rows without a column of their own; add some")
        reach = distance[n + 1 + ends].max(initial=0.0)
        self._limit = 2 * reach if reach > 0 else np.inf
        distance = np.minimum(distance, reach)
        by_row = (self.row_of >= 0) & (self.row_of < n)
        self.v -= np.where(by_row, distance[np.where(by_row, self.row_of, 0)], distance[n + 1 :])
        self.u += distance[: n + 1]
        before = before.tolist()
        for end in ends.tolist():
            self._exchange(end, before)

    def _graph(self, edges: Edges) -> csr_array:
        """Returns the exchanges: who would take a column leads to who has it, at the price the sum would lose."""
        n, m = self.n, self.m
        rows, columns, weights = edges
        by_row = (self.row_of >= 0) & (self.row_of < n)
        node = np.where(by_row, self.row_of, n + 1 + np.arange(m))
        cost = np.maximum(self.u[rows] + self.v[columns] - weights, 0.0)
        counts = np.bincount(rows, minlength=n)
        if n == m:
            start = np.concatenate([[0], np.cumsum(counts), np.full(m + 1, len(rows))])
            return csr_array((cost, node[columns], start), shape=(n + m + 1, n + m + 1))
        held = self.row_of == n
        cost = np.concatenate([cost, np.maximum(self.u[n] + self.v, 0.0), np.zeros(held.sum())])
        start = np.concatenate([[0], np.cumsum(np.concatenate([counts, [m], held]))])
        leads = np.concatenate([node[columns], node, np.full(held.sum(), n)])
        return csr_array((cost, leads, start), shape=(n + m + 1, n + m + 1))

    def _exchange(self, column: int, before: list[int]) -> None:
        """Hands a free column to whoever leads to it, that one's column to the one before, and so on to the root."""
        n, node = self.n, self.n + 1 + column
        while True:
            taker = before[node]
            self.row_of[column] = taker
            if taker == n:
                if before[n] < 0:
                    return
                column, node = before[n] - n - 1, before[n]
                continue
            given, self.column_of[taker] = int(self.column_of[taker]), column
            if given < 0:
                return
            column, node = given, taker

    def _tight(self, edges: Edges) -> Bool[np.ndarray, " E"]:
        rows, columns, weights = edges
        return self.u[rows] + self.v[columns] - weights <= self._tolerance

    def _tight_for_holder(self) -> Bool[np.ndarray, " m"]:
        return self.u[self.n] + self.v <= self._tolerance

    def _missing(self) -> int:
        """Returns how many columns the holder has yet to take."""
        return self.m - self.n - int((self.row_of == self.n).sum())

    def _without_column(self) -> Int[np.ndarray, " _"]:
        rows = np.flatnonzero(self.column_of < 0)
        return np.append(rows, self.n) if self._missing() else rows
