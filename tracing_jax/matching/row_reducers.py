"""A matrix of similarities seen block by block: whole where it lies, in the order in which a solver is to see it.

A solver asks only for what reductions give, so that no copy of the matrix is ever made, and one that lies on an
accelerator stays there. What breaks ties, here and in the solver, is the order of the view and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

_GROUPS = 4
"""Groups of columns per candidate asked for: few rows then have more candidates than were asked for."""

_BLOCK_BYTES = 2**22
"""Of one block of rows; small enough to stay in a cache between the passes over it."""


class Survey(NamedTuple):
    """The extremes of a matrix.

    Attributes:
      best: the column of the greatest entry of each row.
      most: that entry.
      tied: whether it is not the only such entry of its row.
      least: the least of all entries.
      broken: how many entries are NaN or infinite; the other figures then mean nothing.
    """

    best: Int[np.ndarray, " n"]
    most: Float[np.ndarray, " n"]
    tied: Bool[np.ndarray, " n"]
    least: float
    broken: int


class Best(NamedTuple):
    """The entries of each row with the greatest similarity less the price of their column.

    Attributes:
      rows, columns, values: where they are, and the similarity there.
      rest: what no other entry of the row exceeds, less the price of its column, in float32 arithmetic.
    """

    rows: Int[np.ndarray, " E"]
    columns: Int[np.ndarray, " E"]
    values: Float[np.ndarray, " E"]
    rest: Float[np.ndarray, " n"]

    def where(self, chosen: Bool[np.ndarray, " E"]) -> "Best":
        """Returns the entries that are chosen."""
        return Best(self.rows[chosen], self.columns[chosen], self.values[chosen], self.rest)


@runtime_checkable
class View(Protocol):
    """A matrix of similarities, of which only reductions are seen."""

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns."""

    def survey(self) -> Survey:
        """Returns the extremes."""

    def best(self, prices: Float[np.ndarray, " m"], count: int) -> Best:
        """Returns the `count` entries of each row that are greatest less these prices, with those that tie with them.

        Of many ties some are left out, by the order of the view.
        """

    def sample(self, count: int) -> Float[np.ndarray, "S m"]:
        """Returns at most `count` whole rows, evenly spread."""

    def diagonal(self) -> Float[np.ndarray, " n"]:
        """Returns the entries (i, i)."""


@dataclass(frozen=True)
class HostView:
    """A view of a numpy matrix, which is read as it lies; only what is found is put into the view's order.

    Attributes:
      rows, columns: which of them are seen, and in which order; None for all, as they stand.
      absolute: whether absolute values are seen.
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
        """The numbers of rows and of columns that are seen."""
        rows, columns = self._order
        return len(rows), len(columns)

    def survey(self) -> Survey:
        """Returns the extremes, in one pass."""
        (n, _), columns = self.shape, self._columns_at()
        best, most, tied, least, broken = np.empty(n, int), np.empty(n), np.empty(n, bool), np.inf, 0
        for rows, block in self._blocks(np.where(columns < 0, np.float32(np.inf), np.float32(0))):
            first = block.argmax(axis=1)
            greatest_ones = block[np.arange(len(block)), first]
            smallest = block.min(initial=np.inf, where=columns >= 0)
            if not np.isfinite([smallest, greatest_ones.max(initial=0)]).all():
                broken += int(np.count_nonzero(~np.isfinite(block[:, columns >= 0])))
            best[rows], most[rows], least = columns[first], greatest_ones, min(least, smallest)
            tied[rows] = np.count_nonzero(block == greatest_ones[:, None], axis=1) > 1
        return Survey(best, most, tied, float(least), broken)

    def best(self, prices: Float[np.ndarray, " m"], count: int) -> Best:
        """Returns the greatest entries of each row, in one pass."""
        (n, m), (order_rows, order) = self.shape, self._order
        columns, dear = self._columns_at(), np.full(self.matrix.shape[1], np.inf, np.float32)
        dear[order] = prices
        rest = np.empty(n, np.float32)
        found = []
        for rows, block in self._blocks(dear):
            at, where, rest[rows] = greatest(block, min(count, m), order, rows)
            found.append((rows[at], columns[where]))
        at, where = (np.concatenate(parts) for parts in zip(*found))
        values = self.matrix[order_rows[at], order[where]]
        return Best(at, where, np.abs(values) if self.absolute else values, rest)

    def sample(self, count: int) -> Float[np.ndarray, "S m"]:
        """Returns at most `count` whole rows, evenly spread."""
        n, _ = self.shape
        rows, columns = self._order
        found = self.matrix[rows[np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))]][:, columns]
        return np.abs(found) if self.absolute else found

    def diagonal(self) -> Float[np.ndarray, " n"]:
        """Returns the entries (i, i)."""
        rows, columns = self._order
        found = self.matrix[rows, columns[: len(rows)]]
        return np.abs(found) if self.absolute else found

    def _columns_at(self) -> Int[np.ndarray, " m0"]:
        """Returns where each column of the matrix is seen, -1 if it is not."""
        return places(self._order[1], self.matrix.shape[1])

    def _blocks(
        self, prices: Float[np.ndarray, " m0"]
    ) -> Iterator[tuple[Int[np.ndarray, " b"], Float[np.ndarray, "b m0"]]]:
        """Yields blocks of the rows that are seen, less prices, with where they are seen; each is overwritten next."""
        n, m = self.matrix.shape
        rows = places(self._order[0], n)
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


def not_finite(broken: int, size: int) -> str:
    """Returns the complaint about similarities that are not finite."""
    return (
        f"{broken} of {size} similarities are NaN or infinite; look for such values in the weights or activations they "
        "come from"
    )


def places(order: Int[np.ndarray, " n"], size: int) -> Int[np.ndarray, " size"]:
    """Returns the inverse of an order of some of `size` things: the place of each, -1 for those left out."""
    found = np.full(size, -1)
    found[order] = np.arange(len(order))
    return found


def greatest(
    block: Float[np.ndarray, "b m0"], count: int, order: Int[np.ndarray, " m"], turns: Int[np.ndarray, " b"]
) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"], Float[np.ndarray, " b"]]:
    """Returns where the `count` greatest entries of each row are, with their ties, and what no other entry exceeds.

    The columns are dealt to groups in turn. The `count` greatest of the groups' maxima are as many entries, so no entry
    below the least of them is sought. That takes maxima of whole vectors where partitioning the rows would not.

    Args:
      block: some rows; columns that do not count hold -inf.
      count: at most the number of columns that count.
      order: the columns that count, in the order by which ties are broken where they are too many.
      turns: a number for each row, by which rows with many ties get different ones.
    """
    b, m = block.shape
    groups = min(_GROUPS * count, m)
    maxima = block[:, : m // groups * groups].reshape(b, -1, groups).max(axis=1)
    level = np.partition(maxima, groups - count, axis=1)[:, groups - count]
    level = np.maximum(level, np.finfo(np.float32).min)
    at, columns = np.divmod(np.flatnonzero(block >= level[:, None]), m)
    values = block[at, columns]
    by_value = np.lexsort((-values, at))
    starts = np.searchsorted(at, np.arange(b))
    level = values[by_value][starts + count - 1]
    kept = values >= level[at]
    at, columns = at[kept], columns[kept]
    crowded = np.flatnonzero(np.bincount(at, minlength=b) > 2 * count)
    if len(crowded):
        thinned = [thinned_greatest(block[i, order], count, int(turns[i])) for i in crowded]
        kept = ~np.isin(at, crowded)
        at = np.concatenate([at[kept], np.repeat(crowded, [len(one) for one in thinned])])
        columns = np.concatenate([columns[kept], *(order[one] for one in thinned)])
    return at, columns, level


def thinned_greatest(row: Float[np.ndarray, " m"], count: int, turn: int) -> Int[np.ndarray, " _"]:
    """Returns the greatest entries of a row in which many tie for the last of `count` places: `count` of those that do.

    Rows of different turns get different ones, else all of them would contend for a few.
    """
    level = np.partition(row, -count)[-count]
    equal = np.flatnonzero(row == level)
    first = np.searchsorted(equal, turn * count % len(row))
    return np.concatenate([np.flatnonzero(row > level), equal[(first + np.arange(count)) % len(equal)]])
