"""Accumulating a large matmul in column blocks: computed whole, the product would take as much memory as the sum."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

_BLOCK_ENTRIES = 2**24
"""The most entries of a block: 64 MiB in float32."""


def accumulate_matmul(
    total: Float[Array, "n m"], columns: Callable[[int | Int[Array, ""], int], Float[Array, "n w"]]
) -> Float[Array, "n m"]:
    """Returns the sum with a product added; under `jit`, with the sum donated, in its memory.

    The blocks are equally wide; the last is narrower where the width is no multiple.

    Args:
      total: the sum so far.
      columns: (first column, number of columns w) -> the product there.
    """
    n, m = total.shape
    blocks = -(-n * m // _BLOCK_ENTRIES)
    if blocks <= 1:
        return total + columns(0, m)
    width = -(-m // blocks)

    def add(start: int | Int[Array, ""], width: int, total: Float[Array, "n m"]) -> Float[Array, "n m"]:
        known = jax.lax.dynamic_slice_in_dim(total, start, width, 1)
        return jax.lax.dynamic_update_slice_in_dim(total, known + columns(start, width), start, 1)

    total = jax.lax.fori_loop(0, m // width, lambda i, total: add(i * width, width, total), total)
    return add(m - m % width, m % width, total) if m % width else total
