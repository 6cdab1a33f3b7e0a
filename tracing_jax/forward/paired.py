"""The forward passes of two models in parallel, layer by layer, with the correlations of their units."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch, length_problem
from tracing_jax.data import PairedBlocks, paired_one_to_one
from tracing_jax.forward.forward_pass import (
    LayerOutput,
    SavedStates,
    forward,
    forward_mlps,
    gather_positions,
    vocabulary_problem,
)
from tracing_jax.forward.gram_sums import Sums, accumulate, gram_sharding, pearson, zero_sums
from tracing_jax.forward.unit_samples import ArrayPair, HostPair, Sample, UnitSampler
from tracing_jax.models import taps_problem
from tracing_jax.progress import tqdm
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource
from tracing_jax.tree import readable

_EMBEDDINGS = (1, 512)
"""Batch of the weights-only form: so many blocks of so many tokens pass an MLP at a time."""


@dataclass(frozen=True)
class LayerCorrelations:
    """The correlations of the units of one layer of both models.

    Attributes:
      layer: its index in both models.
      by_tap: tap -> Pearson correlation of base's units with ft's, over all paired positions, on the device.
      samples: tap -> activations of base and of ft at the sampled positions, float32; empty if none were asked for.
    """

    layer: int
    by_tap: Mapping[str, Float[Array | np.ndarray, "U U2"]]
    samples: Mapping[str, tuple[Float[np.ndarray, "S U3"], Float[np.ndarray, "S U4"]]] = field(default_factory=dict)


class _Pairing(NamedTuple):
    """Which positions of a batch are compared (None: all, one to one), and the weight of each pair, 1 or 0."""

    at: ArrayPair | tuple[None, None]
    weight: Float[Array, "B P"]


def correlations(
    base: ParamSource,
    ft: ParamSource,
    blocks: PairedBlocks,
    taps: Sequence[str],
    compute: Compute,
    description: str = "correlations",
    sample: Sample | None = None,
    run_cache: RunCache | None = None,
) -> Iterator[LayerCorrelations]:
    """Returns an iterator over the layers with the correlations of base's units with ft's at all paired positions.

    U counts the units of a tap (see `models.tap_axes`): its axes after B and T, flattened. A unit that never varies has
    correlation 0 with every other. Weights are on the mesh already, or on no particular device.

    With `run_cache` the hidden states between layers are saved now and then; an interrupted pass continues with the
    layer that receives the saved ones, and yields no layer before it.

    Raises:
      ValueError: models of different depth, unknown taps, no tokens, blocks longer than a model can read, or ids
        outside a vocabulary; all at once, before anything is computed.
    """
    _check(base.arch, ft.arch, blocks, taps)
    batches = _batches(blocks, compute)
    states = SavedStates(run_cache or RunCache(), base.arch, ft.arch)
    first, hidden = states.load(batches, compute.dtype) or (0, None)
    passes = tuple(
        forward(model, ids, compute.dtype, taps=tuple(taps), start=None if hidden is None else (first, hidden[m]))
        for m, (model, ids) in enumerate(zip((base, ft), batches))
    )
    layers = range(first, base.arch.num_layers)
    return _correlations(passes, layers, [tuple(taps)], blocks, compute, description, sample, states)


def embedding_correlations(
    base: ParamSource,
    ft: ParamSource,
    shared: tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]],
    taps: Sequence[str],
    compute: Compute,
    sample: Sample,
    description: str = "embeddings through every MLP",
    first: int = 0,
) -> Iterator[LayerCorrelations]:
    """Returns an iterator over the layers, from `first` on, when each MLP reads the embeddings of shared tokens.

    There is no forward pass: every layer normalises the embeddings and applies its gain, as it would the hidden state,
    and of its weights only those are read. Each of the tokens in `shared` (ids in base, ids in ft, paired by string) is
    one observation.

    Raises:
      ValueError: models of different depth, unknown taps, or no shared tokens.
    """
    blocks = _in_blocks(shared)
    _check(base.arch, ft.arch, blocks, taps, mlp_only=True)
    compute = replace(compute, batch_size=_EMBEDDINGS[0], dtype=jnp.float32)
    groups = [(tap,) for tap in taps]  # one by one: of a layer's weights only those of one tap are then held
    passes = tuple(
        forward_mlps(model, ids, groups, first) for model, ids in zip((base, ft), _batches(blocks, compute))
    )  # fmt: skip
    layers = range(first, base.arch.num_layers)
    return _correlations(passes, layers, groups, blocks, compute, description, sample, SavedStates(RunCache()))


def _in_blocks(shared: tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]) -> PairedBlocks:
    """Returns the tokens in blocks of one length, the last padded with tokens of weight 0."""
    count = len(shared[0])
    width = max(1, min(_EMBEDDINGS[1], count))
    base, ft = (np.resize(ids, (-(-count // width), width)).astype(np.int32) for ids in shared)
    return replace(paired_one_to_one(base, ft), valid=np.arange(base.size).reshape(base.shape) < count)


def _batches(blocks: PairedBlocks, compute: Compute) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the batches that base reads, and those that ft does."""
    base, ft = ([compute.put(batch) for batch in compute.batches(ids)] for ids in (blocks.base, blocks.ft))
    return base, ft


def _correlations(
    passes: tuple[Iterator[LayerOutput], ...],
    layers: range,
    tap_groups: Sequence[tuple[str, ...]],
    blocks: PairedBlocks,
    compute: Compute,
    description: str,
    sample: Sample | None,
    states: SavedStates,
) -> Iterator[LayerCorrelations]:
    """Advances the passes of base and ft in turn, which give layers, groups of taps and batches in this order."""
    pairings, sampler = _pairings(blocks, compute), UnitSampler(sample, blocks, compute)
    progress = tqdm(
        layers, desc=description, unit="layer", initial=layers.start, total=layers.stop, disable=None
    )  # fmt: skip
    for i in progress:
        by_tap: dict[str, Array | np.ndarray] = {}
        samples: dict[str, HostPair] = {}
        for taps in tap_groups:
            sums, sampled, hidden = _sums(passes, taps, pairings, sampler, compute)
            samples |= sampler.concatenated(sampled)
            for tap in taps:
                total = sums.pop(tap)
                by_tap[tap] = readable(pearson(total.cross, total.first, total.square, blocks.num_pairs))
                del total
        yield LayerCorrelations(i, by_tap, samples)
        del by_tap  # before the next ones are made
        if i + 1 < layers.stop:
            states.save_if_due(i + 1, hidden)
    states.delete()


def _sums(
    passes: tuple[Iterator[LayerOutput], ...],
    taps: tuple[str, ...],
    pairings: Sequence[_Pairing],
    sampler: UnitSampler,
    compute: Compute,
) -> tuple[dict[str, Sums], list[dict[str, HostPair]], tuple[list[jax.Array], list[jax.Array]]]:
    """Returns the sums of these taps over all batches, and of each batch the sampled activations and hidden states."""
    sums: list[Sums] = []
    sampled: list[dict[str, HostPair]] = []
    hidden: tuple[list[jax.Array], list[jax.Array]] = ([], [])
    for b, pairing in enumerate(pairings):
        base, ft = (next(outputs) for outputs in passes)
        jax.block_until_ready(sums)  # so that the activations of two batches at most are held
        units = [(base.taps[tap], ft.taps[tap]) for tap in taps]  # without their names, with which others would compile
        widths = [(ours.shape[-1], theirs.shape[-1]) for ours, theirs in units]
        sums = sums or [zero_sums(*width, compute.mesh) for width in widths]
        selection = sampler.selection(b, widths)
        sums, found = _accumulate_step(compute.mesh, units, pairing, selection, b == 0, sums)
        sampled.append(dict(zip(taps, compute.get(found))))
        hidden[0].append(base.hidden)
        hidden[1].append(ft.hidden)
    return dict(zip(taps, sums)), sampled, hidden


def correlate(a: Float[np.ndarray, "S U"], b: Float[np.ndarray, "S U2"]) -> Float[np.ndarray, "U U2"]:
    """Returns the Pearson correlation of the columns of a with those of b over the S rows; 0 where one is constant."""
    return np.asarray(_correlate(a, b))


def _pairings(blocks: PairedBlocks, compute: Compute) -> list[_Pairing]:
    """Returns the compared positions of each batch; copies of a block that only pad the last batch have weight 0."""
    weight = compute.batches(blocks.valid.astype(np.float32))
    last = weight[-1]
    weight[-1] = last * (np.arange(len(last)) < len(blocks.valid) - len(last) * (len(weight) - 1))[:, None]
    weights = [compute.put(batch) for batch in weight]
    if blocks.is_whole:
        return [_Pairing((None, None), w) for w in weights]
    at_pairs = zip(*(map(compute.put, compute.batches(at)) for at in (blocks.at_base, blocks.at_ft)))
    return [_Pairing(at, w) for at, w in zip(at_pairs, weights)]


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("sums",))
def _accumulate_step(
    mesh: Mesh,
    units: list[ArrayPair],
    pairing: _Pairing,
    selection: tuple[ArrayPair, list[ArrayPair]] | None,
    is_first: bool | jax.Array,
    sums: list[Sums],
) -> tuple[list[Sums], list[ArrayPair]]:
    """Returns the sums with a batch of both models' units added, and the sampled activations of the batch."""
    at_base, at_ft = pairing.at
    compared = [(gather_positions(ours, at_base), gather_positions(theirs, at_ft)) for ours, theirs in units]
    sums = [accumulate(total, both, pairing.weight, is_first) for total, both in zip(sums, compared, strict=True)]
    # Stated, or the first batch's sums and the next ones' would be placed differently and compile twice.
    sums = jax.lax.with_sharding_constraint(sums, jax.tree.map(lambda total: gram_sharding(total.shape, mesh), sums))
    if selection is None:
        return sums, []
    (at_a, at_b), columns = selection
    sampled = [
        (gather_positions(ours, at_a)[..., in_a], gather_positions(theirs, at_b)[..., in_b])
        for (ours, theirs), (in_a, in_b) in zip(units, columns, strict=True)
    ]
    return sums, sampled


@jax.jit
def _correlate(a: Float[Array | np.ndarray, "S U"], b: Float[Array | np.ndarray, "S U2"]) -> Float[Array, "U U2"]:
    a, b = a - a[-1], b - b[-1]  # a constant unit is then exactly 0
    a, b = (x - x.mean(axis=0) for x in (a, b))
    scales = [jnp.where((x != 0).any(0), jax.lax.rsqrt(jnp.square(x).sum(0)), 0.0) for x in (a, b)]
    return jnp.einsum("su,sv->uv", a * scales[0], b * scales[1], precision="highest")


def _check(base: Arch, ft: Arch, blocks: PairedBlocks, taps: Sequence[str], mlp_only: bool = False) -> None:
    lines = []
    if base.num_layers != ft.num_layers:
        lines.append(f"base has {base.num_layers} layers, ft {ft.num_layers}; layers are compared one to one")
    lines += dict.fromkeys(problem for arch in (base, ft) if (problem := taps_problem(arch, taps)))
    lengths = () if mlp_only else ((base, blocks.base.shape[-1]), (ft, blocks.ft.shape[-1]))
    lines += dict.fromkeys(problem for arch, T in lengths if (problem := length_problem(arch, T)))
    if not blocks.num_pairs:
        lines.append("no token blocks")
    for name, tokens, arch in (("base", blocks.base, base), ("ft", blocks.ft, ft)):
        if problem := vocabulary_problem(tokens, arch):
            lines.append(f"{name}: {problem}")
    if lines:
        raise ValueError("cannot correlate these models:\n  " + "\n  ".join(lines))
