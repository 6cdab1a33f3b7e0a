"""`merge_report`: from open models to the report."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

from tracing_jax.alignment import AlignmentError
from tracing_jax.merges.aligning import is_in_place, with_aligned_child
from tracing_jax.merges.choice import Choice, choose
from tracing_jax.merges.depth import with_layers_mapped
from tracing_jax.merges.models import MergeError, MergeModels, TensorKey
from tracing_jax.merges.normal_equations import NormalEquations, read_sums
from tracing_jax.merges.parent_shares import ParentShare, merge_sentence, parent_shares
from tracing_jax.merges.recipe import moe_recipe, recipe
from tracing_jax.merges.report import MergeReport
from tracing_jax.merges.selection import Selection, restricted, select
from tracing_jax.merges.shares import Shares, estimate, grouped_shares
from tracing_jax.record import plain

_OUT_OF_PLACE = "the child's units are in no other model's order, where the test has no power"


def merge_report(
    models: MergeModels,
    *,
    align: Sequence[str] = (),
    seed: int = 0,
    asked: Mapping[str, Any] | None = None,
    search: bool = False,
    more_notes: Sequence[str] = (),
) -> MergeReport:
    """Returns the report on the parents of a model.

    Args:
      models: the child, its parents, and the origin; read once.
      align: kinds of disguises that are undone first if the child is in none of the others' places; see
        `tracing_jax.align`.
      seed: of the entries and units that are drawn.
      asked: goes into the record.
      search: whether the parents are candidates, of which those without a part are left out of the shares; p-values
        count all of them.
      more_notes: go into the record before those of the comparison.

    Raises:
      MergeError: the models have nothing in common that shares could be estimated from.
    """
    check_names(models)
    models, moved = with_layers_mapped(models)
    notes: list[str] = []
    sums = read_sums(models, seed)
    aligned, untested = False, dict[str, str]()
    if not is_in_place(models, sums):
        untested = dict.fromkeys(models.names, _OUT_OF_PLACE)
        try:
            if align:
                models, sums, note, found_untested = with_aligned_child(models, align, seed)
                untested = dict(found_untested)
                aligned, notes = True, [note]
        except AlignmentError as error:
            notes = [str(error)]
    check(models)
    candidates, selection, left_out = models.names, None, models.left_out
    if search:
        selection = select(models, sums)
        models, sums = restricted(models, sums, selection.chosen)
        notes = [*notes, *_notes_on(selection, candidates)]
    whole, by_tensor, parts = compared(models, sums, seed, untested, len(candidates))
    by_role = grouped_shares(models, sums.tensors, lambda tensor: tensor.place.role)
    by_layer = grouped_shares(models, sums.tensors, lambda tensor: tensor.place.layer)
    both = grouped_shares(models, sums.tensors, lambda tensor: (tensor.place.role, tensor.place.layer))
    by_expert = _by_expert(models, sums)
    fit = reduce(add, (shares.fit for shares in by_tensor.values()))
    nested: dict[str, dict[str, Any]] = {}
    for (role, layer), shares in both.items():
        if layer is not None:
            nested.setdefault(role, {})[str(layer)] = shares.as_dict(models.names)
    choice = choose(models, sums, seed)
    origin = None if models.origin is None else str((asked or {}).get("base") or "origin")
    record = {
        **(asked or {}),
        "reference": "origin" if models.origin is not None else models.names[0],
        "sentence": merge_sentence(models, parts, fit, aligned),
        "parts": [part.as_dict() for part in parts],
        "search": None if selection is None else selection.as_dict(candidates),
        "method": choice.as_dict(),
        "recipe": _recipe(models, sums, choice, both, by_expert, origin),
        "unexplained": fit.unexplained,
        "rounded": fit.rounded,
        "whole": whole.as_dict(models.names),
        "by_role": _as_dicts(by_role, models),
        "by_layer": _as_dicts(by_layer, models),
        "by_role_and_layer": nested,
        "by_expert": _as_dicts(by_expert, models),
        "by_tensor": _as_dicts(by_tensor, models),
        "left_out": left_out,
        "layers": None if models.layers is None else list(models.layers[0]),
        "notes": [*more_notes, *notes, *([moved] if moved else []), *_notes(models, left_out, by_tensor)],
        "aligned": aligned,
        "seed": seed,
    }
    return MergeReport(plain(record))


def _by_expert(models: MergeModels, sums: NormalEquations) -> Mapping[int, Shares]:
    """Returns the shares of each expert over all layers, where experts were made of MLPs of dense models."""
    return grouped_shares(models, sums.tensors, lambda tensor: tensor.place.expert) if models.from_dense else {}


def _recipe(
    models: MergeModels,
    sums: NormalEquations,
    choice: Choice,
    by_place: Mapping[tuple[str, int | None], Shares],
    by_expert: Mapping[int, Shares],
    origin: str | None,
) -> str | None:
    if not by_expert:
        return recipe(models, choice, by_place, origin, sums.dtype)
    others = estimate(models, [tensor for tensor in sums.tensors if tensor.place.expert is None])
    return moe_recipe(models, by_expert, others, origin, sums.dtype)


class MergeFit(NamedTuple):
    """Shares over the model and by tensor, and what is known of each parent."""

    whole: Shares
    by_tensor: Mapping[TensorKey, Shares]
    parts: Sequence[ParentShare]


def compared(
    models: MergeModels, sums: NormalEquations, seed: int, untested: Mapping[str, str], candidates: int | None = None
) -> MergeFit:
    """Returns the shares of what one pass has read, and the part of each parent; see `merge_report`.

    Args:
      models: all of them.
      sums: of one pass.
      seed: of the order in which ties are broken.
      untested: see `parent_shares`.
      candidates: the number of models that the parents were chosen from; by default that of the parents.
    """
    whole = estimate(models, sums.tensors)
    by_tensor = grouped_shares(models, sums.tensors, lambda tensor: tensor.place)
    parts = parent_shares(
        models, sums, whole, list(by_tensor.values()), seed, untested, candidates or len(models.names)
    )
    return MergeFit(whole, by_tensor, parts)


def check_names(models: MergeModels) -> None:
    """Checks that there are enough models.

    Raises:
      MergeError: what is missing.
    """
    if not models.names:
        raise MergeError("no parents were given; name one with a base, or two and more")
    if models.terms < 1:
        raise MergeError(f"{models.names[0]} alone has no share to estimate; give the base, or another parent")


def check(models: MergeModels) -> None:
    """Checks that there is something to compare.

    Raises:
      MergeError: the models have no weight in common.
    """
    if not any(True for _ in models.places()):
        reasons = "; ".join(dict.fromkeys(models.left_out.values()))
        raise MergeError(f"the models have no weight in common that could be compared: {reasons}")


def _notes_on(selection: Selection, names: Sequence[str]) -> list[str]:
    left_out = [name for k, name in enumerate(names) if k not in selection.chosen]
    notes = [f"candidates that explain no more than noise, given the others: {', '.join(left_out)}"] if left_out else []
    return notes + [
        f"{', '.join(names[j] for j in others)} would do in the place of {names[k]}: they cannot be distinguished"
        for k, others in selection.instead.items()
    ]


def _as_dicts(groups: Mapping[Any, Shares], models: MergeModels) -> dict[str, Any]:
    return {str(key): shares.as_dict(models.names) for key, shares in groups.items()}


def _notes(models: MergeModels, left_out: Mapping[str, str], by_tensor: Mapping[Any, Shares]) -> list[str]:
    notes = []
    if left_out:
        reasons = dict.fromkeys(left_out.values())
        notes.append(f"{len(left_out)} tensors are not compared: {'; '.join(reasons)}")
    undefined: dict[str, list[str]] = {}
    for place, shares in by_tensor.items():
        if shares.undefined:
            undefined.setdefault(shares.undefined, []).append(str(place))
    notes += [
        f"shares are undefined in {len(places)} of {len(by_tensor)} tensors, such as {places[0]}: {reason}"
        for reason, places in undefined.items()
    ]
    if models.from_dense:
        notes.append("experts of the child are compared, each by itself, with the one MLP that another model has")
    if models.origin is None:
        notes.append("without the base, shares are taken to sum to one over the parents")
    return notes
