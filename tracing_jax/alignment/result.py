"""An `Alignment`, and the numbers that its record holds about each rewrite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np

from tracing_jax.rewrites import (
    GainScaling,
    GainSetting,
    IdentityLayer,
    LayerRemoval,
    MeanSetting,
    Padding,
    Permutation,
    Permutations,
    QueryKeyMaps,
    Rewrite,
    Rotation,
    UnitScaling,
    ValueMixing,
    reorders_only,
    share_moved,
)
from tracing_jax.sources import ParamSource, rewritten

Evidence = Literal["weights", "activations", "learned"]

Gains = Mapping[str, np.ndarray]
"""Norm -> its gain."""


@dataclass(frozen=True)
class Alignment:
    """The rewrites that align a fine-tuned model to its base, and how well they do.

    Attributes:
      rewrites: from left to right; `aligned` applies them to ft.
      evidence: what the units were compared by.
      objective: similarity of the paired units: first as given, then after each step. For weights, the sum over leaves
        of their cosine; for activations, the mean correlation of paired units (one sweep). For learned, the barrier
        between the models on text held out from the learning, nats per token: at its start, then at each check.
      logits_moved: greatest change of any logit of ft, relative to max(1, its greatest logit).
      left_out: what the comparison of weights went without, or was not aligned -> why.
      converged: no single axis could be improved; False if the descent was stopped before.
      undone: name -> numbers about each disguise that the rewrites undo, plain data.
      base_rewrites: of base, where both ends were mapped; see `aligned_base`.
      likeness: kind of leaf, such as `mlp/up_proj/kernel` -> mean over layers of its cosine with base before (None if
        their shapes differ) and after; empty where permutations alone were asked for.

    Example:
      >>> alignment = tj.align("demo:base", "demo:disguised", ("embed", "mlp"))
      >>> [rewrite.name for rewrite in alignment.rewrites]
      ['permute']
      >>> alignment.share_moved["mlp"] > 0.5
      True
    """

    rewrites: tuple[Rewrite, ...]
    evidence: Evidence
    objective: tuple[float, ...]
    logits_moved: float
    left_out: Mapping[str, str]
    converged: bool = True
    undone: Mapping[str, Any] = field(default_factory=dict)
    likeness: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    base_rewrites: tuple[Rewrite, ...] = ()

    @property
    def permutations(self) -> Permutations:
        """Axis -> p: unit `p[i]` of ft, without its padding and identity layers, is paired with unit i of base."""
        found: dict[str, np.ndarray] = {}
        for rewrite in self._reordering:
            # A second one pairs units anew and leaves the parents of nested units where they are.
            second = rewrite.permutations
            found |= {
                axis: np.take_along_axis(found[axis], p, -1) if axis in found else p for axis, p in second.items()
            }
        return found

    @property
    def reorders_only(self) -> bool:
        """Whether the rewrites change nothing but the order of units."""
        return reorders_only(self.rewrites + self.base_rewrites)

    @property
    def how(self) -> Literal["permutations", "maps", "states", "learned"]:
        """What was used: permutations alone, maps from weights, the features' from hidden states, or learned maps."""
        if self.evidence == "learned":
            return "learned"
        if self.reorders_only:
            return "permutations"
        return "states" if self.evidence == "activations" else "maps"

    @property
    def share_moved(self) -> dict[str, float]:
        """Axis kind -> share of units that change place."""
        return share_moved(self.permutations)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The permutations by axis, and the data of all other rewrites by their name and place."""
        reordering = self._reordering
        others = [rewrite for rewrite in self.rewrites if not any(rewrite is found for found in reordering)]
        of_base = {f"base/{name}": array for name, array in rewrite_arrays(self.base_rewrites).items()}
        permutations = {axis: np.asarray(p) for axis, p in self.permutations.items()}
        return permutations | rewrite_arrays(others) | of_base

    @property
    def _reordering(self) -> list[Permutation]:
        """The permutations after the last change of shape: one, and another where units were assigned anew."""
        found: list[Permutation] = []
        for rewrite in self.rewrites:
            if isinstance(rewrite, Padding | IdentityLayer | LayerRemoval):
                found = []
            if isinstance(rewrite, Permutation):
                found.append(rewrite)
        return found


def aligned(ft: ParamSource, alignment: Alignment) -> ParamSource:
    """Returns the fine-tuned model after the rewrites of an alignment, subtree by subtree as they are asked for.

    Its head is untied where gains were folded out of it or the residual stream is rotated; for a path that interpolates
    embeddings base must then be untied too (see `rewrites.Untying`).

    Example:
      >>> base, ft = tj.load("demo:base"), tj.load("demo:disguised")
      >>> model = tj.aligned(ft, tj.align(base, ft))
      >>> model.arch == ft.arch
      True
    """
    return rewritten(ft, alignment.rewrites)


def aligned_base(base: ParamSource, alignment: Alignment) -> ParamSource:
    """Returns base after the rewrites of an alignment by which both ends were mapped; else base itself.

    A base with a tied head must be untied where ft's head was (see `rewrites.Untying`).

    Example:
      >>> base, ft = tj.load("demo:base"), tj.load("demo:disguised")
      >>> tj.aligned_base(base, tj.align(base, ft)) is base  # only ft was mapped
      True
    """
    return rewritten(base, alignment.base_rewrites) if alignment.base_rewrites else base


def rewrite_arrays(rewrites: Sequence[Rewrite]) -> dict[str, np.ndarray]:
    """Returns the arrays of rewrites by name, such as `values/layers/0/v_dim`; `rotate` is a matrix.

    Where a type occurs twice, as a rotation that separates zero features does, later ones are numbered: `rotate-2`.
    """
    found: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for rewrite in rewrites:
        counts[rewrite.name] = counts.get(rewrite.name, 0) + 1
        name = rewrite.name if counts[rewrite.name] == 1 else f"{rewrite.name}-{counts[rewrite.name]}"
        for value in (getattr(rewrite, data.name) for data in fields(rewrite)):  # type: ignore[arg-type]
            if isinstance(value, Mapping):
                found |= {f"{name}/{place}": np.asarray(array) for place, array in value.items()}
            else:
                found[name] = np.asarray(value)
    return found


def undone_by(
    rewrites: Sequence[Rewrite], gains_base: Gains, gains_ft: Gains, means_ft: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns numbers about each rewrite of a model that has base's shape and had these gains and means."""
    report: dict[str, Any] = {}
    for rewrite in rewrites:
        match rewrite:
            case Rotation():
                report["rotation"] = _rotation(rewrite.matrix)
            case GainSetting() | GainScaling():
                report["gains"] = _gains(gains_base, gains_ft)
            case MeanSetting():
                report["means"] = _means(rewrite.values, means_ft)
            case UnitScaling():
                report["scaling"] = _factors(rewrite.factors)
            case ValueMixing():
                conditions = [np.linalg.cond(matrix).max() for matrix in rewrite.matrices.values()]
                report["values"] = {"greatest_condition": float(max(conditions))}
            case QueryKeyMaps():
                report["queries"] = _complex_factors(rewrite.factors)
    return report


def cosines_by_kind(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """Returns the mean over layers of the cosine of each kind of leaf, before and after."""
    kinds: dict[str, list[str]] = {}
    for leaf in after:
        kinds.setdefault(leaf.split("/", 2)[2] if leaf.startswith("layers/") else leaf, []).append(leaf)
    return {kind: {"before": _mean(before, names), "after": _mean(after, names)} for kind, names in kinds.items()}


def _mean(cosines: Mapping[str, float], names: Sequence[str]) -> float | None:
    known = [cosines[name] for name in names if name in cosines]
    return float(np.mean(known)) if known else None


def _rotation(matrix: np.ndarray) -> dict[str, float]:
    mean_cosine = float(np.trace(matrix)) / len(matrix)
    return {
        # Between a random vector and its image: the expectation of their cosine is the mean of the diagonal.
        "angle_degrees": float(np.degrees(np.arccos(np.clip(mean_cosine, -1.0, 1.0)))),
        # One for a permutation with signs, about sqrt(2 log(D) / D) for a random rotation.
        "mean_greatest_entry": float(np.abs(matrix).max(axis=1).mean()),
    }


def _factors(factors: Mapping[str, np.ndarray]) -> dict[str, float]:
    every = np.concatenate([array.ravel() for array in factors.values()])
    sizes = np.abs(every)
    return {
        "share_flipped": float((every < 0).mean()), "least": float(sizes.min()), "greatest": float(sizes.max())
    }  # fmt: skip


def _complex_factors(factors: Mapping[str, np.ndarray]) -> dict[str, float]:
    every = np.concatenate([array.ravel() for array in factors.values()])
    angle = float(np.degrees(np.sqrt(np.square(np.angle(every)).mean())))
    return {"least": float(np.abs(every).min()), "greatest": float(np.abs(every).max()), "rms_angle_degrees": angle}


def _gains(base: Gains, ft: Gains) -> dict[str, float]:
    """Returns how far ft's gains were from base's, paired by size, for the order of features may be unknown."""
    pairs = [[np.sort(np.abs(gains[norm])) for gains in (base, ft)] for norm in base]
    logs = [np.abs(np.log(y[known] / x[known])) for x, y in pairs if (known := (x > 0) & (y > 0)).any()]
    return {"greatest_factor": float(np.exp(max((log.max() for log in logs), default=0.0)))}


def _means(base: Mapping[str, np.ndarray], ft: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns how far ft's means over the features were from base's, paired by size as gains are."""
    pairs = [[np.sort(np.abs(means[name]), axis=None) for means in (base, ft)] for name in base if name in ft]
    return {"greatest_change": max((float(np.abs(y - x).max()) for x, y in pairs), default=0.0)}
