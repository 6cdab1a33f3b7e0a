"""Permutations of ft's units estimated from activations of both models on the same tokens."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table, kind_of
from tracing_jax.data import paired_one_to_one
from tracing_jax.forward import LayerCorrelations, correlations
from tracing_jax.matching import Coordinate, Similarity, coordinates, solve, value
from tracing_jax.models import tap_axes
from tracing_jax.rewrites import identity
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource

TAP = {"embed": "residual", "mlp": "units", "kv_heads": "heads", "q_group": "heads", "expert": "units"}
"""Axis kind -> the tap (see `models.tap_axes`) whose activations its units are compared by."""


def match_activations(
    base: ParamSource,
    ft: ParamSource,
    kinds: Sequence[str],
    tokens: np.ndarray,
    compute: Compute,
) -> tuple[dict[str, np.ndarray], tuple[float, float], dict[str, str]]:
    """Returns the permutations, the mean correlation of paired units before and after, and what has no activations.

    Latents of attention and the units of an MLP beside the experts have no tap; they stay as they are.

    Raises:
      ValueError: no axis of these kinds has activations that could be compared.
    """
    table = axis_table(base.arch)
    axes = table.axes_of_kind(kinds)
    left_out = {axis: "it has no tap; match by weights" for axis in axes if axis not in _tapped(base.arch, axis)}
    axes = [axis for axis in axes if axis not in left_out]
    if not axes:
        raise ValueError(f"no activations of {', '.join(left_out)} can be compared; match by weights")
    unmoved = identity(table, axes)
    found: dict[str, np.ndarray] = {}
    before, after, pairs = 0.0, 0.0, 0
    taps = sorted({TAP[kind_of(axis)] for axis in axes})
    layers = correlations(base, ft, paired_one_to_one(tokens, tokens), taps, compute, "align")
    for coordinate, similarity in _similarities(base.arch, coordinates(table, axes), layers):
        found |= solve(coordinate, similarity)
        before += value(coordinate, similarity, unmoved)
        after += value(coordinate, similarity, found)
        pairs += math.prod(table.sizes[axis] for axis in (coordinate.axis, coordinate.nested) if axis is not None)
    return found, (before / pairs, after / pairs), left_out


def _tapped(arch: Arch, axis: str) -> list[str]:
    """Returns the axes of the tap by which the units of an axis are compared; empty if its kind has none."""
    if kind_of(axis) not in TAP:
        return []
    layer = int(axis.split("/")[1]) if "/" in axis else 0
    kinds = tap_axes(arch, layer)[TAP[kind_of(axis)]]
    return [kind if kind == "embed" else f"layers/{layer}/{kind}" for kind in kinds]


def _similarities(
    arch: Arch, todo: Sequence[Coordinate], layers: Iterator[LayerCorrelations]
) -> Iterator[tuple[Coordinate, Similarity]]:
    """Yields each coordinate as soon as its correlations are there: those of the whole model after the last layer."""
    whole_model = [coordinate for coordinate in todo if "/" not in coordinate.axis]
    total: dict[Coordinate, np.ndarray] = {}
    for found_in in layers:
        for coordinate in todo:
            found = np.asarray(found_in.by_tap[TAP[kind_of(coordinate.axis)]])
            if coordinate in whole_model:
                total[coordinate] = total.get(coordinate, np.float32(0)) + found / np.float32(arch.num_layers)
            elif coordinate.axis.startswith(f"layers/{found_in.layer}/"):
                yield coordinate, _similarity(arch, coordinate, found)
    for coordinate, mean in total.items():
        yield coordinate, _similarity(arch, coordinate, mean)


def _similarity(arch: Arch, coordinate: Coordinate, correlation: Float[np.ndarray, "U U"]) -> Similarity:
    """Returns the correlation of units; over other axes of their tap, such as the features of a head, the mean."""
    tap, sizes = _tapped(arch, coordinate.axis), axis_table(arch).sizes
    paired = [axis for axis in (coordinate.axis, coordinate.nested) if axis is not None]
    base = [chr(ord("a") + dim) for dim in range(len(tap))]
    ft = [letter.upper() if axis in paired else letter for letter, axis in zip(base, tap)]
    pairing = "".join([base[tap.index(axis)] for axis in paired] + [ft[tap.index(axis)] for axis in paired])
    shape = [sizes[axis] for axis in tap]
    found = np.einsum(f"{''.join(base + ft)}->{pairing}", correlation.reshape(shape + shape))
    found = found / np.float32(math.prod(sizes[axis] for axis in tap if axis not in paired))
    if coordinate.nested is None:
        return Similarity(found)
    return Similarity(np.zeros((len(found), len(found)), np.float32), lambda i, j: found[i, :, j])
