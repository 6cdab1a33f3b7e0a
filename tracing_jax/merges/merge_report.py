"""`merge_report`: from open models to the report."""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

from tracing_jax.merges.aligning import ModelsInOrder, read_in_one_order
from tracing_jax.merges.alignment_bias import AlignmentBias, shares_by
from tracing_jax.merges.choice import Choice, choose
from tracing_jax.merges.exchange import ExchangedUnits
from tracing_jax.merges.models import MergeError, MergeModels, TensorKey
from tracing_jax.merges.normal_equations import NormalEquations
from tracing_jax.merges.other_shapes import OtherShape, VocabulariesOf, compared_by_units, set_apart
from tracing_jax.merges.parent_shares import (
    ParentShare,
    merge_sentence,
    parent_shares,
    share_of_other_shape,
    with_reproduced_entries,
    without_share,
)
from tracing_jax.merges.recipe import moe_recipe, recipe
from tracing_jax.merges.recipe_residual import recipe_residual
from tracing_jax.merges.regions import joint_regions
from tracing_jax.merges.report import MergeReport
from tracing_jax.merges.selection import Selection, read_of, restricted, select
from tracing_jax.merges.shares import Fit, Shares, estimate, grouped_shares
from tracing_jax.record import plain


class MergeFit(NamedTuple):
    """Shares over the model and by tensor, and what is known of each parent."""

    whole: Shares
    by_tensor: Mapping[TensorKey, Shares]
    parts: Sequence[ParentShare]

    @property
    def in_tensors(self) -> Fit:
        """The sums of squares where every tensor has shares of its own."""
        return reduce(add, (shares.fit for shares in self.by_tensor.values()))


def merge_report(
    models: MergeModels,
    *,
    align: Sequence[str] = (),
    seed: int = 0,
    asked: Mapping[str, Any] | None = None,
    search: bool = False,
    more_notes: Sequence[str] = (),
    vocabularies_of: VocabulariesOf | None = None,
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
      vocabularies_of: parents of other shapes, of which tokens are compared that a text has; None if the tokens of
        these models are all read.

    Raises:
      MergeError: too few models.
    """
    kept, apart = set_apart(models)
    if apart and kept.terms < 1:
        found = compared_by_units(models, kept, apart, seed, vocabularies_of)
        return MergeReport(plain({**(asked or {}), **_without_shares(kept, found, more_notes), "seed": seed}))
    check_names(kept)
    read = read_in_one_order(kept, align, seed)
    if not _comparable(read.models):
        nobody = MergeModels(models.child, {})
        found = compared_by_units(models, nobody, models.names, seed, vocabularies_of)
        notes = [*more_notes, *read.notes]
        return MergeReport(plain({**(asked or {}), **_without_shares(nobody, found, notes), "seed": seed}))
    others = compared_by_units(models, read.models, apart, seed, vocabularies_of)
    chosen = _chosen(read, search)
    models, sums = chosen.models, chosen.sums
    names = read.models.names
    choice = choose(models, sums, seed)
    fit = compared(models, sums, seed, read.untested, len(names), chosen.exchanged, read.bias, choice)
    left_out = read.models.left_out
    record = {
        **(asked or {}),
        "reference": "origin" if models.origin is not None else models.names[0],
        **_findings(models, fit, read.aligned, others),
        "search": None if chosen.selection is None else chosen.selection.as_dict(names),
        **_method_and_recipe(models, sums, choice, asked or {}),
        **_tables(models, sums, fit, read.bias),
        "left_out": left_out,
        "layers": None if models.layers is None else list(models.layers[0]),
        "notes": [*more_notes, *read.notes, *chosen.notes, *_notes(models, left_out, fit.by_tensor)],
        "aligned": read.aligned,
        "alignment_bias": None if read.bias is None else read.bias.as_dict(),
        "seed": seed,
    }
    return MergeReport(plain(record))


class _Chosen(NamedTuple):
    """The parents of which shares are estimated: all, or those that a search chose."""

    models: MergeModels
    sums: NormalEquations
    exchanged: ExchangedUnits
    selection: Selection | None
    notes: Sequence[str]


def _chosen(read: ModelsInOrder, search: bool) -> _Chosen:
    if not search:
        return _Chosen(read.models, read.sums, read.exchanged, None, ())
    selection = select(read.models, read.sums)
    models, sums = restricted(read.models, read.sums, selection.chosen)
    exchanged = read.exchanged.of(read_of(read.models, selection.chosen))
    return _Chosen(models, sums, exchanged, selection, _notes_on(selection, read.models.names))


def _findings(models: MergeModels, fit: MergeFit, aligned: bool, others: Sequence[OtherShape]) -> dict[str, Any]:
    """Returns the sentence, what is known of each parent, and the shares of the whole."""
    sentence = merge_sentence(models, fit.parts, fit.in_tensors, aligned, fit.whole)
    return {
        "sentence": "; ".join([sentence, *(other.sentence for other in others)]),
        "parts": [part.as_dict() for part in (*fit.parts, *map(share_of_other_shape, others))],
        "other_shapes": {other.name: other.as_dict() for other in others},
        "unexplained": fit.in_tensors.unexplained,
        "rounded": fit.in_tensors.rounded,
        "whole": fit.whole.as_dict(models.names),
        "joint": [region.as_dict(models.names) for region in joint_regions(fit.whole)],
    }


def _without_shares(models: MergeModels, others: Sequence[OtherShape], more_notes: Sequence[str]) -> dict[str, Any]:
    """Returns the record where no share can be estimated, for all parents but one, or all, have other shapes."""
    alone = [without_share(name, "alone it has no share to estimate; give the base") for name in models.names]
    return {
        "reference": None,
        "sentence": "; ".join(["no shares can be estimated", *(other.sentence for other in others)]),
        "parts": [part.as_dict() for part in (*alone, *map(share_of_other_shape, others))],
        "other_shapes": {other.name: other.as_dict() for other in others},
        "unexplained": None,
        "rounded": None,
        "whole": None,
        "joint": [],
        "search": None,
        "method": Choice(None).as_dict(),
        "recipe": None,
        "recipe_residual": None,
        **{f"by_{key}": {} for key in ("role", "layer", "role_and_layer", "expert", "tensor")},
        "left_out": {},
        "layers": None,
        "notes": list(more_notes),
        "aligned": False,
        "alignment_bias": None,
    }


def _tables(models: MergeModels, sums: NormalEquations, fit: MergeFit, bias: AlignmentBias | None) -> dict[str, Any]:
    """Returns the shares by role, layer, both, expert and tensor."""
    nested: dict[str, dict[str, Any]] = {}
    for (role, layer), shares in shares_by("role_and_layer", models, sums, bias).items():
        nested.setdefault(role, {})[str(layer)] = shares.as_dict(models.names)
    return {
        "by_role": _as_dicts(shares_by("role", models, sums, bias), models),
        "by_layer": _as_dicts(shares_by("layer", models, sums, bias), models),
        "by_role_and_layer": nested,
        "by_expert": _as_dicts(_by_expert(models, sums, bias), models),
        "by_tensor": _as_dicts(fit.by_tensor, models),
    }


def _by_role_and_layer(models: MergeModels, sums: NormalEquations) -> dict[tuple[str, int | None], Shares]:
    return grouped_shares(models, sums.tensors, lambda tensor: (tensor.place.role, tensor.place.layer))


def _method_and_recipe(
    models: MergeModels, sums: NormalEquations, choice: Choice, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the method that was chosen, the configuration that makes the child again, and what it leaves."""
    origin = None if models.origin is None else str(asked.get("base") or "origin")
    if not (by_expert := _by_expert(models, sums)):
        text = recipe(models, choice, _by_role_and_layer(models, sums), origin, sums.dtype)
    else:
        others = estimate(models, [tensor for tensor in sums.tensors if tensor.place.expert is None])
        text = moe_recipe(models, by_expert, others, origin, sums.dtype)
    left = None if text is None or by_expert else recipe_residual(text, models, sums, choice, origin)
    return {"method": choice.as_dict(), "recipe": text, "recipe_residual": left}


def _by_expert(models: MergeModels, sums: NormalEquations, bias: AlignmentBias | None = None) -> Mapping[int, Shares]:
    """Returns the shares of each expert over all layers, where experts were made of MLPs of dense models."""
    return shares_by("expert", models, sums, bias) if models.from_dense else {}


def compared(
    models: MergeModels,
    sums: NormalEquations,
    seed: int,
    untested: Mapping[str, str],
    candidates: int | None = None,
    exchanged: ExchangedUnits | None = None,
    bias: AlignmentBias | None = None,
    choice: Choice | None = None,
) -> MergeFit:
    """Returns the shares of what one pass has read, and the part of each parent; see `merge_report`.

    Args:
      models: all of them.
      sums: of one pass.
      seed: of the order in which ties are broken.
      untested: see `parent_shares`.
      candidates: the number of models that the parents were chosen from; by default that of the parents.
      exchanged: the units that parents are tested by; by default those of the sums.
      bias: what an alignment does to the shares; errors contain it.
      choice: of the method, by whose exact entries parents may have a part; without it none has by these.
    """
    whole = estimate(models, sums.tensors)
    if bias is not None:
        whole = whole.with_bias(bias.of("whole", None, models.names))
    by_tensor = shares_by("tensor", models, sums, bias)
    units = exchanged or ExchangedUnits(sums.units)
    parts = parent_shares(
        models, units, whole, list(by_tensor.values()), seed, untested, candidates or len(models.names)
    )
    return MergeFit(whole, by_tensor, with_reproduced_entries(parts, None if choice is None else choice.reproduced))


def check_models(models: MergeModels) -> None:
    """Checks that shares can be estimated.

    Raises:
      MergeError: there are not enough models, or they have no weight in common.
    """
    kept, apart = set_apart(models)
    if apart and kept.terms < 1:
        raise MergeError(f"shares cannot be estimated: the MLPs of {', '.join(apart)} have other shapes")
    check_names(kept)
    if not _comparable(kept):
        reasons = "; ".join(dict.fromkeys(kept.left_out.values()))
        raise MergeError(f"the models have no weight in common that could be compared: {reasons}")


def check_names(models: MergeModels) -> None:
    """Checks that there are enough models.

    Raises:
      MergeError: what is missing.
    """
    if not models.names:
        raise MergeError("no parents were given; name one with a base, or two and more")
    if models.terms < 1:
        raise MergeError(f"{models.names[0]} alone has no share to estimate; give the base, or another parent")


def _comparable(models: MergeModels) -> bool:
    """Returns whether the models have a weight in common."""
    return any(True for _ in models.places())


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
