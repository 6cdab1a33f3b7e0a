"""Blocks of coordinate descent: the axes that one assignment solves together, given any similarity of their units."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from tracing_jax.axes import AxisTable
from tracing_jax.matching.assignment import assign
from tracing_jax.rewrites import Permutations

InnerSimilarity = Callable[[int, int], Float[np.ndarray, "G G2"]]
"""(unit i of base, unit j of ft) -> similarity of the units inside the two, at [g, h]."""


@dataclass(frozen=True)
class Coordinate:
    """The units of an axis, together with those of the axis nested in it, if any.

    Attributes:
      moves: the axes among the two whose permutation is sought.
      groups: into how many groups of one size the units of `axis` fall; the units of a group stay together.
    """

    axis: str
    nested: str | None
    moves: tuple[str, ...]
    groups: int = 1


@dataclass(frozen=True)
class Similarity:
    """Similarity of unit i of base and unit j of ft, at [i, j].

    Attributes:
      units: similarity of the two units themselves.
      nested: similarity of the units (i, g) of base and (j, h) of ft inside them: the block of (i, j), at [g, h].
    """

    units: Float[np.ndarray, "n n"]
    nested: InnerSimilarity | None = None


def coordinates(table: AxisTable, axes: Sequence[str]) -> list[Coordinate]:
    """Returns the axes grouped into coordinates: a nested axis is solved together with its parent axis.

    Raises:
      ValueError: two of the axes are nested in the same one.
    """
    nested: dict[str, str] = {}
    for axis in axes:
        parent = table.parent_axis.get(axis)
        if parent in nested:
            raise ValueError(f"{nested[parent]} and {axis} are both nested in {parent}; match one of them at a time")
        if parent is not None:
            nested[parent] = axis
    found = []
    for axis in axes:
        parent = table.parent_axis.get(axis)
        if axis in nested:
            found.append(Coordinate(axis, nested[axis], (axis, nested[axis]), table.groups.get(axis, 1)))
        elif parent is None:
            found.append(Coordinate(axis, None, (axis,), table.groups.get(axis, 1)))
        elif parent not in axes:
            found.append(Coordinate(parent, axis, (axis,)))
    return found


def assign_in_groups(similarity: Float[np.ndarray, "n n"], groups: int) -> Int[np.ndarray, " n"]:
    """Returns the assignment of greatest total similarity that keeps the units of each group together, exactly.

    Raises:
      ValueError: as `assign`.
    """
    if groups == 1:
        return assign(similarity)
    size = len(similarity) // groups
    blocks = similarity.reshape(groups, size, groups, size)
    p, r = assign_nested(lambda i, j: blocks[i, :, j], np.zeros((groups, groups)))
    return (p[:, None] * size + r).ravel()


def assign_nested(
    inner: InnerSimilarity, outer: Float[np.ndarray, "K K2"], groups: int = 1
) -> tuple[Int[np.ndarray, " K"], Int[np.ndarray, "K G"]]:
    """Returns p and r of greatest `sum_k outer[k, p[k]] + sum_kg inner(k, p[k])[g, r[k, g]]`, exactly.

    The best inner assignment of a pair (k, k') does not depend on the other pairs, so the outer problem is one more
    assignment whose weights are the outer similarities plus the values of the best inner assignments. The sum of the
    row maxima bounds such a value from above and is cheap: inner assignments are solved only for pairs that the outer
    assignment picks by these bounds, until all picked pairs are solved. The outer one keeps groups of units together.

    Raises:
      ValueError: as `assign`.
    """
    weight = np.array(outer, np.float64)
    for k, k2 in np.ndindex(weight.shape):
        weight[k, k2] += inner(k, k2).max(axis=1).sum(dtype=np.float64)
    inner_of: dict[tuple[int, int], np.ndarray] = {}
    while True:
        p = assign_in_groups(weight, groups)
        picked_pairs = [(k, int(k2)) for k, k2 in enumerate(p)]
        if not (unsolved := [pair for pair in picked_pairs if pair not in inner_of]):
            return p, np.stack([inner_of[pair] for pair in picked_pairs])
        for pair in unsolved:
            similarity = inner(*pair)
            inner_of[pair] = assign(similarity)
            picked = np.take_along_axis(similarity, inner_of[pair][:, None], axis=1)
            weight[pair] = outer[pair] + picked.sum(dtype=np.float64)


def solve(coordinate: Coordinate, similarity: Similarity) -> dict[str, Int[np.ndarray, "*_ _"]]:
    """Returns the permutations of the axes that a coordinate moves, of greatest total similarity, as `int32`.

    Raises:
      ValueError: similarities that are not finite.
    """
    if coordinate.nested is None:
        return {coordinate.axis: assign_in_groups(similarity.units, coordinate.groups)}
    assert similarity.nested is not None, f"{coordinate.nested} has no similarity"
    if coordinate.axis in coordinate.moves:
        p, r = assign_nested(similarity.nested, similarity.units, coordinate.groups)
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
    nested = [
        similarity.nested(k, int(p[k]))[np.arange(len(order)), order].sum(dtype=np.float64) for k, order in enumerate(r)
    ]
    return total + float(sum(nested))
