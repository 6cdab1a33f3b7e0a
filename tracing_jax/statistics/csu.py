"""`csu`: are units where they were? Up-projection rows matched, and the matching compared with the identity."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float
from tqdm import trange

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.matching import FactoredSimilarity, match_units
from tracing_jax.statistics.comparison import (
    Comparison,
    against_identity,
    constrained_result,
    layers_in_common,
    overlapped,
    rows_not_applicable,
)
from tracing_jax.statistics.cosine import similarities
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies
from tracing_jax.tree import Tree


class Csu(options.Csu):
    """Constrained test on the up-projection: exact if one of the models was trained independently of the other.

    Rows are matched on |cos|: a unit scaled by a negative number, with its output, is the same unit. Layers of equal
    index are compared; each has a permutation of its own under the null, so their p-values combine by Fisher.

    Source: Zhu et al. 2025 (arXiv 2502.12292), which matches on the signed cosine, in index order.
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why up-projection rows of these models cannot be compared."""
        return rows_not_applicable(base, ft)

    def compute(self, pair: Pair) -> Result:
        """Returns the p-values per layer and combined, by rank correlation and by agreement."""
        run_cache = pair.run_cache.scope("csu")
        layers, kept = layers_in_common(pair), run_cache.count(Comparison)

        def by_layer() -> Iterator[tuple[int, Array | np.ndarray | FactoredSimilarity]]:
            for i in trange(kept, layers, desc="csu", unit="layer", initial=kept, total=layers, disable=None):
                base, ft = (unit_rows(m.layer(i, ("mlp/up_proj/kernel",)), "up_proj") for m in (pair.base, pair.ft))
                yield i, similarities(base, ft)

        def compare(item: tuple[int, Array | np.ndarray | FactoredSimilarity]) -> Comparison:
            i, similarity = item
            return run_cache.cached(Comparison, (i,), lambda: compare_rows(similarity, pair.generator("csu", i)))

        comparisons = [comparison for i in range(kept) if (comparison := run_cache.load(Comparison, i))]
        comparisons += overlapped(by_layer(), compare)
        return constrained_result(pair, comparisons, "units whose up-projection stays in place, share")


def unit_rows(layer: Tree, projection: str) -> Float[Array | np.ndarray, "F D"]:
    """Returns the weights of each MLP unit of a layer on the features, a row per unit."""
    return layer["mlp"][projection]["kernel"].T


def compare_rows(
    similarity: Float[Array | np.ndarray, "n m"] | FactoredSimilarity, generator: np.random.Generator
) -> Comparison:
    """Returns the comparison of the matching by absolute similarity with the identity."""
    matching = match_units(similarity, generator, absolute=True)
    return against_identity(matching, *similarity.shape)
