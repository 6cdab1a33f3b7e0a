"""`jsd`: Jensen-Shannon divergence of the next-token distributions of both models."""

from typing import ClassVar

import numpy as np

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.forward import divergences
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies, heads_not_applicable


class Jsd(options.Jsd):
    """Mean Jensen-Shannon divergence, nats per token, between the predictions over the tokens both vocabularies have.

    Each distribution is restricted to the shared tokens and normalised; the divergence is in [0, ln 2]. Models with
    different tokenizers are compared at positions where they have read the same bytes.

    Source: Zhu et al. 2025 (arXiv 2502.12292), whose program sums over batches and divides by the vocabulary instead.
    """

    needs_tokens: ClassVar[bool] = True

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns the reason why the predictions cannot be compared; empty if they can."""
        shared = [] if len(vocabularies.ids_base) else ["the vocabularies share no token to predict"]
        return heads_not_applicable(base, ft) + shared

    def compute(self, pair: Pair) -> Result:
        """Returns the mean over all paired positions; one forward pass per model."""
        assert pair.blocks is not None
        ids = (pair.vocabularies.ids_base, pair.vocabularies.ids_ft)
        found = divergences(pair.base, pair.ft, pair.blocks, ids, pair.compute, run_cache=pair.run_cache.scope("jsd"))
        return Result(
            headline=float(found.mean(dtype=np.float64)),
            label="Jensen-Shannon divergence of the predictions (nats per token)",
            p_reason="no p-value can exist: what a model predicts does not change when its units are permuted",
            notes=[f"positions: {pair.blocks.how}", f"over {len(ids[0])} shared tokens"],
        )
