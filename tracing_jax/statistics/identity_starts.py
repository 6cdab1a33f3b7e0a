"""Rows that were initialised to the identity: unit i reads feature i most.

Such rows agree between unrelated models until training has changed them, at equal places: they are no evidence.

Letters: n units, D features.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

IDENTITY_BELOW = 1e-6
"""p-value of rows that do not begin at the identity, in a layer, below which they do. Small, since it decides for two
models at once: of relatives the ranks are the same. Rows that do, until training has hidden it, are far below."""


@functools.partial(jax.jit, static_argnames="axis")
def diagonal_ranks(weights: Float[Array | np.ndarray, "..."], axis: int = 1) -> Float[Array, " n"]:
    """Returns of each row i the share of its entries that are smaller than the entry i modulo D, by absolute value.

    Entries are compared over the mean of their feature, as features may be in order of size. Entries that are equal
    count half. Of rows in random directions the ranks are uniform.

    Args:
      weights: rows `[n, D]`, or columns `[D, n]` in their place.
      axis: that of the features.
    """
    sizes = jnp.abs(weights.astype(jnp.float32))
    sizes = sizes / jnp.where(sizes.max() > 0, sizes.max(), 1.0)
    means = sizes.mean(axis=1 - axis, keepdims=True)
    sizes = sizes / jnp.where(means > 0, means, 1.0)
    rows = jnp.arange(weights.shape[1 - axis])
    feature = rows % weights.shape[axis]
    own = jnp.expand_dims(sizes[(rows, feature) if axis == 1 else (feature, rows)], axis)
    return jnp.where(sizes < own, 1.0, jnp.where(sizes == own, 0.5, 0.0)).mean(axis=axis)


def identity_p(ranks: Float[np.ndarray, " K"]) -> float:
    """Returns the p-value of ranks that are uniform on [0, 1] against larger ones, by the normal distribution."""
    if not len(ranks):
        return 1.0
    z = (float(np.mean(ranks, dtype=np.float64)) - 0.5) * math.sqrt(12 * len(ranks))
    return 0.5 * math.erfc(z / math.sqrt(2))
