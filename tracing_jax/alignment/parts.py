"""Two models as float64 leaves, one part at a time: what every step of undoing a disguise compares."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, Leaf
from tracing_jax.matching import Shared
from tracing_jax.rewrites import Rewrite
from tracing_jax.rewrites.rewrite import Weight, table_of
from tracing_jax.sources import Disguised, Mapped, ParamSource, disguised, part
from tracing_jax.tree import flatten, to_host

Leaves = dict[str, np.ndarray]
"""Leaves of one part by their names in it."""


def exact(source: ParamSource, rewrites: Sequence[Rewrite] = ()) -> Disguised:
    """Returns the source after rewrites, in float64 on the host: nothing is rounded."""
    wide = Mapped(source, lambda part, table: jax.tree.map(lambda leaf: to_host(leaf).astype(np.float64), part))
    return disguised(wide, rewrites)


def leaves(source: ParamSource, prefix: str) -> Leaves:
    """Returns the leaves under `embed/`, `layers/<i>/` or `head/`, on the host."""
    return {name: to_host(leaf) for name, leaf in flatten(part(source, prefix)).items()}


def prefixes(arch: Arch) -> list[str]:
    """Returns the prefixes of all parts."""
    return ["embed/", *(f"layers/{i}/" for i in range(arch.num_layers)), "head/"]


def rows(arch: Arch, prefix: str) -> AxisTable:
    """Returns the rows of a part by the names of its leaves in it, and the sizes of its own axes alone."""
    table = table_of(arch).restricted(prefix)
    axes = {axis for row in table.leaves.values() for axis in row.axes}
    return AxisTable(table.leaves, {axis: n for axis, n in table.sizes.items() if axis in axes}, table.within)


def after(part: Leaves, prefix: str, rewrites: Sequence[Rewrite], arch: Arch) -> Leaves:
    """Returns a part after rewrites that look at no other part and keep the facts of the model."""
    weights = {name: Weight(leaf, leaf.dtype) for name, leaf in part.items()}
    for rewrite in rewrites:
        weights = rewrite.part(prefix, lambda _, weights=weights: weights, arch)  # type: ignore[misc]
    return {name: np.asarray(weight.values) for name, weight in weights.items()}


def shared_units(
    base: np.ndarray, ft: np.ndarray, row: Leaf, shared: Shared | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns a leaf of both models cut to the units that mean the same; None if they differ in shape even so."""
    for dim, axis in enumerate(row.axes):
        if axis is not None and shared is not None and axis in shared:
            base, ft = (np.take(x, ids, axis=dim) for x, ids in zip((base, ft), shared[axis], strict=True))
    return (base, ft) if base.shape == ft.shape else None


def cosines(base: ParamSource, ft: ParamSource, shared: Shared | None) -> dict[str, float]:
    """Returns the cosine of each leaf that both models have in one shape; one that is zero in either counts 0."""
    found = {}
    common = [prefix for prefix in prefixes(base.arch) if prefix in prefixes(ft.arch)]
    for prefix in common:
        table, of_base, of_ft = rows(base.arch, prefix), leaves(base, prefix), leaves(ft, prefix)
        for name in [name for name in of_base if name in of_ft and of_ft[name].ndim == of_base[name].ndim]:
            pair = shared_units(of_base[name], of_ft[name], table.leaves[name], shared)
            if pair is not None:
                found[prefix + name] = cosine(*pair)
    return found


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the cosine of two arrays of one shape, 0 if one is zero."""
    x, y = (np.asarray(a, np.float64).ravel() for a in (x, y))
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms else 0.0


def units_first(x: np.ndarray, row: Leaf, axes: Sequence[str]) -> Float[np.ndarray, "... n"]:
    """Returns a leaf with the dimensions of these axes in front, in this order, and all others flattened behind."""
    dims = [row.axes.index(axis) for axis in axes]
    front = np.moveaxis(x, dims, range(len(dims)))
    return front.reshape(*front.shape[: len(dims)], -1)


def stacked(
    part: Mapping[str, np.ndarray], table: AxisTable, axis: str, side: str | None, lead: Sequence[str] = ()
) -> np.ndarray | None:
    """Returns all weights that stand on one side of an axis, one row for each unit of `lead` and of the axis.

    Leaves that lack an axis of `lead` are left out; None if nothing is left.
    """
    chosen = [
        name
        for name, row in table.leaves.items()
        if name in part and {axis, *lead} <= set(row.axes) and row.sides[row.axes.index(axis)] == side
    ]
    found = [units_first(part[name], table.leaves[name], (*lead, axis)) for name in chosen]
    return np.concatenate(found, axis=-1) if found else None
