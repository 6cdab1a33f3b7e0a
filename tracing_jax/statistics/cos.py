"""`cos`: does each MLP unit of base have a twin in ft? Best-match cosine of gate weights, per layer and mean."""

from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import trange

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.cosine import best_cosines
from tracing_jax.statistics.statistic import QUANTILE_LEVELS, Pair, Result, Vocabularies, quantiles

_LABEL = "best-match cosine of MLP units, mean over layers of the median"


class Cos(options.Cos):
    """Mean over layers of the median over MLP units of the best cosine between gate weights.

    Blind to a permutation of the units, but not to one of the features: align first where that is suspected. In a
    mixture of experts the units of all experts of a layer are compared with one another.

    Source: the reference program of Zhu et al. 2025 (arXiv 2502.12292).
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why gate weights of these models cannot be compared layer by layer."""
        lines = [
            f"no gate: the MLPs of {name} (family {arch.family}) have none, and gate weights are what is compared"
            for name, arch in (("base", base), ("ft", ft))
            if not arch.gated
        ]
        if base.num_layers != ft.num_layers:
            lines.append(f"different depth ({base.num_layers} and {ft.num_layers} layers): no layer has a counterpart")
        if base.embed_dim != ft.embed_dim:
            lines.append(f"different width ({base.embed_dim} and {ft.embed_dim} features): rows have no cosine")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the medians per layer, their mean (the headline) and the quantiles over units."""
        rows = []
        for i in trange(pair.base.arch.num_layers, desc="cosines", unit="layer", disable=None):
            rows.append(quantiles(best_cosines(_gate_rows(pair.base, i), _gate_rows(pair.ft, i))))
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


def _gate_rows(model: ParamSource, layer: int) -> Float[Array, "F D"]:
    """Returns the gate weights of a layer, one row per unit, whatever other axes they have beside the features."""
    name = f"layers/{layer}/mlp/gate_proj/kernel"
    features = axis_table(model.arch).leaves[name].axes.index("embed")
    gate = model.layer(layer, ("mlp/gate_proj/kernel",))["mlp"]["gate_proj"]["kernel"]
    kernel = jnp.moveaxis(jnp.asarray(gate), features, -1)
    return kernel.reshape(-1, kernel.shape[-1])
