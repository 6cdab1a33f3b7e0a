"""Models at points between others, such as along a path: their subtrees, with the leaves that points are made of."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.interpolation import combine
from tracing_jax.rewrites import Dims, Permutations, take_units, unit_moves
from tracing_jax.sources import ParamSource, is_resident, subtree
from tracing_jax.tree import Tree, flatten, unflatten

T = TypeVar("T")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "others", "coefficients", "indices"],
    meta_fields=["interpolated", "dims"],
)
@dataclass(frozen=True)
class InterpolatedSubtree:
    """One subtree, such as a layer, of the models at all points.

    Attributes:
      base: the subtree of base.
      others: of each other model name -> the leaf of the same subtree, of the interpolated leaves.
      coefficients: of base and the others at each point, `[A, K]`.
      indices: name -> how the units of the others' leaves are permuted at each point, `[A, ...]` for each permuted
        dimension.
      interpolated: names of the interpolated leaves.
      dims: name and permuted dimensions of the leaves in `indices`.
    """

    base: Tree
    others: tuple[dict[str, jax.Array], ...]
    coefficients: jax.Array
    indices: dict[str, list[jax.Array]]
    interpolated: frozenset[str]
    dims: tuple[tuple[str, Dims], ...]

    def map(self, function: Callable[..., Any], *rest: Any) -> Any:
        """Returns `function(params at the point, *slices of rest)` at every point, one after another."""

        def at_point(point: tuple[Any, ...]) -> Any:
            coefficients, indices, *slices = point
            # Tied to the point: what does not depend on it, such as copies in float32, would be made before the loop.
            coefficients, base, others = jax.lax.optimization_barrier((coefficients, self.base, self.others))
            trees = [
                unflatten(other | {name: take_units(other[name], dims, indices[name]) for name, dims in self.dims})
                for other in others
            ]
            return function(combine(base, trees, coefficients, self.interpolated), *slices)

        return jax.lax.map(at_point, (self.coefficients, self.indices, *rest))

    def with_embedding(self, embed: "InterpolatedSubtree") -> "InterpolatedSubtree":
        """Returns this head with the embedding that a tied model shares with it, as the subtree `embed`."""
        return InterpolatedSubtree(
            self.base | {"embed": embed.base},
            tuple(
                other | {f"embed/{name}": leaf for name, leaf in of_embed.items()}
                for other, of_embed in zip(self.others, embed.others, strict=True)
            ),
            self.coefficients,
            self.indices | {f"embed/{name}": taken for name, taken in embed.indices.items()},
            self.interpolated | {f"embed/{name}" for name in embed.interpolated},
            self.dims + tuple((f"embed/{name}", dims) for name, dims in embed.dims),
        )


@dataclass(frozen=True)
class InterpolatedModel:
    """Linear combinations of models, such as all points of a path, read subtree by subtree like a `ParamSource`.

    Attributes:
      base: the first model, whose facts (rope, norms, scales) all points have.
      others: the other models; their subtrees are read only where leaves are interpolated. Empty if none are.
      interpolated: names of the leaves that are interpolated; the remaining ones are base's.
      coefficients: of base and the others at each point: `1 - alpha` and `alpha` along a straight path.
      copies: one for each point, permutations of the same axes, applied to the others; none leaves them as they are. No
        permuted model is made: the units are taken where a layer is interpolated.
    """

    base: ParamSource
    others: Sequence[ParamSource]
    interpolated: frozenset[str]
    coefficients: Float[Array, "A K"]
    copies: Sequence[Permutations] = ()
    _subtrees: dict[str, InterpolatedSubtree] = field(default_factory=dict, repr=False)

    @property
    def arch(self) -> Arch:
        """The facts of all these models."""
        return self.base.arch

    @functools.cached_property
    def is_resident(self) -> bool:
        """Whether all weights are in memory, so that reading a subtree again costs nothing."""
        return is_resident(self.base) and (not self.interpolated or all(map(is_resident, self.others)))

    def embed(self) -> InterpolatedSubtree:
        """Returns the subtree `embed`."""
        return self._subtree("embed/")

    def layer(self, index: int) -> InterpolatedSubtree:
        """Returns the subtree `layers/<index>`."""
        return self._subtree(f"layers/{index}/")

    def head(self) -> InterpolatedSubtree:
        """Returns the subtree `head`, without the embedding that a tied head shares."""
        return self._subtree("head/")

    def _subtree(self, prefix: str) -> InterpolatedSubtree:
        if not self.is_resident:
            return self._read(prefix)
        if prefix not in self._subtrees:
            self._subtrees[prefix] = self._read(prefix)
        return self._subtrees[prefix]

    def _read(self, prefix: str) -> InterpolatedSubtree:
        names = frozenset(name.removeprefix(prefix) for name in self.interpolated if name.startswith(prefix))
        others = tuple(_leaves(other, prefix, sorted(names)) for other in self.others)
        table = axis_table(self.arch)
        moves = {name: unit_moves(table.leaves[prefix + name], self._stacked, table.parent_axis) for name in names}
        moves = {name: (dims, indices) for name, (dims, indices) in moves.items() if dims}
        return InterpolatedSubtree(
            subtree(self.base, prefix),
            others,
            self.coefficients,
            {name: [jnp.asarray(index) for index in indices] for name, (_, indices) in moves.items()},
            names,
            tuple((name, dims) for name, (dims, _) in sorted(moves.items())),
        )

    @functools.cached_property
    def _stacked(self) -> dict[str, np.ndarray]:
        """Axis -> the permutations of all copies, `[A, ...]`."""
        return {axis: np.stack([copy[axis] for copy in self.copies]) for axis in self.copies[0]} if self.copies else {}


def _leaves(model: ParamSource, prefix: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns some leaves of a subtree, which is read only if there are any."""
    leaves = flatten(subtree(model, prefix)) if names else {}
    return {name: leaves[name] for name in names}


def is_resident_model(model: ParamSource | InterpolatedModel) -> bool:
    """Returns whether all weights are in memory, so that reading a layer again costs nothing."""
    return model.is_resident if isinstance(model, InterpolatedModel) else is_resident(model)


def num_points(model: ParamSource | InterpolatedModel) -> int:
    """Returns the number of models that are evaluated together: the points of a path, or one."""
    return len(model.coefficients) if isinstance(model, InterpolatedModel) else 1


def with_embedding(head: Tree | InterpolatedSubtree, embed: Tree | InterpolatedSubtree) -> Tree | InterpolatedSubtree:
    """Returns a head with the embedding that a tied model shares with it, as the subtree `embed`."""
    return head.with_embedding(embed) if isinstance(head, InterpolatedSubtree) else {**head, "embed": embed}


def map_points(part: Tree | InterpolatedSubtree, function: Callable[..., Any], *rest: Any) -> Any:
    """Returns `function(params, *rest)`, for each point of a path with its slices of rest, along a leading axis A."""
    return part.map(function, *rest) if isinstance(part, InterpolatedSubtree) else function(part, *rest)
