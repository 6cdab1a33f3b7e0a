"""The engine: token blocks through one model, or along the path between two, layer by layer.

The jitted unit is the block step: one layer, for every alpha at once. It compiles once per shape, whatever the depth:
what differs between layers, such as rope and window, comes in as data. The weights of one interpolated layer live at a
time.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from tracing_jax.arch import Arch, length_problem
from tracing_jax.axes import axis_table
from tracing_jax.data import PairedBlocks
from tracing_jax.interpolate import interpolate, moving_leaves
from tracing_jax.models import apply_block, apply_embed, apply_head, layer_inputs
from tracing_jax.sharding import Compute
from tracing_jax.source import ParamSource, part
from tracing_jax.symmetry import Dims, Permutations, take_units, unit_moves
from tracing_jax.tree import Tree, flatten, unflatten

_LOGITS_BYTES = 256 * 2**20  # the most that the logits of one head slice may take


def path_losses(
    base: ParamSource,
    ft: ParamSource | None,
    tokens: Int[np.ndarray, "N T"],
    alphas: Sequence[float] | np.ndarray,
    groups: Sequence[str],
    compute: Compute,
    description: str = "losses along the path",
    copies: Sequence[Permutations] = (),
) -> Float[np.ndarray, "A N T1"]:
    """Returns the loss of every predicted token, in nats, at every alpha of the path from base (0) to ft (1).

    The model at alpha has base's facts (rope, norms, scales); only leaves in `groups` move. With no groups `ft` is not
    read. T1 = T - 1: the first token of a block is never predicted. Weights stay on the mesh, and no logits of a whole
    batch are kept.

    Args:
      base: the end at 0.
      ft: the end at 1; None where nothing moves.
      tokens: the blocks that every model on the path reads.
      alphas: the points.
      groups: which leaves move.
      compute: where and how.
      description: what the progress bar says.
      copies: one for each alpha, permutations of the same axes: ft is permuted by them before it is met. No permuted
        model is made; the units are taken where the layer is interpolated.

    Raises:
      ValueError: no tokens, blocks longer than base can read, ids outside its vocabulary, or not as many copies as
        alphas.
    """
    _check_tokens(tokens, base.arch)
    if copies and len(copies) != len(alphas):
        raise ValueError(f"{len(copies)} permuted copies at {len(alphas)} alphas; give one for each, or none")
    moving = moving_leaves(axis_table(base.arch), groups)
    walk = _Walk(base, ft, moving, jnp.asarray(alphas, jnp.float32), compute.dtype, copies)
    batches = tqdm(compute.batches(tokens), desc=description, unit="batch", disable=None)
    losses = [np.asarray(walk.losses(compute.put(batch))) for batch in batches]
    return np.concatenate(losses, axis=1)[:, : len(tokens)]


def token_losses(
    source: ParamSource, tokens: Int[np.ndarray, "N T"], compute: Compute, description: str = "losses"
) -> Float[np.ndarray, "N T1"]:
    """Returns the loss of every predicted token of one model, in nats."""
    return path_losses(source, None, tokens, (0.0,), (), compute, description)[0]


def divergences(
    base: ParamSource,
    ft: ParamSource,
    blocks: PairedBlocks,
    shared: tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]],
    compute: Compute,
    description: str = "divergences",
) -> Float[np.ndarray, " M"]:
    """Returns the Jensen-Shannon divergence of the two predictions at every paired position, in nats.

    Both are cut to the tokens in `shared` (ids in base, ids in ft, paired) and normalised again. Each model makes one
    pass, and logits exist for a slice of a batch at a time.

    Raises:
      ValueError: no tokens, or ids outside a vocabulary.
    """
    _check_tokens(blocks.base, base.arch)
    _check_tokens(blocks.ft, ft.arch)
    walks = [_Walk(source, None, frozenset(), jnp.zeros(1), compute.dtype) for source in (base, ft)]
    read = (blocks.base, blocks.ft, blocks.at_base, blocks.at_ft)
    batches = list(zip(*(compute.batches(rows) for rows in read)))
    found = []
    for ids_base, ids_ft, at_base, at_ft in tqdm(batches, desc=description, unit="batch", disable=None):
        hidden = [walk.hidden(compute.put(ids))[0] for walk, ids in zip(walks, (ids_base, ids_ft))]
        at = (compute.put(at_base), compute.put(at_ft))
        step = _divergence_step((base.arch, ft.arch), [walk.own_head() for walk in walks], hidden, at, shared)
        found.append(np.asarray(step))
    return np.concatenate(found)[: len(blocks.valid)][blocks.valid]


def logits(
    source: ParamSource, tokens: Int[np.ndarray, "B T"], dtype: DTypeLike = jnp.float32
) -> Float[np.ndarray, "B T V"]:
    """Returns the logits of a few token blocks: for proofs of equal function, not for scoring."""
    _check_tokens(tokens, source.arch)
    make = functools.partial(_path, source, None, frozenset(), jnp.zeros(1), {})
    embed = make("embed/")
    x = _embed_step(source.arch, dtype, embed, jnp.asarray(tokens))
    for i in range(source.arch.num_layers):  # one layer of a lazy source at a time
        x = _block_step(source.arch, make(f"layers/{i}/"), x, *layer_inputs(source.arch, i))
    return np.asarray(_logits(source.arch, source.head() | {"embed": embed.base}, x[0]))


FUNCTION_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""Dtype of the weights -> the most that a rewrite may move logits, relative to the larger of 1 and the largest.

Rewritten weights are rounded once, to 2^-24, 2^-11 or 2^-9 of themselves, and a deep model amplifies what that changes;
a rewrite that does not keep the function moves logits by their own size."""

_PROOF_TOKENS = (2, 32)  # blocks, positions


def check_function(
    before: ParamSource, after: ParamSource, *, seed: int, new_ids: Int[np.ndarray, " V"] | None = None
) -> float:
    """Returns how far the logits of two models are apart on random tokens, over the larger of 1 and the largest.

    Args:
      before: a model.
      after: the model rewritten.
      seed: draws the tokens.
      new_ids: for each token of `before` its id in `after`, if it has another.

    Raises:
      ValueError: further than rounding explains: `after` does not compute what `before` does.
    """
    blocks, length = _PROOF_TOKENS
    shape = (blocks, min(length, before.arch.num_positions or length))
    tokens = np.random.default_rng(seed).integers(before.arch.vocab_size, size=shape, dtype=np.int32)
    ids = np.arange(before.arch.vocab_size) if new_ids is None else new_ids
    expected, found = logits(before, tokens), logits(after, ids[tokens].astype(np.int32))[..., ids]
    moved = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
    dtype = str(flatten(before.embed())["embedding"].dtype)
    if not moved <= FUNCTION_TOLERANCE[dtype]:  # NaN too
        raise ValueError(
            f"logits move by {moved:.2e} of the largest, expected at most {FUNCTION_TOLERANCE[dtype]:.0e} for weights "
            f"in {dtype}: these rewrites do not keep the function of this {before.arch.family} model; leave rewrites "
            "out to find which it is"
        )
    return moved


class _Walk:
    """The layers of a path in the order in which a batch passes them; parts are read from the sources once."""

    def __init__(
        self,
        base: ParamSource,
        ft: ParamSource | None,
        moving: frozenset[str],
        alphas: jax.Array,
        dtype: DTypeLike,
        copies: Sequence[Permutations] = (),
    ) -> None:
        self.arch, self.dtype = base.arch, dtype
        make = functools.partial(_path, base, ft, moving, alphas, _stacked(copies))
        self.embed = make("embed/")
        self.layers = [make(f"layers/{i}/") for i in range(base.arch.num_layers)]
        self.head = make("head/")
        if self.arch.tied:
            self.head = self.head.with_embedding(self.embed)
        self.inputs = [layer_inputs(base.arch, i) for i in range(base.arch.num_layers)]

    def hidden(self, tokens: jax.Array) -> jax.Array:
        x = _embed_step(self.arch, self.dtype, self.embed, tokens)
        for layer, inputs in zip(self.layers, self.inputs, strict=True):
            x = _block_step(self.arch, layer, x, *inputs)
        return x

    def losses(self, tokens: jax.Array) -> jax.Array:
        return _loss_step(self.arch, self.head, self.hidden(tokens), tokens)

    def own_head(self) -> Tree:
        """Returns base's head, with the embedding that a tied head shares."""
        return self.head.base


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "ft", "alphas", "indices"],
                   meta_fields=["moving", "dims"])  # fmt: skip
@dataclass(frozen=True)
class _Path:
    """One part of the models along the path.

    Attributes:
      base: the part of base.
      ft: name -> the leaf of the same part of ft, of those that move.
      alphas: the points `[A]`.
      indices: name -> how the units of ft's leaf are taken at each point, `[A, ...]` for each of its moved dimensions.
      moving: names of the leaves that move.
      dims: name and moved dimensions of the leaves in `indices`.
    """

    base: Tree
    ft: dict[str, jax.Array]
    alphas: jax.Array
    indices: dict[str, list[jax.Array]]
    moving: frozenset[str]
    dims: tuple[tuple[str, Dims], ...]

    def each(self, function: Callable[..., jax.Array], *rest: jax.Array) -> jax.Array:
        """Returns `function(params at the point, *slices of rest)` at every point, one after another."""

        def one(point: tuple[Any, ...]) -> jax.Array:
            alpha, indices, *slices = point
            ft = self.ft | {name: take_units(self.ft[name], dims, indices[name]) for name, dims in self.dims}
            return function(interpolate(self.base, unflatten(ft), alpha, self.moving), *slices)

        return jax.lax.map(one, (self.alphas, self.indices, *rest))

    def with_embedding(self, embed: "_Path") -> "_Path":
        """Returns this head with the embedding that a tied model shares with it, as the subtree `embed`."""
        return _Path(
            self.base | {"embed": embed.base},
            self.ft | {f"embed/{name}": leaf for name, leaf in embed.ft.items()},
            self.alphas,
            self.indices | {f"embed/{name}": taken for name, taken in embed.indices.items()},
            self.moving | {f"embed/{name}" for name in embed.moving},
            self.dims + tuple((f"embed/{name}", dims) for name, dims in embed.dims),
        )


def _stacked(copies: Sequence[Permutations]) -> dict[str, np.ndarray]:
    """Returns axis -> the permutations of all copies, `[A, ...]`."""
    return {axis: np.stack([copy[axis] for copy in copies]) for axis in copies[0]} if copies else {}


def _path(
    base: ParamSource,
    ft: ParamSource | None,
    moving: frozenset[str],
    alphas: jax.Array,
    stacked: Mapping[str, np.ndarray],
    prefix: str,
) -> _Path:
    """Returns the part under `prefix`; ft's is read only if something in it moves."""
    names = frozenset(name.removeprefix(prefix) for name in moving if name.startswith(prefix))
    leaves = flatten(part(ft, prefix)) if ft is not None and names else {}
    own = {name: leaves[name] for name in sorted(names)} if leaves else {}
    table = axis_table(base.arch)
    moves = {name: unit_moves(table.leaves[prefix + name], stacked, table.within) for name in own}
    moves = {name: (dims, indices) for name, (dims, indices) in moves.items() if dims}
    return _Path(
        part(base, prefix),
        own,
        alphas,
        {name: [jnp.asarray(index) for index in indices] for name, (_, indices) in moves.items()},
        names,
        tuple((name, dims) for name, (dims, _) in moves.items()),
    )


@functools.partial(jax.jit, static_argnames=("arch", "dtype"))
def _embed_step(arch: Arch, dtype: DTypeLike, path: _Path, tokens: jax.Array) -> Float[Array, "A B T D"]:
    return path.each(lambda params: apply_embed(arch, params, tokens, dtype))


@functools.partial(jax.jit, static_argnames="arch", donate_argnames="x")
def _block_step(
    arch: Arch,
    path: _Path,
    x: Float[Array, "A B T D"],
    frequencies: jax.Array,
    window: jax.Array,
    attention_scale: jax.Array,
) -> Float[Array, "A B T D"]:
    return path.each(lambda params, x: apply_block(arch, params, x, frequencies, window, attention_scale), x)


@functools.partial(jax.jit, static_argnames="arch")
def _loss_step(arch: Arch, path: _Path, x: jax.Array, tokens: jax.Array) -> Float[Array, "A B T1"]:
    """Returns the losses of a batch; logits exist for a slice of the positions and one alpha at a time."""
    B, T = tokens.shape
    step = _slice_length(T, B * arch.vocab_size * 4)
    targets = jnp.roll(tokens, -1, axis=1).reshape(B, T // step, step)

    def one(params: Tree, x: jax.Array) -> jax.Array:
        def positions(x_and_targets: tuple[jax.Array, jax.Array]) -> jax.Array:
            x, wanted = x_and_targets
            scores = _logits(arch, params, x)
            picked = jnp.take_along_axis(scores, wanted[..., None], axis=-1)[..., 0]
            return jax.nn.logsumexp(scores, axis=-1) - picked

        slices = (x.reshape(B, T // step, step, -1).swapaxes(0, 1), targets.swapaxes(0, 1))
        return jax.lax.map(positions, slices).swapaxes(0, 1).reshape(B, T)[:, :-1]

    return path.each(one, x)


@functools.partial(jax.jit, static_argnames="archs")
def _divergence_step(
    archs: tuple[Arch, Arch],
    heads: Sequence[Tree],
    hidden: Sequence[Float[Array, "B _ _"]],
    at: tuple[Int[Array, "B P"], Int[Array, "B P"]],
    shared: tuple[Int[Array, " S"], Int[Array, " S"]],
) -> Float[Array, "B P"]:
    """Returns the divergences of a batch; logits exist for a slice of the positions at a time."""
    B, P = at[0].shape
    step = _slice_length(P, B * (archs[0].vocab_size + archs[1].vocab_size) * 4)
    slices = [
        jnp.take_along_axis(x, place[:, :, None], axis=1).reshape(B, P // step, step, -1).swapaxes(0, 1)
        for x, place in zip(hidden, at)
    ]

    def positions(xs: list[jax.Array]) -> jax.Array:
        one, other = (
            jax.nn.log_softmax(_logits(arch, head, x)[..., ids], axis=-1)
            for arch, head, x, ids in zip(archs, heads, xs, shared)
        )
        middle = jnp.logaddexp(one, other) - math.log(2)
        return 0.5 * ((jnp.exp(one) * (one - middle)).sum(-1) + (jnp.exp(other) * (other - middle)).sum(-1))

    return jax.lax.map(positions, slices).swapaxes(0, 1).reshape(B, P)


def _logits(arch: Arch, params: Tree, x: jax.Array) -> jax.Array:
    own = {name: leaf for name, leaf in params.items() if name != "embed"}
    return apply_head(arch, own, x, params["embed"]["embedding"] if arch.tied else None)


def _slice_length(length: int, bytes_per_position: int) -> int:
    """Returns the largest divisor of the block length whose logits fit the limit."""
    most = max(1, _LOGITS_BYTES // bytes_per_position)
    return max(n for n in range(1, length + 1) if length % n == 0 and n <= most)


def _check_tokens(tokens: np.ndarray, arch: Arch) -> None:
    if tokens.size == 0:
        raise ValueError("no token blocks to score")
    if problem := length_problem(arch, tokens.shape[-1]):
        raise ValueError(problem)
    # An index out of range gives NaN or the last row on a device, never an error.
    if tokens.min() < 0 or tokens.max() >= arch.vocab_size:
        raise ValueError(
            f"token ids run from {tokens.min()} to {tokens.max()}, the vocabulary has {arch.vocab_size}; "
            "tokenizer and model do not belong together"
        )
