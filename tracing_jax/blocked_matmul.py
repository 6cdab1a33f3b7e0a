"""Adding a large matrix of products to a sum of its size, slice by slice: made whole, it would take as much again."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

_SLICE_ENTRIES = 2**24
"""The most that are made at a time: 64 MiB."""


def accumulate_matmul(
    total: Float[Array, "n m"], columns: Callable[[int | Int[Array, ""], int], Float[Array, "n w"]]
) -> Float[Array, "n m"]:
    """Returns the sum with products added; under `jit`, with the sum donated, in its place.

    Args:
      total: the sum so far.
      columns: (first column, number of columns w) -> the products there.
    """
    parts = _parts(*total.shape)
    width = total.shape[1] // parts

    def add(i: int | Int[Array, ""], total: Float[Array, "n m"]) -> Float[Array, "n m"]:
        known = jax.lax.dynamic_slice_in_dim(total, i * width, width, 1)
        return jax.lax.dynamic_update_slice_in_dim(total, known + columns(i * width, width), i * width, 1)

    return add(0, total) if parts == 1 else jax.lax.fori_loop(0, parts, add, total)


def _parts(n: int, m: int) -> int:
    """Returns into how many slices of equal width a matrix is cut; 1 where it is small, or its width a prime."""
    least = -(-n * m // _SLICE_ENTRIES)
    return next((parts for parts in range(least, 4 * least) if m % parts == 0), 1)
