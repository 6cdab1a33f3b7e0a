"""The next token: logits filtered as transformers does, and a draw that does not depend on the batch."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: only so many of the most likely tokens are drawn; 0 for all.
      top_p: only the fewest tokens are drawn that together have at least this probability; 1 for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def problems(self) -> list[str]:
        """Returns what is out of range."""
        lines = [] if self.temperature >= 0 else [f"temperature={self.temperature}: at least 0"]
        lines += [] if self.top_k >= 0 else [f"top_k={self.top_k}: at least 0"]
        return lines + ([] if 0 < self.top_p <= 1 else [f"top_p={self.top_p}: above 0 and at most 1"])


def filtered(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """Returns logits over the temperature, and minus infinity for tokens that are not sampled.

    Temperature comes first, then top_k, then top_p, as in transformers; ties at the
    border of top_k are all kept.

    Source: Holtzman et al. 2020 (arXiv 1904.09751) for top_p.
    """
    logits = logits / params.temperature
    V = logits.shape[-1]
    if 0 < params.top_k < V:
        least = jax.lax.top_k(logits, params.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if params.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of the more likely tokens
        ranks = jnp.argsort(order, axis=-1)
        logits = jnp.where(jnp.take_along_axis(before, ranks, axis=-1) < params.top_p, logits, -jnp.inf)
    return logits


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], positions: Int[Array, " B"], params: SamplingParams
) -> Int[Array, " B"]:
    """Returns the next token of each text; its draw follows from the text's key and the position alone."""
    if params.temperature == 0:
        return logits.argmax(axis=-1).astype(jnp.int32)
    drawn = jax.vmap(lambda key, position, row: jax.random.categorical(jax.random.fold_in(key, position), row))
    return drawn(keys, positions, filtered(logits, params)).astype(jnp.int32)
