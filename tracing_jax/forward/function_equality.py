"""Whether two models compute the same function: their logits on a few random tokens."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from tracing_jax.forward.forward_pass import check_tokens, final_hidden, head_logits, head_of
from tracing_jax.sources import ParamSource
from tracing_jax.tree import flatten, to_host

FUNCTION_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 5e-2, "bfloat16": 2e-1}
"""Dtype of the weights -> the most that a rewrite may change logits, relative to the larger of 1 and the largest.

Rewritten weights are rounded once, to 2^-24, 2^-11 or 2^-9 of themselves, and a deep model amplifies what that changes;
a rewrite that does not preserve the function changes logits by their own size."""

_BLOCKS, _LENGTH = 2, 32
"""Of the tokens that are drawn."""


def logits(
    source: ParamSource, tokens: Int[np.ndarray, "B T"], dtype: DTypeLike = jnp.float32
) -> Float[np.ndarray, "B T V"]:
    """Returns the logits of a few token blocks, all at once: for comparing functions, not for scoring a text.

    Raises:
      ValueError: no tokens, blocks longer than the model can read, or ids outside its vocabulary.
    """
    check_tokens(tokens, source.arch)
    (hidden,) = final_hidden(source, [jnp.asarray(tokens)], dtype)
    return to_host(head_logits(source.arch, head_of(source), hidden))


def check_function(
    before: ParamSource,
    after: ParamSource,
    *,
    seed: int = 0,
    tokens: Int[np.ndarray, "B T"] | None = None,
    new_ids: Int[np.ndarray, " V"] | None = None,
    tolerance: float | None = None,
) -> float:
    """Returns the largest change of the logits from one model to the other, over the larger of 1 and the largest.

    Args:
      before: a model.
      after: the same model rewritten.
      seed: draws the tokens, unless some are given.
      tokens: the blocks to read, in ids of `before`.
      new_ids: for each token of `before` its id in `after`, if ids were renamed.
      tolerance: the largest change allowed; by default `FUNCTION_TOLERANCE` for the dtype of `before`.

    Raises:
      ValueError: a larger change, or NaN: `after` does not compute the function of `before`.
    """
    vocab_size = before.arch.vocab_size
    if tokens is None:
        shape = (_BLOCKS, min(_LENGTH, before.arch.longest or _LENGTH))
        tokens = np.random.default_rng(seed).integers(vocab_size, size=shape, dtype=np.int32)
    ids = np.arange(vocab_size) if new_ids is None else new_ids
    expected, found = logits(before, tokens), logits(after, ids[tokens].astype(np.int32))[..., ids]
    change = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
    dtype = str(flatten(before.embed())["embedding"].dtype)
    allowed = FUNCTION_TOLERANCE[dtype] if tolerance is None else tolerance
    if not change <= allowed:  # NaN too
        raise ValueError(
            f"logits move by {change:.2e} of the largest, expected at most {allowed:.0e} for weights in {dtype}: these "
            f"rewrites do not keep the function of this {before.arch.family} model, or its weights hold NaN; leave "
            "rewrites out to find which it is"
        )
    return change
