"""`ParamSource`: a model's params, part by part. Sources wrap one another lazily."""

from tracing_jax.sources.lazy_leaves import leaf, params_of
from tracing_jax.sources.prefetch import PrefetchingSource
from tracing_jax.sources.source import InMemory, ParamSource, in_memory, is_resident, part, parts, prefixes
from tracing_jax.sources.submodel import Submodel
from tracing_jax.sources.transforms import (
    Disguised,
    Mapped,
    disguised,
    over,
    permute_in_place,
    permuted,
    placed,
)

__all__ = [
    "Disguised",
    "InMemory",
    "Mapped",
    "ParamSource",
    "PrefetchingSource",
    "Submodel",
    "disguised",
    "in_memory",
    "is_resident",
    "leaf",
    "over",
    "params_of",
    "part",
    "parts",
    "permute_in_place",
    "permuted",
    "placed",
    "prefixes",
]
