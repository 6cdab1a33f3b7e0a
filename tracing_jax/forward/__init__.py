"""Forward passes: token blocks through one model, along the path between two models, or through two in parallel.

`forward_pass.forward` is the one loop over layers; everything else here, sampling of text and the demo's training are
uses of it. Its jitted unit is the block step: one layer, for every alpha at once. It compiles once per shape, whatever
the depth: what differs between layers, such as rope and window, comes in as data. Resident models take one batch after
another through all layers; streamed ones take as many batches as memory allows through one layer after another, so that
each layer is read once.

Two models in parallel give the correlations of their inner units: layers outer, the Grams of one layer at a time, and
no activation matrix whole. The models may read the text through different tokenizers: only positions paired in
`PairedBlocks` are compared.
"""

from tracing_jax.forward.activation_spread import activation_spread, activation_values
from tracing_jax.forward.activations import activations, embedding_activations
from tracing_jax.forward.bezier import BezierTraining, trained_midpoint
from tracing_jax.forward.descent import LEAST_BLOCKS, Descended, Descent, adam_step
from tracing_jax.forward.forward_pass import LayerOutput, final_hidden, forward, head_logits, head_of
from tracing_jax.forward.function_equality import FUNCTION_TOLERANCE, check_function, logits
from tracing_jax.forward.gradients import StreamPass, stream_pass
from tracing_jax.forward.interpolated_model import InterpolatedModel
from tracing_jax.forward.losses import (
    combination_losses,
    divergences,
    mean_loss,
    path_losses,
    scaled_path_losses,
    token_losses,
)
from tracing_jax.forward.paired import LayerCorrelations, correlate, correlations, embedding_correlations
from tracing_jax.forward.temperature import INVERSE_TEMPERATURES, calibrated
from tracing_jax.forward.unit_samples import Sample, sampled_units

__all__ = [
    "FUNCTION_TOLERANCE",
    "INVERSE_TEMPERATURES",
    "LEAST_BLOCKS",
    "BezierTraining",
    "Descended",
    "Descent",
    "InterpolatedModel",
    "LayerCorrelations",
    "LayerOutput",
    "Sample",
    "StreamPass",
    "activation_spread",
    "activation_values",
    "activations",
    "adam_step",
    "calibrated",
    "check_function",
    "combination_losses",
    "correlate",
    "correlations",
    "divergences",
    "embedding_activations",
    "embedding_correlations",
    "final_hidden",
    "forward",
    "head_logits",
    "head_of",
    "logits",
    "mean_loss",
    "path_losses",
    "sampled_units",
    "scaled_path_losses",
    "stream_pass",
    "token_losses",
    "trained_midpoint",
]
