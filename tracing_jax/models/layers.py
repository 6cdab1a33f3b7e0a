"""The parts of a block: norms, rotary positions, attention, and the MLP with or without experts.

Letters: B batch, T position, S positions of keys and values, D embed, K kv heads, G queries per kv head, H head dim,
F mlp, E experts.
Weights keep the dtype they have on disk and are cast to the computing dtype where they are used; norms, attention
scores and softmax are computed in float32.
"""

import functools
from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
}


class LayerInputs(NamedTuple):
    """What a block takes beside the hidden state, and in which the layers of a model may differ."""

    frequencies: Float[Array, " R2"]  # of the rope; none without one
    amplitude: Float[Array, ""]  # of rotated queries and keys
    window: Int[Array, ""]
    attention_scale: Float[Array, ""]


class Cache(NamedTuple):
    """The keys and values of one layer at all positions of a text."""

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]


def linear(params: Tree, x: Float[Array, "..."], equation: str) -> Float[Array, "..."]:
    """Returns `einsum(equation, x, kernel)` in the dtype of x, plus the bias if there is one."""
    y = einsum(equation, x, params["kernel"].astype(x.dtype))
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns x times a constant, multiplied in float32; no-op for 1."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def norm(arch: Arch, params: Tree, x: Float[Array, "..."], num_axes: int = 1) -> Float[Array, "..."]:
    """Returns x normalised over its last axes in float32: RMS norm with gain g or 1 + g, or a LayerNorm.

    The gain may have more axes than are normalised over, such as one for each head; a bias is added where there is one.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); Gemma stores the gain minus one.
    """
    axes = tuple(range(x.ndim - num_axes, x.ndim))
    x32 = x.astype(jnp.float32)
    if arch.norm.startswith("layer_norm"):
        x32 = x32 - x32.mean(axes, keepdims=True)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axes, keepdims=True) + arch.norm_eps)
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
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K G H"], Cache | None]:
    """Returns the output of causal attention with grouped queries, the heads before the output projection, the cache.

    A token sees itself and the `window - 1` positions before it. With a cache the tokens write their keys and values at
    their positions and see all that is there, so a text can be read in pieces.
    """
    q = linear(params["q_proj"], x, "btd,dkgh->btkgh")
    k = linear(params["k_proj"], x, "btd,dkh->btkh")
    v = linear(params["v_proj"], x, "btd,dkh->btkh")
    if arch.qk_norm is not None:
        together = arch.qk_norm == "all"
        q = norm(arch, params["q_norm"], q, 3 if together else 1)
        k = norm(arch, params["k_norm"], k, 2 if together else 1)
    if arch.clip_qkv is not None:
        q, k, v = (jnp.clip(y, -arch.clip_qkv, arch.clip_qkv) for y in (q, k, v))
    if arch.rope_frequencies:
        q, k = rotate(arch, q, inputs, positions), rotate(arch, k, inputs, positions)
    if cache is not None:
        cache = Cache(_written(cache.keys, k, positions), _written(cache.values, v, positions))
        k, v = cache.keys.astype(k.dtype), cache.values.astype(v.dtype)
    heads = _attend(arch, q, k, v, inputs, positions)
    return linear(params["o_proj"], heads, "btkgh,kghd->btd"), heads, cache


def _written(
    cached: Float[Array, "B S K H"], new: Float[Array, "B T K H"], positions: Int[Array, "B T"]
) -> Float[Array, "B S K H"]:
    return cached.at[jnp.arange(len(new))[:, None], positions].set(new.astype(cached.dtype))


def _attend(
    arch: Arch,
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    inputs: LayerInputs,
    positions: Int[Array, "#B T"],
) -> Float[Array, "B T K G H"]:
    scores = einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * inputs.attention_scale
    if (cap := arch.attention_softcap) is not None:
        scores = cap * jnp.tanh(scores / cap)
    back = positions[:, None, None, :, None] - jnp.arange(k.shape[1])
    if arch.alibi_slopes:
        slopes = jnp.asarray(arch.alibi_slopes, jnp.float32).reshape(1, *q.shape[2:4], 1, 1)
        scores = scores - slopes * back.astype(jnp.float32)
    scores = jnp.where((back >= 0) & (back < inputs.window), scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return einsum("bkgts,bskh->btkgh", weights, v)


def mlp(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], taps: Collection[str] = ()
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T *units"]]]:
    """Returns the output of an MLP or a mixture of experts, and those of `gate`, `up` and `units` that are asked for.

    An MLP computes `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate; its units are the columns of up.

    Source: Shazeer 2020, GLU variants (arXiv 2002.05202).
    """
    if arch.num_experts is not None:
        return _mixture(arch, params, x, taps)
    found = _inner(arch, params, x)
    y = linear(params["down_proj"], found["units"], "btf,fd->btd")
    return y, {tap: found[tap] for tap in taps if tap in found}


def mlp_inner(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], taps: Collection[str]
) -> dict[str, Float[Array, "B T *units"]]:
    """Returns `gate`, `up` or `units` of an MLP; only the weights that they are computed from need be there."""
    if arch.num_experts is None:
        found = _inner(arch, params, x)
        return {tap: found[tap] for tap in taps}
    kernels = {name: leaves for name, leaves in params.items() if name in ("gate_proj", "up_proj")}

    def of_expert(own: Tree) -> dict[str, jax.Array]:
        found = _inner(arch, own, x)
        return {tap: found[tap] for tap in taps}

    return _experts_last(jax.lax.map(of_expert, kernels))


def _inner(arch: Arch, params: Tree, x: Float[Array, "B T D"]) -> dict[str, Float[Array, "B T F"]]:
    """Returns the pre-activations `gate` and `up` whose weights are given, and the `units` if they follow."""
    found = {tap: linear(params[f"{tap}_proj"], x, "btd,df->btf") for tap in ("up", "gate") if f"{tap}_proj" in params}
    activation = ACTIVATIONS[arch.activation]
    if arch.gated and len(found) == 2:
        found["units"] = activation(found["gate"]) * found["up"]
    elif not arch.gated and "up" in found:
        found["units"] = activation(found["up"])
    return found


def _mixture(
    arch: Arch, params: Tree, x: Float[Array, "B T D"], taps: Collection[str]
) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B T E F"]]]:
    """Returns the sum of the k selected experts' MLPs weighted by the router, and inner activations of all experts.

    Every expert computes every token, one expert at a time, and those not selected have weight 0: the numbers are
    exact, only one expert's activations `[B T F]` are held at a time, and the cost is E / k times that of computing the
    selected experts alone (4 times for 8 experts, 2 per token).

    Source: Jiang et al. 2024, Mixtral of Experts (arXiv 2401.04088), section 2.1.
    """
    weights = _expert_weights(arch, linear(params["router"], x, "btd,de->bte"))
    kernels = {name: params[name] for name in ("gate_proj", "up_proj", "down_proj")}

    def add_expert(
        total: jax.Array, expert: tuple[jax.Array, Tree]
    ) -> tuple[jax.Array, dict[str, Float[Array, "B T F"]]]:
        weight, own = expert
        found = _inner(arch, own, x)
        y = linear(own["down_proj"], found["units"], "btf,fd->btd").astype(jnp.float32)
        return total + weight[..., None] * y, {tap: found[tap] for tap in taps if tap in found}

    start = jnp.zeros(x.shape, jnp.float32)
    total, found = jax.lax.scan(add_expert, start, (jnp.moveaxis(weights, -1, 0), kernels))
    return total.astype(x.dtype), _experts_last(found)


def _experts_last(found: dict[str, Float[Array, "E B T F"]]) -> dict[str, Float[Array, "B T E F"]]:
    return {tap: jnp.moveaxis(activations, 0, 2) for tap, activations in found.items()}


def _expert_weights(arch: Arch, scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Returns every expert's weight in a token: softmax over the k experts of largest score, 0 for the others."""
    assert arch.experts_per_token is not None
    largest, selected = jax.lax.top_k(scores.astype(jnp.float32), arch.experts_per_token)
    weights = jax.nn.softmax(largest, axis=-1)
    return (jax.nn.one_hot(selected, scores.shape[-1]) * weights[..., None]).sum(-2)
