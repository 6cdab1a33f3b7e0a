"""A gated delta net: a recurrence whose state forgets, and corrects what it would return for a key, token by token.

Letters: B batch, T position, D embed, K groups of heads, G heads of a group, N dims of a key, U dims of a value, C taps
of the convolution.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.models.layers import ACTIVATIONS, LayerInputs, StateCache, einsum, linear, unit_rms
from tracing_jax.models.linear_recurrence import (
    State,
    Values,
    empty_state,
    in_chunks,
    read_and_write,
    similarity,
    since_start,
)
from tracing_jax.models.short_convolution import causal_convolution, last_tokens
from tracing_jax.tree import Tree

_LENGTH_EPS = 1e-6
"""Added to the squared length of queries and keys, a constant of the reference implementation."""

_PARTS = ("query", "key", "value")


def delta_net(
    arch: Arch,
    params: Tree,
    x: Float[Array, "B T D"],
    inputs: LayerInputs,
    positions: Int[Array, "#B T"],
    cache: StateCache | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K G U"], StateCache | None]:
    """Returns the output of a gated delta net, its heads before the output projection, and the cache.

    Positions are not used, but that tokens at negative ones are padding, which leaves the state as it is.

    Source: Yang et al. 2024 (arXiv 2412.06464); gates, norms and convolution as in Qwen3-Next.
    """
    del inputs
    act = ACTIVATIONS[arch.activation]
    is_text = jnp.broadcast_to(positions >= 0, x.shape[:2])
    assert arch.delta_net is not None
    before = empty_state(arch.delta_net, x.shape[0], x.dtype) if cache is None else cache
    shapes = dict(zip(_PARTS, ("btd,dkn->btkn", "btd,dkn->btkn", "btd,dkgu->btkgu"), strict=True))
    own = {name: linear(params[f"{name}_proj"], x, shapes[name]) for name in _PARTS}
    q, k, v = (act(causal_convolution(params[f"{name}_conv"], own[name], before.past[name])) for name in _PARTS)
    beta = jax.nn.sigmoid(linear(params["beta_proj"], x, "btd,dkg->btkg")).astype(jnp.float32)
    rate = linear(params["decay_proj"], x, "btd,dkg->btkg").astype(jnp.float32) + params["dt_bias"].astype(jnp.float32)
    decay = -jnp.exp(params["A_log"].astype(jnp.float32)) * jax.nn.softplus(rate)
    state, heads = gated_delta_rule(_unit_length(q), _unit_length(k), v, decay, beta, before.state, is_text)
    heads = unit_rms(heads.astype(x.dtype), arch.norm_eps) * params["norm"]["gain"].astype(x.dtype)
    z = linear(params["z_proj"], x, "btd,dkgu->btkgu")
    heads = (heads.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype)
    after = None
    if cache is not None:
        after = StateCache({name: last_tokens(own[name], cache.past[name], is_text) for name in _PARTS}, state)
    return linear(params["out_proj"], heads, "btkgu,kgud->btd"), heads, after


def gated_delta_rule(
    q: Float[Array, "B T K N"],
    k: Float[Array, "B T K N"],
    v: Float[Array, "B T K G U"],
    decay: Float[Array, "B T K G"],
    beta: Float[Array, "B T K G"],
    state: Float[Array, "B K G N U"],
    is_text: Bool[Array, "B T"],
) -> tuple[Float[Array, "B K G N U"], Float[Array, "B T K G U"]]:
    """Returns the state after the tokens, and what queries read of it after each, in float32.

    With S the state, `S <- exp(decay) S`, then `S <- S + beta k (v - S^T k)^T`, and the output is `S^T q / sqrt(N)`.
    Within a chunk the corrections u of all tokens solve a triangular system, because each depends on those before it.

    Args:
      q: queries, of length one.
      k: keys, of length one.
      v: values.
      decay: at most 0.
      beta: in 0..1.
      state: before the tokens.
      is_text: tokens that are none leave the state as it is; what is returned for them means nothing.

    Source: arXiv 2412.06464, section 3.2 and eq. 10; chunks as in Yang et al. 2024 (arXiv 2406.06484).
    """
    here = is_text[:, :, None, None]
    decay, beta = jnp.where(here, decay, 0.0), jnp.where(here, beta, 0.0)
    return in_chunks(_chunk, state, (q * q.shape[-1] ** -0.5, k, v, decay, beta))


def _chunk(state: State, tokens: tuple[Array, ...]) -> tuple[State, Values]:
    """Returns the state after a chunk, and what its queries read."""
    q, k, v, decay, beta = tokens
    since, beta = since_start(decay), jnp.moveaxis(beta, 1, -1)
    system = jnp.eye(q.shape[1]) + jnp.tril(beta[..., None] * similarity(k, k, since), -1)
    known = einsum("btkn,bkgnu->bkgtu", k, state) * jnp.exp(since)[..., None]
    wanted = beta[..., None] * (jnp.moveaxis(v, 1, -2) - known)
    corrections = jax.scipy.linalg.solve_triangular(system, wanted, lower=True, unit_diagonal=True)
    return read_and_write(state, q, k, corrections, since)


def _unit_length(x: Float[Array, "B T K N"]) -> Float[Array, "B T K N"]:
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.square(x32).sum(-1, keepdims=True) + _LENGTH_EPS)
