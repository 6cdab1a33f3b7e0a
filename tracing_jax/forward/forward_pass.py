"""The forward pass: batches of tokens through the layers of one model, or of all models along a path.

`forward` is the loop over layers; `forward_mlps` is the one over layers of which the MLPs alone are computed. `forward`
takes a `ParamSource`, resident or streamed, or an `InterpolatedModel`, whose hidden states have an axis A of points in
front. Its jitted unit is the block step, which compiles once per shape,
whatever the depth: what differs between layers comes in as data. All batches given pass a layer together, so a caller
with resident weights passes one batch at a time, and one with streamed weights as many as memory allows.

Letters: A points of a path, B batch, T position, P selected positions, D embed, U units, V vocab.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tracing_jax.arch import WEIGHTS_ONLY, Arch, UnsupportedModelError, length_problem
from tracing_jax.forward.interpolated_model import (
    InterpolatedModel,
    InterpolatedSubtree,
    is_resident_model,
    map_points,
    num_points,
    with_embedding,
)
from tracing_jax.models import (
    BlockOutput,
    Carried,
    LayerCache,
    LayerInputs,
    apply_block,
    apply_embed,
    apply_head,
    apply_mlp,
    apply_per_layer,
    layer_inputs,
    mlp_leaves,
)
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import put_like
from tracing_jax.sources import ParamSource
from tracing_jax.tree import Tree, to_host

PathOrModel = ParamSource | InterpolatedModel
Subtree = Tree | InterpolatedSubtree

_HIDDEN_BYTES = 2**30
"""The most that the hidden states of streamed models may take: further batches pass in a second reading."""

LOGITS_BYTES = 256 * 2**20
"""The most that the logits of one slice of positions may take."""


class LayerOutput(NamedTuple):
    """What one layer gives for one batch."""

    layer: int
    batch: int
    hidden: Float[Array, "*A B T D"]
    """Valid until the next layer takes this batch in: its memory is then reused."""
    taps: dict[str, Float[Array, "*A B P U"]]
    cache: LayerCache | None
    carried: Carried
    """What passes to the next layer beside the hidden state."""


def forward(
    model: PathOrModel,
    tokens: Sequence[Int[Array, "B T"]],
    dtype: DTypeLike,
    *,
    taps: tuple[str, ...] = (),
    at: Sequence[Int[Array, "B P"]] | None = None,
    positions: Sequence[Int[Array, "B T"]] | None = None,
    caches: Sequence[Sequence[LayerCache]] | None = None,
    start: tuple[int, Sequence[Float[Array, "*A B T D"]]] | None = None,
) -> Iterator[LayerOutput]:
    """Returns an iterator over the layers and in each layer over the batches, with what the layer gives for the batch.

    One layer is held at a time, and none when the caller has the output for the last batch of a layer. Pure: over a
    resident model it may run under `jit` and `grad`.

    Args:
      model: a model, resident or streamed, or all models along a path.
      tokens: the batches.
      dtype: the computing dtype.
      taps: inner activations to return (see `models.tap_axes`), their units flattened, in float32.
      at: for each batch the positions at which taps are returned; None for all.
      positions: for each batch those of its tokens; None counts from 0.
      caches: for each batch the key/value caches of the layers, continued with these tokens.
      start: the first layer to run, and the hidden states that it receives; None starts from the tokens. Not for models
        that carry more than the hidden state through their layers (see `carries_more`).

    Raises:
      UnsupportedModelError: the model is read by its weights alone.
    """
    arch, resident = model.arch, is_resident_model(model)
    if arch.reading is not None:
        raise UnsupportedModelError(f"{arch.family}: {WEIGHTS_ONLY}")
    assert start is None or not carries_more(arch)
    each_at = [None] * len(tokens) if at is None else at
    each_positions = [None] * len(tokens) if positions is None else positions
    first, given = start or (0, _embedded(model, tokens, dtype, each_positions))
    hidden = list(given)
    carried = carried_before(model, tokens, hidden)
    for i in range(first, arch.num_layers):
        layer: Subtree | None = model.layer(i)
        inputs = layer_inputs(arch, i)
        for b, x in enumerate(hidden):
            cache = None if caches is None else caches[b][i]
            # Under jit it is not known where x lies, nor whether gradients of the weights are taken.
            alone = not isinstance(x, jax.core.Tracer) and len(x.sharding.device_set) == 1
            rest = (each_positions[b], cache, each_at[b], carried[b])
            outputs = [block_step(arch, taps, layer, x, inputs, *rest, grouped=alone)]
            hidden[b], carried[b] = outputs[0].hidden, outputs[0].carried
            if b == len(hidden) - 1:
                layer = None  # freed before the next one is read, and before the caller uses this one's results
            yield LayerOutput(i, b, *outputs.pop())  # no reference is left here: the caller alone holds activations
        if not resident:
            jax.block_until_ready(hidden)  # dispatch is asynchronous, and layers would accumulate


def forward_mlps(
    source: ParamSource, tokens: Sequence[Int[Array, "B T"]], tap_groups: Sequence[tuple[str, ...]], first: int = 0
) -> Iterator[LayerOutput]:
    """Returns an iterator over layers, groups of taps and batches when every MLP reads the embeddings of these tokens.

    There is no attention and no hidden state: every layer normalises the embeddings and applies its gain. Of a layer
    only the weights behind one group of taps are read and held at a time. All is computed in float32.
    """
    hidden = _embedded(source, tokens, jnp.float32, [None] * len(tokens))
    for i in range(first, source.arch.num_layers):
        for taps in tap_groups:
            layer: Tree | None = source.layer(i, mlp_leaves(source.arch, taps))
            for b, x in enumerate(hidden):
                found = [mlp_step(source.arch, taps, layer, x)]
                if b == len(hidden) - 1:
                    layer = None
                yield LayerOutput(i, b, x, found.pop(), None, Carried(None, {}))


def final_hidden(
    model: PathOrModel,
    tokens: Sequence[Int[Array, "B T"]],
    dtype: DTypeLike,
    run_cache: RunCache | None = None,
    on_layer: Callable[[], object] = lambda: None,
) -> list[Float[Array, "*A B T D"]]:
    """Returns the hidden states after the last layer, of each batch.

    Args:
      model: a model, resident or streamed, or all models along a path.
      tokens: the batches.
      dtype: the computing dtype.
      run_cache: where hidden states of an unfinished pass are saved now and then; an interrupted one continues there.
      on_layer: is called after every layer.
    """
    states = SavedStates(run_cache or RunCache(), model.arch)
    start = states.load(tokens, dtype)
    hidden: dict[int, jax.Array] = {}
    for _ in range(start[0] if start else 0):
        on_layer()
    for output in forward(model, tokens, dtype, start=start):
        hidden[output.batch] = output.hidden
        if output.batch == len(tokens) - 1:
            on_layer()
            if output.layer < model.arch.num_layers - 1:
                states.save_if_due(output.layer + 1, hidden)
    return [hidden[b] for b in range(len(tokens))]


class SavedStates:
    """The hidden states of an unfinished forward pass, from which a second start continues.

    There is one file, which is replaced when the write budget of the run cache allows it: not after every layer. There
    is none of models that carry more than that through their layers (see `carries_more`).
    """

    def __init__(self, run_cache: RunCache, *archs: Arch) -> None:
        self.run_cache = RunCache() if any(map(carries_more, archs)) else run_cache

    def save_if_due(self, layer: int, states: Tree) -> None:
        """Saves a pytree of hidden states that this layer receives, if the write budget allows it."""
        leaves = jax.tree.leaves(states)

        def arrays() -> dict[str, np.ndarray]:
            # npz has no bfloat16: the bits are stored.
            bits = {f"state {n}": _bits(to_host(leaf)) for n, leaf in enumerate(leaves)}
            return {"layer": np.asarray(layer), **bits}

        self.run_cache.save_if_due(arrays, sum(leaf.nbytes for leaf in leaves), "hidden")

    def load(self, tokens: Tree, dtype: DTypeLike) -> tuple[int, Tree] | None:
        """Returns the layer and the states that it receives, as the pytree of their tokens; None if none are saved."""
        arrays = self.run_cache.load_arrays("hidden")
        if arrays is None:
            return None
        batches, treedef = jax.tree.flatten(tokens)
        states = [put_like(arrays[f"state {n}"].view(jnp.dtype(dtype)), batch) for n, batch in enumerate(batches)]
        return int(arrays["layer"]), jax.tree.unflatten(treedef, states)

    def delete(self) -> None:
        """Deletes the states: the pass is finished."""
        self.run_cache.delete("hidden")


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def _embedded(
    model: PathOrModel, tokens: Sequence[jax.Array], dtype: DTypeLike, positions: Sequence[jax.Array | None]
) -> list[Float[Array, "*A B T D"]]:
    embed = model.embed()
    return [embed_step(model.arch, dtype, embed, batch, at) for batch, at in zip(tokens, positions, strict=True)]


def carries_more(arch: Arch) -> bool:
    """Returns whether more than the hidden state passes through the layers of a model; see `models.Carried`."""
    return arch.per_layer_dim is not None or arch.shares_keys


def carried_before(
    model: PathOrModel, tokens: Sequence[jax.Array], hidden: Sequence[Float[Array, "*A B T D"]]
) -> list[Carried]:
    """Returns for each batch what its first layer receives beside these hidden states."""
    if model.arch.per_layer_dim is None:
        return [Carried(None, {}) for _ in tokens]
    embed = model.embed()
    return [Carried(per_layer_step(model.arch, embed, *batch), {}) for batch in zip(tokens, hidden, strict=True)]


def head_of(model: PathOrModel) -> Subtree:
    """Returns the head, with the embedding of a tied model as the subtree `embed`."""
    head = model.head()
    if not model.arch.tied:
        return head
    return with_embedding(head, model.embed())


def head_logits(arch: Arch, head: Tree, x: Float[Array, "*A B T D"]) -> Float[Array, "*A B T V"]:
    """Returns the logits from a head as `head_of` gives it."""
    return apply_head(arch, head, x, head["embed"]["embedding"] if arch.tied else None)


def points_at_once(arch: Arch, batch: Int[np.ndarray, "B T"], dtype: DTypeLike) -> int:
    """Returns at how many points together a batch passes a layer, their hidden states in bounded memory."""
    return max(1, _HIDDEN_BYTES // (batch.size * arch.embed_dim * jnp.dtype(dtype).itemsize))


def batches_at_once(model: PathOrModel, batch: Int[np.ndarray, "B T"], dtype: DTypeLike) -> int:
    """Returns how many batches pass a layer together: one if resident, as many as fit if each layer must be read."""
    if is_resident_model(model):
        return 1
    arch = model.arch
    width = arch.embed_dim + (arch.per_layer_dim or 0) * arch.per_layer_count
    state_bytes = num_points(model) * batch.size * width * jnp.dtype(dtype).itemsize
    return max(1, _HIDDEN_BYTES // state_bytes)


@functools.partial(jax.jit, static_argnames=("arch", "dtype"))
def embed_step(
    arch: Arch, dtype: DTypeLike, embed: Subtree, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None
) -> Float[Array, "*A B T D"]:
    """Returns the hidden states before the first layer."""
    return map_points(embed, lambda params: apply_embed(arch, params, tokens, dtype, positions))


@functools.partial(jax.jit, static_argnames=("arch",))
def per_layer_step(
    arch: Arch, embed: Subtree, tokens: Int[Array, "B T"], x: Float[Array, "*A B T D"]
) -> Float[Array, "*A B T L P"]:
    """Returns the per-layer embeddings of tokens whose hidden states before the first layer are x."""
    return map_points(embed, lambda params, x: apply_per_layer(arch, params, tokens, x), x)


@functools.partial(jax.jit, static_argnames=("arch", "taps", "grouped"), donate_argnames=("x", "cache"))
def block_step(
    arch: Arch,
    taps: tuple[str, ...],
    layer: Subtree,
    x: Float[Array, "*A B T D"],
    inputs: LayerInputs,
    positions: Int[Array, "B T"] | None = None,
    cache: LayerCache | None = None,
    at: Int[Array, "B P"] | None = None,
    carried: Carried | None = None,
    grouped: bool = False,
) -> BlockOutput:
    """Returns what a layer gives; its taps as `gather_positions` returns them."""

    def at_point(params: Tree, x: jax.Array, cache: LayerCache | None, carried: Carried | None) -> BlockOutput:
        output = apply_block(
            arch, params, x, inputs, positions=positions, cache=cache, carried=carried, taps=taps, grouped=grouped
        )
        return output._replace(taps={tap: gather_positions(output.taps[tap], at) for tap in taps})

    return map_points(layer, at_point, x, cache, carried)


@functools.partial(jax.jit, static_argnames=("arch", "taps"))
def mlp_step(
    arch: Arch, taps: tuple[str, ...], layer: Tree, x: Float[Array, "B T D"]
) -> dict[str, Float[Array, "B T U"]]:
    """Returns inner activations of a layer's MLP that reads this hidden state, as `gather_positions` returns them."""
    return {tap: gather_positions(units, None) for tap, units in apply_mlp(arch, layer, x, taps).items()}


def gather_positions(x: Float[Array, "B T *units"], at: Int[Array, "B P"] | None) -> Float[Array, "B P U"]:
    """Returns the units at these positions (None: at all), flattened, in float32."""
    flat = x.reshape(*x.shape[:2], -1)
    return (flat if at is None else jnp.take_along_axis(flat, at[:, :, None], axis=1)).astype(jnp.float32)


def map_slices(
    function: Callable[..., Float[Array, "B S *G"]], arrays: Sequence[jax.Array], bytes_per_position: int
) -> Float[Array, "B T *G"]:
    """Returns `function(*slices of arrays)`, of any further axes, over slices of the positions.

    The logits of a slice fit `LOGITS_BYTES`.

    The slices are equally long; the last is padded with zeros where T is no multiple, and there are no more of them
    than the limit asks for.
    """
    B, T = arrays[0].shape[:2]
    count = -(-T // max(1, LOGITS_BYTES // bytes_per_position))
    length = -(-T // count)

    def slices(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, count * length - T)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(B, count, length, *x.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(lambda xs: function(*xs), tuple(map(slices, arrays)))
    return found.swapaxes(0, 1).reshape(B, count * length, *found.shape[3:])[:, :T]


def check_tokens(tokens: Int[np.ndarray, "N T"], arch: Arch) -> None:
    """Checks that a model can read these blocks.

    Raises:
      ValueError: no tokens, blocks longer than the model can read, or ids outside its vocabulary.
    """
    if tokens.size == 0:
        raise ValueError("no token blocks to score")
    if problem := length_problem(arch, tokens.shape[-1]):
        raise ValueError(problem)
    # An index out of range gives NaN or the last row on a device, never an error.
    if problem := vocabulary_problem(tokens, arch):
        raise ValueError(problem)


def vocabulary_problem(tokens: Int[np.ndarray, "N T"], arch: Arch) -> str | None:
    """Returns which ids are outside the vocabulary of a model, or None."""
    if not tokens.size or (tokens.min() >= 0 and tokens.max() < arch.vocab_size):
        return None
    return (
        f"token ids run from {tokens.min()} to {tokens.max()}, the vocabulary has {arch.vocab_size}; "
        "tokenizer and model do not belong together"
    )
