"""Mamba-2: a recurrence whose state forgets at a rate that each token sets, and takes in what it brings.

Letters: B batch, T position, D embed, K groups, G heads of a group, N dims of a state ("keys"), U dims of a head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.models.layers import LayerInputs, StateCache, linear
from tracing_jax.models.linear_recurrence import State, Values, empty_state, in_chunks, read_and_write, since_start
from tracing_jax.models.short_convolution import causal_convolution, last_tokens
from tracing_jax.tree import Tree

_SHAPES = {"value": "btd,dkgu->btkgu", "key": "btd,dkn->btkn", "query": "btd,dkn->btkn"}


def mamba(
    arch: Arch,
    params: Tree,
    x: Float[Array, "B T D"],
    inputs: LayerInputs,
    positions: Int[Array, "#B T"],
    cache: StateCache | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T K G U"], StateCache | None]:
    """Returns the output of a Mamba-2 layer, its heads before the output projection, and the cache.

    With S the state of a head, k and q ("B" and "C" of the paper) those of its group, v what the head takes in and dt
    the step that a token makes: `S <- exp(-A dt) S + dt k v^T`, and the output is `S^T q + skip v`. Positions are not
    used, but that tokens at negative ones are padding, which leaves the state as it is.

    Source: Dao and Gu 2024 (arXiv 2405.21060), section 7; limits of steps and the norm as in Nemotron-H.
    """
    del inputs
    facts = arch.mamba
    assert facts is not None
    is_text = jnp.broadcast_to(positions >= 0, x.shape[:2])
    before = empty_state(facts, x.shape[0], x.dtype) if cache is None else cache
    own = {name: linear(params[f"{name}_proj"], x, shape) for name, shape in _SHAPES.items()}
    v, k, q = (
        jax.nn.silu(causal_convolution(params[f"{name}_conv"], own[name], before.past[name])) for name in _SHAPES
    )
    step = linear(params["decay_proj"], x, "btd,dkg->btkg") + params["dt_bias"].astype(x.dtype)
    step = jnp.maximum(jax.nn.softplus(step.astype(jnp.float32)), facts.least_step)
    step = jnp.where(is_text[:, :, None, None], step, 0.0)
    decay = -jnp.exp(params["A_log"].astype(jnp.float32)) * step
    taken_in = v.astype(jnp.float32) * step[..., None]
    state, heads = in_chunks(_chunk, before.state, (q, k, taken_in, decay))
    heads += params["skip"].astype(jnp.float32)[..., None] * v.astype(jnp.float32)
    z = linear(params["z_proj"], x, "btd,dkgu->btkgu")
    heads = heads.astype(x.dtype).astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    # The norm is over all heads of a group together.
    heads = heads * jax.lax.rsqrt(jnp.square(heads).mean((-2, -1), keepdims=True) + arch.norm_eps)
    heads = heads.astype(x.dtype) * params["norm"]["gain"].astype(x.dtype)
    after = None
    if cache is not None:
        after = StateCache({name: last_tokens(own[name], cache.past[name], is_text) for name in _SHAPES}, state)
    return linear(params["out_proj"], heads, "btkgu,kgud->btd"), heads, after


def _chunk(state: State, tokens: tuple[Array, ...]) -> tuple[State, Values]:
    q, k, taken_in, decay = tokens
    return read_and_write(state, q, k, jnp.moveaxis(taken_in, 1, -2), since_start(decay))
