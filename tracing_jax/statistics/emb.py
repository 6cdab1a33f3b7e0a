"""`emb`: does each token's embedding of base have a twin in ft? Best-match cosine of embedding rows."""

from typing import ClassVar

import numpy as np

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.statistics.cosine import best_cosines
from tracing_jax.statistics.statistic import QUANTILE_LEVELS, Pair, Result, Vocabularies, quantiles

_LABEL = "best-match cosine of embedding rows, median over shared tokens"


class Emb(options.Emb):
    """Median over embedding rows of shared tokens of the best cosine with any such row of the other model.

    Tokens are shared when both vocabularies have their string. Above `max_rows` shared tokens, a random draw of base's
    rows (from the run's seed) is compared with all of ft's.

    Source: the reference program of Zhu et al. 2025 (arXiv 2502.12292).
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why embedding rows of these models cannot be compared."""
        lines = []
        if base.embed_dim != ft.embed_dim:
            lines.append(f"different width ({base.embed_dim} and {ft.embed_dim} features): rows have no cosine")
        if len(vocabularies.ids_base) == 0:
            lines.append("the vocabularies share no token")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the median (the headline) and the quantiles over rows."""
        ids, others = pair.vocabularies.ids_base, pair.vocabularies.ids_ft
        if len(ids) > self.max_rows:
            ids = np.sort(np.random.default_rng(pair.seed).choice(ids, self.max_rows, replace=False))
        cosines = best_cosines(
            pair.base.embed()["embedding"][ids], pair.ft.embed()["embedding"][others], "cosines of embeddings"
        )
        rows = quantiles(cosines)
        return Result(
            headline=rows[QUANTILE_LEVELS.index(0.5)],
            label=_LABEL,
            p_reason="a best-match cosine has no null distribution",
            distribution={
                "label": f"best-match cosine of {len(ids)} embedding rows",
                "quantiles": {"levels": list(QUANTILE_LEVELS), "layers": [rows]},
            },
        )
