"""One walk of two models through the same tokens, layer by layer, with the correlations of their units."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from tracing_jax.arch import Arch, length_problem
from tracing_jax.data import PairedBlocks, paired_one_to_one
from tracing_jax.forward.activations import block_step, embed_step, mlp_step, picked
from tracing_jax.forward.gram_sums import Sums, added, lies, no_sums, pearson
from tracing_jax.forward.unit_samples import Keeper, Sample, Side
from tracing_jax.models import layer_inputs, mlp_leaves, taps_problem
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource
from tracing_jax.tree import Tree, readable, to_host

_EMBEDDINGS = (1, 512)
"""Batch of the weights-only form: so many blocks of so many tokens pass an MLP at a time."""


@dataclass(frozen=True)
class LayerCorrelations:
    """What one layer of both models shows.

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

    at: Side | tuple[None, None]
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
    correlation 0 with every other. Weights lie on the mesh already, or on no particular device.

    With `run_cache` the hidden states after each layer that was taken in are kept; an interrupted walk goes on with the
    layer after the last of these, and yields no layer before it.

    Raises:
      ValueError: models of different depth, unknown taps, no tokens, blocks longer than a model can read, or ids
        outside a vocabulary; all at once, before anything is computed.
    """
    _check(base.arch, ft.arch, blocks, taps)
    return _walk((base, ft), blocks, tuple(taps), compute, description, sample, run_cache or RunCache())


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
    """Returns an iterator over the layers, from `first` on, when each MLP is handed the embeddings of shared tokens.

    There is no forward pass: every layer normalises the embeddings and applies its gain, as it would the hidden state,
    and of its weights only those are read. Each of the tokens in `shared` (ids in base, ids in ft, paired by string) is
    one observation.

    Raises:
      ValueError: models of different depth, unknown taps, or no shared tokens.
    """
    blocks = _in_blocks(shared)
    _check(base.arch, ft.arch, blocks, taps, reads_in_order=False)
    compute = replace(compute, batch_size=_EMBEDDINGS[0], dtype=jnp.float32)
    return _walk((base, ft), blocks, tuple(taps), compute, description, sample, RunCache(), hand_over=True, first=first)


def _in_blocks(shared: tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]) -> PairedBlocks:
    """Returns the tokens in blocks of one length, the last filled up with a token that counts nothing."""
    count = len(shared[0])
    width = max(1, min(_EMBEDDINGS[1], count))
    base, ft = (np.resize(ids, (-(-count // width), width)).astype(np.int32) for ids in shared)
    return replace(paired_one_to_one(base, ft), valid=np.arange(base.size).reshape(base.shape) < count)


def _walk(
    sources: tuple[ParamSource, ParamSource],
    blocks: PairedBlocks,
    taps: tuple[str, ...],
    compute: Compute,
    description: str,
    sample: Sample | None,
    run_cache: RunCache,
    hand_over: bool = False,
    first: int = 0,
) -> Iterator[LayerCorrelations]:
    kept_layer, hidden = _kept_states(run_cache, compute)
    first, depth = max(first, kept_layer), sources[0].arch.num_layers
    hidden = hidden or _embedded(sources, blocks, compute)
    walk = _Walk(sources, hidden, _pairings(blocks, compute), Keeper(sample, blocks, compute), compute, hand_over)
    # An MLP that is handed its input shows its taps one by one: of a layer's weights only that one's are then held.
    groups = [(tap,) for tap in taps] if hand_over else [taps]
    for i in tqdm(range(first, depth), desc=description, unit="layer", initial=first, total=depth, disable=None):
        by_tap, kept = {}, []
        for group in groups:
            sums, found = walk.through(i, group)
            kept.append(found)
            for tap in group:
                total = sums.pop(tap)
                by_tap[tap] = readable(pearson(total.cross, total.first, total.square, blocks.num_pairs))
                del total
        samples = {tap: rows for found in kept for tap, rows in walk.keeper.joined(found).items()}
        yield LayerCorrelations(i, by_tap, samples)
        del by_tap  # before the next ones are made
        _keep_states(run_cache, i + 1, walk.hidden)


@dataclass
class _Walk:
    """Both models on their way through all batches.

    Attributes:
      hidden: of each batch, the hidden states that the next layer reads.
      hand_over: whether these are handed to every MLP as they stand.
    """

    sources: tuple[ParamSource, ParamSource]
    hidden: list[Side]
    pairings: Sequence[_Pairing]
    keeper: Keeper
    compute: Compute
    hand_over: bool

    def through(self, i: int, taps: tuple[str, ...]) -> tuple[dict[str, Sums], list[Tree]]:
        """Returns the sums of these taps in a layer, over all batches, and what is kept of each batch."""
        only = mlp_leaves(taps) if self.hand_over else ()
        layers = [source.layer(i, only) for source in self.sources]
        sums: dict[str, Sums] = {}
        kept = []
        for b, pairing in enumerate(self.pairings):
            base, ft = self._step(i, taps, layers, b)
            jax.block_until_ready(sums)  # so that the activations of two batches at most are there
            widths = {tap: (base[tap].shape[-1], ft[tap].shape[-1]) for tap in taps}
            sums = sums or {tap: no_sums(*width, self.compute.mesh) for tap, width in widths.items()}
            sums, found = _take_in(self.compute.mesh, (base, ft), pairing, self.keeper.picks(b, widths), b == 0, sums)
            kept.append(self.compute.get(found))
        return sums, kept

    def _step(self, i: int, taps: tuple[str, ...], layers: Sequence[Tree], b: int) -> list[dict[str, jax.Array]]:
        """Returns both models' taps on a batch, whose hidden states are then those after the layer."""
        archs = [source.arch for source in self.sources]
        if self.hand_over:
            return [mlp_step(*each) for each in zip(archs, (taps, taps), layers, self.hidden[b], strict=True)]
        inputs = [layer_inputs(arch, i) for arch in archs]
        after = [block_step(*each) for each in zip(archs, (taps, taps), layers, self.hidden[b], inputs, strict=True)]
        self.hidden[b] = after[0][0], after[1][0]
        return [units for _, units in after]


def _embedded(sources: tuple[ParamSource, ParamSource], blocks: PairedBlocks, compute: Compute) -> list[Side]:
    archs = (sources[0].arch, sources[1].arch)
    embeds = (sources[0].embed(), sources[1].embed())
    ids = zip(*(map(compute.put, compute.batches(tokens)) for tokens in (blocks.base, blocks.ft)))
    return [
        (embed_step(archs[0], compute.dtype, embeds[0], a), embed_step(archs[1], compute.dtype, embeds[1], b))
        for a, b in ids
    ]


def _keep_states(run_cache: RunCache, layer: int, hidden: Sequence[Side]) -> None:
    def arrays() -> dict[str, np.ndarray]:
        states = {f"{side} {b}": to_host(x).astype(np.float32) for b, pair in enumerate(hidden)
                  for side, x in zip(("base", "ft"), pair)}  # fmt: skip
        return {"layer": np.asarray(layer), **states}

    run_cache.save_arrays(arrays, "hidden")


def _kept_states(run_cache: RunCache, compute: Compute) -> tuple[int, list[Side]]:
    arrays = run_cache.load_arrays("hidden")
    if arrays is None:
        return 0, []
    layer, dtype = int(arrays.pop("layer")), jnp.dtype(compute.dtype)
    sides = [[compute.put(arrays[f"{side} {b}"].astype(dtype)) for side in ("base", "ft")]
             for b in range(len(arrays) // 2)]  # fmt: skip
    return layer, [(base, ft) for base, ft in sides]


def correlate(a: Float[np.ndarray, "S U"], b: Float[np.ndarray, "S U2"]) -> Float[np.ndarray, "U U2"]:
    """Returns the Pearson correlation of the columns of a with those of b over the S rows; 0 where one is constant."""
    return np.asarray(_correlate(jnp.asarray(a), jnp.asarray(b)))


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


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("sums",))
def _take_in(
    mesh: Mesh,
    units: tuple[dict[str, jax.Array], dict[str, jax.Array]],
    pairing: _Pairing,
    keep: tuple[Side, dict[str, Side]] | None,
    is_first: bool | jax.Array,
    sums: dict[str, Sums],
) -> tuple[dict[str, Sums], dict[str, Side]]:
    """Returns the sums with a batch of both models' units added, and what is to be kept of it."""
    compared = {tap: (picked(units[0][tap], pairing.at[0]), picked(units[1][tap], pairing.at[1])) for tap in sums}
    sums = {tap: added(sums[tap], compared[tap], pairing.weight, is_first) for tap in sums}
    # Stated, or the first batch's sums and the next ones' would be placed differently and compile twice.
    sums = jax.lax.with_sharding_constraint(sums, jax.tree.map(lambda total: lies(total.shape, mesh), sums))
    if keep is None:
        return sums, {}
    (at_a, at_b), columns = keep
    kept = {
        tap: (picked(units[0][tap], at_a)[..., cols_a], picked(units[1][tap], at_b)[..., cols_b])
        for tap, (cols_a, cols_b) in columns.items()
    }
    return sums, kept


@jax.jit
def _correlate(a: Float[Array, "S U"], b: Float[Array, "S U2"]) -> Float[Array, "U U2"]:
    a, b = a - a[-1], b - b[-1]  # a constant unit is then exactly 0
    a, b = (x - x.mean(axis=0) for x in (a, b))
    scales = [jnp.where((x != 0).any(0), jax.lax.rsqrt(jnp.square(x).sum(0)), 0.0) for x in (a, b)]
    return jnp.einsum("su,sv->uv", a * scales[0], b * scales[1], precision="highest")


def _check(base: Arch, ft: Arch, blocks: PairedBlocks, taps: Sequence[str], reads_in_order: bool = True) -> None:
    lines = []
    if base.num_layers != ft.num_layers:
        lines.append(f"base has {base.num_layers} layers, ft {ft.num_layers}; layers are compared one to one")
    lines += dict.fromkeys(problem for arch in (base, ft) if (problem := taps_problem(arch, taps)))
    lengths = ((base, blocks.base.shape[-1]), (ft, blocks.ft.shape[-1])) if reads_in_order else ()
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
