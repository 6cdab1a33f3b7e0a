"""The parts of a block: norms, rotary positions, attention and the MLP.

Letters: B batch, T position, D embed, K kv heads, G queries per kv head, H head dim, F mlp.
Weights keep the dtype they have on disk and are cast to the computing dtype where they are used; norms, attention
scores and softmax are computed in float32.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch

# TF32 and bf16 passes, the default for float32 operands on accelerators, would break parity with float32 references.
einsum = functools.partial(jnp.einsum, precision="highest")

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

KERNEL_INIT = nn.initializers.normal(0.02)


class Kernel(nn.Module):
    """A weight contracted with its input, and its bias: `einsum(equation, x, kernel) + bias`."""

    shape: tuple[int, ...]
    equation: str
    bias_shape: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", KERNEL_INIT, self.shape)
        y = einsum(self.equation, x, kernel.astype(x.dtype))
        if self.bias_shape is None:
            return y
        return y + self.param("bias", nn.initializers.zeros, self.bias_shape).astype(x.dtype)


class Norm(nn.Module):
    """Normalises over the trailing axes `shape` in float32: RMS norm with gain g or 1 + g, or a layer norm.

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); Gemma stores the gain minus one.
    """

    arch: Arch
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - len(self.shape), x.ndim))
        x32 = x.astype(jnp.float32)
        if self.arch.norm in ("layer_norm", "layer_norm_plain"):
            x32 = x32 - x32.mean(axes, keepdims=True)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axes, keepdims=True) + self.arch.norm_eps)
        if self.arch.norm in ("rms", "layer_norm"):
            y = y * self.param("scale", nn.initializers.ones, self.shape).astype(jnp.float32)
        if self.arch.norm == "rms_unit_offset":
            y = y * (1 + self.param("scale", nn.initializers.zeros, self.shape).astype(jnp.float32))
        if self.arch.norm == "layer_norm":
            y = y + self.param("bias", nn.initializers.zeros, self.shape).astype(jnp.float32)
        return y.astype(x.dtype)


def rotate(
    x: Float[Array, "B T *heads H"], frequencies: Float[Array, " H2"], positions: Int[Array, "#B T"]
) -> Float[Array, "B T *heads H"]:
    """Returns x with each pair (h, h + H/2) turned by position times frequency, computed in float32.

    Source: RoFormer (arXiv 2104.09864), in the half-split layout of Hugging Face checkpoints.
    """
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies
    angles = angles.reshape(*positions.shape, *(1,) * (x.ndim - 3), -1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Causal attention with grouped queries; every option of the families is a flag of `Arch`.

    Where the collection `cache` holds `keys` and `values`, `[B S K H]`, the tokens at hand write theirs at their
    positions and see all that is there: a text can then be read in pieces, token by token at last.
    """

    arch: Arch

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        frequencies: Float[Array, " H2"],
        window: Int[Array, ""],
        attention_scale: Float[Array, ""],
        positions: Int[Array, "#B T"],
    ) -> Float[Array, "B T D"]:
        """Returns the mixed values; a token sees itself and the `window - 1` positions before it."""
        a = self.arch
        D, K, G, H = a.embed_dim, a.num_kv_heads, a.q_group, a.head_dim
        q = Kernel((D, K, G, H), "btd,dkgh->btkgh", (K, G, H) if a.qkv_bias else None, name="q_proj")(x)
        k = Kernel((D, K, H), "btd,dkh->btkh", (K, H) if a.qkv_bias else None, name="k_proj")(x)
        v = Kernel((D, K, H), "btd,dkh->btkh", (K, H) if a.qkv_bias else None, name="v_proj")(x)
        if a.qk_norm is not None:
            q = Norm(a, (H,) if a.qk_norm == "head" else (K, G, H), name="q_norm")(q)
            k = Norm(a, (H,) if a.qk_norm == "head" else (K, H), name="k_norm")(k)
        if a.clip_qkv is not None:
            q, k, v = (jnp.clip(y, -a.clip_qkv, a.clip_qkv) for y in (q, k, v))
        if a.rope_frequencies:
            q, k = rotate(q, frequencies, positions), rotate(k, frequencies, positions)
        if self.has_variable("cache", "keys"):
            k, v = self._remembered("keys", k, positions), self._remembered("values", v, positions)
        mixed = self._attend(q, k, v, window, attention_scale, positions)
        self.sow("taps", "heads", mixed)
        return Kernel((K, G, H, D), "btkgh,kghd->btd", (D,) if a.o_bias else None, name="o_proj")(mixed)

    def _remembered(
        self, name: str, new: Float[Array, "B T K H"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B S K H"]:
        """Returns the keys or values of all positions, the new ones among them."""
        kept = self.variable("cache", name, lambda: new)
        kept.value = kept.value.at[jnp.arange(len(new))[:, None], positions].set(new.astype(kept.value.dtype))
        return kept.value.astype(new.dtype)

    def _attend(
        self,
        q: Float[Array, "B T K G H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        window: jax.Array,
        scale: jax.Array,
        positions: Int[Array, "#B T"],
    ) -> Float[Array, "B T K G H"]:
        scores = einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale
        if (cap := self.arch.attention_softcap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        back = positions[:, None, None, :, None] - jnp.arange(k.shape[1])
        scores = jnp.where((back >= 0) & (back < window), scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return einsum("bkgts,bskh->btkgh", weights, v)


class Mlp(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate; its units are the columns of up.

    Source: Shazeer 2020, GLU variants (arXiv 2002.05202).
    """

    arch: Arch

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        D, F = self.arch.embed_dim, self.arch.mlp_dim
        activation = ACTIVATIONS[self.arch.activation]
        bias, out_bias = ((F,), (D,)) if self.arch.mlp_bias else (None, None)
        up = Kernel((D, F), "btd,df->btf", bias, name="up_proj")(x)
        if self.arch.gated:
            gate = Kernel((D, F), "btd,df->btf", bias, name="gate_proj")(x)
            self.sow("taps", "gate", gate)
            units = activation(gate) * up
        else:
            units = activation(up)
        self.sow("taps", "up", up)
        self.sow("taps", "units", units)
        return Kernel((F, D), "btf,fd->btd", out_bias, name="down_proj")(units)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns x times a constant, multiplied in float32; no-op for 1."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)
