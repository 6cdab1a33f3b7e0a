"""`cos` and `emb`: best-match cosines of MLP units and of embedding rows; and cosines of rows for other statistics.

Source: the reference program of Zhu et al. 2025 (arXiv 2502.12292).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.matching import FactoredSimilarity
from tracing_jax.progress import tqdm, trange
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.mlp_rows import unit_length
from tracing_jax.statistics.statistic import (
    QUANTILE_LEVELS,
    Pair,
    Result,
    Vocabularies,
    depths_not_applicable,
    quantiles,
    widths_not_applicable,
)
from tracing_jax.tree import readable, to_host

_SLICE_BYTES = 256 * 2**20  # maximum of one slice of the cosine matrix
_WHOLE_BYTES = 4 * 2**30  # maximum of one matrix to be matched, 32,768 x 32,768; two may exist at a time


class Cos(options.Cos):
    """Mean over layers of the median over MLP units of the best cosine between gate weights.

    Invariant to permutations of the units, but not of the features: align first where these may be permuted. In a
    mixture of experts the units of all experts of a layer are compared with one another.

    Source: the reference program of Zhu et al. 2025 (arXiv 2502.12292).
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why gate weights cannot be compared layer by layer; empty if they can."""
        lines = [
            f"no gate: the MLPs of {name} (family {arch.family}) have none, and gate weights are what is compared"
            for name, arch in (("base", base), ("ft", ft))
            if not arch.gated
        ]
        lines += depths_not_applicable(base, ft, "no layer has a counterpart")
        return lines + widths_not_applicable(base, ft)

    def compute(self, pair: Pair) -> Result:
        """Returns the medians per layer, their mean (the headline) and the quantiles over units."""
        rows = []
        for i in trange(pair.base.arch.num_layers, desc="cosines", unit="layer", disable=None):
            rows.append(quantiles(best_cosines(_gate_rows(pair.base, i), _gate_rows(pair.ft, i))))
        medians = [row[QUANTILE_LEVELS.index(0.5)] for row in rows]
        return Result(
            headline=float(np.mean(medians)),
            label="best-match cosine of MLP units, mean over layers of the median",
            p_reason="a best-match cosine has no null distribution",
            per_layer={"label": "median best-match cosine of gate weights", "values": medians},
            distribution={
                "label": "best-match cosine of MLP units",
                "quantiles": {"levels": list(QUANTILE_LEVELS), "layers": rows},
            },
        )


class Emb(options.Emb):
    """Median over embedding rows of shared tokens of the best cosine with any such row of the other model.

    Tokens are shared if both vocabularies have their string. Above `max_rows` shared tokens, a random draw of base's
    rows (from the run's seed) is compared with all of ft's.

    Source: the reference program of Zhu et al. 2025 (arXiv 2502.12292).
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why embedding rows of these models cannot be compared; empty if they can."""
        lines = widths_not_applicable(base, ft)
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
            label="best-match cosine of embedding rows, median over shared tokens",
            p_reason="a best-match cosine has no null distribution",
            distribution={
                "label": f"best-match cosine of {len(ids)} embedding rows",
                "quantiles": {"levels": list(QUANTILE_LEVELS), "layers": [rows]},
            },
        )


def best_cosines(rows: Float[Array, "n d"], others: Float[Array, "m d"], description: str = "") -> np.ndarray:
    """Returns for each row the largest cosine with any row of `others`, float32 `[n]`; 0 for a row of zeros.

    Cosines are computed in float32; at most 256 MiB of the n x m matrix exist at a time.
    """
    others = _normalised(others)
    step = max(1, min(len(rows), _SLICE_BYTES // (4 * len(others))))
    starts = tqdm(range(0, len(rows), step), desc=description, unit="slice", disable=None if description else True)
    return np.concatenate([to_host(_best(rows[start : start + step], others)) for start in starts])


def similarities(
    rows: Float[Array | np.ndarray, "n d"], others: Float[Array | np.ndarray, "m d"]
) -> Float[Array | np.ndarray, "n m"] | FactoredSimilarity:
    """Returns the cosines of all rows with all others, for matching; above 4 GiB as factors.

    Each pass of the matching then computes the product again, block by block.
    """
    if 4 * len(rows) * len(others) > _WHOLE_BYTES:
        return FactoredSimilarity(*(_normalised(readable(jnp.asarray(side))) for side in (rows, others)))
    return readable(cosines(rows, others))


@jax.jit
def cosines(rows: Float[Array | np.ndarray, "n d"], others: Float[Array | np.ndarray, "m d"]) -> Float[Array, "n m"]:
    """Returns the cosine of every row with every other, float32; 0 where either is a row of zeros."""
    return jnp.einsum("nd,md->nm", _normalised(rows), _normalised(others), precision="highest")


def _gate_rows(model: ParamSource, layer: int) -> Float[Array, "F D"]:
    """Returns the gate weights of a layer, one row per unit, whatever other axes they have beside the features."""
    name = f"layers/{layer}/mlp/gate_proj/kernel"
    features = axis_table(model.arch).leaves[name].axes.index("embed")
    gate = model.layer(layer, ("mlp/gate_proj/kernel",))["mlp"]["gate_proj"]["kernel"]
    kernel = jnp.moveaxis(jnp.asarray(gate), features, -1)
    return kernel.reshape(-1, kernel.shape[-1])


@jax.jit
def _best(rows: jax.Array, others: jax.Array) -> jax.Array:
    return jnp.einsum("nd,md->nm", _normalised(rows), others, precision="highest").max(axis=1)


def _normalised(rows: Float[Array | np.ndarray, "n d"]) -> Float[Array, "n d"]:
    return unit_length(jnp.asarray(rows, jnp.float32))
