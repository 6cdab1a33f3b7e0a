"""One layer's evidence: a matching of units compared with the identity, or with another matching of the same units.

Below, what statistics make of such comparisons: tests, shares, and notes. Units in place are in `in_place.py`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.forward import LayerCorrelations
from tracing_jax.matching import FactoredSimilarity, UnitMatching, live_units
from tracing_jax.run_cache import RunCache
from tracing_jax.statistics.distinct_units import DistinctUnits
from tracing_jax.statistics.nulls import agreement, agreement_log_sf, spearman
from tracing_jax.statistics.pvalues import LogPs
from tracing_jax.statistics.statistic import Result, Test

LN10 = math.log(10)
_PARTNERS = 128

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Comparison:
    """Agreement of two matchings of units, with p-values under the null of a uniformly random matching.

    Attributes:
      units: h, the units matched in both.
      choices: h2, the units that each could be matched to; equal to `units` for permutations.
      r: rank correlation of the two.
      agreeing: k, units that both match to the same unit.
      log_p_rank, log_p_agreement: natural logarithms, one-sided. The second is conservative, as k is discrete.
      sampled, outstanding: of so many matched units, those that are in place and more similar to their partner than an
        order chosen afterwards makes units of independent models; see `placed_beyond_order`.
      similarity, nearest: the mean similarity of the sampled units to their partners, where these are in place and 0
        elsewhere; and that to the closest other unit.
      copies, inactive, mixed, alike: of base and of ft, units that repeat another, that write nothing, that share a
        gate and not the other rows, and whose own two rows are alike; all left out.
      order_p: of base and of ft, the p-value of units in no particular order; see `DistinctUnits`.
      identity_p: of base and of ft, that of rows that do not begin at the identity.
    """

    units: int
    choices: int
    r: float
    agreeing: int
    log_p_rank: float
    log_p_agreement: float
    sampled: int = 0
    outstanding: int = 0
    similarity: float = 0.0
    nearest: float = 0.0
    copies: Sequence[int] = (0, 0)
    inactive: Sequence[int] = (0, 0)
    order_p: Sequence[float] = (1.0, 1.0)
    identity_p: Sequence[float] = (1.0, 1.0)
    mixed: Sequence[int] = (0, 0)
    alike: Sequence[int] = (0, 0)
    partners: Sequence[Sequence[int]] = ()
    """Of some units of base, spread evenly: the unit, and its partner in ft by either matching."""
    agrees_on_text: bool = True
    """False where units agree on embeddings of tokens and not on a text; see `responses_on_text`."""

    def of_units(self, base: DistinctUnits, ft: DistinctUnits) -> "Comparison":
        """Returns the comparison with what is known of the units of both layers."""
        order_p = tuple(min(1.0, len(side.order_p) * min(side.order_p, default=1.0)) for side in (base, ft))
        return replace(
            self,
            copies=(base.copies, ft.copies),
            inactive=(base.inactive, ft.inactive),
            order_p=order_p,
            identity_p=(base.identity_p, ft.identity_p),
            mixed=(base.mixed, ft.mixed),
            alike=(base.alike, ft.alike),
        )


def live_among(
    base: DistinctUnits,
    ft: DistinctUnits,
    *similarities: Float[Array | np.ndarray, "n m"] | FactoredSimilarity,
    drawn: Int[np.ndarray, " n"] | None = None,
) -> tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]:
    """Returns the distinct units of base and of ft that have a nonzero entry in every one of these matrices.

    Args:
      base: the units of base's layer.
      ft: those of ft's.
      similarities: of units of base with all of ft's.
      drawn: the units of base that are the rows; all if None. What is returned are then positions among them.
    """
    rows, columns = live_units(*similarities)
    kept = base.kept if drawn is None else base.among(drawn)
    return np.intersect1d(rows, kept), np.intersect1d(columns, ft.kept)


def against_identity(matching: UnitMatching, num_base: int, num_ft: int, drawn: bool = False) -> Comparison:
    """Returns the comparison of a matching with the identity.

    Layers of equal width are compared index by index. Otherwise indices are replaced by their ranks among the matched
    units, since pruning and copying keep the order of the remaining units. Where units were left out, the places of
    those that remain may follow one rule in both models: the null is that of no more places than such units.

    Where only some units of base were drawn, ft's order can depend on which: all that they are matched to may lie at
    their places. The null is then that of as many places as units.
    """
    p1, p2 = matching.base, matching.ft
    if num_base == num_ft and drawn:
        return _compare(p1, p2, len(p1))
    if num_base == num_ft:
        return _compare(p1, p2, max(matching.live_base, matching.live_ft))
    return _compare(np.argsort(np.argsort(p1)), np.argsort(np.argsort(p2)), len(p1))


def against_each_other(one: UnitMatching, other: UnitMatching) -> Comparison:
    """Returns the comparison of two matchings of the same live units."""
    if one.live_base <= one.live_ft:
        return _compare(one.ft, other.ft, one.live_ft)
    return _compare(one.base, other.base, one.live_base)


def sampled_partners(one: UnitMatching, other: UnitMatching, first: int = 0) -> list[list[int]]:
    """Returns of up to `_PARTNERS` units of base, spread evenly over those in both matchings, the partners in ft.

    Args:
      one: a matching.
      other: another of the same units.
      first: index of the first unit of base that was matched, where these are a run of them.
    """
    both, in_one, in_other = np.intersect1d(one.base, other.base, return_indices=True)
    kept = np.unique(np.linspace(0, len(both) - 1, min(_PARTNERS, len(both))).round().astype(int))
    return np.stack([both + first, one.ft[in_one], other.ft[in_other]], axis=1)[kept].tolist()


def compare_layers(
    layers: Iterable[LayerCorrelations], compare: Callable[[LayerCorrelations], Comparison], run_cache: RunCache
) -> list[Comparison]:
    """Returns the comparison of every layer; those that an interrupted run finished come from its cache.

    A layer is compared before the forward pass continues: its assignment takes a few per cent of the time of a 7B layer
    at most (measured on two cores), and keeping its correlations meanwhile would exceed the memory for a 70B pair.
    """
    found: dict[int, Comparison] = {}
    for layer in layers:
        found[layer.layer] = run_cache.cached(Comparison, (layer.layer,), functools.partial(compare, layer))
        del layer  # frees its correlations before those of the next one are computed
    comparisons: list[Comparison] = []
    while (known := found.get(len(comparisons)) or run_cache.load(Comparison, len(comparisons))) is not None:
        comparisons.append(known)
    return comparisons


def tests_of(
    comparisons: Sequence[Comparison], places: Sequence[str], combine: Callable[[LogPs], float], combined: str
) -> tuple[Test, Test]:
    """Returns the tests by rank correlation and by agreement, each combined over all places."""
    return (
        one_test("rank correlation", comparisons, [c.log_p_rank for c in comparisons], places, combine, combined),
        one_test("agreement", comparisons, [c.log_p_agreement for c in comparisons], places, combine, combined),
    )


def by_agreement(
    comparisons: Sequence[Comparison], places: Sequence[str], combine: Callable[[LogPs], float], combined: str
) -> tuple[Test, Test]:
    """Returns the test by agreement, which decides, and the one by rank correlation, which is reported beside it.

    For units whose order may follow the same rule in both models, as where both were sorted by importance: rank
    correlation of independent models is then above zero, and agreement stays at chance. Below 64 units the tail of rank
    correlation is approximate besides.
    """
    rank, agreeing = tests_of(comparisons, places, combine, combined)
    return agreeing, replace(rank, decides=False)


def one_test(
    name: str,
    comparisons: Sequence[Comparison],
    log_ps: Sequence[float],
    places: Sequence[str],
    combine: Callable[[LogPs], float],
    combined: str,
) -> Test:
    """Returns a test of these natural log p-values, with the units and agreements behind them."""
    values: dict[str, Sequence[float | int]] = {
        "units": [c.units for c in comparisons],
        "agreeing": [c.agreeing for c in comparisons],
        "r": [c.r for c in comparisons],
    }
    log10_ps = [log_p / LN10 for log_p in log_ps]
    return Test(name, combine(log_ps) / LN10, combined, list(places), log10_ps, values)


def share_agreeing(comparisons: Sequence[Comparison]) -> float:
    """Returns the share of all matched units on which the two matchings agree, in [0, 1]."""
    return sum(c.agreeing for c in comparisons) / max(1, sum(c.units for c in comparisons))


def share_by_layer(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Returns for the record, by layer, the share of matched units on which the two matchings agree."""
    return {"label": "units that agree, share", "values": [share_agreeing([layer]) for layer in comparisons]}


def bonferroni_log10(tests: Sequence[Test], firm: bool = False) -> float | None:
    """Returns the decimal log p-value of the smallest of the tests that enter the verdict, after Bonferroni.

    Args:
      tests: of one statistic.
      firm: whether evidence to which a reservation applies is left out.
    """
    log10_ps = [
        test.firm_log10_p if firm and test.firm_log10_p is not None else test.log10_p
        for test in tests
        if test.decides and test.log10_p is not None
    ]
    found = [log10_p for log10_p in log10_ps if log10_p is not None]
    return min(0.0, min(found) + math.log10(len(found))) if found else None


def reserved(tests: Sequence[Test], reservation: str) -> dict[str, Any]:
    """Returns the fields of a result with which evidence is reserved, if the tests have any such evidence."""
    log10_p, firm = bonferroni_log10(tests), bonferroni_log10(tests, firm=True)
    if log10_p is None or firm is None or firm <= log10_p:
        return {}
    return {"reservation": reservation, "firm_log10_p": firm}


def all_reserved(result: Result, reservation: str, but: str | None = None) -> Result:
    """Returns a result none of whose evidence is firm.

    Args:
      result: of one statistic.
      reservation: how else than by descent its p-value can be as small as it is.
      but: how the names of tests begin that are left as they are.
    """
    tests = tuple(
        test if but is not None and test.name.startswith(but) else replace(test, firm_log10_p=0.0)
        for test in result.tests
    )
    firm = bonferroni_log10(tests, firm=True)
    result = replace(result, tests=tests)
    if result.log10_p is None or firm is None or firm <= result.log10_p:
        return result
    return replace(result, firm_log10_p=firm, reservation="; ".join(filter(None, (result.reservation, reservation))))


def overlapped(items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """Yields `work(item)` for each item, in order; it runs on a thread while the next item is computed.

    At most two items exist at a time.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="overlapped") as thread:
        pending: Future[R] | None = None
        for item in items:
            if pending is not None:
                yield pending.result()
            pending = thread.submit(work, item)
            del item  # else it would be kept until the next one is there
        if pending is not None:
            yield pending.result()


def unit_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns what was left out of the comparisons of all layers: copies and units that write nothing."""
    notes = []
    for side, name in enumerate(("base", "ft")):
        if copies := sum(c.copies[side] for c in comparisons):
            notes.append(f"{name}: {copies} units repeat another; of each group of copies one was compared")
        if inactive := sum(c.inactive[side] for c in comparisons):
            notes.append(
                f"{name}: {inactive} units write nothing to the residual stream, read nothing of the tokens, or are in "
                "an expert that no input reaches"
            )
        if mixed := sum(c.mixed[side] for c in comparisons):
            notes.append(
                f"{name}: {mixed} units share a gate with others; their other rows can be any that have the same sum, "
                "so that they are no evidence"
            )
        if alike := sum(c.alike[side] for c in comparisons):
            notes.append(
                f"{name}: {alike} units have two rows that are alike; matchings by them agree by themselves, so that "
                "they are no evidence"
            )
    return notes


def _compare(p1: np.ndarray, p2: np.ndarray, choices: int) -> Comparison:
    h = len(p1)
    if h < 2:  # one unit is no evidence
        return Comparison(h, choices, 0.0, 0, 0.0, 0.0)
    rank, k = spearman(p1, p2), agreement(p1, p2)
    return Comparison(h, choices, rank.r, k, rank.log_p, agreement_log_sf(k, h, choices))
