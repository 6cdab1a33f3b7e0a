"""A child in disguise: aligned to the origin or to a parent, and all models in the same gauge.

A disguise is undone by the project's alignment. Where it is more than a permutation, alignment moves a model a little
towards its reference (the rotation that fits best, gains set to the reference's): the parents are aligned in the same
way, so that this changes child and parents alike, and to first order no share.
"""

from collections.abc import Sequence
from dataclasses import replace

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
_KERNELS = ("attn/q_proj", "attn/k_proj", "attn/v_proj", "attn/o_proj", "mlp/up_proj", "mlp/down_proj")


def is_in_place(models: MergeModels, sums: NormalEquations) -> bool:
    """Returns whether kernels of the child in its first, middle and last layer are like those of another model.

    Experts need not all be like those of the same one: half of them are to be like those of some. Kernels of another
    shape are in no model's unit order.
    """
    L = models.child.arch.num_layers
    names = [f"layers/{i}/{name}/kernel" for i in sorted({0, L // 2, L - 1}) for name in _KERNELS]
    if any("shapes" in models.left_out.get(name, "") for name in names):
        return False
    samples = [own for name in names if (own := sums.samples_of(name))]
    alike = [np.median([max(_cosines(sample)) for sample in experts]) for experts in samples]
    return bool(samples) and float(min(alike)) > _MIN_COSINE


def with_aligned_child(
    models: MergeModels, kinds: Sequence[str], seed: int
) -> tuple[MergeModels, NormalEquations, list[str]]:
    """Returns the models with the child, and where needed the parents, aligned; their sums; and notes on what was done.

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
        if not found.reorders_only and not _NO_MAPS.issuperset(undone):
            moved, more = _in_one_gauge(moved, reference, kinds, seed)
            note += more
        sums = read_sums(moved, seed)
        if is_in_place(moved, sums):
            return moved, sums, [note]
        reasons.append(f"to {name}: aligned, its kernels are still unlike those of the others")
    raise AlignmentError("the child could not be aligned:\n  " + "\n  ".join(reasons))


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
