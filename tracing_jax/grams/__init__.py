"""Correlations between the inner units of two models that read the same tokens side by side.

Both models advance in lockstep, layer outer: the hidden states of all tokens are kept, the Grams of one layer live at a
time, and no activation matrix does. Each model makes one forward pass in all, whatever the number of layers and taps.
The models may read the text through different tokenizers: only positions paired in `PairedBlocks` are compared.
"""

from tracing_jax.grams.lockstep import LayerCorrelations, correlate, correlations, embedding_correlations
from tracing_jax.grams.sampling import Sample, sampled_units

__all__ = [
    "LayerCorrelations",
    "Sample",
    "correlate",
    "correlations",
    "embedding_correlations",
    "sampled_units",
]
