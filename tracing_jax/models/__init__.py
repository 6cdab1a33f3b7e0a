"""Flax (linen) modules of every supported family; the only place that imports Flax."""

from tracing_jax.models.llama import Block, Embed, Head, init_params, layer_inputs

__all__ = ["Block", "Embed", "Head", "init_params", "layer_inputs"]
