"""The coordinates of a matching: what one assignment solves, whatever the evidence is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from tracing_jax.axes import AxisTable
from tracing_jax.matching.assignment import Blocks, assign, assign_nested
from tracing_jax.rewrites import Permutations


@dataclass(frozen=True)
class Coordinate:
    """The units of an axis, together with those of the axis nested in it, if any.

    Attributes:
      moves: the axes among the two whose permutation is sought.
    """

    axis: str
    nested: str | None
    moves: tuple[str, ...]


@dataclass(frozen=True)
class Similarity:
    """How alike unit i of base and unit j of ft are, at [i, j].

    Attributes:
      units: what pairing two units is worth in itself.
      nested: what pairing the units (i, g) of base and (j, h) of ft inside them adds: the block of (i, j), at [g, h].
    """

    units: Float[np.ndarray, "n n"]
    nested: Blocks | None = None


def coordinates(table: AxisTable, axes: Sequence[str]) -> list[Coordinate]:
    """Returns the axes grouped into coordinates: a nested axis is solved together with the one that holds it.

    Raises:
      ValueError: two of the axes lie within the same one.
    """
    nested: dict[str, str] = {}
    for axis in axes:
        holder = table.parent_axis.get(axis)
        if holder in nested:
            raise ValueError(f"{nested[holder]} and {axis} both lie within {holder}; match one of them at a time")
        if holder is not None:
            nested[holder] = axis
    found = []
    for axis in axes:
        holder = table.parent_axis.get(axis)
        if axis in nested:
            found.append(Coordinate(axis, nested[axis], (axis, nested[axis])))
        elif holder is None:
            found.append(Coordinate(axis, None, (axis,)))
        elif holder not in axes:
            found.append(Coordinate(holder, axis, (axis,)))
    return found


def solve(coordinate: Coordinate, similarity: Similarity) -> dict[str, Int[np.ndarray, "*_ _"]]:
    """Returns the permutations of the axes that a coordinate moves, of greatest total similarity.

    Raises:
      ValueError: similarities that are not finite.
    """
    if coordinate.nested is None:
        return {coordinate.axis: assign(similarity.units)}
    assert similarity.nested is not None, f"{coordinate.nested} is sought, and nothing is known of it"
    if coordinate.axis in coordinate.moves:
        p, r = assign_nested(similarity.nested, similarity.units)
        return {coordinate.axis: p, coordinate.nested: r}
    return {coordinate.nested: np.stack([assign(similarity.nested(k, k)) for k in range(len(similarity.units))])}


def value(coordinate: Coordinate, similarity: Similarity, permutations: Permutations) -> float:
    """Returns the total similarity of the units that the permutations pair."""
    ks = np.arange(len(similarity.units))
    p = permutations.get(coordinate.axis, ks)
    total = float(similarity.units[ks, p].sum())
    if coordinate.nested is None or similarity.nested is None:
        return total
    r = permutations[coordinate.nested]
    inside = [
        similarity.nested(k, int(p[k]))[np.arange(len(order)), order].sum(dtype=np.float64) for k, order in enumerate(r)
    ]
    return total + float(sum(inside))
