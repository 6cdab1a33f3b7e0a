"""Embedding, block and head of every supported family: decoders of one design, which differ by the flags of `Arch`.

Letters: B batch, T position, S positions of a cache, D embed, V vocab.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch, head_problem, is_attention, keys_of, length_problem, mixer_kind
from tracing_jax.models.delta_net import delta_net
from tracing_jax.models.latent_attention import latent_attention
from tracing_jax.models.layers import (
    ACTIVATIONS,
    Cache,
    Carried,
    LayerCache,
    LayerInputs,
    StateCache,
    attention,
    einsum,
    linear,
    norm,
    scaled,
    shared_attention,
    unit_rms,
)
from tracing_jax.models.linear_recurrence import empty_state
from tracing_jax.models.mamba import mamba
from tracing_jax.models.mlp import mlp, mlp_and_experts, mlp_inner
from tracing_jax.models.taps import taps_problem
from tracing_jax.tree import Tree

_STATE_MIXERS: Mapping[str, Callable[..., tuple[Any, ...]]] = {"delta_net": delta_net, "mamba": mamba}
"""Kind of recurrence -> its function."""

_NO_WINDOW = jnp.iinfo(jnp.int32).max


class BlockOutput(NamedTuple):
    """What a block returns."""

    hidden: Float[Array, "*A B T D"]
    """The hidden state after it, which the next block receives."""
    taps: dict[str, Float[Array, "..."]]
    """The inner activations that were asked for, by tap name, `[B T *units]`."""
    cache: LayerCache | None
    """The cache with the keys and values of these tokens; None without one."""
    carried: Carried
    """What the next block receives beside the hidden state."""


def layer_inputs(arch: Arch, layer: int) -> LayerInputs:
    """Returns what a layer takes beside the hidden state: rope frequencies, window, chunk, attention scale, mixers.

    All but the mixers are data, not static arguments: layers with the same mixers share one compiled program.
    """
    window, chunk = arch.layer_windows[layer], arch.layer_chunks[layer] if arch.layer_chunks else None
    rope = arch.layer_ropes[layer] if arch.rope_frequencies else None
    return LayerInputs(
        np.asarray(() if rope is None else arch.rope_frequencies[rope], np.float32),
        np.asarray(arch.rope_amplitudes[rope] if rope is not None and arch.rope_amplitudes else 1.0, np.float32),
        np.asarray(_NO_WINDOW if window is None else window, np.int32),
        np.asarray(_NO_WINDOW if chunk is None else chunk, np.int32),
        np.asarray(arch.attention_scale / (layer + 1 if arch.inverse_layer_scale else 1), np.float32),
        np.asarray(arch.per_layer_index[layer] if arch.per_layer_index else 0, np.int32),
        arch.mixers_of(layer),
    )


def empty_cache(
    arch: Arch, layer: int, batch: int, length: int, dtype: DTypeLike, place: Callable[[int], Sharding] | None = None
) -> LayerCache:
    """Returns the cache of a layer for texts of up to `length` tokens, before it has read any: zeros.

    Attention that reads the keys of an earlier layer has none.

    Args:
      arch: the facts of the model.
      layer: its index.
      batch: the number of texts.
      length: of the longest, in tokens.
      dtype: of keys, values and inputs of convolutions.
      place: the kv heads of an array (0 for one without) -> the devices that it is on.
    """
    found: dict[str, Cache | StateCache] = {}
    for name in arch.mixers_of(layer):
        if (state := arch.state_mixer(name)) is not None:
            found[name] = empty_state(state, batch, dtype, place and place(0))
            continue
        if keys_of(name) is not None:
            continue
        sizes = arch.heads_of(name)
        on, heads = place and place(sizes.kv_heads), (batch, length, sizes.kv_heads)
        widths = (sizes.head_dim, sizes.head_dim if arch.latent is None else arch.v_dim)
        found[name] = Cache(*(jnp.zeros((*heads, width), dtype, device=on) for width in widths))
    return found


def apply_embed(
    arch: Arch, params: Tree, tokens: Int[Array, "B T"], dtype: DTypeLike, positions: Int[Array, "#B T"] | None = None
) -> Float[Array, "B T D"]:
    """Returns the first hidden state from the subtree `embed`, scaled as the family requires, in the computing dtype.

    Args:
      arch: the facts of the model.
      params: the subtree `embed`.
      tokens: token ids.
      dtype: the computing dtype.
      positions: of the tokens; None counts from 0.

    Raises:
      ValueError: more tokens than the model can read.
    """
    # Gemma rounds its scale to the computing dtype; Granite's is a small integer.
    scale = float(np.asarray(arch.embed_scale, jnp.dtype(dtype)))
    x = scaled(params["embedding"][tokens].astype(dtype), scale)
    if positions is None and (problem := length_problem(arch, tokens.shape[1])):
        raise ValueError(problem)
    x = _optional_norm(arch, params, "norm", arch.embed_norm, x)
    if arch.num_positions is None:
        return x
    learned = params["positions"][arch.position_offset :]
    return x + (learned[: tokens.shape[1]] if positions is None else learned[positions]).astype(dtype)


def apply_per_layer(
    arch: Arch, params: Tree, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]
) -> Float[Array, "B T L P"] | None:
    """Returns the per-layer embeddings of these tokens, of which x is the first hidden state; None if there are none.

    Source: Gemma 3n and Gemma 4, as transformers has them.
    """
    if arch.per_layer_dim is None:
        return None
    shape = (*tokens.shape, arch.per_layer_count, arch.per_layer_dim)
    own = params["per_layer"]["embedding"][tokens].astype(x.dtype).reshape(shape)
    own = scaled(own, float(np.asarray(arch.per_layer_dim**0.5, x.dtype)))
    projected = scaled(linear(params["per_layer_proj"], x, "btd,de->bte"), arch.embed_dim**-0.5).reshape(shape)
    gain = params["per_layer_norm"]["gain"].astype(jnp.float32)
    projected = (unit_rms(projected.astype(jnp.float32), arch.norm_eps) * gain).astype(x.dtype)
    return scaled(projected + own, 2**-0.5)


def apply_block(
    arch: Arch,
    params: Tree,
    x: Float[Array, "B T D"],
    inputs: LayerInputs,
    *,
    positions: Int[Array, "#B T"] | None = None,
    cache: LayerCache | None = None,
    carried: Carried | None = None,
    taps: Collection[str] = (),
    head_weights: Float[Array, "B T K G"] | None = None,
    grouped: bool = False,
) -> BlockOutput:
    """Returns the hidden state after one layer, the inner activations asked for, its cache, and what is carried on.

    Args:
      arch: the facts of the model.
      params: the subtree `layers/<i>`.
      x: the hidden state that the layer receives.
      inputs: its rope, window and scale; see `layer_inputs`.
      positions: of the tokens; None counts from 0.
      cache: keys and values of earlier tokens, or states; the new ones are added at `positions`, which must then be
        given. Tokens at negative positions are padding behind a text.
      carried: what passes through the layers beside the hidden state; see `apply_per_layer`.
      taps: names of inner activations; see `tap_axes`.
      head_weights: factors of what the heads of the mixer `attn` give; the gradient at weights of 1 is what each adds,
        times the gradient along it.
      grouped: whether experts may compute the tokens that they are selected for alone, where that is less. Tokens of
        all blocks are sorted, which suits one device.

    Raises:
      ValueError: taps that this model does not have, or a layer that lacks what earlier ones carry to it.
    """
    if problem := taps_problem(arch, taps):
        raise ValueError(problem)
    if positions is None:
        positions = jnp.arange(x.shape[1])[None]
    carried = carried or Carried(None, {})
    found, after, keys = {"residual": x, "heads": x[..., :0]}, {}, dict(carried.keys)
    for name in inputs.mixers:
        y = _optional_norm(arch, params, f"{name}_norm", arch.pre_norms, x)
        if (shared := keys_of(name)) is not None:
            if shared not in keys:
                raise ValueError("the layer whose keys and values this one reads is not among those before it")
            y, found["heads"] = shared_attention(arch, params[name], y, inputs, positions, keys[shared])
        else:
            own = None if cache is None else cache[name]
            more = {} if head_weights is None or name != "attn" else {"head_weights": head_weights}
            y, found["heads"], after[name] = _mixer(arch, name)(arch, params[name], y, inputs, positions, own, **more)
            if arch.shares_keys:
                keys[name] = after[name]
        y = scaled(_optional_norm(arch, params, "attn_post_norm", arch.post_norms, y), arch.residual_scale)
        if not arch.parallel:
            x = x + y
    found["mlp_input"] = mlp_input(arch, params, x)
    if arch.branch_norms:
        found["mlp_output"], inner = mlp_and_experts(arch, params, x, found["mlp_input"], taps, grouped)
    else:
        found["mlp_output"], inner = mlp(arch, params["mlp"], found["mlp_input"], taps, grouped)
    found |= inner
    if arch.parallel:
        x = x + y
    y = _optional_norm(arch, params, "mlp_post_norm", arch.post_norms, found["mlp_output"])
    x = x + scaled(y, arch.residual_scale)
    if arch.per_layer_dim is not None:
        x = x + _per_layer(arch, params, x, inputs, carried)
    if arch.layer_scale:
        x = x * params["output"]["multiplier"].astype(x.dtype)
    after_all = None if cache is None else after
    return BlockOutput(x, {tap: found[tap] for tap in taps}, after_all, Carried(carried.per_layer, keys))


def _per_layer(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], inputs: LayerInputs, carried: Carried
) -> Float[Array, "B T D"]:
    """Returns what the per-layer embedding of a layer adds to the hidden state."""
    if carried.per_layer is None:
        raise ValueError("a layer with a per-layer embedding was given none")
    gate = ACTIVATIONS[arch.activation](linear(params["per_layer"]["gate_proj"], x, "btd,dp->btp"))
    own = jnp.take(carried.per_layer, inputs.per_layer_index, axis=-2)
    return norm(arch, params["per_layer_post_norm"], linear(params["per_layer"]["out_proj"], gate * own, "btp,pd->btd"))


def _mixer(arch: Arch, name: str) -> Callable[..., tuple[Any, ...]]:
    """Returns what mixes tokens under this name."""
    if is_attention(name):
        return attention if arch.latent is None else latent_attention
    return _STATE_MIXERS[mixer_kind(name)]


def mlp_input(arch: Arch, params: Tree, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns what the MLP of a layer reads of a hidden state: the state, normalised where blocks have pre-norms."""
    return _optional_norm(arch, params, arch.mlp_norm, arch.pre_norms, x)


def apply_mlp(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], taps: Collection[str]
) -> dict[str, Float[Array, "B T *units"]]:
    """Returns `gate`, `up` or `units` of a layer whose MLP reads this hidden state, without the attention before it.

    Of the layer's params only those under `mlp_leaves(arch, taps)` need be there.
    """
    return mlp_inner(arch, params["mlp"], mlp_input(arch, params, x), taps)


def apply_head(
    arch: Arch, params: Tree, x: Float[Array, "*A B T D"], embedding: Float[Array, "V D"] | None
) -> Float[Array, "*A B T V"]:
    """Returns the logits in float32 from the subtree `head`; a tied model needs its embedding table.

    Raises:
      ValueError: the model has no head.
    """
    if problem := head_problem(arch):
        raise ValueError(problem)
    x = norm(arch, params.get("norm", {}), x)
    if arch.tied:
        assert embedding is not None, "a tied head needs the embedding table"
        logits = einsum("...td,vd->...tv", x, embedding.astype(x.dtype))
        if arch.head_bias:
            logits = logits + params["lm_head"]["bias"].astype(x.dtype)
    else:
        logits = linear(params["lm_head"], x, "...td,dv->...tv")
    logits = scaled(logits.astype(jnp.float32), arch.logit_scale)
    cap = arch.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _optional_norm(arch: Arch, params: Tree, name: str, present: bool, x: jax.Array) -> jax.Array:
    return norm(arch, params.get(name, {}), x) if present else x
