"""What the shared tokens of two models read and write: their rows of the input embedding and of the head."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.mlp_rows import gain_of, without_mean
from tracing_jax.statistics.statistic import Pair, Vocabularies, heads_not_applicable
from tracing_jax.tree import taken

FEW_TOKENS = 32
"""Fewer shared tokens than this tell units apart too badly."""


class TokenRows(NamedTuple):
    """Rows of the input embedding, and rows of the head with the gain of the final norm; float32."""

    read: Float[Array, "S D"]
    effect: Float[Array, "S D"]


def tokens_not_applicable(base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
    """Returns the reasons why what units do with shared tokens cannot be compared; empty if it can."""
    found = len(vocabularies.ids_base)
    few = [] if found >= FEW_TOKENS else [f"the vocabularies share {found} tokens, {FEW_TOKENS} are needed"]
    return heads_not_applicable(base, ft) + few


def token_rows(pair: Pair, most: int, name: str) -> tuple[TokenRows, TokenRows]:
    """Returns the rows of base and of ft of the same shared tokens, at most so many, drawn from the seed of the run."""
    ids = pair.vocabularies.ids_base, pair.vocabularies.ids_ft
    drawn = np.sort(pair.generator(name, "tokens").permutation(len(ids[0]))[:most])
    return _rows(pair.base, ids[0][drawn]), _rows(pair.ft, ids[1][drawn])


def _rows(model: ParamSource, ids: Int[np.ndarray, " S"]) -> TokenRows:
    arch, table, head = model.arch, model.embed()["embedding"], model.head()
    rows = taken(table, ids)
    written = rows if arch.tied else taken(head["lm_head"]["kernel"], ids, axis=1).T
    read = jnp.asarray(rows, jnp.float32)
    effect = jnp.asarray(written, jnp.float32) * gain_of(head, "norm", arch)
    return TokenRows(without_mean(read, arch), without_mean(effect, arch))
