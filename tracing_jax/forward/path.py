"""One part of all models along a path: the leaves of both ends, and what the points between are made from."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tracing_jax.axes import axis_table
from tracing_jax.interpolation import interpolate
from tracing_jax.rewrites import Dims, Permutations, take_units, unit_moves
from tracing_jax.sources import ParamSource, part
from tracing_jax.tree import Tree, flatten, unflatten


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "ft", "alphas", "indices"],
                   meta_fields=["moving", "dims"])  # fmt: skip
@dataclass(frozen=True)
class Path:
    """One part of the models along the path.

    Attributes:
      base: the part of base.
      ft: name -> the leaf of the same part of ft, of those that move.
      alphas: the points `[A]`.
      indices: name -> how the units of ft's leaf are taken at each point, `[A, ...]` for each of its moved dimensions.
      moving: names of the leaves that move.
      dims: name and moved dimensions of the leaves in `indices`.
    """

    base: Tree
    ft: dict[str, jax.Array]
    alphas: jax.Array
    indices: dict[str, list[jax.Array]]
    moving: frozenset[str]
    dims: tuple[tuple[str, Dims], ...]

    def each(self, function: Callable[..., jax.Array], *rest: jax.Array) -> jax.Array:
        """Returns `function(params at the point, *slices of rest)` at every point, one after another."""

        def one(point: tuple[Any, ...]) -> jax.Array:
            alpha, indices, *slices = point
            # Tied to the point: what does not depend on it, such as copies in float32, would be made before the loop.
            alpha, base, ft = jax.lax.optimization_barrier((alpha, self.base, self.ft))
            ft = ft | {name: take_units(ft[name], dims, indices[name]) for name, dims in self.dims}
            return function(interpolate(base, unflatten(ft), alpha, self.moving), *slices)

        return jax.lax.map(one, (self.alphas, self.indices, *rest))

    def with_embedding(self, embed: "Path") -> "Path":
        """Returns this head with the embedding that a tied model shares with it, as the subtree `embed`."""
        return Path(
            self.base | {"embed": embed.base},
            self.ft | {f"embed/{name}": leaf for name, leaf in embed.ft.items()},
            self.alphas,
            self.indices | {f"embed/{name}": taken for name, taken in embed.indices.items()},
            self.moving | {f"embed/{name}" for name in embed.moving},
            self.dims + tuple((f"embed/{name}", dims) for name, dims in embed.dims),
        )


def stacked(copies: Sequence[Permutations]) -> dict[str, np.ndarray]:
    """Returns axis -> the permutations of all copies, `[A, ...]`."""
    return {axis: np.stack([copy[axis] for copy in copies]) for axis in copies[0]} if copies else {}


def path_of(
    base: ParamSource,
    ft: ParamSource | None,
    moving: frozenset[str],
    alphas: jax.Array,
    copies: Mapping[str, np.ndarray],
    prefix: str,
) -> Path:
    """Returns the part under `prefix`, with ft's units permuted by the stacked `copies`, one for each alpha.

    Ft's part is read only if something in it moves.
    """
    names = frozenset(name.removeprefix(prefix) for name in moving if name.startswith(prefix))
    leaves = flatten(part(ft, prefix)) if ft is not None and names else {}
    own = {name: leaves[name] for name in sorted(names)} if leaves else {}
    table = axis_table(base.arch)
    moves = {name: unit_moves(table.leaves[prefix + name], copies, table.parent_axis) for name in own}
    moves = {name: (dims, indices) for name, (dims, indices) in moves.items() if dims}
    return Path(
        part(base, prefix),
        own,
        alphas,
        {name: [jnp.asarray(index) for index in indices] for name, (_, indices) in moves.items()},
        names,
        tuple((name, dims) for name, (dims, _) in moves.items()),
    )
