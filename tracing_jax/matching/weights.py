"""Weight matching: coordinate descent over the axes of any pytree with an axis table.

Source: Ainsworth et al. 2023, Git Re-Basin (arXiv 2209.04836), algorithm 1. We differ in normalising the weights (see
`similarity.py`), in solving nested axes jointly, and in the start. In a language model no block can be compared before
the embedding features are matched, so a descent from the identity finds nothing. Here the axes are first solved one
after another, each from the weights whose other axes are matched already or need no matching: the features from the
embedding and the head, whose other axis is the vocabulary, and then all other axes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from tracing_jax.axes import AxisTable, check
from tracing_jax.matching.coordinate import Coordinate, coordinates, solve
from tracing_jax.matching.similarity import Shared, WeightPairs, scores, weight_pairs, weight_similarity
from tracing_jax.progress import tqdm
from tracing_jax.rewrites import Permutations, check_permutations, identity
from tracing_jax.run_cache import RunCache
from tracing_jax.tree import Tree, flatten


@dataclass(frozen=True)
class WeightMatching:
    """The permutations of ft's units that bring its weights closest to base's.

    Attributes:
      permutations: axis -> p, where unit `p[i]` of ft belongs to unit i of base; `permute(ft, p)` is aligned.
      objective: sum over the compared leaves of their cosine with base: for ft as given, then after each sweep. It
        never decreases.
      converged: whether no single axis can be improved.
      left_out: leaf name -> reason why it was not compared.
    """

    permutations: Permutations
    objective: tuple[float, ...]
    converged: bool
    left_out: Mapping[str, str]


def match_weights(
    base: Tree,
    ft: Tree,
    table: AxisTable,
    axes: Sequence[str],
    *,
    shared: Shared | None = None,
    max_sweeps: int = 50,
    run_cache: RunCache | None = None,
) -> WeightMatching:
    """Returns the permutations of the named axes that bring ft's weights closest to base's.

    Args:
      base: any pytree of arrays.
      ft: a pytree of the same kind. Leaves that only one of the two has, and leaves whose other axes differ in size,
        are not compared.
      table: the axes of base's leaves.
      axes: the axes to match.
      shared: for an axis that is not matched and whose units differ, such as the vocabularies of two tokenizers, the
        pairs of corresponding units; only these are compared.
      max_sweeps: maximum number of passes over the axes; few are needed.
      run_cache: where the permutations of every solved axis are stored, to resume an interrupted run.

    Raises:
      ValueError: base does not fit the table, axes that are unknown, fixed, of different size in ft or without a weight
        to compare, or shared units that do not fit.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> params = {"up": rng.normal(size=(8, 5)), "down": rng.normal(size=(5, 8))}
      >>> table = tj.table_from_axes({"up": (None, "mlp"), "down": ("mlp", None)}, params)
      >>> shuffled = tj.permute(params, {"mlp": np.array([3, 1, 4, 0, 2])}, table)
      >>> found = tj.match_weights(params, shuffled, table, ["mlp"]).permutations
      >>> np.array_equal(tj.permute(shuffled, found, table)["up"], params["up"])
      True
    """
    check(base, table)
    pairs = weight_pairs(base, ft, table, shared or {})
    _check_axes(pairs, axes, flatten(ft))
    descent = _Descent(pairs, axes, run_cache or RunCache())
    objective = [descent.objective]
    descent.start()
    objective.append(descent.objective)
    converged = False
    while not converged and len(objective) <= max_sweeps:
        converged = not descent.sweep()
        objective.append(descent.objective)
        logging.info("weight matching, sweep %d: objective %.6f", len(objective) - 1, objective[-1])
    return WeightMatching(descent.permutations, tuple(objective), converged, pairs.left_out)


class _Descent:
    """State of the descent: permutations, leaf scores, and the changes of axes that each coordinate has seen."""

    def __init__(self, pairs: WeightPairs, axes: Sequence[str], run_cache: RunCache) -> None:
        self.pairs, self.run_cache, self.solved = pairs, run_cache, 0
        self.permutations = identity(pairs.table, axes)
        self.scores = scores(pairs, pairs.base, self.permutations)
        self.order = coordinates(pairs.table, axes)
        self.leaves = {c: pairs.leaves_with_axes(c.moves) for c in self.order}
        # An axis is solved again only if one that shares a leaf with it has changed since.
        self.changes = dict.fromkeys(axes, 0)
        self.seen: dict[Coordinate, dict[str, int]] = {}

    @property
    def objective(self) -> float:
        return math.fsum(self.scores.values())

    def start(self) -> None:
        """Solves every coordinate once, most comparable weights first, and keeps the result if the objective rises."""
        order: list[Coordinate] = []
        complete: list[Coordinate] = []
        found = dict(self.permutations)
        for _ in tqdm(self.order, desc="matching", unit="axis", disable=None):
            known = {axis for done in order for axis in done.moves}
            coordinate = max((c for c in self.order if c not in order), key=lambda c: self._share(c, known))
            comparable = [name for name in self.leaves[coordinate] if self._others(coordinate, name) <= known]
            if comparable == self.leaves[coordinate]:
                complete.append(coordinate)
            names = comparable or self.leaves[coordinate]
            found |= self._solve(coordinate, found, names)
            order.append(coordinate)
        self.order = order
        if self._accept(found, list(self.scores)):
            self.seen = {coordinate: self._neighbours(coordinate) for coordinate in complete}

    def sweep(self) -> bool:
        """Solves every coordinate whose neighbours have changed; returns whether any permutation changed."""
        changed = False
        for coordinate in tqdm(self.order, desc="matching", unit="axis", disable=None):
            neighbours = self._neighbours(coordinate)
            if self.seen.get(coordinate) == neighbours:
                continue
            self.seen[coordinate] = neighbours
            names = self.leaves[coordinate]
            found = self._solve(coordinate, self.permutations, names)
            changed |= self._accept(found, names)
        return changed

    def _solve(self, coordinate: Coordinate, permutations: Permutations, names: Sequence[str]) -> Permutations:
        """Returns the best permutations of a coordinate; the n-th call gets the n-th result of an interrupted run."""
        self.solved += 1
        return self.run_cache.cached_arrays(
            ("solved", self.solved),
            lambda: dict(solve(coordinate, weight_similarity(self.pairs, coordinate, permutations, names))),
        )

    def _accept(self, found: Permutations, names: Sequence[str]) -> bool:
        """Takes the permutations found if the objective rises; returns whether it did."""
        moved = [axis for axis, p in found.items() if not np.array_equal(p, self.permutations[axis])]
        if not moved:
            return False
        # Exact sums: with rounding errors the objective could fall and the descent cycle.
        candidate = self.permutations | dict(found)
        new = self.scores | scores(self.pairs, names, candidate)
        if math.fsum(new.values()) <= self.objective:
            return False
        self.permutations, self.scores = candidate, new
        for axis in moved:
            self.changes[axis] += 1
        return True

    def _others(self, coordinate: Coordinate, name: str) -> set[str]:
        """Returns the matched axes of a leaf other than the coordinate's, and these too if the leaf has them twice."""
        axes = list(self.pairs.table.leaves[name].axes)
        for axis in coordinate.moves:
            if axis in axes:
                axes.remove(axis)
        return {axis for axis in axes if axis in self.changes}

    def _neighbours(self, coordinate: Coordinate) -> dict[str, int]:
        axes = {axis for name in self.leaves[coordinate] for axis in self._others(coordinate, name)}
        return {axis: self.changes[axis] for axis in axes}

    def _share(self, coordinate: Coordinate, known: set[str]) -> float:
        """Returns the share of a coordinate's weights that can be compared once the axes `known` are matched."""
        sizes = {name: self.pairs.base[name].size for name in self.leaves[coordinate]}
        comparable = sum(size for name, size in sizes.items() if self._others(coordinate, name) <= known)
        return comparable / sum(sizes.values())


def _check_axes(pairs: WeightPairs, axes: Sequence[str], ft: Mapping[str, Any]) -> None:
    table = pairs.table
    lines = [
        f"{axis}: no such axis; the table has {', '.join(table.sizes)}" for axis in axes if axis not in table.sizes
    ]
    for axis in [axis for axis in axes if axis in table.sizes]:
        rows = [(table.leaves[name].axes, leaf.shape) for name, leaf in ft.items() if name in table.leaves]
        sizes = {size for row, shape in rows for a, size in zip(row, shape) if a == axis}
        if sizes - {table.sizes[axis]}:
            lines.append(f"{axis}: {table.sizes[axis]} units in base, {', '.join(map(str, sorted(sizes)))} in ft")
        elif not pairs.leaves_with_axes([axis]):
            lines.append(f"{axis}: no weight that both models have describes its units")
        if axis in pairs.shared:
            lines.append(f"{axis}: its units are given as shared, so they cannot be matched as well")
    if lines:
        raise ValueError("these axes cannot be matched:\n  " + "\n  ".join(lines))
    check_permutations(identity(table, axes), table)
