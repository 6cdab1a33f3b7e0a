"""A child in disguise: aligned to the origin or to a parent, and all models in the same gauge.

A disguise is undone by the project's alignment. Where it is more than a permutation, alignment moves a model a little
towards its reference (the rotation that fits best, gains set to the reference's): the parents are aligned in the same
way, so that this changes child and parents alike, and to first order no share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from tracing_jax.alignment import AlignmentError, align, aligned
from tracing_jax.merges.models import MergeModels
from tracing_jax.merges.normal_equations import NormalEquations, read_sums
from tracing_jax.sources import MappedSource, ParamSource, in_memory
from tracing_jax.tree import Tree

_MIN_COSINE = 0.3
"""A kernel of the child is in place if its cosine with that of another model is above; independent ones are near 0."""
_NO_MAPS = frozenset({"permute", "pad", "remove", "group", "ungroup"})
"""Rewrites after which what is left of a model has its own numbers: no other model is to be moved likewise."""
_SURE = 0.6
_KERNELS = ("attn/q_proj", "attn/k_proj", "attn/v_proj", "attn/o_proj", "mlp/up_proj", "mlp/down_proj")


def is_in_place(models: MergeModels, sums: NormalEquations) -> bool:
    """Returns whether kernels of the child in its first, middle and last layer are like those of another model.

    Experts need not all be like those of the same one: half of them are to be like those of some. Kernels of another
    shape are in no model's unit order.
    """
    if any("shapes" in models.left_out.get(name, "") for name in _kernels_of(models)):
        return False
    alike = [np.median([max(_cosines(sample)) for sample in experts]) for experts in _samples(models, sums)]
    return bool(alike) and float(min(alike)) > _MIN_COSINE


class AlignedModels(NamedTuple):
    """The models of a merge after the child was aligned to one of them.

    Attributes:
      models: the child aligned, and where needed the others.
      sums: of these.
      note: what was done.
      untested: name of a parent -> why its units cannot be exchanged any more.
    """

    models: MergeModels
    sums: NormalEquations
    note: str
    untested: Mapping[str, str]


def with_aligned_child(models: MergeModels, kinds: Sequence[str], seed: int) -> AlignedModels:
    """Returns the models with the child, and where needed the parents, aligned; their sums; and what was done.

    Args:
      models: none of which is changed.
      kinds: of disguises, as for `tracing_jax.align`.
      seed: of the alignment's proof, and of the sums.

    Raises:
      AlignmentError: the child could not be aligned to any of the models.
    """
    reasons: list[str] = []
    original = float32_source(models.child)  # to round it again would add to the noise
    for at, name in enumerate(["the base"] * (models.origin is not None) + list(models.names), start=1):
        reference = models.read_together[at]
        try:
            found = align(reference, original, kinds, evidence="weights", shared=_shared(models, at), seed=seed)
        except (AlignmentError, ValueError) as error:
            reasons.append(f"to {name}: {error}")
            continue
        moved = replace(models, child=in_memory(aligned(original, found), "aligning"))
        undone = [rewrite.name for rewrite in found.rewrites]
        note = f"the child was aligned to {name}: {', '.join(undone) or 'nothing'}"
        stay = found.reorders_only or _NO_MAPS.issuperset(undone)
        if not stay:
            moved, more = _in_one_gauge(moved, reference, kinds, seed)
            note += more
        sums = read_sums(moved, seed)
        if is_in_place(moved, sums):
            return AlignedModels(moved, sums, note, _untested(moved, sums, at, stay))
        reasons.append(f"to {name}: aligned, its kernels are still unlike those of the others")
    raise AlignmentError("the child could not be aligned:\n  " + "\n  ".join(reasons))


def _untested(models: MergeModels, sums: NormalEquations, at: int, stay: bool) -> dict[str, str]:
    """Returns the parents whose units have no null after an alignment to the model of this index, each with the reason.

    Where the other models stay as they are, the order of the child's units comes from the child and that model alone:
    in what order those of a third one stand is as open as before. That needs an order that is right, and not the best
    of many chance agreements, which reach a cosine of .42 among 256 units of 64 features.
    """
    reference = None if models.origin is not None and at == 1 else models.names[at - 1 - (models.origin is not None)]
    if not stay:
        return dict.fromkeys(models.names, "all models were aligned: units are in the others' order by construction")
    alike = [np.median([_cosines(sample)[at - 1] for sample in experts]) for experts in _samples(models, sums)]
    if float(min(alike)) < _SURE:
        return dict.fromkeys(models.names, "the child was aligned to weights that are not like its own enough")
    if reference is None:
        return {}
    return {reference: "the child was aligned to it: its units are in this order by construction"}


def _kernels_of(models: MergeModels) -> list[str]:
    L = models.child.arch.num_layers
    return [f"layers/{i}/{name}/kernel" for i in sorted({0, L // 2, L - 1}) for name in _KERNELS]


def _samples(models: MergeModels, sums: NormalEquations) -> list[list[Float[np.ndarray, "S M"]]]:
    """Returns the sampled entries of each of those kernels, of its experts one after another."""
    return [own for name in _kernels_of(models) if (own := sums.samples_of(name))]


def _in_one_gauge(
    models: MergeModels, reference: ParamSource, kinds: Sequence[str], seed: int
) -> tuple[MergeModels, str]:
    """Returns the models with every parent but the reference aligned to it as the child was; and what to note."""
    whole = ("all",) if "auto" in kinds else tuple(kinds)

    def in_gauge(model: ParamSource) -> ParamSource:
        wide = float32_source(model)
        return in_memory(aligned(wide, align(reference, wide, whole, evidence="weights", seed=seed)), "aligning")

    origin = None if models.origin is None else in_gauge(models.origin)
    parents = {name: in_gauge(parent) for name, parent in models.parents.items()}
    return replace(models, parents=parents, origin=origin), "; the other models likewise, for the same gauge"


def _shared(models: MergeModels, at: int) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    return None if models.tokens is None else {"vocab": (models.tokens[at], models.tokens[0])}


def float32_source(source: ParamSource) -> ParamSource:
    """Returns the model with float32 leaves, as they are read."""

    def cast(tree: Tree, _: object) -> Tree:
        return jax.tree.map(lambda weights: np.asarray(weights, np.float32), tree)

    return MappedSource(source, cast)


def _cosines(sample: Float[np.ndarray, "S M"]) -> Float[np.ndarray, " M-1"]:
    """Returns the cosines of the child's entries with those of every other model."""
    wide = sample.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=0)
    found: np.ndarray = wide[:, 0] @ wide[:, 1:] / np.maximum(lengths[0] * lengths[1:], 1e-30)
    return found
