"""Reductions over the rows of a similarity matrix, block by block, with rows and columns in a given order.

An assignment solver needs only these reductions: the matrix is never copied, and one on an accelerator stays there.
Ties, here and in the solver, are broken by the given order of rows and columns alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

_GROUPS = 4
"""Groups of columns per entry requested; with so many, few rows return more entries than were requested."""

_BLOCK_BYTES = 2**22
"""Of one block of rows; small enough to stay in a cache between the passes over it."""


class RowStats(NamedTuple):
    """Row maxima of a matrix, and its minimum.

    Attributes:
      argmax: the column of the greatest entry of each row.
      max: that entry.
      tied: whether another entry of the row equals it.
      min: the least of all entries.
      non_finite: the number of NaN or infinite entries; unless 0, the other values are meaningless.
    """

    argmax: Int[np.ndarray, " n"]
    max: Float[np.ndarray, " n"]
    tied: Bool[np.ndarray, " n"]
    min: float
    non_finite: int


class TopK(NamedTuple):
    """The entries of each row with the greatest reduced similarity: the similarity less the price of the column.

    Attributes:
      rows, columns, values: positions of the entries, and the similarities there.
      rest_at_most: an upper bound on the reduced similarity of every other entry of the row, in float32 arithmetic.
    """

    rows: Int[np.ndarray, " E"]
    columns: Int[np.ndarray, " E"]
    values: Float[np.ndarray, " E"]
    rest_at_most: Float[np.ndarray, " n"]

    def where(self, chosen: Bool[np.ndarray, " E"]) -> "TopK":
        """Returns the chosen entries."""
        return TopK(self.rows[chosen], self.columns[chosen], self.values[chosen], self.rest_at_most)


@runtime_checkable
class RowReducer(Protocol):
    """Reductions over the rows of a similarity matrix `[n, m]`."""

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns."""

    def stats(self) -> RowStats:
        """Returns the row maxima and the minimum."""

    def top_k(self, prices: Float[np.ndarray, " m"], k: int) -> TopK:
        """Returns the k entries of each row that are greatest less these prices, and those that tie with the k-th.

        If more than k entries tie with it, k of them are returned, chosen by the order of the columns.
        """

    def sample_rows(self, count: int) -> Float[np.ndarray, "S m"]:
        """Returns at most `count` whole rows, evenly spread."""

    def diagonal(self) -> Float[np.ndarray, " n"]:
        """Returns the entries (i, i)."""


@dataclass(frozen=True)
class HostRowReducer:
    """Row reductions of a numpy matrix, in numpy; the matrix is read in place, and only results are reordered.

    Attributes:
      rows, columns: indices of the rows and columns that take part, in their order; None for all.
      absolute: whether absolute values are taken.
    """

    matrix: Float[np.ndarray, "n0 m0"]
    rows: Int[np.ndarray, " n"] | None = None
    columns: Int[np.ndarray, " m"] | None = None
    absolute: bool = False

    @cached_property
    def _order(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
        chosen = zip((self.rows, self.columns), self.matrix.shape)
        return tuple(np.arange(size) if one is None else one for one, size in chosen)  # type: ignore[return-value]

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns that take part."""
        rows, columns = self._order
        return len(rows), len(columns)

    def stats(self) -> RowStats:
        """Returns the row maxima and the minimum, in one pass."""
        (n, _), columns = self.shape, self._column_positions()
        argmax, maxima, tied, least, non_finite = np.empty(n, int), np.empty(n), np.empty(n, bool), np.inf, 0
        for rows, block in self._blocks(np.where(columns < 0, np.float32(np.inf), np.float32(0))):
            first = block.argmax(axis=1)
            block_max = block[np.arange(len(block)), first]
            block_min = block.min(initial=np.inf, where=columns >= 0)
            if not np.isfinite([block_min, block_max.max(initial=0)]).all():
                non_finite += int(np.count_nonzero(~np.isfinite(block[:, columns >= 0])))
            argmax[rows], maxima[rows], least = columns[first], block_max, min(least, block_min)
            tied[rows] = np.count_nonzero(block == block_max[:, None], axis=1) > 1
        return RowStats(argmax, maxima, tied, float(least), non_finite)

    def top_k(self, prices: Float[np.ndarray, " m"], k: int) -> TopK:
        """Returns the greatest reduced entries of each row, in one pass."""
        (n, m), (order_rows, order) = self.shape, self._order
        columns, matrix_prices = self._column_positions(), np.full(self.matrix.shape[1], np.inf, np.float32)
        matrix_prices[order] = prices
        rest = np.empty(n, np.float32)
        found = []
        for rows, block in self._blocks(matrix_prices):
            at, where, rest[rows] = _block_top_k(block, min(k, m), order, rows)
            found.append((rows[at], columns[where]))
        at, where = (np.concatenate(parts) for parts in zip(*found))
        values = self.matrix[order_rows[at], order[where]]
        return TopK(at, where, np.abs(values) if self.absolute else values, rest)

    def sample_rows(self, count: int) -> Float[np.ndarray, "S m"]:
        """Returns at most `count` whole rows, evenly spread."""
        n, _ = self.shape
        rows, columns = self._order
        some = np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))
        found = self.matrix[np.ix_(rows[some], columns)]  # a quarter of the time of rows first and columns then
        return np.abs(found) if self.absolute else found

    def diagonal(self) -> Float[np.ndarray, " n"]:
        """Returns the entries (i, i)."""
        rows, columns = self._order
        found = self.matrix[rows, columns[: len(rows)]]
        return np.abs(found) if self.absolute else found

    def _column_positions(self) -> Int[np.ndarray, " m0"]:
        """Returns the position of each column of the matrix in the given order, -1 if it takes no part."""
        return inverse_order(self._order[1], self.matrix.shape[1])

    def _blocks(
        self, prices: Float[np.ndarray, " m0"]
    ) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "b m0"]]]:
        """Yields the positions of some rows and these rows less prices, in a buffer that the next block overwrites."""
        n, m = self.matrix.shape
        rows = inverse_order(self._order[0], n)
        size = max(1, min(n, _BLOCK_BYTES // (4 * max(1, m))))
        buffer = np.empty((size, m), np.result_type(self.matrix.dtype, np.float32))
        for start in range(0, n, size):
            block = self.matrix[start : start + size]
            out = buffer[: len(block)]
            if self.absolute:
                block = np.abs(block, out=out)
            np.subtract(block, prices, out=out)
            here = rows[start : start + size]
            yield (here, out) if (here >= 0).all() else (here[here >= 0], out[here >= 0])


def inverse_order(order: Int[np.ndarray, " n"], size: int) -> Int[np.ndarray, " size"]:
    """Returns the inverse of an order of some of `size` items: the position of each, -1 for those left out."""
    found = np.full(size, -1)
    found[order] = np.arange(len(order))
    return found


def _block_top_k(
    block: Float[np.ndarray, "b m0"], k: int, order: Int[np.ndarray, " m"], offsets: Int[np.ndarray, " b"]
) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"], Float[np.ndarray, " b"]]:
    """Returns rows and columns of the k greatest entries of each row, with their ties, and the k-th greatest entry.

    The columns are divided among groups. The k-th greatest of the groups' maxima is a lower bound on the k-th greatest
    entry, so only entries at or above it are sorted. Maxima of whole vectors are faster than partitioning each row.

    Args:
      block: some rows; columns that take no part hold -inf.
      k: at most the number of columns that take part.
      order: these columns, in the order by which ties are broken where they are too many.
      offsets: a number for each row, by which rows with many ties keep different ones.
    """
    b, m = block.shape
    groups = min(_GROUPS * k, m)
    maxima = block[:, : m // groups * groups].reshape(b, -1, groups).max(axis=1)
    level = np.partition(maxima, groups - k, axis=1)[:, groups - k]
    level = np.maximum(level, np.finfo(np.float32).min)
    at, columns = np.divmod(np.flatnonzero(block >= level[:, None]), m)
    values = block[at, columns]
    by_value = np.lexsort((-values, at))
    starts = np.searchsorted(at, np.arange(b))
    level = values[by_value][starts + k - 1]
    kept = values >= level[at]
    at, columns = at[kept], columns[kept]
    crowded = np.flatnonzero(np.bincount(at, minlength=b) > 2 * k)
    if len(crowded):
        kept_ties = [top_k_few_ties(block[i, order], k, int(offsets[i])) for i in crowded]
        kept = ~np.isin(at, crowded)
        at = np.concatenate([at[kept], np.repeat(crowded, [len(one) for one in kept_ties])])
        columns = np.concatenate([columns[kept], *(order[one] for one in kept_ties)])
    return at, columns, level


def top_k_few_ties(row: Float[np.ndarray, " m"], k: int, offset: int) -> Int[np.ndarray, " _"]:
    """Returns the columns of a row's entries above the k-th greatest, and of k of the many that equal it.

    Rows of different offsets keep different ones, else all rows would compete for the same few columns.
    """
    level = np.partition(row, -k)[-k]
    equal = np.flatnonzero(row == level)
    first = np.searchsorted(equal, offset * k % len(row))
    return np.concatenate([np.flatnonzero(row > level), equal[(first + np.arange(k)) % len(equal)]])
