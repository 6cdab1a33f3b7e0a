"""The decoder of every supported family as plain functions of a params pytree.

Plain functions rather than Flax linen modules, for three reasons. Models are streamed a layer at a time, sometimes only
some leaves of it or several interpolated copies at once, while a module assumes a complete tree that it initialises
itself. Inner activations, the key/value cache and positions are arguments and results here, where linen has mutable
collections that are addressed by module paths. Flax's params stay the exchange format: trees, leaf names and kernels
`[in, out]` are those of linen modules of the same names, and so are freshly initialised weights.
"""

from tracing_jax.models.decoder import (
    BlockOutput,
    apply_block,
    apply_embed,
    apply_head,
    apply_mlp,
    apply_per_layer,
    empty_cache,
    layer_inputs,
)
from tracing_jax.models.initialization import init_params
from tracing_jax.models.layers import Carried, LayerCache, LayerInputs
from tracing_jax.models.taps import mlp_leaves, tap_axes, taps_of, taps_problem

__all__ = [
    "BlockOutput",
    "Carried",
    "LayerCache",
    "LayerInputs",
    "apply_block",
    "apply_embed",
    "apply_head",
    "apply_mlp",
    "apply_per_layer",
    "empty_cache",
    "init_params",
    "layer_inputs",
    "mlp_leaves",
    "tap_axes",
    "taps_of",
    "taps_problem",
]
