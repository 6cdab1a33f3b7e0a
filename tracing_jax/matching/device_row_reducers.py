"""Views of matrices that lie on an accelerator, or are made there from their factors; only candidates leave it.

Blocks are read as they lie and all have one shape, so that each reduction compiles once for a matrix.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.matching.row_reducers import Best, HostView, Survey, View, places, thinned_greatest

_BLOCK_ROWS = 512


@dataclass(frozen=True)
class Product:
    """The similarities X Y^T of units with these factors, made block by block whenever they are looked at."""

    x: Float[Array, "n d"]
    y: Float[Array, "m d"]

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns."""
        return self.x.shape[0], self.y.shape[0]

    @property
    def T(self) -> "Product":  # noqa: N802 - named as that of arrays
        """The similarities Y X^T."""
        return Product(self.y, self.x)

    def any(self, axis: int) -> Bool[Array, " _"]:
        """Returns which rows (`axis` 1) or columns (0) have a factor that is not zero."""
        return (self.x if axis == 1 else self.y).any(axis=1)


def view_of(
    similarity: Float[Array | np.ndarray, "n m"] | Product,
    rows: Int[np.ndarray, " _"],
    columns: Int[np.ndarray, " _"],
    absolute: bool = False,
) -> View:
    """Returns a view of a matrix where it lies: of one in host memory by numpy, else by the device that holds it."""
    if isinstance(similarity, Product):
        return DeviceView((similarity.x, similarity.y), rows, columns, absolute)
    if isinstance(similarity, np.ndarray) or all(device.platform == "cpu" for device in similarity.devices()):
        return HostView(np.asarray(similarity), rows, columns, absolute)
    return DeviceView((similarity,), rows, columns, absolute)


@dataclass(frozen=True)
class DeviceView:
    """A view of a matrix on a device: itself, or two factors X [n0, d] and Y [m0, d] whose product X Y^T it is.

    Attributes:
      rows, columns: which of them are seen, and in which order.
      absolute: whether absolute values are seen.
    """

    factors: tuple[Array, ...]
    rows: Int[np.ndarray, " n"]
    columns: Int[np.ndarray, " m"]
    absolute: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and of columns that are seen."""
        return len(self.rows), len(self.columns)

    def survey(self) -> Survey:
        """Returns the extremes, in one pass."""
        n, m = self.shape
        best, most, tied, least, broken = np.empty(n, int), np.empty(n), np.empty(n, bool), np.inf, 0
        columns = places(self.columns, self._width)
        for rows, inside, found in self._reduced(_survey, np.zeros(m)):
            first, greatest, ties, smallest, bad = (part[inside] for part in found)
            best[rows], most[rows], tied[rows] = columns[first], greatest, ties
            least, broken = min(least, smallest.min(initial=np.inf)), broken + int(bad.sum())
        return Survey(best, most, tied, float(least), broken)

    def best(self, prices: Float[np.ndarray, " m"], count: int) -> Best:
        """Returns the greatest entries of each row, in one pass; rows with more ties than fit are looked at whole."""
        n, m = self.shape
        count = min(count, m)
        columns, found = places(self.columns, self._width), []
        rest = np.empty(n, np.float32)
        top = functools.partial(_top, count=min(2 * count + 1, m))
        for rows, inside, (reduced, where, values) in self._reduced(top, prices):
            reduced, where, values = reduced[inside], where[inside], values[inside]
            rest[rows] = reduced[:, count - 1]
            kept = reduced >= rest[rows][:, None]
            crowded = kept[:, -1] & (kept.shape[1] < m)
            kept[crowded] = False
            at, place = np.nonzero(kept)
            found.append((rows[at], columns[where[at, place]], values[at, place]))
            found += [self._crowded(row, prices, count) for row in rows[crowded].tolist()]
        at, where, values = (np.concatenate(parts) for parts in zip(*found))
        return Best(at, where, values, rest)

    def sample(self, count: int) -> Float[np.ndarray, "S m"]:
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

    def _crowded(
        self, row: int, prices: Float[np.ndarray, " m"], count: int
    ) -> tuple[Int[np.ndarray, " E"], Int[np.ndarray, " E"], Float[np.ndarray, " E"]]:
        (values,) = self._whole(self.rows[row : row + 1])
        found = thinned_greatest(values - prices.astype(np.float32), count, row)
        return np.full(len(found), row), found, values[found]

    @cached_property
    def _seen(self) -> Bool[np.ndarray, " m0"]:
        return places(self.columns, self._width) >= 0

    def _reduced(
        self, reduction: Callable[..., tuple[Array, ...]], prices: Float[np.ndarray, " m"]
    ) -> Iterator[tuple[Int[np.ndarray, " b"], Bool[np.ndarray, " r"], tuple[np.ndarray, ...]]]:
        """Yields for each block where its rows are seen, which of them are new, and what was found in them."""
        dear = np.full(self._width, np.inf, np.float32)
        dear[self.columns] = prices
        rows, size = places(self.rows, self._height), max(1, min(self._height, _BLOCK_ROWS))
        on_device = jnp.asarray(dear)
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
def _survey(
    factors: tuple[Array, ...], first: int | Array, size: int, prices: Float[Array, " m0"], absolute: bool
) -> tuple[Array, ...]:
    block = _rows(factors, first + jnp.arange(size), absolute)
    seen = jnp.isfinite(prices)
    shown = jnp.where(seen, block, -jnp.inf)
    most = shown.max(axis=1)
    ties = (shown == most[:, None]).sum(axis=1) > 1
    least = jnp.where(seen, block, jnp.inf).min(axis=1)
    return shown.argmax(axis=1), most, ties, least, (seen & ~jnp.isfinite(block)).sum(axis=1)


@functools.partial(jax.jit, static_argnames=("size", "absolute", "count"))
def _top(
    factors: tuple[Array, ...], first: int | Array, size: int, prices: Float[Array, " m0"], absolute: bool, count: int
) -> tuple[Array, ...]:
    block = _rows(factors, first + jnp.arange(size), absolute)
    reduced, where = jax.lax.top_k(block - prices, count)
    return reduced, where, jnp.take_along_axis(block, where, axis=1)
