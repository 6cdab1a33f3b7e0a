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
from tracing_jax.merges.alignment_bias import AlignmentBias, Moved, moved_shares
from tracing_jax.merges.depth import with_layers_mapped
from tracing_jax.merges.exchange import ExchangedUnits
from tracing_jax.merges.models import MergeModels
from tracing_jax.merges.noise import merged_again, merged_noise
from tracing_jax.merges.normal_equations import NormalEquations, read_sums, read_units
from tracing_jax.merges.shares import estimate
from tracing_jax.rewrites import DISGUISES, draw_rewrites
from tracing_jax.sources import MappedSource, ParamSource, in_memory, rewritten
from tracing_jax.tree import Tree

_MIN_COSINE = 0.3
"""A kernel of the child is in place if its cosine with that of another model is above; independent ones are near 0."""
_NO_MAPS = frozenset({"permute", "pad", "remove", "group", "ungroup"})
"""Rewrites after which what is left of a model has its own numbers: no other model is to be moved likewise."""
_SURE = 0.6
_OUT_OF_PLACE = "the child's units are in no other model's order, where the test has no power"
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


class ModelsInOrder(NamedTuple):
    """The models of a merge, their units in one order as far as that can be, and the sums of one pass.

    Attributes:
      models: the child aligned where it was in disguise, and where needed the others.
      sums: of these.
      exchanged: the units that parents are tested by.
      untested: name of a parent -> why its units cannot be exchanged.
      aligned: whether the child was aligned.
      notes: what was done, or why it could not be.
      bias: what the alignment does to shares; None where it estimated no maps.
    """

    models: MergeModels
    sums: NormalEquations
    exchanged: ExchangedUnits
    untested: Mapping[str, str]
    aligned: bool = False
    notes: Sequence[str] = ()
    bias: AlignmentBias | None = None


class AlignedModels:
    """Models after their alignment to a reference, each aligned once, however many merges they are parents of."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, tuple[str, ...], int], tuple[ParamSource, ParamSource, ParamSource]] = {}

    def get(self, model: ParamSource, reference: ParamSource, kinds: tuple[str, ...], seed: int) -> ParamSource:
        """Returns a model aligned to the reference by all that these kinds of disguises allow.

        Raises:
          AlignmentError, ValueError: it cannot be aligned.
        """
        key = (id(model), id(reference), kinds, seed)
        if key not in self._found:
            wide = float32_source(model)
            moved = aligned(wide, align(reference, wide, kinds, evidence="weights", seed=seed))
            # With the two that the numbers belong to, so that these stay theirs.
            self._found[key] = in_memory(moved, "aligning"), model, reference
        return self._found[key][0]

    def forget(self, reference: ParamSource) -> None:
        """Lets go of the models that were aligned to a reference to which the child could not be."""
        self._found = {key: found for key, found in self._found.items() if found[2] is not reference}


def read_in_one_order(
    models: MergeModels,
    kinds: Sequence[str],
    seed: int,
    *,
    known: AlignedModels | None = None,
    measures_bias: bool = True,
) -> ModelsInOrder:
    """Returns the models with their sums: layers in their places, and a child in disguise aligned.

    Args:
      models: none of which is changed.
      kinds: of disguises that are undone where the child is in none of the others' places; none if empty.
      seed: of the alignment's proof, and of the sums.
      known: other models that were aligned before, for merges of the same ones.
      measures_bias: whether it is measured what an alignment does to shares, which no word depends on.
    """
    models, moved = with_layers_mapped(models)
    notes = [moved] if moved else []
    sums = read_sums(models, seed)
    as_read = ExchangedUnits(sums.units)
    if is_in_place(models, sums):
        return ModelsInOrder(models, sums, as_read, {}, notes=notes)
    try:
        if kinds:
            found = with_aligned_child(models, kinds, seed, known or AlignedModels(), measures_bias)
            return found._replace(notes=[*found.notes, *notes])
    except AlignmentError as error:
        notes = [str(error), *notes]
    return ModelsInOrder(models, sums, as_read, dict.fromkeys(models.names, _OUT_OF_PLACE), notes=notes)


def with_aligned_child(
    models: MergeModels, kinds: Sequence[str], seed: int, known: AlignedModels, measures_bias: bool
) -> ModelsInOrder:
    """Returns the models with the child, and where needed the parents, aligned; their sums; and what was done.

    Args:
      models: none of which is changed.
      kinds: of disguises, as for `tracing_jax.align`.
      seed: of the alignment's proof, and of the sums.
      known: see `read_in_one_order`.
      measures_bias: see `read_in_one_order`.

    Raises:
      AlignmentError: the child could not be aligned to any of the models.
    """
    reasons: list[str] = []
    original = replace(models, child=float32_source(models.child))  # to round it again would add to the noise
    for at in range(1, len(original.read_together)):
        if (gauge := _gauge_of(original, at, kinds, seed, known, reasons)) is None:
            continue
        strongest = _strongest(gauge, at)
        if strongest != at and (nearer := _gauge_of(original, strongest, kinds, seed, known, reasons)) is not None:
            known.forget(original.read_together[at])
            at, gauge = strongest, nearer
        undone = ", ".join(gauge.undone) or "nothing"
        likewise = "; the other models likewise, for the same gauge" if gauge.mapped else ""
        units = read_units(gauge.child_alone, seed) if gauge.mapped else gauge.sums.units
        return ModelsInOrder(
            gauge.models,
            gauge.sums,
            ExchangedUnits(units, gauge.mapped),
            _untested(gauge.models, gauge.sums, at),
            True,
            [f"the child was aligned to {_name(models, at)}: {undone}{likewise}"],
            _bias(gauge, at, kinds, seed, known) if gauge.mapped and measures_bias else None,
        )
    raise AlignmentError("the child could not be aligned:\n  " + "\n  ".join(reasons))


def _gauge_of(
    models: MergeModels, at: int, kinds: Sequence[str], seed: int, known: AlignedModels, reasons: list[str]
) -> "_Gauge | None":
    """Returns the models after the child was aligned to the one at this place; None, with a reason, if it was not."""
    to = f"to {_name(models, at)}"
    try:
        gauge = _aligned_to(models, at, kinds, seed, known)
    except (AlignmentError, ValueError) as error:
        reasons.append(f"{to}: {error}")
    else:
        if is_in_place(gauge.models, gauge.sums):
            return gauge
        reasons.append(f"{to}: aligned, its kernels are still unlike those of the others")
    known.forget(models.read_together[at])
    return None


def _strongest(gauge: "_Gauge", at: int) -> int:
    """Returns the place of the model to which maps are estimated best: the origin, or the parent of the largest share.

    The child is as near to no other one. Where nothing but an order was found, it is right whoever it came from.
    """
    if gauge.models.origin is not None or not gauge.mapped:
        return at
    shares = estimate(gauge.models, gauge.sums.tensors)
    return at if shares.undefined else 1 + int(np.argmax(shares.values))


def _name(models: MergeModels, at: int) -> str:
    """Returns the name of the model at this place of those that are read together."""
    return "the base" if models.origin is not None and at == 1 else models.names[at - 1 - (models.origin is not None)]


class _Gauge(NamedTuple):
    """The models after an alignment.

    Attributes:
      models: the child aligned, and the others too if maps were estimated.
      child_alone: the child aligned, all others as they were.
      undone: names of the rewrites.
      mapped: whether maps were estimated.
      sums: of the models.
    """

    models: MergeModels
    child_alone: MergeModels
    undone: Sequence[str]
    mapped: bool
    sums: NormalEquations


def _aligned_to(models: MergeModels, at: int, kinds: Sequence[str], seed: int, known: AlignedModels) -> _Gauge:
    """Returns the models after the child was aligned to the one at this place of those that are read together.

    Raises:
      AlignmentError, ValueError: the child cannot be aligned to it.
    """
    reference = models.read_together[at]
    found = align(reference, models.child, kinds, evidence="weights", shared=_shared(models, at), seed=seed)
    alone = replace(models, child=in_memory(aligned(models.child, found), "aligning"))
    undone = [rewrite.name for rewrite in found.rewrites]
    if found.reorders_only or _NO_MAPS.issuperset(undone):
        return _Gauge(alone, alone, undone, False, read_sums(alone, seed))
    likewise = _in_one_gauge(alone, reference, kinds, seed, known)
    return _Gauge(likewise, alone, undone, True, read_sums(likewise, seed))


def _bias(gauge: _Gauge, at: int, kinds: Sequence[str], seed: int, known: AlignedModels) -> AlignmentBias | None:
    """Returns what such an alignment does to the shares of merges with the shares that were found.

    One is of independent noise of the same sizes; see `merged_noise`. The other is of the parents themselves, whose
    differences have the structure that training gives, which maps fit better than noise. None if shares are undefined.
    """
    found = estimate(gauge.models, gauge.sums.tensors)
    names = [name for name in gauge.undone if name in DISGUISES]
    if found.undefined or not names:
        return None
    noise = merged_noise(gauge.models, gauge.sums, found.values, found.fit.unexplained, seed)
    again = merged_again(gauge.child_alone, found.values) if gauge.models.tokens is None else None
    moved = {
        "noise": _moved(noise, at, kinds, names, seed, AlignedModels()),
        "parents": None if again is None else _moved(again, at, kinds, names, seed, known),
    }
    measured = {of: own for of, own in moved.items() if own is not None}
    return AlignmentBias(gauge.models.names, measured) if measured else None


def _moved(
    made: MergeModels, at: int, kinds: Sequence[str], names: Sequence[str], seed: int, known: AlignedModels
) -> Moved | None:
    """Returns how much shares move if a child is disguised by rewrites of these names and aligned; None if it fails."""
    hidden = rewritten(made.child, draw_rewrites(names, jax.random.key(seed), made.child.arch))
    try:
        back = _aligned_to(replace(made, child=in_memory(hidden, "measuring the alignment")), at, kinds, seed, known)
    except (AlignmentError, ValueError):
        return None
    moved = moved_shares(made, read_sums(made, seed), back.models, back.sums)
    return moved if np.isfinite(moved["whole"][None]).all() else None  # of either, shares may be undefined


def _untested(models: MergeModels, sums: NormalEquations, at: int) -> dict[str, str]:
    """Returns the parents whose units have no null after an alignment to the model of this index, each with the reason.

    The order of the child's units comes from the child and that model alone: in what order those of a third one stand
    is as open as before. That needs an order that is right, and not the best of many chance agreements, which reach a
    cosine of .42 among 256 units of 64 features.
    """
    reference = None if models.origin is not None and at == 1 else _name(models, at)
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
    models: MergeModels, reference: ParamSource, kinds: Sequence[str], seed: int, known: AlignedModels
) -> MergeModels:
    """Returns the models, the reference and all others aligned to it as the child was."""
    whole = ("all",) if "auto" in kinds else tuple(kinds)
    origin = None if models.origin is None else known.get(models.origin, reference, whole, seed)
    parents = {name: known.get(parent, reference, whole, seed) for name, parent in models.parents.items()}
    return replace(models, parents=parents, origin=origin)


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
