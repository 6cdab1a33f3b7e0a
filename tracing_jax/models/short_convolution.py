"""Causal convolutions over a few tokens, each channel by itself, and what they remember of a text that goes on.

Letters: B batch, T position, C taps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tracing_jax.tree import Tree


def causal_convolution(
    params: Tree, x: Float[Array, "B T *units"], past: Float[Array, "B C1 *units"]
) -> Float[Array, "B T *units"]:
    """Returns each channel's sum over its last tokens, the newest last, weighted by its taps, plus a bias if any.

    Args:
      params: `taps` `[*units C]` and maybe `bias` `[*units]`.
      x: the tokens.
      past: the C - 1 tokens before them; zeros at the start of a text.
    """
    taps = params["taps"].astype(x.dtype)
    both = jnp.concatenate([past.astype(x.dtype), x], axis=1)
    found = sum(both[:, i : i + x.shape[1]] * taps[..., i] for i in range(taps.shape[-1]))
    assert isinstance(found, jax.Array)
    return found + params["bias"].astype(x.dtype) if "bias" in params else found


def last_tokens(
    x: Float[Array, "B T *units"], past: Float[Array, "B C1 *units"], is_text: Bool[Array, "B T"]
) -> Float[Array, "B C1 *units"]:
    """Returns the last C - 1 tokens of a text, of which those here may be followed by padding."""
    both = jnp.concatenate([past, x.astype(past.dtype)], axis=1)
    at = is_text.sum(axis=1)[:, None] + jnp.arange(past.shape[1])
    return jnp.take_along_axis(both, at.reshape(*at.shape, *(1,) * (both.ndim - 2)), axis=1)
