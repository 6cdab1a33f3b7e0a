"""The rotation of the residual stream between two models, learnt from the weights of their MLP units alone.

Units are paired by descriptors that no rotation changes. The rotation that brings the paired rows closest (orthogonal
Procrustes problem) then gives better pairs, these a better rotation, and so on.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.matching import UnitMatching, match_units
from tracing_jax.statistics.distinct_units import DistinctUnits
from tracing_jax.statistics.mlp_rows import MlpRows, mlp_rows, unit_length
from tracing_jax.statistics.unit_descriptors import descriptor_correlations, log_quadratic_forms
from tracing_jax.tree import Tree

_MOST_ROUNDS, _LEAST_ROUNDS = 9, 5
_SETTLED = 1e-4
"""The relative gain of the objective, below which more rounds change nothing."""


@dataclass(frozen=True)
class Units:
    """The MLP units of a layer.

    Attributes:
      rows: `gate` (if there is one), `up`, `down` -> a row of length one for each unit.
      live: units that count as evidence, and none of whose rows is zero.
      weight: the product of the lengths of a unit's rows, over its mean: what a unit adds to the output of the layer
        grows with it, and no scaling of its rows that keeps the function changes it.
    """

    rows: MlpRows
    live: Bool[np.ndarray, " F"]
    weight: Float[np.ndarray, " F"]

    def some(self, which: Int[np.ndarray, " U"]) -> "Units":
        """Returns some of the units."""
        found = _some_rows(self.rows, which)
        return Units({name: found[name] for name in self.rows}, self.live[which], self.weight[which])


@jax.jit
def _some_rows(
    rows: Mapping[str, Float[Array, "F D"]], which: Int[Array | np.ndarray, " U"]
) -> dict[str, Float[Array, "U D"]]:
    return {name: jnp.take(side, which, axis=0, mode="clip") for name, side in rows.items()}


def units_of(layer: Tree, arch: Arch, distinct: DistinctUnits) -> Units:
    """Returns the units of a layer; those that are no evidence have no weight, and copies write together."""
    rows = mlp_rows(layer, arch)
    rows["down"] = jnp.asarray(distinct.outputs(rows["down"]))
    lengths = np.prod([np.linalg.norm(np.asarray(side, np.float64), axis=1) for side in rows.values()], axis=0)
    lengths = np.where(distinct.is_kept, lengths, 0.0)
    live = lengths > 0
    weight = lengths / max(lengths.mean(), np.finfo(np.float64).tiny)
    return Units({name: unit_length(side) for name, side in rows.items()}, live, weight)


def weighted_moments(units: Units) -> list[Float[Array, "D D"]]:
    """Returns the second moment of each kind of rows, every unit with its weight.

    Without weights, units that add next to nothing to the output could be planted to move the moments.
    """
    weight = units.weight / max(units.weight.sum(), np.finfo(np.float64).tiny)
    found = _moments(units.rows, weight.astype(np.float32))
    return [found[name] for name in units.rows]


def learn_rotation(
    base: Sequence[Units],
    ft: Sequence[Units],
    moments: tuple[Sequence[Array], Sequence[Array]],
    generator: np.random.Generator,
) -> Float[Array, "D2 D"]:
    """Returns the orthogonal R for which ft's rows, times R, are closest to those of base's units in these layers.

    Of models of unequal width R maps the narrower one's features into those of the other.

    The first pairs are those of `descriptor_correlations`. Of the pairs of all layers the better half counts, each with
    its weight: at first their first kind of rows, whose sign is fixed, then all, up and down with a common sign.

    Args:
      base: layers of base.
      ft: the layers of ft that correspond.
      moments: of base and of ft, for the descriptors, in the same order.
      generator: draws the orders in which units are matched.
    """
    signed = [[_descriptor(layer, own) for layer in side] for side, own in zip((base, ft), moments)]
    scores: list[Array | np.ndarray] = [descriptor_correlations(*both) for both in zip(*signed)]
    pairs = [match_units(np.asarray(score), generator) for score in scores]
    first = "gate" if "gate" in base[0].rows else "up"
    rotation, objective = _procrustes(base, ft, pairs, scores, (first,), None), -np.inf
    for done in range(1, _MOST_ROUNDS + 1):
        scores = [_row_scores(ours, theirs, rotation) for ours, theirs in zip(base, ft)]
        pairs = [match_units(np.asarray(score), generator) for score in scores]
        total = sum(float(np.asarray(score)[found.base, found.ft].sum()) for score, found in zip(scores, pairs))
        rotation, gain = _procrustes(base, ft, pairs, scores, tuple(base[0].rows), rotation), total - objective
        objective = total
        if done >= _LEAST_ROUNDS and gain < _SETTLED * abs(total):
            break
    return rotation


def row_similarities(base: Units, ft: Units, rotation: Float[Array, "D2 D"]) -> dict[str, Float[Array, "F F2"]]:
    """Returns for each kind of rows the cosines of base's with ft's, rotated, absolute but for the gate's.

    They are 0 for units that are not live.
    """
    return _live_cosines(base.rows, ft.rows, rotation, base.live, ft.live)


def _descriptor(units: Units, moments: Sequence[Array]) -> tuple[Float[np.ndarray, "F M"], np.ndarray]:
    found = [log_quadratic_forms(side, moments) for side in units.rows.values()]
    return np.concatenate(found, axis=1), units.live


def _row_scores(base: Units, ft: Units, rotation: Float[Array, "D2 D"]) -> Float[Array, "F F2"]:
    """Returns `cos(gate) + |cos(up) + cos(down)|`, and 0 for inactive units; without a gate the sign is not free."""
    return _scores(base.rows, ft.rows, rotation, base.live, ft.live)


@jax.jit
def _scores(
    base: Mapping[str, Float[Array, "F D"]],
    ft: Mapping[str, Float[Array, "F2 D2"]],
    rotation: Float[Array, "D2 D"],
    live_base: Bool[Array | np.ndarray, " F"],
    live_ft: Bool[Array | np.ndarray, " F2"],
) -> Float[Array, "F F2"]:
    found = {name: _cosines(base[name], ft[name], rotation) for name in base}
    both = found["up"] + found["down"]
    score = found["gate"] + jnp.abs(both) if "gate" in found else both
    return jnp.where(live_base[:, None] & live_ft[None, :], score, 0.0)


def _procrustes(
    base: Sequence[Units],
    ft: Sequence[Units],
    pairs: Sequence[UnitMatching],
    scores: Sequence[Array | np.ndarray],
    names: Sequence[str],
    rotation: Float[Array, "D2 D"] | None,
) -> Float[Array, "D2 D"]:
    total = None
    for ours, theirs, found, better in zip(base, ft, pairs, _better_half(pairs, scores)):
        # Each number of pairs would compile: there are as many for all layers of a size, and some have no weight.
        none = (0, min(len(ours.live), len(theirs.live)) - len(better))
        one, other = ours.some(np.pad(found.base, none)), theirs.some(np.pad(found.ft, none))
        weight = np.pad(better, none) * np.sqrt(one.weight * other.weight)
        sign = np.ones(len(weight)) if rotation is None else _signs(one, other, rotation)
        factors = {name: weight if name == "gate" else weight * sign for name in names}
        factors = {name: factor.astype(np.float32) for name, factor in factors.items()}
        found = _crosses(other.rows, one.rows, factors)
        total = found if total is None else total + found
    assert total is not None, "a rotation is learnt from one layer at least"
    return _orthogonal(total)


def _better_half(pairs: Sequence[UnitMatching], scores: Sequence[Array | np.ndarray]) -> list[Bool[np.ndarray, " P"]]:
    """Returns for each layer which pairs of units have a score of at least the median of all layers' pairs."""
    own = [np.asarray(score)[found.base, found.ft] for score, found in zip(scores, pairs)]
    every = np.concatenate(own)
    least = np.median(every) if every.size else 0.0  # layers that do nothing have no units
    return [values >= least for values in own]


def _signs(one: Units, other: Units, rotation: Float[Array, "D2 D"]) -> np.ndarray:
    """Returns the common sign of up and down rows of each pair of units of a gated MLP; else 1."""
    if "gate" not in one.rows:
        return np.ones(len(one.live))
    return np.where(np.asarray(_sums_of_cosines(one.rows, other.rows, rotation)) < 0, -1.0, 1.0)


@jax.jit
def _moments(
    rows: Mapping[str, Float[Array, "F D"]], weight: Float[Array | np.ndarray, " F"]
) -> dict[str, Float[Array, "D D"]]:
    return {
        name: jnp.einsum("fd,fe->de", side * weight[:, None], side, precision="highest") for name, side in rows.items()
    }


@jax.jit
def _crosses(
    theirs: Mapping[str, Float[Array, "P D2"]],
    ours: Mapping[str, Float[Array, "P D"]],
    factors: Mapping[str, Float[Array | np.ndarray, " P"]],
) -> Float[Array, "D2 D"]:
    """Returns the sum over kinds of rows, of those that have factors, of what the orthogonal map is made from."""
    found = [
        jnp.einsum("pd,pe->de", theirs[name] * factor[:, None], ours[name], precision="highest")
        for name, factor in factors.items()
    ]
    return functools.reduce(jnp.add, found)


@jax.jit
def _orthogonal(cross: Float[Array, "D2 D"]) -> Float[Array, "D2 D"]:
    left, _, right = jnp.linalg.svd(cross, full_matrices=False)
    return jnp.einsum("de,ef->df", left, right, precision="highest")


@jax.jit
def _cosines(ours: Float[Array, "F D"], theirs: Float[Array, "F2 D2"], rotation: Float[Array, "D2 D"]) -> Array:
    return jnp.einsum("fd,gd->fg", ours, jnp.dot(theirs, rotation, precision="highest"), precision="highest")


@jax.jit
def _live_cosines(
    base: Mapping[str, Float[Array, "F D"]],
    ft: Mapping[str, Float[Array, "F2 D2"]],
    rotation: Float[Array, "D2 D"],
    live_base: Bool[Array | np.ndarray, " F"],
    live_ft: Bool[Array | np.ndarray, " F2"],
) -> dict[str, Float[Array, "F F2"]]:
    found = {name: _cosines(base[name], ft[name], rotation) for name in base}
    live = live_base[:, None] & live_ft[None, :]
    return {name: jnp.where(live, side if name == "gate" else jnp.abs(side), 0.0) for name, side in found.items()}


@jax.jit
def _sums_of_cosines(
    ours: Mapping[str, Float[Array, "P D"]], theirs: Mapping[str, Float[Array, "P D2"]], rotation: Float[Array, "D2 D"]
) -> Float[Array, " P"]:
    """Returns for each pair of units the cosine of their up rows plus that of their down rows."""
    up, down = (
        (ours[name] * jnp.dot(theirs[name], rotation, precision="highest")).sum(axis=1) for name in ("up", "down")
    )
    return up + down
