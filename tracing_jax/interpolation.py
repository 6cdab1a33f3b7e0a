"""The point at alpha on the straight path between two trees, over chosen groups of leaves."""

from collections.abc import Collection, Iterable

import jax
import jax.numpy as jnp
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
    other = flatten(ft)

    def point(name: str, leaf: jax.Array) -> jax.Array:
        if name not in interpolated:
            return leaf
        return (1 - alpha) * leaf.astype(jnp.float32) + alpha * other[name].astype(jnp.float32)

    return map_named(point, base)
