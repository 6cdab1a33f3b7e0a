"""The engine: token blocks through one model, or along the path between two, layer by layer.

The jitted unit is the block step: one layer, for every alpha at once. It compiles once per shape, whatever the depth:
what differs between layers, such as rope and window, comes in as data. The weights of one interpolated layer live at a
time. Models in memory take one batch after another through all layers; models that are streamed take as many batches
as memory allows through one layer after another, so that each layer is read once.
"""

from tracing_jax.forward.divergences import divergences
from tracing_jax.forward.losses import path_losses, token_losses
from tracing_jax.forward.proof import FUNCTION_TOLERANCE, check_function, logits

__all__ = ["FUNCTION_TOLERANCE", "check_function", "divergences", "logits", "path_losses", "token_losses"]
