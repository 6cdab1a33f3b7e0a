"""What linear recurrences share: a text in chunks, and what a chunk reads of the states before it and writes.

Letters: B batch, T position, L tokens of a chunk, K groups of heads, G heads of a group, N dims of a key, U dims of a
value.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tracing_jax.arch import StateMixer
from tracing_jax.models.layers import StateCache, einsum

CHUNK = 64
"""Tokens that are computed together."""

State = Float[Array, "B K G N U"]
Values = Float[Array, "B L K G U"]


def empty_state(mixer: StateMixer, batch: int, dtype: DTypeLike, sharding: Sharding | None = None) -> StateCache:
    """Returns what a recurrence remembers before it has read any text: zeros."""
    keys, values = (mixer.groups, mixer.key_dim), (mixer.groups, mixer.heads, mixer.value_dim)
    past = {
        name: jnp.zeros((batch, mixer.taps - 1, *units), dtype, device=sharding)
        for name, units in {"query": keys, "key": keys, "value": values}.items()
    }
    shape = (batch, mixer.groups, mixer.heads, mixer.key_dim, mixer.value_dim)
    return StateCache(past, jnp.zeros(shape, jnp.float32, device=sharding))


def in_chunks(
    step: Callable[[State, tuple[Array, ...]], tuple[State, Values]], state: State, tokens: tuple[Array, ...]
) -> tuple[State, Float[Array, "B T K G U"]]:
    """Returns the state after a text and what each token reads, chunk by chunk; the last is padded with zeros.

    Args:
      step: the state before a chunk, the arrays of its tokens -> the state after it, what the tokens read.
      state: before the text.
      tokens: arrays `[B T ...]`, taken in float32; zeros must leave the state as it is.
    """
    T = tokens[0].shape[1]
    length = min(CHUNK, T)

    def chunks(x: Array) -> Array:
        x = x.astype(jnp.float32)
        padded = jnp.pad(x, [(0, 0), (0, -T % length)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(x.shape[0], -1, length, *x.shape[2:]).swapaxes(0, 1)

    state, found = jax.lax.scan(step, state, tuple(map(chunks, tokens)))
    return state, found.swapaxes(0, 1).reshape(found.shape[1], -1, *found.shape[3:])[:, :T]


def since_start(decay: Float[Array, "B L K G"]) -> Float[Array, "B K G L"]:
    """Returns the log of what is left, at each token, of the state before the chunk."""
    return jnp.moveaxis(jnp.cumsum(decay, axis=1), 1, -1)


def similarity(
    read: Float[Array, "B L K N"], keys: Float[Array, "B L K N"], since: Float[Array, "B K G L"]
) -> Float[Array, "B K G L L"]:
    """Returns the products with the keys of earlier tokens, at [t, s], times what is left of these; else zero."""
    L = read.shape[1]
    # Only differences of past tokens are taken: others would overflow.
    differences = jnp.where(jnp.tril(jnp.ones((L, L), bool)), since[..., :, None] - since[..., None, :], -jnp.inf)
    return einsum("btkn,bskn->bkts", read, keys)[:, :, None] * jnp.exp(differences)


def read_and_write(
    state: State,
    queries: Float[Array, "B L K N"],
    keys: Float[Array, "B L K N"],
    written: Float[Array, "B K G L U"],
    since: Float[Array, "B K G L"],
) -> tuple[State, Values]:
    """Returns the state after a chunk whose tokens add `keys written^T` to it, and what its queries read."""
    found = einsum("bkgts,bkgsu->btkgu", similarity(queries, keys, since), written)
    found += einsum("btkn,bkgnu,bkgt->btkgu", queries, state, jnp.exp(since))
    kept = jnp.exp(since[..., -1:] - since)
    state = state * jnp.exp(since[..., -1])[..., None, None]
    return state + einsum("bskn,bkgsu,bkgs->bkgnu", keys, written, kept), found
