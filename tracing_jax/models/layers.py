"""The parts of a block beside its MLP: norms, rotary positions and attention.

Letters: B batch, T position, S positions of keys and values, D embed, K kv heads, G queries per kv head, H head dim,
U dims of a value (H, but for latent attention).
Weights keep the dtype they have on disk and are cast to the computing dtype where they are used; norms, attention
scores and softmax are computed in float32.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.tree import Tree

# TF32 and bf16 passes, the default for float32 operands on accelerators, would break parity with float32 references.
einsum = functools.partial(jnp.einsum, precision="highest")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What a block takes beside the hidden state, and in which the layers of a model may differ."""

    frequencies: Float[Array | np.ndarray, " R2"]  # of the rope; none without one
    amplitude: Float[Array | np.ndarray, ""]  # of rotated queries and keys
    window: Int[Array | np.ndarray, ""]
    chunk: Int[Array | np.ndarray, ""]
    attention_scale: Float[Array | np.ndarray, ""]
    per_layer_index: Int[Array | np.ndarray, ""]  # of its per-layer embedding
    mixers: tuple[str, ...] = field(default=("attn",), metadata={"static": True})  # in their order


class Cache(NamedTuple):
    """The keys and values of one layer at all positions of a text."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K U"]


class StateCache(NamedTuple):
    """What a recurrence remembers of a text."""

    past: Mapping[str, Float[Array, "B C1 *units"]]
    """The last inputs of its convolutions, one fewer than they have taps, by name."""
    state: Float[Array, "B K G N U"]


LayerCache = Mapping[str, Cache | StateCache]
"""What each mixer of a layer remembers of a text."""


class Carried(NamedTuple):
    """What passes through the layers beside the hidden state, in the models that have it."""

    per_layer: Float[Array, "*A B T L P"] | None
    """The per-layer embeddings of all layers."""
    keys: Mapping[str, Cache]
    """Mixer -> its newest keys and values, if later layers read any."""


def linear(params: Tree, x: Float[Array, "..."], equation: str) -> Float[Array, "..."]:
    """Returns `einsum(equation, x, kernel)` in the dtype of x, plus the bias if there is one."""
    y = einsum(equation, x, params["kernel"].astype(x.dtype))
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns x times a constant, multiplied in float32; no-op for 1."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def norm(
    arch: Arch, params: Tree, x: Float[Array, "..."], num_axes: int = 1, *, eps: float | None = None
) -> Float[Array, "..."]:
    """Returns x normalised over its last axes in float32: RMS norm with gain g or 1 + g, or a LayerNorm.

    The gain may have more axes than are normalised over, such as one for each head; a bias is added where there is one.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); Gemma stores the gain minus one.
    """
    axes = tuple(range(x.ndim - num_axes, x.ndim))
    x32 = x.astype(jnp.float32)
    if arch.norm_subtracts_mean:
        x32 = x32 - x32.mean(axes, keepdims=True)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axes, keepdims=True) + (arch.norm_eps if eps is None else eps))
    if arch.norm == "rms_unit_offset":
        y = y * (1 + params["scale"].astype(jnp.float32))
    elif arch.norm != "layer_norm_plain":
        y = y * params["scale"].astype(jnp.float32)
    if "bias" in params:
        y = y + params["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def rotate(
    arch: Arch, x: Float[Array, "B T *heads H"], inputs: LayerInputs, positions: Int[Array, "#B T"]
) -> Float[Array, "B T *heads H"]:
    """Returns x with each pair of its rotated dims turned by position times frequency, computed in float32.

    Source: RoFormer (arXiv 2104.09864). The pairs are (h, h + R/2) or (2h, 2h + 1) of the first R dims.
    """
    angles = positions.astype(jnp.float32)[:, :, None] * inputs.frequencies
    angles = angles.reshape(*positions.shape, *(1,) * (x.ndim - 3), -1)
    cos, sin = jnp.cos(angles) * inputs.amplitude, jnp.sin(angles) * inputs.amplitude
    rotated, rest = jnp.split(x, [2 * angles.shape[-1]], axis=-1)
    pairs = rotated.astype(jnp.float32).reshape(*x.shape[:-1], *((-1, 2) if arch.rope_interleaved else (2, -1)))
    at = -1 if arch.rope_interleaved else -2
    first, second = jnp.moveaxis(pairs, at, 0)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=at)
    turned = turned.reshape(rotated.shape).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def attention(
    arch: Arch,
    params: Tree,
    x: Float[Array, "B T D"],
    inputs: LayerInputs,
    positions: Int[Array, "#B T"],
    cache: Cache | None = None,
    head_weights: Float[Array, "B T K G"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K G H"], Cache]:
    """Returns the output of causal attention with grouped queries, the heads before the output projection, the cache.

    A token attends to itself and the `window - 1` positions before it. With a cache the tokens write their keys and
    values at their positions and attend to all that is there, so a text can be read in pieces. A layer without a
    projection of values takes what that of keys gives. What a head gives at a token is multiplied by its weight, if
    there are any.
    """
    q = linear(params["q_proj"], x, "btd,dkgh->btkgh")
    k = linear(params["k_proj"], x, "btd,dkh->btkh")
    v = linear(params["v_proj"], x, "btd,dkh->btkh") if "v_proj" in params else k
    if arch.value_norm:
        v = unit_rms(v, arch.norm_eps)
    if arch.qk_norm is not None:
        together = arch.qk_norm == "all"
        q = norm(arch, params["q_norm"], q, 3 if together else 1)
        k = norm(arch, params["k_norm"], k, 2 if together else 1)
    if arch.clip_qkv is not None:
        q, k, v = (jnp.clip(y, -arch.clip_qkv, arch.clip_qkv) for y in (q, k, v))
    if arch.rope_frequencies:
        q, k = rotate(arch, q, inputs, positions), rotate(arch, k, inputs, positions)
    if arch.rotated_norm or arch.temperature is not None:
        q, k = _by_positions(arch, q, k, inputs, positions)
    k, v, cache = with_cache(cache, k, v, positions)
    heads = attend(arch, params, q, k, v, inputs, positions)
    if arch.head_gate:
        heads = heads * jax.nn.sigmoid(linear(params["head_gate"], x, "btd,dkgh->btkgh"))
    heads = heads if head_weights is None else heads * head_weights[..., None]
    return linear(params["o_proj"], heads, "btkgh,kghd->btd"), heads, cache


def shared_attention(
    arch: Arch,
    params: Tree,
    x: Float[Array, "B T D"],
    inputs: LayerInputs,
    positions: Int[Array, "#B T"],
    keys: Cache,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K G H"]]:
    """Returns what `attention` does of queries that read the keys and values of an earlier layer, without a cache.

    Source: Brandon et al. 2024, cross-layer attention (arXiv 2405.12981); norms as in Gemma 4.
    """
    q = norm(arch, params["q_norm"], linear(params["q_proj"], x, "btd,dkgh->btkgh"))
    q = rotate(arch, q, inputs, positions)
    heads = attend(arch, params, q, keys.keys.astype(x.dtype), keys.values.astype(x.dtype), inputs, positions)
    return linear(params["o_proj"], heads, "btkgh,kghd->btd"), heads


def _by_positions(
    arch: Arch,
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    inputs: LayerInputs,
    positions: Int[Array, "#B T"],
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"]]:
    """Returns queries and keys normalised in layers with positions, and queries scaled in layers without.

    Source: Llama 4 as transformers has it; scaling by position is that of arXiv 2501.19399.
    """
    has_positions = (inputs.frequencies != 0).any()
    if arch.rotated_norm:
        q, k = (jnp.where(has_positions, unit_rms(x, arch.norm_eps), x) for x in (q, k))
    if arch.temperature is not None:
        length, slope = arch.temperature
        scale = 1 + slope * jnp.log1p(jnp.floor((positions.astype(jnp.float32) + 1) / length))
        scale = jnp.where(has_positions, 1.0, scale)[:, :, None, None, None]
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    return q, k


def unit_rms(x: Float[Array, "..."], eps: float) -> Float[Array, "..."]:
    """Returns x divided by its root mean square over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def with_cache(
    cache: Cache | None, k: Float[Array, "B T K H"], v: Float[Array, "B T K U"], positions: Int[Array, "#B T"]
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K U"], Cache]:
    """Returns the keys and values that tokens see, and the cache with the new ones at their positions.

    Without a cache it is made of the new ones.
    """
    if cache is None:
        return k, v, Cache(k, v)
    cache = Cache(_written(cache.keys, k, positions), _written(cache.values, v, positions))
    return cache.keys.astype(k.dtype), cache.values.astype(v.dtype), cache


def _written(
    cached: Float[Array, "B S K H"], new: Float[Array, "B T K H"], positions: Int[Array, "B T"]
) -> Float[Array, "B S K H"]:
    return cached.at[jnp.arange(len(new))[:, None], positions].set(new.astype(cached.dtype))


def _alibi(
    arch: Arch, back: Int[Array, "#B 1 1 T S"], others: Int[Array, " S"], inputs: LayerInputs
) -> Float[Array, "#B K G #T S"]:
    """Returns what is added to the scores of keys at a distance, or, the same to the softmax, at a position.

    Source: Press et al. 2022 (arXiv 2108.12409); the rounding is that of Falcon in transformers.
    """
    slopes = jnp.asarray(arch.alibi_slopes, jnp.float32).reshape(1, arch.num_kv_heads, arch.q_group, 1, 1)
    if not arch.alibi_bfloat16:
        return -slopes * back.astype(jnp.float32)
    products = slopes.astype(jnp.bfloat16) * others.astype(jnp.bfloat16)
    return products.astype(jnp.float32) * inputs.attention_scale


def attend(
    arch: Arch,
    params: Tree,
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K U"],
    inputs: LayerInputs,
    positions: Int[Array, "#B T"],
) -> Float[Array, "B T K G U"]:
    """Returns the values that each token attends to, weighted by a softmax over the scores of queries and keys."""
    scores = einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * inputs.attention_scale
    if (cap := arch.attention_softcap) is not None:
        scores = cap * jnp.tanh(scores / cap)
    own, others = positions[:, None, None, :, None], jnp.arange(k.shape[1])
    back = own - others
    if arch.alibi_slopes:
        scores = scores + _alibi(arch, back, others, inputs)
    is_seen = (back >= 0) & (back < inputs.window) & (own // inputs.chunk == others // inputs.chunk)
    scores = jnp.where(is_seen, scores, jnp.finfo(jnp.float32).min)
    if arch.sinks:
        sinks = params["sinks"].astype(jnp.float32)[None, :, :, None, None]
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    return einsum("bkgts,bskh->btkgh", weights, v)
