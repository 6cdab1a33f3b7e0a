"""Correlations between the inner units of two models that read the same tokens side by side.

Both models advance in lockstep, layer outer: the hidden states of all tokens are kept, the Grams of one layer live at a
time, and no activation matrix does. Each model makes one forward pass in all, whatever the number of layers and taps.
The models may read the text through different tokenizers: only positions paired in `PairedBlocks` are compared.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from tracing_jax.activations import mlp_step, picked
from tracing_jax.arch import Arch, length_problem
from tracing_jax.data import PairedBlocks, paired_one_to_one
from tracing_jax.models import LayerInputs, apply_block_with_taps, apply_embed, layer_inputs, taps_problem
from tracing_jax.sharding import Compute
from tracing_jax.source import ParamSource
from tracing_jax.tree import Tree

_Pair = tuple[jax.Array, jax.Array]  # base's and ft's
_Inputs = tuple[LayerInputs, LayerInputs]
_HostPair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LayerCorrelations:
    """What one layer of both models shows.

    Attributes:
      layer: its index in both models.
      by_tap: tap -> Pearson correlation of base's units with ft's, over all paired positions.
      samples: tap -> activations of base and of ft at the sampled positions, float32; empty if none were asked for.
    """

    layer: int
    by_tap: Mapping[str, Float[np.ndarray, "U U2"]]
    samples: Mapping[str, tuple[Float[np.ndarray, "S U3"], Float[np.ndarray, "S U4"]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Activations to keep of every layer: at most so many paired positions and units of each tap, drawn from a seed."""

    positions: int
    units: int
    seed: int


class _Pairing(NamedTuple):
    """Which positions of a batch are compared (None: all, one to one), and the weight of each pair, 1 or 0."""

    at: _Pair | tuple[None, None]
    weight: Float[Array, "B P"]


class _Sums(NamedTuple):
    """Running sums over tokens of one tap, of activations minus a shift: far from zero, squares would cancel."""

    cross: Float[Array, "U U2"]
    first: tuple[Float[Array, " U"], Float[Array, " U2"]]
    square: tuple[Float[Array, " U"], Float[Array, " U2"]]
    shift: tuple[Float[Array, " U"], Float[Array, " U2"]]


def correlations(
    base: ParamSource,
    ft: ParamSource,
    blocks: PairedBlocks,
    taps: Sequence[str],
    compute: Compute,
    description: str = "correlations",
    sample: Sample | None = None,
) -> Iterator[LayerCorrelations]:
    """Returns an iterator over the layers with the correlations of base's units with ft's at all paired positions.

    U counts the units of a tap (see `models.tap_axes`): its axes after B and T, flattened. A unit that never varies has
    correlation 0 with every other. Weights lie on the mesh already, or on no particular device.

    Raises:
      ValueError: models of different depth, unknown taps, no tokens, blocks longer than a model can read, or ids
        outside a vocabulary; all at once, before anything is computed.
    """
    _check(base.arch, ft.arch, blocks, taps)
    return _walk((base, ft), blocks, tuple(taps), compute, description, sample)


def _walk(
    sources: tuple[ParamSource, ParamSource],
    blocks: PairedBlocks,
    taps: tuple[str, ...],
    compute: Compute,
    description: str,
    sample: Sample | None,
) -> Iterator[LayerCorrelations]:
    archs = (sources[0].arch, sources[1].arch)
    embeds = (sources[0].embed(), sources[1].embed())
    pairings, keeper = _pairings(blocks, compute), _Keeper(sample, blocks, compute)
    ids = zip(*(map(compute.put, compute.batches(tokens)) for tokens in (blocks.base, blocks.ft)))
    hidden = [_embed_step(archs, compute.dtype, embeds, batch) for batch in ids]
    for i in tqdm(range(archs[0].num_layers), desc=description, unit="layer", disable=None):
        layers = (sources[0].layer(i), sources[1].layer(i))
        inputs = (layer_inputs(archs[0], i), layer_inputs(archs[1], i))
        sums = _empty(archs, taps, layers, hidden[0], inputs, compute.mesh)
        kept = []
        for b, pairing in enumerate(pairings):
            keep = keeper.picks(b, sums)
            hidden[b], sums, found = _step(
                archs, taps, compute.mesh, layers, hidden[b], inputs, pairing, keep, b == 0, sums
            )
            kept.append(jax.device_get(found))
        by_tap = {tap: np.asarray(_pearson(tap_sums, blocks.num_pairs)) for tap, tap_sums in sums.items()}
        yield LayerCorrelations(i, by_tap, keeper.joined(kept))


def embedding_correlations(
    base: ParamSource,
    ft: ParamSource,
    shared: tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]],
    taps: Sequence[str],
    sample: Sample,
    description: str = "embeddings through every MLP",
) -> Iterator[LayerCorrelations]:
    """Returns an iterator over the layers when each MLP is handed the embeddings of shared tokens: no forward pass.

    Every layer normalises them and applies its gain, as it would the hidden state; each of the tokens in `shared` (ids
    in base, ids in ft, paired by string) is one observation.

    Raises:
      ValueError: models of different depth, unknown taps, or no shared tokens.
    """
    blocks = paired_one_to_one(np.asarray(shared[0], np.int32)[None], np.asarray(shared[1], np.int32)[None])
    _check(base.arch, ft.arch, blocks, taps)
    return _hand_over((base, ft), blocks, tuple(taps), sample, description)


def _hand_over(
    sources: tuple[ParamSource, ParamSource],
    blocks: PairedBlocks,
    taps: tuple[str, ...],
    sample: Sample,
    description: str,
) -> Iterator[LayerCorrelations]:
    archs = (sources[0].arch, sources[1].arch)
    tokens = (jnp.asarray(blocks.base), jnp.asarray(blocks.ft))
    x = _embed_step(archs, jnp.float32, (sources[0].embed(), sources[1].embed()), tokens)
    rows = np.random.default_rng(sample.seed).permutation(blocks.num_pairs)[: sample.positions]
    for i in tqdm(range(archs[0].num_layers), desc=description, unit="layer", disable=None):
        units = [mlp_step(arch, taps, source.layer(i), y) for arch, source, y in zip(archs, sources, x)]
        by_tap, samples = {}, {}
        for tap in taps:
            a, b = units[0][tap], units[1][tap]
            by_tap[tap] = np.asarray(_correlate(a, b))
            columns = sampled_units(sample, (a.shape[1], b.shape[1]))
            samples[tap] = (np.asarray(a[rows][:, columns[0]]), np.asarray(b[rows][:, columns[1]]))
        yield LayerCorrelations(i, by_tap, samples)


def correlate(a: Float[np.ndarray, "S U"], b: Float[np.ndarray, "S U2"]) -> Float[np.ndarray, "U U2"]:
    """Returns the Pearson correlation of the columns of a with those of b over the S rows; 0 where one is constant."""
    return np.asarray(_correlate(jnp.asarray(a), jnp.asarray(b)))


def sampled_units(sample: Sample, widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the units of base and of ft to keep, in increasing order; one draw for all taps of equal width."""
    draws = np.random.default_rng(sample.seed).spawn(2)
    base, ft = (
        np.sort(draw.permutation(width)[: sample.units]).astype(np.int32)
        for draw, width in zip(draws, widths, strict=True)
    )
    return base, ft


class _Keeper:
    """Picks the sampled positions and units of each batch, and joins what was picked."""

    def __init__(self, sample: Sample | None, blocks: PairedBlocks, compute: Compute) -> None:
        self.sample = sample
        if sample is None:
            return
        chosen = blocks.sampled(sample.positions, np.random.default_rng(sample.seed))
        self.at = list(zip(*(map(compute.put, compute.batches(at)) for at in (chosen.at_base, chosen.at_ft))))
        self.valid = chosen.valid

    def picks(self, batch: int, sums: Mapping[str, _Sums]) -> tuple[_Pair, dict[str, _Pair]] | None:
        """Returns the positions of a batch and, for each tap, the units; one draw for all taps of equal width."""
        if self.sample is None:
            return None
        units = {tap: sampled_units(self.sample, found.cross.shape) for tap, found in sums.items()}
        return self.at[batch], jax.tree.map(jnp.asarray, units)

    def joined(
        self, kept: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Returns the rows of all batches at the sampled positions, without those that only fill up."""
        if self.sample is None:
            return {}
        count = len(self.valid)
        return {
            tap: tuple(np.concatenate([found[tap][side] for found in kept])[:count][self.valid] for side in (0, 1))
            for tap in kept[0]
        }  # type: ignore[misc]


def _pairings(blocks: PairedBlocks, compute: Compute) -> list[_Pairing]:
    """Returns the compared positions of each batch; copies of a block that only fill up the last batch weigh 0."""
    weight = compute.batches(blocks.valid.astype(np.float32))
    last = weight[-1]
    weight[-1] = last * (np.arange(len(last)) < len(blocks.valid) - len(last) * (len(weight) - 1))[:, None]
    weights = [compute.put(batch) for batch in weight]
    if blocks.is_whole:
        return [_Pairing((None, None), w) for w in weights]
    places = zip(*(map(compute.put, compute.batches(at)) for at in (blocks.at_base, blocks.at_ft)))
    return [_Pairing(at, w) for at, w in zip(places, weights)]


@functools.partial(jax.jit, static_argnames=("archs", "dtype"))
def _embed_step(archs: tuple[Arch, Arch], dtype: DTypeLike, params: tuple[Tree, Tree], tokens: _Pair) -> _Pair:
    return apply_embed(archs[0], params[0], tokens[0], dtype), apply_embed(archs[1], params[1], tokens[1], dtype)


@functools.partial(jax.jit, static_argnames=("archs", "taps", "mesh"), donate_argnames=("x", "sums"))
def _step(
    archs: tuple[Arch, Arch],
    taps: tuple[str, ...],
    mesh: Mesh,
    layers: tuple[Tree, Tree],
    x: _Pair,
    inputs: _Inputs,
    pairing: _Pairing,
    keep: tuple[_Pair, dict[str, _Pair]] | None,
    is_first: bool | jax.Array,
    sums: dict[str, _Sums],
) -> tuple[_Pair, dict[str, _Sums], dict[str, _Pair]]:
    """Returns both models' hidden states after a layer, the sums with this batch added, and what is to be kept."""
    (x_a, units_a), (x_b, units_b) = _with_taps(archs, taps, layers, x, inputs)
    compared = {tap: (picked(units_a[tap], pairing.at[0]), picked(units_b[tap], pairing.at[1])) for tap in taps}
    sums = {tap: _added(sums[tap], compared[tap], pairing.weight, is_first) for tap in taps}
    # Stated, or the first batch's sums and the next ones' would be placed differently and compile twice.
    sums = jax.lax.with_sharding_constraint(sums, jax.tree.map(lambda total: _split(mesh, total.shape), sums))
    if keep is None:
        return (x_a, x_b), sums, {}
    (at_a, at_b), columns = keep
    kept = {
        tap: (picked(units_a[tap], at_a)[..., cols_a], picked(units_b[tap], at_b)[..., cols_b])
        for tap, (cols_a, cols_b) in columns.items()
    }
    return (x_a, x_b), sums, kept


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
    leaves, structure = jax.tree.flatten((layers, x, inputs))
    described = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    units = _units(archs, taps, described, structure)

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.float32, device=_split(mesh, shape))

    return {
        tap: _Sums(zeros(U, U2), (zeros(U), zeros(U2)), (zeros(U), zeros(U2)), (zeros(U), zeros(U2)))
        for tap, (U, U2) in units.items()
    }


def _split(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns where a sum lies: a Gram split by its rows over `model` where they divide evenly, all else whole."""
    parts = mesh.shape["model"]
    is_split = parts > 1 and len(shape) == 2 and shape[0] % parts == 0
    return NamedSharding(mesh, P("model", None) if is_split else P())


@functools.lru_cache(maxsize=16)  # tracing a block takes longer than running a small one
def _units(
    archs: tuple[Arch, Arch],
    taps: tuple[str, ...],
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    structure: jax.tree_util.PyTreeDef,
) -> dict[str, tuple[int, int]]:
    """Returns how many units base and ft have at each tap, given the shapes of layers, hidden states and inputs."""
    arguments = jax.tree.unflatten(structure, leaves)
    (_, base), (_, ft) = jax.eval_shape(functools.partial(_with_taps, archs, taps), *arguments)
    return {tap: (math.prod(base[tap].shape[2:]), math.prod(ft[tap].shape[2:])) for tap in taps}


def _added(sums: _Sums, rows: _Pair, weight: Float[Array, "B P"], is_first: bool | jax.Array) -> _Sums:
    """Returns the sums with a batch added; the first batch also sets the shift."""
    # One late token, not a mean: a constant unit is then exactly 0, and first tokens are often outliers.
    shift_a, shift_b = (jnp.where(is_first, x[0, -1], old) for x, old in zip(rows, sums.shift, strict=True))
    a, b = (x - shift for x, shift in zip(rows, (shift_a, shift_b), strict=True))
    weighted_a, weighted_b = (x * weight[:, :, None] for x in (a, b))
    return _Sums(
        sums.cross + jnp.einsum("btu,btv->uv", weighted_a, b, precision="highest"),
        (sums.first[0] + weighted_a.sum((0, 1)), sums.first[1] + weighted_b.sum((0, 1))),
        (sums.square[0] + (weighted_a * a).sum((0, 1)), sums.square[1] + (weighted_b * b).sum((0, 1))),
        (shift_a, shift_b),
    )


@jax.jit
def _correlate(a: Float[Array, "S U"], b: Float[Array, "S U2"]) -> Float[Array, "U U2"]:
    a, b = a - a[-1], b - b[-1]  # a constant unit is then exactly 0
    a, b = (x - x.mean(axis=0) for x in (a, b))
    scales = [jnp.where((x != 0).any(0), jax.lax.rsqrt(jnp.square(x).sum(0)), 0.0) for x in (a, b)]
    return jnp.einsum("su,sv->uv", a * scales[0], b * scales[1], precision="highest")


@jax.jit
def _pearson(sums: _Sums, count: int | jax.Array) -> Float[Array, "U U2"]:
    """Returns cov(a, b) / sqrt(var(a) var(b)), and 0 where either variance is."""
    covariance = sums.cross - sums.first[0][:, None] * sums.first[1] / count
    scales = []
    for first, square in zip(sums.first, sums.square, strict=True):
        variance = square - first**2 / count
        scales.append(jnp.where(variance > 0, jax.lax.rsqrt(variance), 0.0))
    return covariance * scales[0][:, None] * scales[1]


def _check(base: Arch, ft: Arch, blocks: PairedBlocks, taps: Sequence[str]) -> None:
    lines = []
    if base.num_layers != ft.num_layers:
        lines.append(f"base has {base.num_layers} layers, ft {ft.num_layers}; layers are compared one to one")
    lines += dict.fromkeys(problem for arch in (base, ft) if (problem := taps_problem(arch, taps)))
    lengths = ((base, blocks.base.shape[-1]), (ft, blocks.ft.shape[-1]))
    lines += dict.fromkeys(problem for arch, T in lengths if (problem := length_problem(arch, T)))
    if not blocks.num_pairs:
        lines.append("no token blocks")
    for side, tokens, arch in (("base", blocks.base, base), ("ft", blocks.ft, ft)):
        if tokens.size and (tokens.min() < 0 or tokens.max() >= arch.vocab_size):
            lines.append(
                f"{side}'s token ids run from {tokens.min()} to {tokens.max()}, its vocabulary has {arch.vocab_size}; "
                "tokenizer and model do not belong together"
            )
    if lines:
        raise ValueError("cannot correlate these models:\n  " + "\n  ".join(lines))
