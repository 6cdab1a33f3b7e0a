"""`merge_report`: from open models to the report."""

from collections.abc import Mapping
from functools import reduce
from operator import add
from typing import Any

from tracing_jax.merges.choice import choose
from tracing_jax.merges.models import MergeError, MergeModels
from tracing_jax.merges.normal_equations import read_sums
from tracing_jax.merges.parts import parts_of, sentence
from tracing_jax.merges.recipe import recipe
from tracing_jax.merges.report import MergeReport
from tracing_jax.merges.shares import Shares, estimate, grouped
from tracing_jax.record import plain


def merge_report(
    models: MergeModels, *, seed: int = 0, aligned: bool = False, asked: Mapping[str, Any] | None = None
) -> MergeReport:
    """Returns the report on the parents of a model.

    Args:
      models: the child, its parents, and the origin; read once.
      seed: of the entries and units that are drawn.
      aligned: whether the child was aligned to one of the others.
      asked: goes into the record.

    Raises:
      MergeError: the models have nothing in common that shares could be estimated from.
    """
    check(models)
    sums = read_sums(models, seed)
    whole = estimate(models, sums.tensors)
    by_tensor = grouped(models, sums.tensors, lambda tensor: tensor.place)
    by_role = grouped(models, sums.tensors, lambda tensor: tensor.place.role)
    by_layer = grouped(models, sums.tensors, lambda tensor: tensor.place.layer)
    both = grouped(models, sums.tensors, lambda tensor: (tensor.place.role, tensor.place.layer))
    fit = reduce(add, (shares.fit for shares in by_tensor.values()))
    parts = parts_of(models, sums, whole, list(by_tensor.values()), seed, aligned)
    nested: dict[str, dict[str, Any]] = {}
    for (role, layer), shares in both.items():
        if layer is not None:
            nested.setdefault(role, {})[str(layer)] = shares.as_dict(models.names)
    choice = choose(models, sums, seed)
    origin = None if models.origin is None else str((asked or {}).get("base") or "origin")
    record = {
        **(asked or {}),
        "reference": "origin" if models.origin is not None else models.names[0],
        "sentence": sentence(models, parts, fit),
        "parts": [part.as_dict() for part in parts],
        "method": choice.as_dict(),
        "recipe": recipe(models, choice, both, origin, sums.dtype),
        "unexplained": fit.unexplained,
        "rounded": fit.rounded,
        "whole": whole.as_dict(models.names),
        "by_role": _as_dicts(by_role, models),
        "by_layer": _as_dicts(by_layer, models),
        "by_role_and_layer": nested,
        "by_tensor": _as_dicts(by_tensor, models),
        "left_out": models.left_out,
        "notes": _notes(models, by_tensor),
        "seed": seed,
    }
    return MergeReport(plain(record))


def check(models: MergeModels) -> None:
    """Checks that there is something to compare.

    Raises:
      MergeError: what is missing.
    """
    if not models.names:
        raise MergeError("no parents were given; name one with a base, or two and more")
    if models.terms < 1:
        raise MergeError(f"{models.names[0]} alone has no share to estimate; give the base, or another parent")
    if not any(True for _ in models.places()):
        reasons = "; ".join(dict.fromkeys(models.left_out.values()))
        raise MergeError(f"the models have no weight in common that could be compared: {reasons}")


def _as_dicts(groups: Mapping[Any, Shares], models: MergeModels) -> dict[str, Any]:
    return {str(key): shares.as_dict(models.names) for key, shares in groups.items()}


def _notes(models: MergeModels, by_tensor: Mapping[Any, Shares]) -> list[str]:
    notes = []
    if models.left_out:
        reasons = dict.fromkeys(models.left_out.values())
        notes.append(f"{len(models.left_out)} tensors are not compared: {'; '.join(reasons)}")
    undefined: dict[str, list[str]] = {}
    for place, shares in by_tensor.items():
        if shares.undefined:
            undefined.setdefault(shares.undefined, []).append(str(place))
    notes += [
        f"shares are undefined in {len(places)} of {len(by_tensor)} tensors, such as {places[0]}: {reason}"
        for reason, places in undefined.items()
    ]
    if models.origin is None:
        notes.append("without the base, shares are taken to sum to one over the parents")
    return notes
