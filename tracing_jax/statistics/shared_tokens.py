"""What the shared tokens of two models read and write: their rows of the input embedding and of the head."""

from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.comparison import all_reserved
from tracing_jax.statistics.mlp_rows import gain_of, without_mean
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies, heads_not_applicable
from tracing_jax.tree import taken

FEW_TOKENS = 32
"""Fewer shared tokens than this distinguish units too badly."""

_MEASURED_TOKENS = 512
"""Power has been measured with so many tokens, or with more than half as many as there are features."""


class TokenRows(NamedTuple):
    """Rows of the input embedding, and rows of the head with the gain of the final norm; float32."""

    read: Float[Array, "S D"]
    effect: Float[Array, "S D"]


def tokens_not_applicable(base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
    """Returns the reasons why what units do with shared tokens cannot be compared; empty if it can."""
    found = len(vocabularies.ids_base)
    few = [] if found >= FEW_TOKENS else [f"the vocabularies share {found} tokens, {FEW_TOKENS} are needed"]
    return heads_not_applicable(base, ft) + few


def with_doubts(result: Result, pair: Pair) -> Result:
    """Returns the result of a statistic on embeddings of shared tokens, with what its tokens leave in doubt.

    Where they are not known to be in a text, its evidence is reserved, but for that of tests on a text, and it does not
    detect a relation that other embeddings hide. Nor does it where there are few of them.
    """
    doubt, usable = pair.vocabularies.doubt, len(pair.vocabularies.usable)
    hidden = result.blind_to or ()
    width = min(pair.base.arch.embed_dim, pair.ft.arch.embed_dim)
    if doubt:
        hidden += ("other embeddings of tokens that no text has",)
    elif usable < min(_MEASURED_TOKENS, width // 2):
        hidden += (f"differences by {usable} tokens, as few as a text and both vocabularies share",)
    result = replace(result, blind_to=hidden or result.blind_to)
    if not doubt:
        return result
    return all_reserved(result, f"{doubt}, and embeddings of tokens that no text has can be made to agree", "forward")


def with_unread_units(result: Result, pair: Pair) -> Result:
    """Returns the result of a test of weights, with what it leaves in doubt where no text is known to the models.

    What units and heads read of a text is not known then: some that no text reaches can be another model's, or take the
    place of those that do the work. Of models that are read by their weights alone the verdict says that they are.
    """
    doubt = pair.vocabularies.doubt or pair.vocabularies.unread
    if not doubt or pair.aligned or any(model.arch.reading is not None for model in (pair.base, pair.ft)):
        return result
    result = replace(result, blind_to=(*(result.blind_to or ()), "units that no text reaches"))
    return all_reserved(result, f"{doubt}, and units that no text reaches can be another model's")


def shared_token_rows(pair: Pair, most: int, name: str) -> tuple[TokenRows, TokenRows]:
    """Returns the rows of base and of ft of the same shared tokens, at most so many, drawn from the seed of the run."""
    ids = pair.vocabularies.ids_base, pair.vocabularies.ids_ft
    drawn = np.sort(pair.vocabularies.drawn(pair.generator(name, "tokens"), most))
    return rows_of_tokens(pair.base, ids[0][drawn]), rows_of_tokens(pair.ft, ids[1][drawn])


def rows_of_tokens(model: ParamSource, ids: Int[np.ndarray, " S"], *, with_effect: bool = True) -> TokenRows:
    """Returns the rows of a model's tokens, without reading its head if not `with_effect`: `effect` is then `read`."""
    arch, rows = model.arch, taken(model.embed()["embedding"], ids)
    if not with_effect:
        read = without_mean(jnp.asarray(rows, jnp.float32), arch)
        return TokenRows(read, read)
    head = model.head()
    written = rows if arch.tied else taken(head["lm_head"]["kernel"], ids, axis=1).T
    read = jnp.asarray(rows, jnp.float32)
    effect = jnp.asarray(written, jnp.float32) * gain_of(head, "norm", arch)
    return TokenRows(without_mean(read, arch), without_mean(effect, arch))
