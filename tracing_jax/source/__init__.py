"""`ParamSource`: a model's params, part by part. Sources wrap one another lazily."""

from tracing_jax.source.ahead import ReadAhead
from tracing_jax.source.reading import InMemory, ParamSource, in_memory, part, parts
from tracing_jax.source.wrapping import (
    Disguised,
    Mapped,
    disguised,
    first_layers,
    permute_in_place,
    permuted,
    placed,
)

__all__ = [
    "Disguised",
    "InMemory",
    "Mapped",
    "ParamSource",
    "ReadAhead",
    "disguised",
    "first_layers",
    "in_memory",
    "part",
    "parts",
    "permute_in_place",
    "permuted",
    "placed",
]
