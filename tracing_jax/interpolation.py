"""Points between trees, over chosen groups of leaves: at alpha of the straight path, and any linear combination."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax.axes import GROUPS, AxisTable
from tracing_jax.tree import Tree, flatten, map_named

ALWAYS = ("mlp", "norm")
"""Groups that every path interpolates: the MLPs and the norms of the blocks."""


def path_groups(attn: bool, emb: bool) -> tuple[str, ...]:
    """Returns the groups of a path: MLPs and block norms, attention if asked, embeddings and head if asked."""
    return ALWAYS + (("attn",) if attn else ()) + (("emb",) if emb else ())


def interpolated_leaves(table: AxisTable, groups: Iterable[str]) -> frozenset[str]:
    """Returns the names of the leaves that a path over `groups` interpolates.

    Raises:
      ValueError: a group that no leaf can belong to.
    """
    groups = set(groups)
    if unknown := sorted(groups - set(GROUPS)):
        raise ValueError(f"unknown groups {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    return frozenset(name for name, row in table.leaves.items() if row.group in groups)


def interpolate(base: Tree, ft: Tree, alpha: float | Float[Array, ""], interpolated: Collection[str]) -> Tree:
    """Returns `(1 - alpha) base + alpha ft` on the interpolated leaves, in float32, and base's own leaf elsewhere.

    alpha = 0 gives base and alpha = 1 gives ft on these leaves, both exactly. `ft` need hold only these leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> base, ft = {"w": jnp.zeros(2), "b": jnp.zeros(2)}, {"w": jnp.ones(2)}
      >>> point = tj.interpolate(base, ft, 0.25, {"w"})
      >>> point["w"].tolist(), point["b"].tolist()
      ([0.25, 0.25], [0.0, 0.0])
    """
    return combine(base, [ft], (1 - alpha, alpha), interpolated)


def on_line(alphas: Float[np.ndarray | Array, " A"]) -> Float[Array, "A 2"]:
    """Returns the coefficients of both ends at points of the straight path."""
    alphas = jnp.asarray(alphas, jnp.float32)
    return jnp.stack([1 - alphas, alphas], axis=-1)


def on_bezier(t: Float[np.ndarray | Array, " *A"]) -> Float[Array, "*A 3"]:
    """Returns the coefficients of both ends and of the middle point, in this order, along a quadratic Bezier curve.

    Source: Garipov et al. 2018 (arXiv 1802.10026), section 3.
    """
    t = jnp.asarray(t, jnp.float32)
    return jnp.stack([(1 - t) ** 2, t**2, 2 * t * (1 - t)], axis=-1)


def combine(
    base: Tree, others: Sequence[Tree], coefficients: Sequence[Any] | Float[Array, " K"], combined: Collection[str]
) -> Tree:
    """Returns the linear combination of trees on the leaves in `combined`, in float32, and base's own leaf elsewhere.

    `others` need hold only these leaves. Of K coefficients the first is base's.
    """
    rest = [flatten(other) for other in others]

    def point(name: str, leaf: jax.Array) -> jax.Array:
        if name not in combined:
            return leaf
        found = coefficients[0] * leaf.astype(jnp.float32)
        for i, other in enumerate(rest):
            found += coefficients[i + 1] * other[name].astype(jnp.float32)
        return found

    return map_named(point, base)
