"""Leaves of models in float64, one subtree at a time: what alignment from weights compares."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Float, Num

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisRole, AxisTable, LeafSpec
from tracing_jax.matching import Shared
from tracing_jax.rewrites import Rewrite
from tracing_jax.rewrites.rewrite import Weight, subtable
from tracing_jax.sources import MappedSource, ParamSource, prefixes, rewritten, subtree
from tracing_jax.tree import Tree, flatten, to_host

Leaves = dict[str, np.ndarray]
"""Leaves of one subtree by their names in it."""


def in_float64(source: ParamSource, rewrites: Sequence[Rewrite] = ()) -> ParamSource:
    """Returns the source after rewrites, in float64 on the host: nothing is rounded."""

    def converted(subtree: Tree, _: AxisTable) -> Tree:
        return jax.tree.map(lambda leaf: to_host(leaf).astype(np.float64), subtree)

    return rewritten(MappedSource(source, converted), rewrites)


def leaves(source: ParamSource, prefix: str) -> Leaves:
    """Returns the leaves under `embed/`, `layers/<i>/` or `head/`, on the host."""
    return {name: to_host(leaf) for name, leaf in flatten(subtree(source, prefix)).items()}


def own_table(arch: Arch, prefix: str) -> AxisTable:
    """Returns the axis table of one subtree, by the names of its leaves in it, with the sizes of its own axes alone."""
    table = subtable(prefix, arch)
    axes = {axis for spec in table.leaves.values() for axis in spec.axes}
    return replace(table, sizes={axis: n for axis, n in table.sizes.items() if axis in axes})


def after(found: Leaves, prefix: str, rewrites: Sequence[Rewrite], arch: Arch) -> Leaves:
    """Returns a subtree after rewrites that read no other subtree and keep the facts of the model."""
    weights = {name: Weight(leaf, leaf.dtype) for name, leaf in found.items()}
    for rewrite in rewrites:
        weights = rewrite.apply(prefix, lambda _, weights=weights: weights, arch)  # type: ignore[misc]
    return {name: np.asarray(weight.values) for name, weight in weights.items()}


def shared_units(
    base: np.ndarray, ft: np.ndarray, spec: LeafSpec, shared: Shared | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns a leaf of both models restricted to shared units; None if they differ in shape even so."""
    for dim, axis in enumerate(spec.axes):
        if axis is not None and shared is not None and axis in shared:
            base, ft = (np.take(x, ids, axis=dim) for x, ids in zip((base, ft), shared[axis], strict=True))
    return (base, ft) if base.shape == ft.shape else None


def leaf_cosines(base: ParamSource, ft: ParamSource, shared: Shared | None) -> dict[str, float]:
    """Returns the cosine of each leaf that both models have in one shape; one that is zero in either counts 0."""
    found = {}
    common = [prefix for prefix in prefixes(base.arch) if prefix in prefixes(ft.arch)]
    for prefix in common:
        table, of_base, of_ft = own_table(base.arch, prefix), leaves(base, prefix), leaves(ft, prefix)
        for name in [name for name in of_base if name in of_ft and of_ft[name].ndim == of_base[name].ndim]:
            pair = shared_units(of_base[name], of_ft[name], table.leaves[name], shared)
            if pair is not None:
                found[prefix + name] = float(cosine(*(leaf.astype(np.float64).ravel() for leaf in pair)))
    return found


def cosine(x: Num[np.ndarray, "*_ n"], y: Num[np.ndarray, "*_ n"]) -> Num[np.ndarray, "*_"]:
    """Returns the cosine of each vector of one array with that of the other, real or complex; 0 if one is zero."""
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    products = (x * y.conj()).sum(-1)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def units_first(x: np.ndarray, spec: LeafSpec, axes: Sequence[str]) -> Float[np.ndarray, "... n"]:
    """Returns a leaf with the dimensions of these axes in front, in this order, and all others flattened behind."""
    dims = [spec.axes.index(axis) for axis in axes]
    front = np.moveaxis(x, dims, range(len(dims)))
    return front.reshape(*front.shape[: len(dims)], -1)


def stacked(
    found: Mapping[str, np.ndarray], table: AxisTable, axis: str, role: AxisRole | None, lead: Sequence[str] = ()
) -> np.ndarray | None:
    """Returns all weights with one role on an axis, a row for each unit of `lead` and of the axis.

    Leaves that lack an axis of `lead` are left out; None if none is left.
    """
    chosen = [
        name
        for name, spec in table.leaves.items()
        if name in found and {axis, *lead} <= set(spec.axes) and spec.roles[spec.axes.index(axis)] == role
    ]
    rows = [units_first(found[name], table.leaves[name], (*lead, axis)) for name in chosen]
    return np.concatenate(rows, axis=-1) if rows else None
