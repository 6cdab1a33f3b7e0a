"""`ParamSource`: a model's params, subtree by subtree. Sources wrap one another lazily."""

from tracing_jax.sources.lazy_leaves import leaf, params_of
from tracing_jax.sources.mlps import MlpIndex, MlpsAsLayers, layer_of, mlp_indices, one_mlp, origin, whole_model
from tracing_jax.sources.prefetch import PrefetchingSource
from tracing_jax.sources.source import (
    InMemory,
    ParamSource,
    has_embeddings,
    in_memory,
    is_resident,
    prefixes,
    subtree,
    subtrees,
)
from tracing_jax.sources.submodel import Submodel
from tracing_jax.sources.transforms import MappedSource, rewritten, rewritten_donating, sharded

__all__ = [
    "InMemory",
    "MappedSource",
    "MlpIndex",
    "MlpsAsLayers",
    "ParamSource",
    "PrefetchingSource",
    "Submodel",
    "has_embeddings",
    "in_memory",
    "is_resident",
    "layer_of",
    "leaf",
    "mlp_indices",
    "one_mlp",
    "origin",
    "params_of",
    "prefixes",
    "rewritten",
    "rewritten_donating",
    "sharded",
    "subtree",
    "subtrees",
    "whole_model",
]
