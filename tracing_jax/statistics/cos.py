"""`cos`: does each MLP unit of base have a twin in ft? Best-match cosine of gate weights, per layer and mean."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from tqdm import trange

from tracing_jax.arch import Arch
from tracing_jax.statistics.cosine import best_cosines
from tracing_jax.statistics.statistic import QUANTILE_LEVELS, Pair, Result, Vocabularies, quantiles

_LABEL = "best-match cosine of MLP units, mean over layers of the median"


@dataclass(frozen=True)
class Cos:
    """Mean over layers of the median over MLP units of the best cosine between gate weights.

    Blind to a permutation of the units, but not to one of the features: align first where that is suspected.

    Source: the reference program of Zhu et al. 2025 (arXiv 2502.12292).
    """

    needs_tokens: ClassVar[bool] = False

    def problems(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why gate weights of these models cannot be compared layer by layer."""
        lines = []
        if base.num_layers != ft.num_layers:
            lines.append(f"different depth ({base.num_layers} and {ft.num_layers} layers): no layer has a counterpart")
        if base.embed_dim != ft.embed_dim:
            lines.append(f"different width ({base.embed_dim} and {ft.embed_dim} features): rows have no cosine")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the medians per layer, their mean (the headline) and the quantiles over units."""
        rows = []
        for i in trange(pair.base.arch.num_layers, desc="cosines", unit="layer", disable=None):
            gate_base, gate_ft = (model.layer(i)["mlp"]["gate_proj"]["kernel"].T for model in (pair.base, pair.ft))
            rows.append(quantiles(best_cosines(gate_base, gate_ft)))
        medians = [row[QUANTILE_LEVELS.index(0.5)] for row in rows]
        return Result(
            headline=float(np.mean(medians)),
            label=_LABEL,
            p_reason="a best-match cosine has no null distribution",
            per_layer={"label": "median best-match cosine of gate weights", "values": medians},
            distribution={
                "label": "best-match cosine of MLP units",
                "quantiles": {"levels": list(QUANTILE_LEVELS), "layers": rows},
            },
        )
