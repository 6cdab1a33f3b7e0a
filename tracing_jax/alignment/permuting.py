"""Alignment by permutations alone: which units belong together, by weights or by activations."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table, kind_of
from tracing_jax.data import paired_one_to_one
from tracing_jax.grams import LayerCorrelations, correlations
from tracing_jax.matching import Coordinate, Similarity, coordinates, solve, value
from tracing_jax.sharding import Compute
from tracing_jax.source import InMemory
from tracing_jax.symmetry import identity

TAP = {"embed": "residual", "mlp": "units", "kv_heads": "heads", "q_group": "heads"}
"""Axis kind -> the tap (see `models.TAPS`) whose activations tell its units apart."""


def by_activations(
    base: InMemory,
    ft: InMemory,
    kinds: Sequence[str],
    tokens: np.ndarray,
    compute: Compute,
) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """Returns the permutations, and the mean correlation of paired units before and after."""
    table = axis_table(base.arch)
    axes = table.axes_of_kind(kinds)
    unmoved = identity(table, axes)
    found: dict[str, np.ndarray] = {}
    before, after, pairs = 0.0, 0.0, 0
    taps = sorted({TAP[kind] for kind in kinds})
    layers = correlations(base, ft, paired_one_to_one(tokens, tokens), taps, compute, "align")
    for coordinate, similarity in _similarities(base.arch, coordinates(table, axes), layers):
        found |= solve(coordinate, similarity)
        before += value(coordinate, similarity, unmoved)
        after += value(coordinate, similarity, found)
        pairs += similarity.units.shape[0] if similarity.nested is None else math.prod(similarity.nested.shape[:2])
    return found, (before / pairs, after / pairs)


def _similarities(
    arch: Arch, todo: Sequence[Coordinate], layers: Iterator[LayerCorrelations]
) -> Iterator[tuple[Coordinate, Similarity]]:
    """Yields each coordinate as soon as its correlations are there: those of the whole model after the last layer."""
    whole_model = [coordinate for coordinate in todo if "/" not in coordinate.axis]
    total: dict[Coordinate, np.ndarray] = {}
    for found_in in layers:
        for coordinate in todo:
            found = found_in.by_tap[TAP[kind_of(coordinate.axis)]]
            if coordinate in whole_model:
                total[coordinate] = total.get(coordinate, np.float32(0)) + found / np.float32(arch.num_layers)
            elif coordinate.axis.startswith(f"layers/{found_in.layer}/"):
                yield coordinate, _similarity(arch, coordinate, found)
    for coordinate, mean in total.items():
        yield coordinate, _similarity(arch, coordinate, mean)


def _similarity(arch: Arch, coordinate: Coordinate, correlation: Float[np.ndarray, "U U"]) -> Similarity:
    """Returns the correlation of units; of heads, the mean over the positions of their dimension H."""
    if TAP[kind_of(coordinate.axis)] != "heads":
        return Similarity(correlation)
    K, G, H = arch.num_kv_heads, arch.q_group, arch.head_dim
    heads = np.einsum("kghKGh->kgKG", correlation.reshape(K, G, H, K, G, H)) / np.float32(H)
    if coordinate.nested is None:
        return Similarity(np.einsum("kgKg->kK", heads) / np.float32(G))
    return Similarity(np.zeros((K, K), np.float32), heads)
