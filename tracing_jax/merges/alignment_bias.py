"""What an alignment does to shares, measured on merges that were made: over the model, and in each part of it.

Letters: K parents.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from tracing_jax.merges.models import MergeModels, TensorKey
from tracing_jax.merges.normal_equations import NormalEquations
from tracing_jax.merges.shares import Shares, estimate, grouped_shares

GROUPINGS: Mapping[str, Callable[[TensorKey], Hashable | None]] = {
    "role": lambda place: place.role,
    "layer": lambda place: place.layer,
    "role_and_layer": lambda place: None if place.layer is None else (place.role, place.layer),
    "expert": lambda place: place.expert,
    "tensor": lambda place: place,
}
"""Name -> the group that a tensor belongs to; None of those that belong to none."""

Moved = Mapping[str, Mapping[Hashable, Float[np.ndarray, " K"]]]
"""Grouping -> group -> how much the shares of all parents moved there; the whole model is group None of `whole`."""


@dataclass(frozen=True)
class AlignmentBias:
    """How much the shares of made merges moved when they were disguised and aligned.

    Attributes:
      names: of the parents.
      merges: what a merge was made of (`noise` or `parents`) -> how much its shares moved.
    """

    names: Sequence[str]
    merges: Mapping[str, Moved]

    @property
    def largest(self) -> float:
        """The most that the share of a parent in the whole model moved."""
        return max(float(np.abs(moved["whole"][None]).max()) for moved in self.merges.values())

    def of(self, grouping: str, group: Hashable, names: Sequence[str]) -> Float[np.ndarray, " K"]:
        """Returns the most that the shares of these parents moved in a group, by any merge.

        Where none says, it is what those of the whole model moved.
        """
        moved = [np.abs(own[grouping][group]) for own in self.merges.values() if group in own[grouping]]
        whole = np.nan_to_num(np.fmax.reduce([np.abs(own["whole"][None]) for own in self.merges.values()]))
        largest = np.fmax.reduce(moved) if moved else np.full(len(self.names), np.nan)
        largest = np.where(np.isfinite(largest), largest, whole)
        return largest[[self.names.index(name) for name in names]]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for the record: of the whole model. Shares of each part have their own beside them."""
        wholes = {of: dict(zip(self.names, moved["whole"][None].tolist())) for of, moved in self.merges.items()}
        return {"largest": self.largest, **wholes}


def moved_shares(made: MergeModels, sums: NormalEquations, back: MergeModels, sums_back: NormalEquations) -> Moved:
    """Returns how much shares moved from those of a merge to those of itself in disguise, aligned.

    Args:
      made: the merge as it was made.
      sums: of it.
      back: the merge after disguise and alignment, the other models aligned as it was.
      sums_back: of it.
    """
    found: dict[str, Mapping[Hashable, Float[np.ndarray, " K"]]] = {
        "whole": {None: estimate(back, sums_back.tensors).values - estimate(made, sums.tensors).values}
    }
    for name in GROUPINGS:
        after, before = shares_by(name, back, sums_back), shares_by(name, made, sums)
        found[name] = {group: after[group].values - before[group].values for group in after.keys() & before.keys()}
    return found


def shares_by(
    grouping: str, models: MergeModels, sums: NormalEquations, bias: AlignmentBias | None = None
) -> dict[Any, Shares]:
    """Returns the shares of each group of tensors, the errors with what an alignment does there."""
    group_of = GROUPINGS[grouping]
    found = grouped_shares(models, sums.tensors, lambda tensor: group_of(tensor.place))
    if bias is None:
        return found
    return {group: own.with_bias(bias.of(grouping, group, models.names)) for group, own in found.items()}
