"""Forward passes: token blocks through one model, along the path between two models, or through two side by side.

The jitted unit is the block step: one layer, for every alpha at once. It compiles once per shape, whatever the depth:
what differs between layers, such as rope and window, comes in as data. The weights of one interpolated layer are held
at a time. Models in memory take one batch after another through all layers; models that are streamed take as many
batches as memory allows through one layer after another, so that each layer is read once.

Two models side by side give the correlations of their inner units: layers outer, the Grams of one layer at a time, and
no activation matrix whole. The models may read the text through different tokenizers: only positions paired in
`PairedBlocks` are compared.
"""

from tracing_jax.forward.activations import activations, embedding_activations
from tracing_jax.forward.divergences import divergences
from tracing_jax.forward.losses import path_losses, token_losses
from tracing_jax.forward.paired import LayerCorrelations, correlate, correlations, embedding_correlations
from tracing_jax.forward.proof import FUNCTION_TOLERANCE, check_function, logits
from tracing_jax.forward.unit_samples import Sample, sampled_units

__all__ = [
    "FUNCTION_TOLERANCE",
    "LayerCorrelations",
    "Sample",
    "activations",
    "check_function",
    "correlate",
    "correlations",
    "divergences",
    "embedding_activations",
    "embedding_correlations",
    "logits",
    "path_losses",
    "sampled_units",
    "token_losses",
]
