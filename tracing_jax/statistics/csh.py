"""`csh`: are MLP units in place? Their activations on random tokens are matched, and compared with the identity."""

from typing import ClassVar

import numpy as np

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.data import PairedBlocks, paired_one_to_one
from tracing_jax.forward import LayerCorrelations, correlations
from tracing_jax.statistics.comparison import Comparison, compare_layers
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.in_place import constrained_result, in_place, units_not_applicable
from tracing_jax.statistics.shared_tokens import with_doubts
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies, depths_not_applicable

_TAP = {"hidden": "units", "up": "up"}


class Csh(options.Csh):
    """Constrained test on the hidden activations of the MLPs; the p-value is exact like that of `csu`.

    Both models read the same random tokens, drawn uniformly from those that both vocabularies and a text have. Units
    are matched by the absolute correlation of their activations over the tokens.

    Source: Zhu et al. 2025 (arXiv 2502.12292); its program matches the up activation under this name, and by cosine.
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why units of these models cannot be compared on the same tokens; empty if they can."""
        lines = units_not_applicable(base, ft) + depths_not_applicable(base, ft, "layers have no counterpart")
        if len(vocabularies.ids_base) < 2:
            lines.append("the vocabularies share no tokens to be read by both")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the p-values per layer and combined; one forward pass per model."""
        blocks = random_blocks(pair.vocabularies, (self.blocks, self.block_size), pair.generator("csh", "tokens"))
        tap = _TAP[self.activation]
        run_cache = pair.run_cache.scope("csh")

        def compare(layer: LayerCorrelations) -> Comparison:
            units = distinct_units(pair.base, layer.layer), distinct_units(pair.ft, layer.layer)
            return in_place(layer.by_tap[tap], units, pair.generator("csh", layer.layer))

        layers = correlations(pair.base, pair.ft, blocks, (tap,), pair.compute, "csh", run_cache=run_cache)
        comparisons = compare_layers(layers, compare, run_cache)
        label = f"units whose {self.activation} activation stays in place, share"
        return with_doubts(constrained_result(pair, comparisons, label), pair)


def random_blocks(vocabularies: Vocabularies, shape: tuple[int, int], generator: np.random.Generator) -> PairedBlocks:
    """Returns blocks of tokens drawn uniformly from those that both vocabularies have, by string, and a text has."""
    drawn = vocabularies.usable[generator.integers(len(vocabularies.usable), size=shape)]
    base, ft = (ids[drawn].astype(np.int32) for ids in (vocabularies.ids_base, vocabularies.ids_ft))
    return paired_one_to_one(base, ft, "random tokens of both vocabularies, paired by string")
