"""Sizes in a config that no model has, found before anything is built from them."""

import re
from collections.abc import Mapping
from typing import Any

_MAX_COUNT = 10_000
"""Layers and experts of a model: ten times as many as any has."""

_MAX_SIZE = 1 << 24
"""Units of an axis: the largest vocabularies have a million."""

_MAX_LABELS = 100_000
"""Classes of a classifier; transformers makes a name for each."""

_COUNTS = re.compile(r"n_layers?|n_experts?|n_routed_experts|num_\w*(layers|experts)|\w+_layers")
_SIZES = re.compile(r"n_(embd|head|heads|inner|ctx)|num_\w+heads|d_(model|ff|kv)|\w+_(size|dim|rank)")


def size_problem(raw: Mapping[str, Any]) -> str | None:
    """Returns which size of a config, or of a config inside it, is out of all proportion; None if none is."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            if problem := size_problem({key: inner for key, inner in value.items() if not isinstance(inner, Mapping)}):
                return f"{name}: {problem}"
        elif isinstance(value, int | float) and not isinstance(value, bool):
            most = _most(name)
            if most is not None and not 0 <= value <= most:
                return f"{name} is {value!r:.40}, expected at most {most}; no model has such a size"
    return None


def _most(name: str) -> int | None:
    if name == "num_labels":
        return _MAX_LABELS
    return _MAX_COUNT if _COUNTS.fullmatch(name) else _MAX_SIZE if _SIZES.fullmatch(name) else None
