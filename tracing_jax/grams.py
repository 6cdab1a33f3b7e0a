"""Correlations between the inner units of two models that read the same tokens side by side.

Both models advance in lockstep, layer outer: the hidden states of all tokens are kept, the Grams of one layer live at a
time, and no activation matrix does. Each model makes one forward pass in all, whatever the number of layers and taps.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from tracing_jax.arch import Arch, length_problem
from tracing_jax.models import LayerInputs, apply_block_with_taps, apply_embed, layer_inputs, taps_problem
from tracing_jax.sharding import Compute
from tracing_jax.source import ParamSource
from tracing_jax.tree import Tree

_Pair = tuple[jax.Array, jax.Array]  # base's and ft's
_Inputs = tuple[LayerInputs, LayerInputs]


class _Sums(NamedTuple):
    """Running sums over tokens of one tap, of activations minus a shift: far from zero, squares would cancel."""

    cross: Float[Array, "U U2"]
    first: tuple[Float[Array, " U"], Float[Array, " U2"]]
    square: tuple[Float[Array, " U"], Float[Array, " U2"]]
    shift: tuple[Float[Array, " U"], Float[Array, " U2"]]


def correlations(
    base: ParamSource,
    ft: ParamSource,
    tokens: Int[np.ndarray, "N T"],
    taps: Sequence[str],
    compute: Compute,
    description: str = "correlations",
) -> Iterator[tuple[int, dict[str, Float[np.ndarray, "U U2"]]]]:
    """Returns an iterator over (layer, {tap: Pearson correlation of base's units with ft's over all tokens}).

    U counts the units of a tap (see `models.tap_axes`): its axes after B and T, flattened. A unit that never varies has
    correlation 0 with every other. Weights lie on the mesh already, or on no particular device.

    Raises:
      ValueError: models of different depth, unknown taps, no tokens, blocks longer than a model can read, or ids
        outside a vocabulary; all at once, before anything is computed.
    """
    _check(base.arch, ft.arch, tokens, taps)
    return _walk((base, ft), tokens, tuple(taps), compute, description)


def _walk(
    sources: tuple[ParamSource, ParamSource],
    tokens: np.ndarray,
    taps: tuple[str, ...],
    compute: Compute,
    description: str,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    archs = (sources[0].arch, sources[1].arch)
    embeds = (sources[0].embed(), sources[1].embed())
    batches = [compute.put(batch) for batch in compute.batches(tokens)]
    weights = [compute.put(weight) for weight in _weights(len(tokens), batches)]
    hidden = [_embed_step(archs, compute.dtype, embeds, batch) for batch in batches]
    for i in tqdm(range(archs[0].num_layers), desc=description, unit="layer", disable=None):
        layers = (sources[0].layer(i), sources[1].layer(i))
        inputs = (layer_inputs(archs[0], i), layer_inputs(archs[1], i))
        sums = _empty(archs, taps, layers, hidden[0], inputs, compute.mesh)
        for b, weight in enumerate(weights):
            hidden[b], sums = _step(archs, taps, compute.mesh, layers, hidden[b], inputs, weight, b == 0, sums)
        yield i, {tap: np.asarray(_pearson(tap_sums, tokens.size)) for tap, tap_sums in sums.items()}


def _weights(num_blocks: int, batches: Sequence[jax.Array]) -> list[np.ndarray]:
    """Returns for each batch the weights of its blocks: 1, and 0 for those that fill up the last batch."""
    total = sum(len(batch) for batch in batches)
    return np.split((np.arange(total) < num_blocks).astype(np.float32), len(batches))


@functools.partial(jax.jit, static_argnames=("archs", "dtype"))
def _embed_step(archs: tuple[Arch, Arch], dtype: DTypeLike, params: tuple[Tree, Tree], tokens: jax.Array) -> _Pair:
    return apply_embed(archs[0], params[0], tokens, dtype), apply_embed(archs[1], params[1], tokens, dtype)


@functools.partial(jax.jit, static_argnames=("archs", "taps", "mesh"), donate_argnames=("x", "sums"))
def _step(
    archs: tuple[Arch, Arch],
    taps: tuple[str, ...],
    mesh: Mesh,
    layers: tuple[Tree, Tree],
    x: _Pair,
    inputs: _Inputs,
    weight: Float[Array, " B"],
    is_first: bool | jax.Array,
    sums: dict[str, _Sums],
) -> tuple[_Pair, dict[str, _Sums]]:
    """Returns both models' hidden states after a layer, and the sums with this batch added."""
    (x_a, units_a), (x_b, units_b) = _with_taps(archs, taps, layers, x, inputs)
    sums = {tap: _added(sums[tap], (units_a[tap], units_b[tap]), weight, is_first) for tap in taps}
    # Stated, or the first batch's sums and the next ones' would be placed differently and compile twice.
    whole = NamedSharding(mesh, P())
    return (x_a, x_b), jax.lax.with_sharding_constraint(sums, jax.tree.map(lambda _: whole, sums))


def _with_taps(
    archs: tuple[Arch, Arch], taps: tuple[str, ...], layers: tuple[Tree, Tree], x: _Pair, inputs: _Inputs
) -> list[tuple[jax.Array, dict[str, jax.Array]]]:
    return [
        apply_block_with_taps(arch, layer, x_one, *inputs_one, taps)
        for arch, layer, x_one, inputs_one in zip(archs, layers, x, inputs, strict=True)
    ]


def _empty(
    archs: tuple[Arch, Arch],
    taps: tuple[str, ...],
    layers: tuple[Tree, Tree],
    x: _Pair,
    inputs: _Inputs,
    mesh: Mesh,
) -> dict[str, _Sums]:
    shapes = jax.eval_shape(functools.partial(_with_taps, archs, taps), layers, x, inputs)
    units = {tap: [math.prod(found[tap].shape[2:]) for _, found in shapes] for tap in taps}

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.float32, device=NamedSharding(mesh, P()))

    return {
        tap: _Sums(zeros(U, U2), (zeros(U), zeros(U2)), (zeros(U), zeros(U2)), (zeros(U), zeros(U2)))
        for tap, (U, U2) in units.items()
    }


def _added(sums: _Sums, units: _Pair, weight: Float[Array, " B"], is_first: bool | jax.Array) -> _Sums:
    """Returns the sums with a batch added; the first batch also sets the shift."""
    rows = [x.astype(jnp.float32).reshape(*x.shape[:2], -1) for x in units]
    # One late token, not a mean: a constant unit is then exactly 0, and first tokens are often outliers.
    shift_a, shift_b = (jnp.where(is_first, x[0, -1], old) for x, old in zip(rows, sums.shift, strict=True))
    a, b = (x - shift for x, shift in zip(rows, (shift_a, shift_b), strict=True))
    weighted_a, weighted_b = (x * weight[:, None, None] for x in (a, b))
    return _Sums(
        sums.cross + jnp.einsum("btu,btv->uv", weighted_a, b, precision="highest"),
        (sums.first[0] + weighted_a.sum((0, 1)), sums.first[1] + weighted_b.sum((0, 1))),
        (sums.square[0] + (weighted_a * a).sum((0, 1)), sums.square[1] + (weighted_b * b).sum((0, 1))),
        (shift_a, shift_b),
    )


@jax.jit
def _pearson(sums: _Sums, count: int | jax.Array) -> Float[Array, "U U2"]:
    """Returns cov(a, b) / sqrt(var(a) var(b)), and 0 where either variance is."""
    covariance = sums.cross - sums.first[0][:, None] * sums.first[1] / count
    scales = []
    for first, square in zip(sums.first, sums.square, strict=True):
        variance = square - first**2 / count
        scales.append(jnp.where(variance > 0, jax.lax.rsqrt(variance), 0.0))
    return covariance * scales[0][:, None] * scales[1]


def _check(base: Arch, ft: Arch, tokens: np.ndarray, taps: Sequence[str]) -> None:
    lines = []
    if base.num_layers != ft.num_layers:
        lines.append(f"base has {base.num_layers} layers, ft {ft.num_layers}; layers are compared one to one")
    lines += dict.fromkeys(problem for arch in (base, ft) if (problem := taps_problem(arch, taps)))
    lines += dict.fromkeys(problem for arch in (base, ft) if (problem := length_problem(arch, tokens.shape[-1])))
    if tokens.size == 0:
        lines.append("no token blocks")
    elif tokens.min() < 0 or tokens.max() >= min(base.vocab_size, ft.vocab_size):
        lines.append(
            f"token ids run from {tokens.min()} to {tokens.max()}, the vocabularies have {base.vocab_size} and "
            f"{ft.vocab_size}; both models must read the same ids"
        )
    if lines:
        raise ValueError("cannot correlate these models:\n  " + "\n  ".join(lines))
