"""Logits of a few tokens: proof that two models compute the same function."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from tracing_jax.forward.walk import Walk, check_tokens, head_logits
from tracing_jax.sources import ParamSource
from tracing_jax.tree import flatten, to_host


def logits(
    source: ParamSource, tokens: Int[np.ndarray, "B T"], dtype: DTypeLike = jnp.float32
) -> Float[np.ndarray, "B T V"]:
    """Returns the logits of a few token blocks: for proofs of equal function, not for scoring."""
    check_tokens(tokens, source.arch)
    walk = Walk(source, None, frozenset(), jnp.zeros(1), dtype)
    (hidden,) = walk.hidden([jnp.asarray(tokens)])
    return to_host(head_logits(source.arch, walk.head().base, hidden[0]))


FUNCTION_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""Dtype of the weights -> the most that a rewrite may move logits, relative to the larger of 1 and the largest.

Rewritten weights are rounded once, to 2^-24, 2^-11 or 2^-9 of themselves, and a deep model amplifies what that changes;
a rewrite that does not keep the function moves logits by their own size."""

_PROOF_TOKENS = (2, 32)  # blocks, positions


def check_function(
    before: ParamSource,
    after: ParamSource,
    *,
    seed: int,
    new_ids: Int[np.ndarray, " V"] | None = None,
    tolerance: float | None = None,
) -> float:
    """Returns how far the logits of two models are apart on random tokens, over the larger of 1 and the largest.

    Args:
      before: a model.
      after: the model rewritten.
      seed: draws the tokens.
      new_ids: for each token of `before` its id in `after`, if it has another.
      tolerance: the largest change allowed; by default `FUNCTION_TOLERANCE` of the dtype of `before`.

    Raises:
      ValueError: further than rounding explains: `after` does not compute what `before` does.
    """
    blocks, length = _PROOF_TOKENS
    shape = (blocks, min(length, before.arch.num_positions or length))
    tokens = np.random.default_rng(seed).integers(before.arch.vocab_size, size=shape, dtype=np.int32)
    ids = np.arange(before.arch.vocab_size) if new_ids is None else new_ids
    expected, found = logits(before, tokens), logits(after, ids[tokens].astype(np.int32))[..., ids]
    moved = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
    dtype = str(flatten(before.embed())["embedding"].dtype)
    allowed = FUNCTION_TOLERANCE[dtype] if tolerance is None else tolerance
    if not moved <= allowed:  # NaN too
        raise ValueError(
            f"logits move by {moved:.2e} of the largest, expected at most {allowed:.0e} for weights in {dtype}: these "
            f"rewrites do not keep the function of this {before.arch.family} model, or its weights hold NaN; leave "
            "rewrites out to find which it is"
        )
    return moved
