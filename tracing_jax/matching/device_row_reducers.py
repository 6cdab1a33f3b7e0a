"""Row reductions of similarity matrices on an accelerator, stored or computed from their factors block by block.

Only the results leave the device. All blocks have one shape, so each reduction compiles once per matrix.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.matching.row_reducers import (
    HostRowReducer,
    RowReducer,
    RowStats,
    TopK,
    inverse_order,
    top_k_few_ties,
)

_BLOCK_ROWS = 512


@dataclass(frozen=True)
class FactoredSimilarity:
    """The similarity matrix X Y^T, kept as its factors and computed block by block in every pass."""

    x: Float[Array, "n d"]
    y: Float[Array, "m d"]

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns."""
        return self.x.shape[0], self.y.shape[0]

    @property
    def T(self) -> "FactoredSimilarity":  # noqa: N802 - named as that of arrays
        """The similarities Y X^T."""
        return FactoredSimilarity(self.y, self.x)

    def any(self, axis: int) -> Bool[Array, " _"]:
        """Returns which rows (`axis` 1) or columns (0) have a factor that is not zero."""
        return (self.x if axis == 1 else self.y).any(axis=1)


def row_reducer(
    similarity: Float[Array | np.ndarray, "n m"] | FactoredSimilarity,
    rows: Int[np.ndarray, " _"],
    columns: Int[np.ndarray, " _"],
    absolute: bool = False,
) -> RowReducer:
    """Returns row reductions on the device that holds the matrix, or in numpy for one in host memory.

    Args:
      similarity: the matrix, or its factors.
      rows: indices of the rows that take part, in their order.
      columns: the same for columns.
      absolute: whether absolute values are taken.
    """
    if isinstance(similarity, FactoredSimilarity):
        return DeviceRowReducer((similarity.x, similarity.y), rows, columns, absolute)
    if isinstance(similarity, np.ndarray) or all(device.platform == "cpu" for device in similarity.devices()):
        return HostRowReducer(np.asarray(similarity), rows, columns, absolute)
    return DeviceRowReducer((similarity,), rows, columns, absolute)


@dataclass(frozen=True)
class DeviceRowReducer:
    """Row reductions on a device of a matrix `(M,)`, or of the product X Y^T of factors `(X [n0, d], Y [m0, d])`.

    Attributes:
      rows, columns: indices of the rows and columns that take part, in their order.
      absolute: whether absolute values are taken.
    """

    factors: tuple[Array, ...]
    rows: Int[np.ndarray, " n"]
    columns: Int[np.ndarray, " m"]
    absolute: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns that take part."""
        return len(self.rows), len(self.columns)

    def stats(self) -> RowStats:
        """Returns the row maxima and the minimum, in one pass."""
        n, m = self.shape
        argmax, maxima, tied, least, non_finite = np.empty(n, int), np.empty(n), np.empty(n, bool), np.inf, 0
        columns = inverse_order(self.columns, self._width)
        for rows, inside, found in self._reduced(_stats, np.zeros(m)):
            first, greatest, ties, smallest, bad = (part[inside] for part in found)
            argmax[rows], maxima[rows], tied[rows] = columns[first], greatest, ties
            least, non_finite = min(least, smallest.min(initial=np.inf)), non_finite + int(bad.sum())
        return RowStats(argmax, maxima, tied, float(least), non_finite)

    def top_k(self, prices: Float[np.ndarray, " m"], k: int) -> TopK:
        """Returns the greatest reduced entries of each row, in one pass; rows with many ties are fetched whole."""
        n, m = self.shape
        k = min(k, m)
        columns, found = inverse_order(self.columns, self._width), []
        rest = np.empty(n, np.float32)
        top = functools.partial(_top_k, k=min(2 * k + 1, m))
        for rows, inside, (reduced, where, values) in self._reduced(top, prices):
            reduced, where, values = reduced[inside], where[inside], values[inside]
            rest[rows] = reduced[:, k - 1]
            kept = reduced >= rest[rows][:, None]
            crowded = kept[:, -1] & (kept.shape[1] < m)
            kept[crowded] = False
            at, rank = np.nonzero(kept)
            found.append((rows[at], columns[where[at, rank]], values[at, rank]))
            found += [self._row_with_ties(row, prices, k) for row in rows[crowded].tolist()]
        at, where, values = (np.concatenate(parts) for parts in zip(*found))
        return TopK(at, where, values, rest)

    def sample_rows(self, count: int) -> Float[np.ndarray, "S m"]:
        """Returns at most `count` whole rows, evenly spread."""
        n, _ = self.shape
        return self._whole(self.rows[np.unique(np.linspace(0, n - 1, min(n, count)).astype(int))])

    def diagonal(self) -> Float[np.ndarray, " n"]:
        """Returns the entries (i, i)."""
        return np.asarray(_pairs(self.factors, self.rows, self.columns[: len(self.rows)], self.absolute))

    @property
    def _height(self) -> int:
        return self.factors[0].shape[0]

    @property
    def _width(self) -> int:
        return self.factors[0].shape[1] if len(self.factors) == 1 else self.factors[1].shape[0]

    def _whole(self, rows: Int[np.ndarray, " S"]) -> Float[np.ndarray, "S m"]:
        return np.asarray(_rows(self.factors, rows, self.absolute))[:, self.columns]

    def _row_with_ties(
        self, row: int, prices: Float[np.ndarray, " m"], k: int
    ) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"], Float[np.ndarray, " E"]]:
        (values,) = self._whole(self.rows[row : row + 1])
        found = top_k_few_ties(values - prices.astype(np.float32), k, row)
        return np.full(len(found), row), found, values[found]

    def _reduced(
        self, reduction: Callable[..., tuple[Array, ...]], prices: Float[np.ndarray, " m"]
    ) -> Iterator[tuple[Int[np.ndarray, " b"], Bool[np.ndarray, " r"], tuple[np.ndarray, ...]]]:
        """Yields for each block the positions of its new rows, their mask, and the results of the reduction."""
        matrix_prices = np.full(self._width, np.inf, np.float32)
        matrix_prices[self.columns] = prices
        rows, size = inverse_order(self.rows, self._height), max(1, min(self._height, _BLOCK_ROWS))
        on_device = jnp.asarray(matrix_prices)
        for start in range(0, self._height, size):
            first = min(start, self._height - size)  # the last block begins early: all have one shape
            found = reduction(self.factors, first, size, on_device, self.absolute)
            here = rows[first : first + size]
            inside = (here >= 0) & (np.arange(first, first + size) >= start)
            yield here[inside], inside, tuple(np.asarray(part) for part in found)


def _rows(factors: tuple[Array, ...], which: Array | np.ndarray, absolute: bool) -> Float[Array, "r m0"]:
    block = jnp.take(factors[0], which, axis=0).astype(jnp.float32)
    if len(factors) == 2:
        block = jnp.einsum("nd,md->nm", block, factors[1].astype(jnp.float32), precision="highest")
    return jnp.abs(block) if absolute else block


@functools.partial(jax.jit, static_argnums=3)
def _pairs(
    factors: tuple[Array, ...], rows: Array | np.ndarray, columns: Array | np.ndarray, absolute: bool
) -> Float[Array, " n"]:
    if len(factors) == 1:
        found = factors[0][rows, columns].astype(jnp.float32)
    else:
        x, y = (jnp.take(f, i, axis=0).astype(jnp.float32) for f, i in zip(factors, (rows, columns)))
        found = jnp.einsum("nd,nd->n", x, y, precision="highest")
    return jnp.abs(found) if absolute else found


@functools.partial(jax.jit, static_argnames=("size", "absolute"))
def _stats(
    factors: tuple[Array, ...], first: int | Array, size: int, prices: Float[Array, " m0"], absolute: bool
) -> tuple[Array, ...]:
    block = _rows(factors, first + jnp.arange(size), absolute)
    used = jnp.isfinite(prices)
    masked = jnp.where(used, block, -jnp.inf)
    most = masked.max(axis=1)
    ties = (masked == most[:, None]).sum(axis=1) > 1
    least = jnp.where(used, block, jnp.inf).min(axis=1)
    return masked.argmax(axis=1), most, ties, least, (used & ~jnp.isfinite(block)).sum(axis=1)


@functools.partial(jax.jit, static_argnames=("size", "absolute", "k"))
def _top_k(
    factors: tuple[Array, ...], first: int | Array, size: int, prices: Float[Array, " m0"], absolute: bool, k: int
) -> tuple[Array, ...]:
    block = _rows(factors, first + jnp.arange(size), absolute)
    reduced, where = jax.lax.top_k(block - prices, k)
    return reduced, where, jnp.take_along_axis(block, where, axis=1)
