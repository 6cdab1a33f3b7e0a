"""Sparse linear assignment with dual prices, by shortest augmenting paths, one at a time or many per search.

Rows are assigned columns, each edge having a weight. Prices u of rows and v of columns are dual feasible where
`u + v >= w` on every edge; with equality (a tight edge) on those assigned, no assignment has a greater sum. One
Dijkstra search from all unassigned rows finds a forest of cheapest reassignments; trees of different rows are disjoint,
so that each tree assigns its row a column.

With fewer rows than columns, one dummy row takes the columns that are left over, each at weight 0. Where these are
many, rows are augmented one by one first: every path that ended at such a column in the joint search would lead through
the dummy row, and so exclude the others.

Source: Hung and Rom 1980, Solving the assignment problem by relaxation, which grows such a forest on dense matrices;
Edmonds and Karp 1972 for the prices; Jonker and Volgenant 1987 and Crouse 2016 for the paths of single rows.
"""

import heapq
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

_MANY = 1 / 64
"""Share of columns left over above which rows are first augmented one by one."""
_MISSES = 16
"""Rows that reach no left-over column nearby, after which the remaining rows are searched together."""
_REACH = 1024
"""Rows that a single path may visit; visiting so many takes as long as one search of the whole graph."""
_ROUNDING = 1e-14
"""Of the greatest weight: an edge with so small a reduced cost is tight."""


class Edges(NamedTuple):
    """The pairs that may be assigned, sorted by row and then by column; every row has at least one."""

    rows: Int[np.ndarray, " E"]
    columns: Int[np.ndarray, " E"]
    weights: Float[np.ndarray, " E"]


class SparseAssignment:
    """An assignment and its dual prices, kept from one `solve` to the next, which may bring more edges.

    Attributes:
      u, v: the prices of rows, the dummy row's last, and of columns.
      column_of: the column of each row, -1 for none.
      row_of: the row of each column, -1 for none, n for the dummy row.
    """

    def __init__(self, shape: tuple[int, int], prices: Float[np.ndarray, " m"]) -> None:
        """Starts without edges, from prices of the columns that are all equal if there are fewer rows than columns."""
        n, m = shape
        self.n, self.m = n, m
        self.u, self.v = np.append(np.full(n, np.nan), -prices.min()), prices.astype(np.float64)
        self.column_of, self.row_of = np.full(n, -1), np.full(m, -1)

    def solve(self, edges: Edges) -> None:
        """Assigns every row a column, such that the sum of the weights is the greatest that these edges allow.

        Raises:
          ValueError: the edges have no assignment of all rows.
        """
        self._tolerance = _ROUNDING * max(np.abs(edges.weights).max(), np.abs(self.v).max())
        self._limit = np.inf
        self._make_feasible(edges)
        self._assign_tight_edges(edges)
        if self.m - self.n > _MANY * self.m:
            self._augment_single_rows(edges)
        self._assign_dummy_row()
        while len(sources := self._unassigned_rows()):
            self._augment_forest(edges, sources)

    def _make_feasible(self, edges: Edges) -> None:
        """Raises prices of columns, or of rows where fewer, until they are feasible; unassigns edges not tight."""
        rows, columns, weights = edges
        violation = weights - self.u[rows] - self.v[columns]
        violated = violation > self._tolerance
        if np.isfinite(violation).all() and len(np.unique(columns[violated])) < len(np.unique(rows[violated])):
            np.maximum.at(self.v, columns[violated], (weights - self.u[rows])[violated])
        starts = np.searchsorted(rows, np.arange(self.n))
        self.u[:-1] = np.maximum.reduceat(weights - self.v[columns], starts)
        self.u[-1] = -self.v.min()
        kept = np.zeros(self.m, bool)
        kept[columns[self._tight(edges) & (self.row_of[columns] == rows)]] = True
        self.row_of[~kept] = -1
        self.column_of[:] = -1
        assigned = np.flatnonzero(self.row_of >= 0)
        self.column_of[self.row_of[assigned]] = assigned

    def _assign_tight_edges(self, edges: Edges) -> None:
        """Assigns tight edges between unassigned rows and columns, greedily."""
        at = np.flatnonzero(self._tight(edges))
        at = at[(self.column_of[edges.rows[at]] < 0) & (self.row_of[edges.columns[at]] < 0)]
        at = at[np.unique(edges.rows[at], return_index=True)[1]]
        at = at[np.unique(edges.columns[at], return_index=True)[1]]
        self.column_of[edges.rows[at]], self.row_of[edges.columns[at]] = edges.columns[at], edges.rows[at]

    def _augment_single_rows(self, edges: Edges) -> None:
        """Augments rows one by one, while enough columns that the dummy row can take are left for it."""
        n = self.n
        paths = _SinglePaths(edges, self)
        left, missed = set(np.flatnonzero((self.row_of < 0) & self._tight_for_dummy()).tolist()), 0
        for row in np.flatnonzero(self.column_of < 0).tolist():
            if len(left) <= self.m - n or missed == _MISSES:
                break
            column = paths.augment(row)
            left.discard(column)
            missed += column < 0
        self.u[:n], self.v[:], self.column_of[:], self.row_of[:] = paths.u, paths.v, paths.column_of, paths.row_of

    def _assign_dummy_row(self) -> None:
        """Assigns the dummy row unassigned columns that are tight for it, up to the number it still needs."""
        left = np.flatnonzero((self.row_of < 0) & self._tight_for_dummy())
        self.row_of[left[: self._dummy_deficit()]] = self.n

    def _augment_forest(self, edges: Edges, sources: Int[np.ndarray, " _"]) -> None:
        """Finds the shortest augmenting paths from all sources, updates the prices, and augments along the paths."""
        n = self.n
        distance, before, root = dijkstra(
            self._residual_graph(edges), indices=sources, min_only=True, return_predecessors=True, limit=self._limit
        )  # of all nodes: rows, the dummy row, columns
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
            self._augment(end, before)

    def _residual_graph(self, edges: Edges) -> csr_array:
        """Returns edges from each row to the rows that have its columns, or to unassigned columns, by reduced cost."""
        n, m = self.n, self.m
        rows, columns, weights = edges
        by_row = (self.row_of >= 0) & (self.row_of < n)
        node = np.where(by_row, self.row_of, n + 1 + np.arange(m))
        cost = np.maximum(self.u[rows] + self.v[columns] - weights, 0.0)
        counts = np.bincount(rows, minlength=n)
        if n == m:
            start = np.concatenate([[0], np.cumsum(counts), np.full(m + 1, len(rows))])
            return csr_array((cost, node[columns], start), shape=(n + m + 1, n + m + 1))
        by_dummy = self.row_of == n
        cost = np.concatenate([cost, np.maximum(self.u[n] + self.v, 0.0), np.zeros(by_dummy.sum())])
        start = np.concatenate([[0], np.cumsum(np.concatenate([counts, [m], by_dummy]))])
        leads = np.concatenate([node[columns], node, np.full(by_dummy.sum(), n)])
        return csr_array((cost, leads, start), shape=(n + m + 1, n + m + 1))

    def _augment(self, column: int, before: list[int]) -> None:
        """Assigns a column to its predecessor on the path, that row's former column to the one before, and so on."""
        n, node = self.n, self.n + 1 + column
        while True:
            row = before[node]
            self.row_of[column] = row
            if row == n:
                if before[n] < 0:
                    return
                column, node = before[n] - n - 1, before[n]
                continue
            released, self.column_of[row] = int(self.column_of[row]), column
            if released < 0:
                return
            column, node = released, row

    def _tight(self, edges: Edges) -> Bool[np.ndarray, " E"]:
        rows, columns, weights = edges
        return self.u[rows] + self.v[columns] - weights <= self._tolerance

    def _tight_for_dummy(self) -> Bool[np.ndarray, " m"]:
        return self.u[self.n] + self.v <= self._tolerance

    def _dummy_deficit(self) -> int:
        """Returns how many columns the dummy row has yet to take."""
        return self.m - self.n - int((self.row_of == self.n).sum())

    def _unassigned_rows(self) -> Int[np.ndarray, " _"]:
        rows = np.flatnonzero(self.column_of < 0)
        return np.append(rows, self.n) if self._dummy_deficit() else rows


class _SinglePaths:
    """Shortest augmenting paths one at a time, visiting only the rows on the way; lists are faster here than arrays.

    Where many columns are left over, a path ends after a row or two; where few are, paths wind through most rows, and
    one search for all rows is faster.
    """

    def __init__(self, edges: Edges, assignment: SparseAssignment) -> None:
        n = assignment.n
        self._starts = np.searchsorted(edges.rows, np.arange(n + 1)).tolist()
        self._columns, self._weights = edges.columns.tolist(), edges.weights.tolist()
        self.u, self.v = assignment.u[:n].tolist(), assignment.v.tolist()
        self.column_of, self.row_of = assignment.column_of.tolist(), assignment.row_of.tolist()

    def augment(self, source: int) -> int:
        """Assigns an unassigned row by the cheapest reassignment, and returns the last column of the path.

        Unassigned columns keep their prices. Returns -1, and changes nothing, if no such column is near.
        """
        distance: dict[int, float] = {}
        before: dict[int, int] = {}
        least, end, last = math.inf, -1, -1
        queue = [(0.0, source, -1)]
        while queue and queue[0][0] < least:
            so_far, row, previous = heapq.heappop(queue)
            if row in distance:
                continue
            if len(distance) == _REACH:
                return -1
            distance[row], before[row] = so_far, previous
            start = so_far + self.u[row]
            for edge in range(self._starts[row], self._starts[row + 1]):
                column = self._columns[edge]
                cost = max(start + self.v[column] - self._weights[edge], so_far)
                if cost < least:
                    if (owner := self.row_of[column]) < 0:
                        least, end, last = cost, column, row
                    elif owner not in distance:
                        heapq.heappush(queue, (cost, owner, row))
        if end >= 0:
            self._update_prices(distance, least)
            self._reassign(end, last, before)
        return end

    def _update_prices(self, distance: dict[int, float], length: float) -> None:
        for row, so_far in distance.items():
            self.u[row] -= length - so_far
            if (own := self.column_of[row]) >= 0:
                self.v[own] += length - so_far

    def _reassign(self, column: int, row: int, before: dict[int, int]) -> None:
        """Assigns a column to a row, that row's former column to the row before it, and so on to the source."""
        while row >= 0:
            self.row_of[column] = row
            column, self.column_of[row], row = self.column_of[row], column, before[row]
