"""How far the training of a model went, by what its weights look like; and which of two relatives went further."""

import math
from collections.abc import Mapping
from typing import Any

from tracing_jax.zoo.report.lineage import WEIGHTS, Edge

Facts = Mapping[str, Mapping[str, Any] | None]
"""Model -> what `weight_facts` says of it; None where that was not measured."""

_MATRICES = {"embed/embedding": "embedding", "head/lm_head": "head"}
_LEAST_PER_DISTANCE = 0.16
"""A fine-tune's directions shrink by at least so much, as a logarithm, per distance from its parent in its own length.

Siblings that were trained equally far differ by less. Measured: see docs/zoo.md.
"""
_LEAST = 1e-4
"""Where the distance is not known; rewriting and rounding move them by less."""


def trained_order(facts: Facts) -> dict[str, float]:
    """Returns how far each model's embedding and head are from initialisation, for the models where it was measured.

    Random matrices are carried by all directions alike, and training concentrates them, in these two matrices without
    exception. In the matrices of the layers it goes either way, as do kurtosis and the gains of norms: no say for them.
    """
    counted = {name: [d for kind in _MATRICES if (d := _directions(found, kind))] for name, found in facts.items()}
    return {name: -sum(map(math.log, found)) / len(found) for name, found in counted.items() if found}


def further_trained(edge: Edge, facts: Facts) -> list[tuple[str, str]]:
    """Returns (model, ground) for the embedding and for the head: which model has it carried by fewer directions."""
    found = []
    for kind, word in _MATRICES.items():
        one, other = (_directions(facts.get(name), kind) for name in edge.row.models)
        if one and other and abs(math.log(one / other)) > _LEAST:
            (fewer, model), more = min(zip((one, other), edge.row.models, strict=True)), max(one, other)
            found.append((model, f"its {word} is further from initialisation ({fewer:.4g} directions, not {more:.4g})"))
    return found


def look_like_siblings(edge: Edge, facts: Facts) -> bool:
    """Returns whether two models are too equally far trained, for how far they are apart, to be parent and child."""
    lengths = [float(found["length"]) for name in edge.row.models if (found := facts.get(name))]
    moved = trained_order({name: facts.get(name) for name in edge.row.models})
    if edge.measure is not WEIGHTS or len(moved) < 2:
        return False
    distance = edge.value / (sum(lengths) / 2)
    return abs(moved[edge.row.base] - moved[edge.row.ft]) < _LEAST_PER_DISTANCE * distance


def _directions(facts: Mapping[str, Any] | None, kind: str) -> float | None:
    values = (facts or {}).get("matrices", {}).get(kind, {}).get("directions")
    return float(values[0]) if values else None
