"""The decoder of every supported family as plain functions of a params pytree.

Plain functions rather than Flax linen modules: models are streamed a layer at a time, and a layer is then a dict of
arrays that is passed to a function, where a module would have to be made, bound and asked for collections. Inner
activations, the key/value cache and the positions are arguments and results, where linen has mutable collections whose
paths must be parsed, and a part of a block can be computed from the weights of that part alone. Flax's params stay the
currency: trees, leaf names and kernels `[in, out]` are those that linen modules of the same names would have.
"""

from tracing_jax.models.decoder import (
    BlockOutput,
    apply_block,
    apply_embed,
    apply_head,
    apply_mlp,
    empty_cache,
    layer_inputs,
)
from tracing_jax.models.initialization import init_params
from tracing_jax.models.layers import Cache, LayerInputs
from tracing_jax.models.taps import mlp_leaves, tap_axes, taps_of, taps_problem

__all__ = [
    "BlockOutput",
    "Cache",
    "LayerInputs",
    "apply_block",
    "apply_embed",
    "apply_head",
    "apply_mlp",
    "empty_cache",
    "init_params",
    "layer_inputs",
    "mlp_leaves",
    "tap_axes",
    "taps_of",
    "taps_problem",
]
