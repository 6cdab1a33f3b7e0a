"""Cosines between the rows of two matrices, in slices if the whole matrix would take too much memory."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from tracing_jax.matching import FactoredSimilarity
from tracing_jax.tree import readable, to_host

_SLICE_BYTES = 256 * 2**20  # maximum of one slice of the cosine matrix
_WHOLE_BYTES = 4 * 2**30  # maximum of one matrix to be matched, 32,768 x 32,768; two may exist at a time


def best_cosines(rows: Float[Array, "n d"], others: Float[Array, "m d"], description: str = "") -> np.ndarray:
    """Returns for each row the largest cosine with any row of `others`, float32 `[n]`; 0 for a row of zeros.

    Cosines are computed in float32; at most 256 MiB of the n x m matrix exist at a time.
    """
    others = _normalised(others)
    step = max(1, min(len(rows), _SLICE_BYTES // (4 * len(others))))
    starts = tqdm(range(0, len(rows), step), desc=description, unit="slice", disable=None if description else True)
    return np.concatenate([to_host(_best(rows[start : start + step], others)) for start in starts])


def similarities(
    rows: Float[Array | np.ndarray, "n d"], others: Float[Array | np.ndarray, "m d"]
) -> Float[Array | np.ndarray, "n m"] | FactoredSimilarity:
    """Returns the cosines of all rows with all others, for matching; above 4 GiB as factors.

    Each pass of the matching then computes the product again, block by block.
    """
    if 4 * len(rows) * len(others) > _WHOLE_BYTES:
        return FactoredSimilarity(*(_normalised(readable(jnp.asarray(side))) for side in (rows, others)))
    return readable(cosines(rows, others))


@jax.jit
def cosines(rows: Float[Array | np.ndarray, "n d"], others: Float[Array | np.ndarray, "m d"]) -> Float[Array, "n m"]:
    """Returns the cosine of every row with every other, float32; 0 where either is a row of zeros."""
    return jnp.einsum("nd,md->nm", _normalised(rows), _normalised(others), precision="highest")


@jax.jit
def _best(rows: jax.Array, others: jax.Array) -> jax.Array:
    return jnp.einsum("nd,md->nm", _normalised(rows), others, precision="highest").max(axis=1)


@jax.jit
def _normalised(rows: jax.Array | np.ndarray) -> jax.Array:
    rows = jnp.asarray(rows, jnp.float32)
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return rows / jnp.where(norms == 0, 1, norms)
