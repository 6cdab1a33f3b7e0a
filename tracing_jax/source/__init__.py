"""`ParamSource`: a model's params, part by part. Sources wrap one another lazily."""

from tracing_jax.source.ahead import ReadAhead
from tracing_jax.source.excerpt import Excerpt
from tracing_jax.source.lazy import leaf, params_of
from tracing_jax.source.reading import InMemory, ParamSource, in_memory, part, parts, prefixes
from tracing_jax.source.wrapping import (
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
    "Excerpt",
    "InMemory",
    "Mapped",
    "ParamSource",
    "ReadAhead",
    "disguised",
    "in_memory",
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
