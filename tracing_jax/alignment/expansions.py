"""Inactive layers and units of ft (function-preserving expansions): found in the weights, and removed.

A layer is inactive if every weight that it writes to the residual stream with is zero, a unit if those that write it or
its values are.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from tracing_jax.alignment.applicability import WIDTHS, AlignmentError
from tracing_jax.alignment.copies import group_copies
from tracing_jax.alignment.float64_leaves import Leaves, in_float64, leaves, own_table, stacked, units_first
from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, kind_of
from tracing_jax.rewrites import (
    LayerRemoval,
    MeanSetting,
    Padding,
    Permutation,
    Rewrite,
    Rotation,
    arch_after,
    residual_group,
    writes_stream,
)
from tracing_jax.sources import ParamSource, prefixes

_WRITTEN_ON = {"mlp": "mlp", "kv_heads": "v_dim"}
"""Axis kind -> the axis kind on which the weights that write an inactive unit are zero."""

_NEGLIGIBLE = 1e-2
"""Largest size, relative to the others, of a zero feature that was rotated and rounded: 2^-8 in bfloat16 at most."""


def remove_expansions(
    base: ParamSource, ft: ParamSource, kinds: Collection[str]
) -> tuple[tuple[Rewrite, ...], dict[str, Any]]:
    """Returns the rewrites that reduce ft to base's depth and width, and a report of what they remove.

    Raises:
      AlignmentError: ft has more surplus layers or units than inactive ones; all findings at once.
    """
    rewrites: list[Rewrite] = []
    report: dict[str, Any] = {}
    differ = any(getattr(base.arch, name) != getattr(ft.arch, name) for name in ("num_layers", *WIDTHS))
    if "rotation" in kinds and differ and not MeanSetting.unsupported(ft.arch):
        rewrites.append(MeanSetting.zeros(ft.arch))  # units that write alike to all features are inactive
    if "identity" in kinds and ft.arch.num_layers > base.arch.num_layers:
        layers = _surplus_layers(base, in_float64(ft, rewrites))
        rewrites += [LayerRemoval(i) for i in sorted(layers, reverse=True)]
        report["identity"] = {"layers": layers}
    if "copies" in kinds:
        after = in_float64(ft, rewrites)
        times = base.arch.q_group // after.arch.q_group
        if "padding" in kinds and (rest := after.arch.num_kv_heads % max(times, 1)):
            # Heads that were added to copies: without them every kv head is there as often as every other.
            fewer = replace(after.arch, num_kv_heads=after.arch.num_kv_heads - rest)
            rewrites += [*_to_the_end(fewer, after, kinds), Padding(kv_heads=-rest)]
        found, removed = group_copies(base.arch, ft, rewrites)
        rewrites += found
        report |= {"copies": removed} if removed else {}
    if "padding" in kinds:
        after = in_float64(ft, rewrites)
        dropped = {
            "units": after.arch.mlp_dim - base.arch.mlp_dim,
            "features": after.arch.embed_dim - base.arch.embed_dim,
            "kv_heads": after.arch.num_kv_heads - base.arch.num_kv_heads,
        }
        if any(dropped.values()):
            report["padding"] = dropped
            rewrites += [*_to_the_end(base.arch, after, kinds), Padding(**{name: -n for name, n in dropped.items()})]
            _check_widths(base.arch, arch_after(rewrites, ft.arch))
    return tuple(rewrites), report


def _surplus_layers(base: ParamSource, ft: ParamSource) -> list[int]:
    """Returns which layers of ft to skip: identity layers at places where base has none."""
    surplus = ft.arch.num_layers - base.arch.num_layers
    inactive, silent_in_base = (_inactive_layers(source) for source in (ft, base))
    found: list[int] = []
    for i in range(ft.arch.num_layers):
        if i in inactive and i - len(found) not in silent_in_base and len(found) < surplus:
            found.append(i)
    if len(found) < surplus:
        raise AlignmentError(
            f"ft has {surplus} layers more than base, of which {len(found)} add nothing to the residual stream: they "
            "are no identity layers, so that layers cannot be paired"
        )
    return found


def _inactive_layers(source: ParamSource) -> set[int]:
    found = set()
    for i in range(source.arch.num_layers):
        prefix = f"layers/{i}/"
        weights, table = leaves(source, prefix), own_table(source.arch, prefix)
        if not any(weights[name].any() for name, spec in table.leaves.items() if writes_stream(spec)):
            found.add(i)
    return found


def _to_the_end(base: Arch, ft: ParamSource, kinds: Collection[str]) -> list[Rewrite]:
    """Returns the rewrites that put ft's inactive units last on every axis that is longer than base's."""
    lines: list[str] = []
    permutations: dict[str, np.ndarray] = {}
    for i in range(ft.arch.num_layers):
        prefix = f"layers/{i}/"
        table, table_base = own_table(ft.arch, prefix), own_table(base, prefix)
        weights = leaves(ft, prefix)
        for axis in [axis for axis in table.sizes if kind_of(axis) in _WRITTEN_ON]:
            surplus = table.sizes[axis] - table_base.sizes[axis]
            if surplus <= 0:
                continue
            inactive = _inactive_units(weights, table, axis)
            if (order := _inactive_last(inactive, surplus, axis, lines)) is not None:
                permutations[axis] = order
    rotation: list[Rewrite] = []
    if (surplus := ft.arch.embed_dim - base.embed_dim) > 0:
        inactive = ~np.logical_or.reduce([written.any(axis=1) for written in _writers(ft)], axis=0)
        if inactive.sum() < surplus and "rotation" in kinds and residual_group(ft.arch) == "orthogonal":
            rotation = _rotated_features(ft, surplus, lines)
        elif (order := _inactive_last(inactive, surplus, "embed", lines)) is not None:
            permutations["embed"] = order
    if lines:
        raise AlignmentError("ft is wider than base, and not by padding:\n  " + "\n  ".join(lines))
    return [*([Permutation(permutations)] if permutations else []), *rotation]


def _inactive_units(weights: Leaves, table: AxisTable, axis: str) -> np.ndarray:
    """Returns which units of an axis, `[units]` or `[parent, units]`, are inactive."""
    written, kind = axis, _WRITTEN_ON[kind_of(axis)]
    if kind != kind_of(axis):
        written = next(other for other in table.sizes if kind_of(other) == kind)
    parents = [table.parent_axis[axis]] if axis in table.parent_axis else []
    lead = parents if written == axis else [*parents, axis]
    writes = stacked(weights, table, written, "writes", lead)
    assert writes is not None
    return np.logical_not(writes.reshape(*writes.shape[: len(parents) + 1], -1).any(axis=-1))


def _inactive_last(inactive: np.ndarray, surplus: int, axis: str, lines: list[str]) -> np.ndarray | None:
    """Returns the order that moves the last inactive units of an axis to its end and keeps the order of the others."""
    if inactive.ndim > 1:
        orders = [_inactive_last(row, surplus, f"{axis} of {i}", lines) for i, row in enumerate(inactive)]
        return None if any(order is None for order in orders) else np.stack([o for o in orders if o is not None])
    if inactive.sum() < surplus:
        lines.append(f"{axis}: {surplus} units more than in base, of which {int(inactive.sum())} are inactive")
        return None
    last = np.flatnonzero(inactive)[-surplus:]
    return np.concatenate([np.setdiff1d(np.arange(len(inactive)), last), last]).astype(np.int32)


def _writers(source: ParamSource) -> Iterable[np.ndarray]:
    """Yields the leaves that write the residual stream, each as `[D, n]`."""
    for prefix in prefixes(source.arch):
        weights, table = leaves(source, prefix), own_table(source.arch, prefix)
        for name, spec in table.leaves.items():
            if name in weights and writes_stream(spec):
                yield units_first(weights[name], spec, ("embed",))


def _rotated_features(ft: ParamSource, surplus: int, lines: list[str]) -> list[Rewrite]:
    """Returns the rotation that puts the directions last on which no weight writes."""
    gram = np.zeros((ft.arch.embed_dim,) * 2)
    for written in _writers(ft):  # one leaf at a time is held
        gram += written @ written.T / max(float(np.square(written).sum()), np.finfo(float).tiny)
    values, vectors = np.linalg.eigh(gram)
    size = np.sqrt(values.clip(0) / values.mean())
    if (nonzero := int((size[:surplus] > _NEGLIGIBLE).sum())) > 0:
        lines.append(f"embed: {surplus} features more than in base, of which {surplus - nonzero} are inactive, rotated")
        return []
    return [Rotation(vectors.T[::-1].copy())]


def _check_widths(base: Arch, ft: Arch) -> None:
    lines = [f"{n}: {getattr(base, n)} and {getattr(ft, n)}" for n in WIDTHS if getattr(base, n) != getattr(ft, n)]
    if lines:
        raise AlignmentError("widths differ after padding is dropped: " + "; ".join(lines))
