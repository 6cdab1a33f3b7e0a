"""The map of ft's residual stream to base's: orthogonal, or a permutation where no rotation keeps the function."""

import numpy as np
from jaxtyping import Float

from tracing_jax.alignment.balance import polar
from tracing_jax.alignment.kinds import AlignmentError
from tracing_jax.alignment.parts import Leaves, leaves, rows, shared_units, units_first
from tracing_jax.axes import AxisTable
from tracing_jax.matching import Shared, assign
from tracing_jax.rewrites import Permutation, Rewrite, Rotation
from tracing_jax.sources import ParamSource


def cross_products(base: Leaves, ft: Leaves, table: AxisTable, shared: Shared | None) -> Float[np.ndarray, "D D"]:
    """Returns the sum over a part's weights of their products over all but the features, each over its two norms.

    Biases are left out: a single vector, which says little, would turn one direction by itself.
    """
    D = table.sizes["embed"]
    total = np.zeros((D, D))
    for name, row in table.leaves.items():
        if name not in base or name not in ft or "embed" not in row.axes or len(row.axes) < 2:
            continue
        pair = shared_units(base[name], ft[name], row, shared)
        if pair is None:
            continue
        x, y = (units_first(leaf, row, ("embed",)) for leaf in pair)
        norms = float(np.linalg.norm(x) * np.linalg.norm(y))
        if norms > 0:
            total += x @ y.T / norms
    return total


def token_products(base: ParamSource, ft: ParamSource, shared: Shared | None) -> Float[np.ndarray, "D D"]:
    """Returns the cross products of the embedding and the head, whose other axis, the tokens, is in order already.

    Raises:
      AlignmentError: the models share no row of a token.
    """
    products = [
        cross_products(leaves(base, prefix), leaves(ft, prefix), rows(base.arch, prefix), shared)
        for prefix in ("embed/", "head/")
    ]
    total = products[0] + products[1]
    if not total.any():
        raise AlignmentError(
            f"no embedding row of base ({base.arch.vocab_size} tokens) and ft ({ft.arch.vocab_size} tokens) stands for "
            "the same token, or they are zero: nothing says how the residual streams belong together"
        )
    return total


def nearest(products: Float[np.ndarray, "D D"], rotates: bool) -> Float[np.ndarray, "D D"]:
    """Returns the orthogonal matrix, or the permutation matrix, R that brings `R @ ft` closest to base."""
    if rotates:
        return polar(products)
    return np.eye(len(products))[assign(products)]


def as_rewrites(R: Float[np.ndarray, "D D"] | None, rotates: bool) -> list[Rewrite]:
    """Returns the rewrite of the residual stream, if there is one."""
    if R is None:
        return []
    return [Rotation(R)] if rotates else [Permutation({"embed": order_of(R)})]


def order_of(R: Float[np.ndarray, "D D"]) -> np.ndarray:
    """Returns the permutation of a permutation matrix."""
    return R.argmax(axis=1).astype(np.int32)
