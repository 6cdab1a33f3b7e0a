"""Flax (linen) modules of every supported family, and pure functions over them; the only place that imports Flax."""

from tracing_jax.models.decoder import (
    Block,
    Embed,
    Head,
    LayerInputs,
    apply_block,
    apply_block_with_cache,
    apply_block_with_taps,
    apply_embed,
    apply_head,
    apply_mlp_with_taps,
    empty_cache,
    init_params,
    layer_inputs,
)
from tracing_jax.models.taps import mlp_leaves, tap_axes, taps_of, taps_problem

__all__ = [
    "Block",
    "Embed",
    "Head",
    "LayerInputs",
    "apply_block",
    "apply_block_with_cache",
    "apply_block_with_taps",
    "apply_embed",
    "apply_head",
    "apply_mlp_with_taps",
    "empty_cache",
    "init_params",
    "layer_inputs",
    "mlp_leaves",
    "tap_axes",
    "taps_of",
    "taps_problem",
]
