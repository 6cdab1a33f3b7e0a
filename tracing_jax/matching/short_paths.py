"""Shortest augmenting paths one at a time, each looking only at the rows that it passes.

Where many columns are left over, a path ends at one of them after a row or two. Then this is the fastest, in plain
Python too; where few are, paths wind through most rows, and are sooner found together.

Source: Jonker and Volgenant 1987, A shortest augmenting path algorithm; Crouse 2016 for fewer rows than columns.
"""

import heapq
import math

import numpy as np
from jaxtyping import Float, Int

_REACH = 1024
"""Rows that a path may look at: so many cost as much time as a search of the whole graph."""


class ShortPaths:
    """An assignment under way, in lists, which are the faster one element at a time.

    Attributes:
      u, v: the prices of rows and of columns.
      column_of, row_of: of each row and of each column, its own, or -1.
    """

    def __init__(
        self,
        starts: Int[np.ndarray, " _"],
        columns: Int[np.ndarray, " E"],
        weights: Float[np.ndarray, " E"],
        u: Float[np.ndarray, " n"],
        v: Float[np.ndarray, " m"],
        column_of: Int[np.ndarray, " n"],
        row_of: Int[np.ndarray, " m"],
    ) -> None:
        """Starts from prices that cover all edges; those of row i are `starts[i]` to `starts[i + 1]`."""
        self._starts, self._columns, self._weights = starts.tolist(), columns.tolist(), weights.tolist()
        self.u, self.v = u.tolist(), v.tolist()
        self.column_of, self.row_of = column_of.tolist(), row_of.tolist()

    def augment(self, source: int) -> int:
        """Gives a row without a column one by the cheapest exchange, whose last column it returns.

        Columns that nobody has keep their prices. Returns -1, and changes nothing, if no such column is near.
        """
        distance: dict[int, float] = {}
        before: dict[int, int] = {}
        least, end, last = math.inf, -1, -1
        ahead = [(0.0, source, -1)]
        while ahead and ahead[0][0] < least:
            passed, row, by = heapq.heappop(ahead)
            if row in distance:
                continue
            if len(distance) == _REACH:
                return -1
            distance[row], before[row] = passed, by
            worth = passed + self.u[row]
            for edge in range(self._starts[row], self._starts[row + 1]):
                column = self._columns[edge]
                cost = max(worth + self.v[column] - self._weights[edge], passed)
                if cost < least:
                    if (owner := self.row_of[column]) < 0:
                        least, end, last = cost, column, row
                    elif owner not in distance:
                        heapq.heappush(ahead, (cost, owner, row))
        if end >= 0:
            self._reprice(distance, least)
            self._exchange(end, last, before)
        return end

    def _reprice(self, distance: dict[int, float], least: float) -> None:
        """Lets the rows that were passed pay what the path costs beyond them, for their own columns or for its last."""
        for row, passed in distance.items():
            self.u[row] -= least - passed
            if (own := self.column_of[row]) >= 0:
                self.v[own] += least - passed

    def _exchange(self, column: int, row: int, before: dict[int, int]) -> None:
        """Hands a column to a row, that row's own to the one before it, and so on to the source."""
        while row >= 0:
            self.row_of[column] = row
            column, self.column_of[row], row = self.column_of[row], column, before[row]
