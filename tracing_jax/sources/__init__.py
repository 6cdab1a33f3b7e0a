"""`ParamSource`: a model's params, subtree by subtree. Sources wrap one another lazily."""

from tracing_jax.sources.lazy_leaves import leaf, params_of
from tracing_jax.sources.mlps import MlpsAsLayers, Place, mlp_places, one_mlp, origin
from tracing_jax.sources.prefetch import PrefetchingSource
from tracing_jax.sources.source import (
    InMemory,
    ParamSource,
    has_embeddings,
    in_memory,
    is_resident,
    part,
    parts,
    prefixes,
)
from tracing_jax.sources.submodel import Submodel
from tracing_jax.sources.transforms import MappedSource, placed, rewritten, rewritten_donating

__all__ = [
    "InMemory",
    "MappedSource",
    "MlpsAsLayers",
    "ParamSource",
    "Place",
    "PrefetchingSource",
    "Submodel",
    "has_embeddings",
    "in_memory",
    "is_resident",
    "leaf",
    "mlp_places",
    "one_mlp",
    "origin",
    "params_of",
    "part",
    "parts",
    "placed",
    "prefixes",
    "rewritten",
    "rewritten_donating",
]
