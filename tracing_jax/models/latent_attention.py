"""Attention whose keys and values are computed from one narrow vector per token.

Letters: B batch, T position, D embed, K heads, G = 1 query per head, N dims without positions, R rotated dims, U dims
of a value, C width of the latent of keys and values.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.models.layers import Cache, LayerInputs, attend, linear, norm, rotate, with_cache
from tracing_jax.tree import Tree


def latent_attention(
    arch: Arch,
    params: Tree,
    x: Float[Array, "B T D"],
    inputs: LayerInputs,
    positions: Int[Array, "#B T"],
    cache: Cache | None = None,
    head_weights: Float[Array, "B T K G"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K G U"], Cache]:
    """Returns what `layers.attention` does. The cache holds the keys and values of every head, not the latents.

    A head's query and key are the concatenation of a part without positions, from the latents, and a rotated part,
    which for keys comes from the hidden state and is the same for all heads.

    Source: DeepSeek-V2 (arXiv 2405.04434), eq. 9 to 19.
    """
    assert arch.latent is not None
    read = x
    if arch.latent.q_rank is not None:
        read = norm(arch, params["q_a_norm"], linear(params["q_a_proj"], x, "btd,dc->btc"), eps=arch.latent.norm_eps)
    q, q_rope = (linear(params[name], read, "btc,ckgh->btkgh") for name in ("q_proj", "q_rope_proj"))
    latent = norm(arch, params["kv_a_norm"], linear(params["kv_a_proj"], x, "btd,dc->btc"), eps=arch.latent.norm_eps)
    k, v = (linear(params[name], latent, "btc,ckh->btkh") for name in ("k_proj", "v_proj"))
    k_rope = linear(params["k_rope_proj"], x, "btd,dh->bth")
    q_rope, k_rope = (rotate(arch, y, inputs, positions) for y in (q_rope, k_rope))
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:-1], k_rope.shape[-1]))
    q, k = jnp.concatenate([q, q_rope], axis=-1), jnp.concatenate([k, k_rope], axis=-1)
    k, v, cache = with_cache(cache, k, v, positions)
    heads = attend(arch, params, q, k, v, inputs, positions)
    heads = heads if head_weights is None else heads * head_weights[..., None]
    return linear(params["o_proj"], heads, "btkgh,kghd->btd"), heads, cache
