"""Which of two relatives was trained further, by what their weights look like."""

import math
from collections.abc import Mapping
from typing import Any

_MATRICES = {"embed/embedding": "embedding", "head/lm_head": "head"}
_LEAST = 1e-4
"""Of the logarithm of the ratio: below it, rewriting and rounding could have made the difference."""


def further_trained(models: tuple[str, str], facts: Mapping[str, Mapping[str, Any] | None]) -> list[tuple[str, str]]:
    """Returns (model, ground) for the embedding and for the head: whose spectrum is further from initialisation's.

    The spectrum of random matrices is flat, and training concentrates it, in these two matrices without exception: see
    docs/zoo.md for how often. In the matrices of the layers it goes either way, as kurtosis and the gains of norms do:
    those are measured, and have no say.
    """
    found = []
    for kind, word in _MATRICES.items():
        one, other = (_spectrum(facts.get(model), kind) for model in models)
        if one is None or other is None or abs(math.log(one / other)) < _LEAST:
            continue
        (low, _), (high, child) = sorted(zip((one, other), models, strict=True))
        found.append((child, f"spectrum of its {word} further from initialisation, {high:.4g} and {low:.4g}"))
    return found


def _spectrum(facts: Mapping[str, Any] | None, kind: str) -> float | None:
    values = (facts or {}).get("matrices", {}).get(kind, {}).get("spectrum")
    return float(values[0]) if values else None
