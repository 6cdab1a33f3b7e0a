"""What statistics found out about a model by itself, kept as long as the model exists: several need the same."""

import weakref
from typing import Any

from tracing_jax.sources import ParamSource

_KEPT: dict[int, dict[Any, Any]] = {}
"""Id of a model -> name of a fact, such as a layer for its distinct units -> the fact, for as long as it exists."""


def kept_of(model: ParamSource) -> dict[Any, Any]:
    """Returns what is kept of a model as long as it exists, to which callers may add."""
    if id(model) not in _KEPT:
        _KEPT[id(model)] = {}
        weakref.finalize(model, _KEPT.pop, id(model), None)  # models hold arrays and cannot be hashed
    return _KEPT[id(model)]
