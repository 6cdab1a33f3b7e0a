"""Which of many candidates are parents: forward selection by entries that no share was fitted to.

Shares are fitted to half of the row blocks of each tensor and judged on the other half, both ways round. The candidate
that adds most joins until the best of those left adds no more than noise; then those that the others have made needless
leave again.

Letters: K candidates, C columns, N tensors.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from tracing_jax.merges.models import MergeModels
from tracing_jax.merges.normal_equations import NormalEquations, TensorSums

_STANDARD_ERRORS = 3.0
_LEAST_GAIN = 1e-3
"""Nats per held-out entry that a parent must add: .2 % of what the others leave, in squares."""
_MOST_WEIGHT = 4096
"""A tensor of more entries counts as this many, so that no one tensor decides."""

Nats = Float[np.ndarray, " N"]


@dataclass(frozen=True)
class Selection:
    """The candidates that were chosen.

    Attributes:
      chosen: indices of candidates, in their order.
      gains: candidate -> nats per held-out entry that it added as it joined; of the first without an origin NaN.
      instead: candidate that was chosen -> others that predict as well in its place.
    """

    chosen: tuple[int, ...]
    gains: dict[int, float]
    instead: dict[int, tuple[int, ...]]

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns plain data for the record."""
        return {
            "candidates": list(names),
            "chosen": [names[k] for k in self.chosen],
            "nats_per_entry": {names[k]: None if math.isnan(gain) else gain for k, gain in self.gains.items()},
            "instead": {names[k]: [names[j] for j in others] for k, others in self.instead.items()},
        }


def select(models: MergeModels, sums: NormalEquations) -> Selection:
    """Returns the candidates, given as parents, without which the child is predicted worse.

    At least one is chosen with an origin, and two without, so that there are shares.
    """
    score = _scorer(models, sums.tensors)
    weights = _weights(sums.tensors)
    count = len(models.names)
    chosen: tuple[int, ...] = ()
    gains: dict[int, float] = {}
    if models.origin is None:
        chosen = (max(range(count), key=lambda k: float((weights * score((k,))).sum())),)
        gains[chosen[0]] = math.nan
    fewest = 1 if models.origin is not None else 2
    while len(chosen) < count:
        before = score(chosen)
        added = {k: weights * (score(_joined(chosen, k)) - before) for k in range(count) if k not in chosen}
        best = max(added, key=lambda k: float(added[k].sum()))
        if len(chosen) >= fewest and not _is_more_than_noise(added[best], weights):
            break
        gains[best] = float(added[best].sum() / weights.sum())
        chosen = _joined(chosen, best)
    chosen = _without_needless(chosen, score, weights, fewest)
    return Selection(chosen, {k: gains[k] for k in chosen}, _instead(chosen, count, score, weights))


def restricted(
    models: MergeModels, sums: NormalEquations, chosen: Sequence[int]
) -> tuple[MergeModels, NormalEquations]:
    """Returns the models with these parents alone, and what one pass would have read of them."""
    names = [models.names[k] for k in chosen]
    read = read_of(models, chosen)
    rows = _rows(models, chosen)
    last = np.zeros((1, rows.shape[1]))
    last[0, -1] = 1.0
    if models.origin is None and chosen[0] > 0:
        last[0, chosen[0]] = 1.0  # the new reference is the old one and a difference from it
    change = np.concatenate([rows, last])
    kept = replace(
        models,
        parents={name: models.parents[name] for name in names},
        tokens=None if models.tokens is None else tuple(models.tokens[i] for i in read),
        layers=None if models.layers is None else tuple(models.layers[i - 1] for i in read[1:]),
    )
    tensors = [
        replace(tensor, grams=change @ tensor.grams @ change.T, sample=tensor.sample[:, read])
        for tensor in sums.tensors
    ]
    units = {layer: [values[read] for values in matrices] for layer, matrices in sums.units.items()}
    return kept, replace(sums, tensors=tensors, units=units)


def read_of(models: MergeModels, chosen: Sequence[int]) -> list[int]:
    """Returns the places, among the models that are read together, of the child, the origin and these parents."""
    first = 1 if models.origin is None else 2
    return [0, *([1] if models.origin is not None else []), *(first + k for k in chosen)]


def _joined(chosen: Sequence[int], more: int) -> tuple[int, ...]:
    return tuple(sorted((*chosen, more)))


def _scorer(models: MergeModels, tensors: Sequence[TensorSums]) -> Callable[[tuple[int, ...]], Nats]:
    """Returns a function from chosen candidates to the log likelihood per held-out entry of each tensor."""
    halves = np.stack([[tensor.grams[0::2].sum(0), tensor.grams[1::2].sum(0)] for tensor in tensors])
    entries = np.array([[tensor.counts[0::2].sum(), tensor.counts[1::2].sum()] for tensor in tensors])
    floors = np.array([tensor.rounding for tensor in tensors])[:, None] * entries

    @functools.cache
    def score(chosen: tuple[int, ...]) -> Nats:
        rows = _rows(models, chosen)
        grams = rows @ halves @ rows.T
        rest = np.stack([_left(grams[:, 1 - half], grams[:, half]) for half in (0, 1)], axis=1)
        # What float64 cannot distinguish from nothing is nothing.
        floor = np.maximum(floors, 1e-12 * halves[:, :, 0, 0]) + 1e-300
        found: Nats = (-0.5 * entries * np.log(np.maximum(rest, floor))).sum(1) / np.maximum(entries.sum(1), 1.0)
        return found

    return score


def _left(fitted: Float[np.ndarray, "N C C"], judged: Float[np.ndarray, "N C C"]) -> Float[np.ndarray, " N"]:
    """Returns the squares of the first column that shares fitted to other entries leave of it."""
    if fitted.shape[1] == 1:
        return np.asarray(judged[:, 0, 0])
    shares = np.stack([np.linalg.lstsq(gram[1:, 1:], gram[1:, 0], rcond=1e-10)[0] for gram in fitted])
    signed = np.concatenate([np.ones((len(shares), 1)), -shares], axis=1)
    found: np.ndarray = np.einsum("nc,ncd,nd->n", signed, judged, signed)
    return found


def _rows(models: MergeModels, chosen: Sequence[int]) -> Float[np.ndarray, "C D"]:
    """Returns rows that make the differences of the child and of the chosen from their reference, of all columns.

    Without an origin the first of the chosen is the reference.
    """
    unit = np.eye(models.terms + 2)
    if models.origin is not None:
        return unit[[0, *(1 + k for k in chosen)]]
    # The first of all parents is the old reference: its difference from it is nothing.
    difference = [np.zeros(models.terms + 2), *unit[1 : 1 + models.terms]]
    reference = difference[chosen[0]]
    return np.stack([unit[0] - reference, *(difference[k] - reference for k in chosen[1:])])


def _weights(tensors: Sequence[TensorSums]) -> Nats:
    return np.minimum([tensor.counts.sum() for tensor in tensors], _MOST_WEIGHT).astype(float)


def _is_more_than_noise(gains: Nats, weights: Nats) -> bool:
    error = math.sqrt(len(gains) * float(gains.var()))
    return bool(gains.sum() > max(_LEAST_GAIN * weights.sum(), _STANDARD_ERRORS * error))


def _without_needless(
    chosen: tuple[int, ...], score: Callable[[tuple[int, ...]], Nats], weights: Nats, fewest: int
) -> tuple[int, ...]:
    while len(chosen) > fewest:
        lost = {k: weights * (score(chosen) - score(tuple(j for j in chosen if j != k))) for k in chosen}
        least = min(lost, key=lambda k: float(lost[k].sum()))
        if _is_more_than_noise(lost[least], weights):
            return chosen
        chosen = tuple(k for k in chosen if k != least)
    return chosen


def _instead(
    chosen: tuple[int, ...], count: int, score: Callable[[tuple[int, ...]], Nats], weights: Nats
) -> dict[int, tuple[int, ...]]:
    """Returns for each of the chosen the others that would do in its place."""
    found: dict[int, tuple[int, ...]] = {}
    for k in chosen:
        rest = tuple(j for j in chosen if j != k)
        if rest and not _is_more_than_noise(weights * (score(chosen) - score(rest)), weights):
            continue  # it is there for lack of a second parent
        others = [
            j
            for j in range(count)
            if j not in chosen and not _is_more_than_noise(weights * (score(chosen) - score(_joined(rest, j))), weights)
        ]
        if others:
            found[k] = tuple(others)
    return found
