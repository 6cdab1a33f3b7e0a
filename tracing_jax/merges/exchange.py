"""The null of a parent that had no part: its units are in arbitrary order.

What is left of the child after the other parents is compared, unit by unit, with what the parent has of its own. If the
parent had no part, the order of its units has nothing to do with the child: the number of units that the best
assignment leaves in their place has the known distribution of fixed points of a random permutation.

Premise: given the child and the other models, every order of the parent's units is equally likely. It holds for a
parent trained from its own initialisation whatever was done to the child, and for fine-tunes of one origin if the rest
of the child is rounding. Where the child was trained further, training on similar text also moves the same units: see
`parent_shares` on parts that are reserved.

A child that was aligned by estimated maps is compared with the other models as they were given: the maps are a function
of the child and the model it was aligned to, and say nothing of the order of a third one. What the maps leave of a unit
has a component along the unit itself, as what training did to a parent's unit has: it is taken out of both.

Letters: M models, U units, F features.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float

from tracing_jax.matching import assign, normalised_rows
from tracing_jax.merges.models import MergeModels
from tracing_jax.statistics.nulls import agreement_log_sf
from tracing_jax.statistics.pvalues import fisher

FEWEST_UNITS = 8
_CORRESPONDING = 0.3
"""Rows of two models correspond if their cosine, over all units, is above; that of independent ones is near 0."""
_NOTHING = 1e-11
"""Of the largest weight: what is left of a child that is a copy is the error of float64."""

UnitRows = Float[np.ndarray, "M U F"]


@dataclass(frozen=True)
class ExchangedUnits:
    """The units by which parents are tested.

    Attributes:
      by_layer: layer -> rows of the same units in all models that are read together, for each matrix of an MLP.
      mapped: whether the child's were moved by maps that were estimated.
    """

    by_layer: Mapping[int, Sequence[UnitRows]]
    mapped: bool = False

    def of(self, read: Sequence[int]) -> "ExchangedUnits":
        """Returns those of some of the models, by their places among those that are read together."""
        kept = {layer: [rows[list(read)] for rows in matrices] for layer, matrices in self.by_layer.items()}
        return replace(self, by_layer=kept)


def log_p_of_parent(
    models: MergeModels, units: ExchangedUnits, parent: int, seed: int = 0, *, without: Sequence[int] = ()
) -> float | None:
    """Returns the log p-value of a parent's part, Fisher over layers; None if no layer has units to exchange.

    Shares may be negative, as where a task is taken out: both signs are tested, each in all layers, and the smaller
    p-value counts twice.

    Args:
      models: all of them.
      units: the units that are exchanged.
      parent: its index.
      seed: of the order in which ties are broken.
      without: indices of other parents that are taken as not given.
    """
    if without:
        names = [name for k, name in enumerate(models.names) if k not in without]
        first = 1 if models.origin is None else 2
        units = units.of([*range(first), *(first + models.names.index(name) for name in names)])
        parent = names.index(models.names[parent])
        models = replace(models, parents={name: models.parents[name] for name in names}, tokens=None, layers=None)
    by_sign = []
    for sign in (1, -1):
        found = [
            log_p_of_layer(models, rows, parent, seed + layer, mapped=units.mapped, sign=sign)
            for layer, rows in units.by_layer.items()
        ]
        by_sign.append([log_p for log_p in found if log_p is not None])
    return min(0.0, min(map(fisher, by_sign)) + math.log(2)) if by_sign[0] else None


def log_p_of_layer(
    models: MergeModels,
    rows: Sequence[UnitRows],
    parent: int,
    seed: int = 0,
    *,
    mapped: bool = False,
    sign: Literal[1, -1] = 1,
) -> float | None:
    """Returns the log p-value of a parent's part in one layer; None if fewer than eight units can be distinguished.

    It is 0 where the other parents explain the layer to the last bit: nothing is left for this one.

    Rows are matched by cosines, and by these over their standard errors; the fewer units that stay count. Where entries
    of a unit are large in both, as the steps of a coarse dtype are where weights are, cosines are large in place by
    chance, of either sign.

    Args:
      models: all of them.
      rows: of each matrix of the layer.
      parent: its index.
      seed: of the order in which ties are broken.
      mapped: see `ExchangedUnits`.
      sign: of the share that is tested.
    """
    compared = [_compared(models, np.asarray(part, np.float64), parent, mapped) for part in rows]
    rest, own = (np.concatenate(parts, axis=1) for parts in zip(*compared))
    if not rest.any():
        return 0.0
    live = np.flatnonzero((np.abs(rest).max(1) > 0) & (np.abs(own).max(1) > 0))
    if len(live) < FEWEST_UNITS:
        return None
    order = np.random.default_rng(seed).permutation(len(live))  # so that ties are not broken in favour of the place
    ours, theirs = _directions(rest[live]), _directions(own[live][order])
    cosines = sign * ours @ theirs.T
    agreeing = [
        int((order[assign(similarity)] == np.arange(len(live))).sum())
        for similarity in (cosines, cosines / _spread(ours, theirs))
    ]
    return agreement_log_sf(min(agreeing), len(live))


def is_in_order(models: MergeModels, units: ExchangedUnits, parent: int) -> bool:
    """Returns whether a parent's units correspond to those of the child or of another model, in most layers."""
    at = parent + (1 if models.origin is None else 2)
    found = []
    for matrices in units.by_layer.values():
        rows = np.concatenate([np.asarray(part, np.float64).reshape(len(part), -1) for part in matrices], axis=1)
        found.append(max(_cosine(rows[at], other) for i, other in enumerate(rows) if i != at))
    return not found or bool(np.median(found) > _CORRESPONDING)


def _compared(
    models: MergeModels, values: Float[np.ndarray, "M U F"], parent: int, mapped: bool
) -> tuple[Float[np.ndarray, "U F"], Float[np.ndarray, "U F"]]:
    """Returns what the other parents leave of the child, and what the parent has of its own.

    That is its difference from another model where their units correspond, as those of fine-tunes of one origin do.
    Units of a model trained by itself have no place in the others: to subtract theirs would put these in place.
    """
    at = parent + (1 if models.origin is None else 2)
    others = [i for i in range(1, len(values)) if i != at]
    ref = values[others[0]]
    y = (values[0] - ref).ravel()
    # The reference is a column too: decay of the weights shrinks the child, and is in the parent's difference as well.
    x = np.stack([ref.ravel(), *((values[i] - ref).ravel() for i in others[1:])], axis=1)
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    rest[np.abs(rest) < _NOTHING * np.abs(values[0]).max()] = 0.0
    rest = rest.reshape(values[0].shape)
    if _cosine(values[at], ref) <= _CORRESPONDING:
        return rest, values[at]
    own = values[at] - ref
    return (_across(rest, ref), _across(own, ref)) if mapped else (rest, own)


def _across(rows: Float[np.ndarray, "U F"], units: Float[np.ndarray, "U F"]) -> Float[np.ndarray, "U F"]:
    """Returns rows without their components along these units, row by row."""
    squares = np.square(units).sum(1, keepdims=True)
    along = (rows * units).sum(1, keepdims=True) / np.where(squares > 0, squares, 1.0)
    return rows - along * units


def _spread(ours: Float[np.ndarray, "U F"], theirs: Float[np.ndarray, "U F"]) -> Float[np.ndarray, "U U"]:
    """Returns the standard error of each product of rows, were signs of entries random."""
    found: np.ndarray = np.sqrt(np.square(ours) @ np.square(theirs).T)
    return np.maximum(found, 1e-300)


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / max(np.linalg.norm(one) * np.linalg.norm(other), 1e-300))


def _directions(rows: Float[np.ndarray, "U F"]) -> Float[np.ndarray, "U F"]:
    return normalised_rows(rows - rows.mean(0))
