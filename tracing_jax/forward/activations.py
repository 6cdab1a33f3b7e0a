"""Inner activations of one model at a few sampled tokens, layer by layer: one forward pass, however many layers."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from tracing_jax.arch import Arch
from tracing_jax.models import (
    LayerInputs,
    apply_block_with_taps,
    apply_embed,
    apply_mlp_with_taps,
    layer_inputs,
    mlp_leaves,
)
from tracing_jax.sharding import Compute
from tracing_jax.sources import ParamSource
from tracing_jax.tree import Tree, to_host


def activations(
    source: ParamSource,
    tokens: Int[np.ndarray, "N T"],
    at: Int[np.ndarray, "N P"],
    valid: Bool[np.ndarray, "N P"],
    taps: Sequence[str],
    compute: Compute,
    description: str = "activations",
) -> Iterator[tuple[int, dict[str, Float[np.ndarray, "S U"]]]]:
    """Returns an iterator over (layer, {tap: activations in float32 at the S valid positions, in their order}).

    U counts the units of a tap (see `models.tap_axes`): its axes after B and T, flattened. The hidden states of all
    tokens are kept, and of each layer only the S rows, which the caller may keep or not.
    """
    arch, taps = source.arch, tuple(taps)
    embed = source.embed()
    hidden = [embed_step(arch, compute.dtype, embed, compute.put(batch)) for batch in compute.batches(tokens)]
    places = [compute.put(batch) for batch in compute.batches(at)]
    for i in tqdm(range(arch.num_layers), desc=description, unit="layer", disable=None):
        layer, inputs = source.layer(i), layer_inputs(arch, i)
        found = []
        for b, place in enumerate(places):
            hidden[b], picked = block_step(arch, taps, layer, hidden[b], inputs, place)
            found.append(compute.get(picked))
        yield i, {tap: np.concatenate([rows[tap] for rows in found])[: len(at)][valid] for tap in taps}


def embedding_activations(
    source: ParamSource, ids: Int[np.ndarray, " S"], taps: Sequence[str], description: str = "embeddings"
) -> Iterator[tuple[int, dict[str, Float[np.ndarray, "S U"]]]]:
    """Returns an iterator over (layer, {tap: activations}) when each MLP is handed the embeddings of these tokens.

    No forward pass: every layer normalises the embeddings and applies its gain, as it would the hidden state.
    """
    arch, taps = source.arch, tuple(taps)
    x = embed_step(arch, jnp.float32, source.embed(), jnp.asarray(ids)[None])
    for i in tqdm(range(arch.num_layers), desc=description, unit="layer", disable=None):
        found = to_host(mlp_step(arch, taps, source.layer(i, mlp_leaves(taps)), x))
        yield i, {tap: units[0] for tap, units in found.items()}


def picked(x: Float[Array, "B T *units"], at: Int[Array, "B P"] | None) -> Float[Array, "B P U"]:
    """Returns the units at the positions (None: at all), flattened, in float32."""
    flat = x.reshape(*x.shape[:2], -1)
    return (flat if at is None else jnp.take_along_axis(flat, at[:, :, None], axis=1)).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("arch", "dtype"))
def embed_step(arch: Arch, dtype: DTypeLike, params: Tree, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Returns the hidden states before the first layer."""
    return apply_embed(arch, params, tokens, dtype)


@functools.partial(jax.jit, static_argnames=("arch", "taps"), donate_argnames=("x",))
def block_step(
    arch: Arch,
    taps: tuple[str, ...],
    layer: Tree,
    x: Float[Array, "B T D"],
    inputs: LayerInputs,
    at: Int[Array, "B P"] | None = None,
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B P U"]]]:
    """Returns the hidden states after a layer, and its activations at the positions as `picked` gives them."""
    x, found = apply_block_with_taps(arch, layer, x, *inputs, taps)
    return x, {tap: picked(found[tap], at) for tap in taps}


@functools.partial(jax.jit, static_argnames=("arch", "taps"))
def mlp_step(
    arch: Arch, taps: tuple[str, ...], layer: Tree, x: Float[Array, "B T D"]
) -> dict[str, Float[Array, "B T U"]]:
    """Returns the activations of a layer's MLP that is handed hidden states, as `picked` gives them."""
    return {tap: picked(units, None) for tap, units in apply_mlp_with_taps(arch, layer, x, taps).items()}
