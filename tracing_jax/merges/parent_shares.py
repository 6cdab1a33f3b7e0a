"""Which parents had a part: a p-value each, Holm over parents, and the words that the evidence allows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from tracing_jax.error_messages import listed_and
from tracing_jax.merges.exchange import ExchangedUnits, is_in_order, log_p_of_parent
from tracing_jax.merges.models import MergeModels
from tracing_jax.merges.other_shapes import OtherShape
from tracing_jax.merges.reproduced_entries import ReproducedEntries
from tracing_jax.merges.shares import ONE_OF_THESE, Fit, Shares, finite
from tracing_jax.statistics.pvalues import holm

LEVEL = 1e-3
"""A parent has a part if its p-value, after Holm, is below."""
SMALLEST_SHARE = 0.01
"""A part of less than a hundredth is not called one: that much is in doubt for reasons that no test covers."""
ALIKE = 0.7
"""Parents whose differences have a cosine above may hide each other's part."""
BEYOND_TRAINING = 0.7
"""Squared partial correlation from which a part is more than training on similar text leaves. Two fine-tunes of
one base on the very same text, in another order, reached .47 (`benchmarks/merges.py`)."""
ROUNDING_TIMES = 8.0
"""What is left of the child is rounding if its square is at most so many times that of one rounding of its weights."""
MOST_LEFT = 0.1
"""And if it is at most so much of the child's difference: one of a step of the grid or less has the size of rounding
itself, and may all be training. Three fine-tunes on the text of a fourth explained .70 of its difference."""

NO_UNITS = "no MLP units are left of the child that could be exchanged"
OTHER_ORDER = (
    "its units are in no other model's order: a part that was put in another order, as to fit another parent, is not "
    "seen, and shares are wrong if there is one; compare it with the child"
)
IN_COMMON = (
    "its part is smaller than what no parent explains; fine-tunes of one model on similar text also have this in common"
)


@dataclass(frozen=True)
class ParentShare:
    """What is known of the part of one parent.

    Attributes:
      name: of the parent.
      word: `part`, `none`, `reserved`, `one_of`, `not_testable`, or `agrees` of a parent of other shapes.
      share: pooled over the model, None if undefined; with its standard error, and interval.
      alone: squared partial correlation with the child, given the other parents, tensor by tensor.
      log10_p: of units in any order; `adjusted_log10_p` after Holm.
      reason: why the word is not `part` or `none`.
    """

    name: str
    word: str
    share: float | None
    se: float | None
    low: float | None
    high: float | None
    alone: float | None
    log10_p: float | None
    adjusted_log10_p: float | None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for the record."""
        return asdict(self)


def parent_shares(
    models: MergeModels,
    exchanged: ExchangedUnits,
    whole: Shares,
    by_tensor: Sequence[Shares],
    seed: int,
    untested: Mapping[str, str],
    candidates: int,
) -> list[ParentShare]:
    """Returns what is known of the part of each parent.

    Args:
      models: all of them.
      exchanged: the units that parents are tested by.
      whole: the shares over all tensors.
      by_tensor: the shares of each tensor, among which the shares may differ.
      seed: of the order in which ties are broken.
      untested: name of a parent -> why its units cannot be exchanged, as after an alignment.
      candidates: the number of models that these parents were chosen from, for Holm's correction.
    """
    fit = reduce(add, (shares.fit for shares in by_tensor))
    units = replace(exchanged, by_layer=_of_distinct_layers(models, exchanged.by_layer))
    log_ps = [
        None if name in untested else log_p_of_parent(models, units, k, seed) for k, name in enumerate(models.names)
    ]
    tested = [log_p for log_p in log_ps if log_p is not None]
    others = [0.0] * (candidates - len(models.names))
    adjusted = iter(holm([*tested, *others]) / math.log(10)) if tested else iter(())
    found: list[ParentShare] = []
    for k, log_p in enumerate(log_ps):
        after = None if log_p is None else float(next(adjusted))
        word, reason = _word(k, fit, whole, after, untested.get(models.names[k], NO_UNITS))
        if word == "none" and not is_rounding(fit) and not is_in_order(models, units, k):
            word, reason = "not_testable", OTHER_ORDER
        share, se, low, high = (finite(row[k]) for row in (whole.values, whole.errors, *whole.interval()))
        log10_p = None if log_p is None else log_p / math.log(10)
        alone = float(fit.alone[k])
        found.append(ParentShare(models.names[k], word, share, se, low, high, alone, log10_p, after, reason))
    return _alike_together(found, models, units, whole, seed, candidates)


def with_reproduced_entries(parts: Sequence[ParentShare], exact: ReproducedEntries | None) -> list[ParentShare]:
    """Returns the parents; those that are reserved have a part where the child has their entries to rounding."""
    return [
        replace(part, word="part", reason=None)
        if part.word == "reserved" and exact is not None and exact.shows(k)
        else part
        for k, part in enumerate(parts)
    ]


def _alike_together(
    found: Sequence[ParentShare],
    models: MergeModels,
    units: ExchangedUnits,
    whole: Shares,
    seed: int,
    candidates: int,
) -> list[ParentShare]:
    """Returns the parents; of those that none of the tests sees given each other, those that one sees without.

    Of two that are alike each explains what the other one does: neither has a part that the other leaves, and to clear
    both would be wrong. Where one of them has a part by itself, that explains the other's likeness.
    """
    given = list(found)
    for k, part in enumerate(found):
        alike = [j for j in np.flatnonzero(np.abs(whole.cosines[k]) > ALIKE).tolist() if j != k]
        if part.word != "none" or not alike or any(found[j].word in ("part", "reserved", "one_of") for j in alike):
            continue
        log_p = log_p_of_parent(models, units, k, seed, without=alike)
        if log_p is not None and log_p + math.log(candidates) < math.log(LEVEL):
            names = listed_and([models.names[j] for j in alike])
            reason = (
                f"its difference is like that of {names}, or its opposite: given each other neither has a part, "
                "without it this one has"
            )
            given[k] = replace(part, word="one_of", reason=reason)
    return given


def without_share(name: str, reason: str) -> ParentShare:
    """Returns a parent of whose part nothing is known."""
    return ParentShare(name, "not_testable", None, None, None, None, None, None, None, reason)


def share_of_other_shape(other: OtherShape) -> ParentShare:
    """Returns what is known of a parent of other shapes: no share, and whether its units agree."""
    found = without_share(other.name, other.reason)
    return replace(
        found,
        word="agrees" if other.agrees else found.word,
        log10_p=other.log10_p,
        adjusted_log10_p=other.log10_p,
    )


def _of_distinct_layers(
    models: MergeModels, units: Mapping[int, Sequence[np.ndarray]]
) -> dict[int, Sequence[np.ndarray]]:
    """Returns the units of one layer of the child for each of the parents': those of a repeated layer count once."""
    first: dict[int, int] = {}
    for layer in sorted(units):
        first.setdefault(layer if models.layers is None else models.layers[0][layer], layer)
    return {layer: units[layer] for layer in first.values()}


def is_rounding(fit: Fit) -> bool:
    """Returns whether what the parents leave of the child is no more than rounding, and little of its difference."""
    return fit.rest <= ROUNDING_TIMES * fit.rounding and fit.unexplained <= MOST_LEFT


def merge_sentence(models: MergeModels, parts: Sequence[ParentShare], fit: Fit, aligned: bool, whole: Shares) -> str:
    """Returns what was found, claiming no more than the tests support."""
    of = {word: [part for part in parts if part.word == word] for word in ("part", "one_of", "reserved", "none")}
    rest = "the rest is rounding" if is_rounding(fit) else f"no parent explains {_percent(fit.unexplained)} of that"
    if of["one_of"]:
        names = ", ".join(part.name for part in of["one_of"])
        had_part = f"{listed_and([part.name for part in of['part']])} had a part, and " if of["part"] else ""
        return f"{had_part}one of these, or several: {names}; {_alike(models, parts, whole)}"
    untested = [part.name for part in parts if part.word == "not_testable"]
    if aligned and untested and all(part.share is not None for part in parts):
        shares = ", ".join(f"{part.name} {part.share:.3f} ± {part.se:.3f}" for part in parts)
        had_part = f"; {listed_and([part.name for part in of['part']])} had a part" if of["part"] else ""
        whom = "a parent" if len(untested) == len(parts) else listed_and(untested)
        return f"after alignment the shares are {shares}{had_part}; {rest}; to test {whom}, compare it with the child"
    named = [f"{part.name} ({part.share:.3f} ± {part.se:.3f})" for part in of["part"]]
    if len(named) > 1:
        return f"merged of {listed_and(named)}; of what differs from {_reference(models)}, {rest}"
    if len(named) == 1:
        if untested:
            return f"{of['part'][0].name} had a part, {listed_and(untested)} cannot be tested; of what differs, {rest}"
        part = of["part"][0]
        assert part.share is not None
        if abs(part.share - 1) < SMALLEST_SHARE or models.origin is None:
            return f"of the parents given, {part.name} alone has a part; of what differs, {rest}"
        return f"along {named[0]} from the origin, no other parent has a part; of what differs, {rest}"
    if of["reserved"]:
        names = ", ".join(part.name for part in of["reserved"])
        return f"no merge is claimed: {names} and the child have something in common, which training also explains"
    if of["none"] and not untested:
        return "no parent had a part that this test can see"
    reason = next(part.reason for part in parts if part.word == "not_testable")
    return f"not testable: {reason}"


def _alike(models: MergeModels, parts: Sequence[ParentShare], whole: Shares) -> str:
    """Returns what is known of the shares of parents that are too alike."""
    text = "they are too alike for shares of each"
    alike = np.array([part.word == "one_of" for part in parts], float)
    if models.origin is None and alike.all():
        return text
    error = math.sqrt(max(float(alike @ whole.covariance @ alike), 0.0))
    return f"{text}, together {float(alike @ whole.values):.3f} ± {error:.3f}"


def _word(
    k: int, fit: Fit, whole: Shares, adjusted_log10_p: float | None, no_exchange_reason: str
) -> tuple[str, str | None]:
    if whole.undefined:
        return "not_testable", whole.undefined
    if whole.inflation[k] > ONE_OF_THESE and len(whole.values) > 1:
        return "one_of", f"parents' differences are nearly collinear (condition number {whole.condition:.0f})"
    if adjusted_log10_p is None:
        return "not_testable", no_exchange_reason
    if adjusted_log10_p >= math.log10(LEVEL) or (
        abs(whole.values[k]) < SMALLEST_SHARE and fit.alone[k] < BEYOND_TRAINING
    ):
        return "none", None
    if fit.alone[k] < BEYOND_TRAINING and not is_rounding(fit):
        return "reserved", IN_COMMON
    return "part", None


def _reference(models: MergeModels) -> str:
    return "the origin" if models.origin is not None else models.names[0]


def _percent(share: float) -> str:
    return "less than 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"
