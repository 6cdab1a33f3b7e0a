"""Layers that repeat an earlier one of their model, as where weights are shared among layers or copies are stacked."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from tracing_jax.sources import ParamSource
from tracing_jax.statistics.distinct_units import distinct_units

_SAME = 0.8
"""Cosine of what pairs of features have in common in two layers, from which on one repeats the other. Between layers
of four small published models and some of our own it is at most .6."""


def first_alike(model: ParamSource) -> list[int]:
    """Returns for each layer the first one whose MLP is the same or nearly so, with units in any order; or itself.

    Either of gate and up is enough: the rows of the other may read features besides that nothing writes. Layers with
    experts, and those of which only what units write is known, count as different.
    """
    found: list[tuple[Float[np.ndarray, " P"], ...]] = []
    first = []
    for i in range(model.arch.num_layers):
        own = () if model.arch.has_experts(i) else distinct_units(model, i).moments
        alike = [j for j, other in enumerate(found) if any(a @ b >= _SAME for a, b in zip(own, other))]
        first.append(alike[0] if alike else i)
        found.append(own)
    return first


def repeated_layers(model: ParamSource) -> list[int]:
    """Returns the layers that repeat an earlier one."""
    return [i for i, first in enumerate(first_alike(model)) if first != i]


def without_repeats(base: ParamSource, ft: ParamSource, layers: Sequence[int]) -> list[int]:
    """Returns the layers without those of which both models have another pair: their p-values are no further evidence.

    Args:
      base: the one model.
      ft: the other.
      layers: indices of layers that both have.
    """
    pairs = dict[tuple[int, int], int]()
    firsts = first_alike(base), first_alike(ft)
    for i in layers:
        pairs.setdefault((firsts[0][i], firsts[1][i]), i)
    return list(pairs.values())


def repetition_notes(layers: Sequence[int], kept: Sequence[int]) -> list[str]:
    """Returns what follows if some of the layers repeat others in both models."""
    if len(kept) == len(layers):
        return []
    return [f"{len(layers) - len(kept)} layers repeat others in both models: of the copies the first counts"]
