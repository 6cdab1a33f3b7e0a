"""One layer's evidence: a matching of units compared with the identity, or with another matching of the same units.

Below, what statistics make of such comparisons: tests, shares, and the result of the constrained tests `csu` and `csh`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.forward import LayerCorrelations
from tracing_jax.matching import FactoredSimilarity, UnitMatching, live_units, match_units
from tracing_jax.run_cache import RunCache
from tracing_jax.statistics.distinct_units import DistinctUnits
from tracing_jax.statistics.nulls import agreement, agreement_log_sf, composite_agreement_log_sf, spearman
from tracing_jax.statistics.pvalues import LogPs, bonferroni, fisher
from tracing_jax.statistics.statistic import Pair, Result, Test, widths_not_applicable
from tracing_jax.tree import taken

LN10 = math.log(10)

ORDERED_BELOW = 0.01
"""p-value of units in no particular order, over all layers, below which a model's units count as put in an order."""

OUTSTANDING = 0.1
"""Share of the units of independent models that may stand out where their order was chosen afterwards: the 1 % of the
definition, matched units that are the best of all and not of all others (3 %), and units alike by convergence (5 %)."""

BY_ORDER = (
    "units of independent models can be put in the same order by whoever has both: order alone is no evidence, only "
    "units in place that are more similar than those of strangers are"
)

_LOOKED_AT = 1024  # matched units of a layer at most, whose similarities to all others are looked at

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
      copies, silent: of base and of ft, units that repeat another, and units that write nothing; all left out.
      order_p: of base and of ft, the p-value of units in no particular order; see `DistinctUnits`.
    """

    units: int
    choices: int
    r: float
    agreeing: int
    log_p_rank: float
    log_p_agreement: float
    sampled: int = 0
    outstanding: int = 0
    copies: Sequence[int] = (0, 0)
    silent: Sequence[int] = (0, 0)
    order_p: Sequence[float] = (1.0, 1.0)

    def of_units(self, base: DistinctUnits, ft: DistinctUnits) -> "Comparison":
        """Returns the comparison with what is known of the units of both layers."""
        order_p = tuple(min(1.0, len(side.order_p) * min(side.order_p, default=1.0)) for side in (base, ft))
        return replace(self, copies=(base.copies, ft.copies), silent=(base.silent, ft.silent), order_p=order_p)


def in_place(
    similarity: Float[Array | np.ndarray, "n m"] | FactoredSimilarity,
    units: tuple[DistinctUnits, DistinctUnits],
    generator: np.random.Generator,
) -> Comparison:
    """Returns the comparison of the matching of distinct units, by absolute similarity, with the identity.

    Args:
      similarity: of all units of base's layer with all of ft's.
      units: of base and of ft, those that are matched.
      generator: for the matching, and for the units looked at by `placed_beyond_order`.
    """
    base, ft = units
    matching = match_units(similarity, generator, live_among(base, ft, similarity), absolute=True)
    found = against_identity(matching, base.total, ft.total, has_copies=bool(base.copies or ft.copies))
    sampled, outstanding = placed_beyond_order(similarity, matching, ft.kept, base.total == ft.total, generator)
    return replace(found, sampled=sampled, outstanding=outstanding).of_units(base, ft)


def live_among(
    base: DistinctUnits, ft: DistinctUnits, *similarities: Float[Array | np.ndarray, "n m"] | FactoredSimilarity
) -> tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]:
    """Returns the distinct units of base and of ft that have a nonzero entry in every one of these matrices."""
    rows, columns = live_units(*similarities)
    return np.intersect1d(rows, base.kept), np.intersect1d(columns, ft.kept)


def against_identity(matching: UnitMatching, num_base: int, num_ft: int, has_copies: bool = False) -> Comparison:
    """Returns the comparison of a matching with the identity.

    Layers of equal width are compared index by index. Otherwise indices are replaced by their ranks among the matched
    units, since pruning and copying keep the order of the remaining units. Where copies were merged, the places of the
    units left may follow one rule in both models: the null is then that of no more places than units.
    """
    p1, p2 = matching.base, matching.ft
    if num_base == num_ft:
        return _compare(p1, p2, max(matching.live_base, matching.live_ft) if has_copies else num_ft)
    return _compare(np.argsort(np.argsort(p1)), np.argsort(np.argsort(p2)), len(p1))


def placed_beyond_order(
    similarity: Float[Array | np.ndarray, "n m"] | FactoredSimilarity,
    matching: UnitMatching,
    columns: Int[np.ndarray, " _"],
    by_index: bool,
    generator: np.random.Generator,
) -> tuple[int, int]:
    """Returns how many pairs of matched units were looked at, and how many stand out at equal places.

    Whoever has both models can reorder the units of an independent one until the matching is the identity. Its matched
    units are then as similar as the best of strangers, and not more: a pair stands out if it is more similar than 99 %
    of the units are to their best partner but the matched one.
    """
    drawn = np.sort(generator.permutation(len(matching.base))[:_LOOKED_AT])
    if not len(drawn) or len(columns) < 2:
        return 0, 0
    base, ft = matching.base[drawn], matching.ft[drawn]
    if by_index:
        same = base == ft
    else:
        same = np.argsort(np.argsort(matching.base))[drawn] == np.argsort(np.argsort(matching.ft))[drawn]
    rows = np.abs(_rows_of(similarity, base))
    own = rows[np.arange(len(drawn)), ft].copy()
    rows[np.arange(len(drawn)), ft] = 0.0
    best_other = rows[:, columns].max(axis=1)
    return len(drawn), int((same & (own > np.quantile(best_other, 0.99))).sum())


def _rows_of(
    similarity: Float[Array | np.ndarray, "n m"] | FactoredSimilarity, rows: Int[np.ndarray, " r"]
) -> Float[np.ndarray, "r m"]:
    if isinstance(similarity, FactoredSimilarity):
        return np.array(taken(similarity.x, rows) @ similarity.y.T)
    return np.array(taken(similarity, rows))


def against_each_other(one: UnitMatching, other: UnitMatching) -> Comparison:
    """Returns the comparison of two matchings of the same live units."""
    if one.live_base <= one.live_ft:
        return _compare(one.ft, other.ft, one.live_ft)
    return _compare(one.base, other.base, one.live_base)


def compare_layers(
    layers: Iterable[LayerCorrelations], compare: Callable[[LayerCorrelations], Comparison], run_cache: RunCache
) -> list[Comparison]:
    """Returns the comparison of every layer; those that an interrupted run finished come from its cache.

    A layer is compared before the forward pass goes on: its assignment takes a few per cent of the time of a 7B layer
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


def units_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns reasons why the MLP units of these models have no exact null; empty if they have."""
    experts = [getattr(arch, "num_experts", None) for arch in (base, ft)]
    if any(experts):
        return ["experts: units are exchangeable only inside their expert, so no exact null; see match_mlps"]
    return []


def rows_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns reasons why units of these models cannot be compared by the cosine of their rows; empty if they can."""
    return units_not_applicable(base, ft) + widths_not_applicable(base, ft)


def layers_in_common(pair: Pair) -> int:
    """Returns the number of layers that have a counterpart of equal index."""
    return min(pair.base.arch.num_layers, pair.ft.arch.num_layers)


def constrained_result(pair: Pair, comparisons: Sequence[Comparison], label: str) -> Result:
    """Returns the result of a comparison per layer: two tests, each combined by Fisher, then Bonferroni over both.

    The null is exact if the units of one of the models are in no particular order. Where units of both were put in an
    order that depends on their weights, both orders may follow the same rule: rank correlation is then left out. Where
    the units in place are no more similar than an order chosen afterwards makes them, the p-value is reserved: it
    cannot call the pair related.
    """
    places = [f"layer {i}" for i in range(len(comparisons))]
    tests = in_place_tests(comparisons, places)
    ordered = ordered_models(comparisons)
    return Result(
        headline=share_agreeing(comparisons),
        label=label,
        log10_p=bonferroni_log10(tests),
        tests=tests,
        per_layer=share_by_layer(comparisons),
        notes=[*_depth_notes(pair), *unit_notes(comparisons), *order_notes(ordered)],
        premises=order_premises(ordered),
        effect=in_place_effect(comparisons),
        **reserved(tests, BY_ORDER),
    ).for_pair(pair)


def in_place_tests(comparisons: Sequence[Comparison], places: Sequence[str]) -> tuple[Test, Test, Test]:
    """Returns the tests of units in place: by rank correlation, by agreement, and of units that stand out.

    The first is left out of the verdict where the units of both models were put in an order. The third enters it
    through the reservation that the first two have without it.
    """
    rank, agreement = tests_of(comparisons, places, fisher, "Fisher over layers")
    outstanding = _outstanding_test(comparisons, places)

    def firm(test: Test) -> float | None:
        return None if test.log10_p is None or outstanding.log10_p is None else max(test.log10_p, outstanding.log10_p)

    decides = not all(ordered_models(comparisons))
    return (
        replace(rank, decides=decides, firm_log10_p=firm(rank)),
        replace(agreement, firm_log10_p=firm(agreement)),
        outstanding,
    )


def in_place_effect(comparisons: Sequence[Comparison]) -> str:
    """Returns how many units are in place, and how many are by chance, as a sentence."""
    units, agreeing = sum(c.units for c in comparisons), sum(c.agreeing for c in comparisons)
    return (
        f"{agreeing:,} of {units:,} units are in the same place; in independent models about one in each of "
        f"{len(comparisons)} layers is"
    )


def ordered_models(comparisons: Sequence[Comparison]) -> tuple[bool, bool]:
    """Returns for base and for ft whether its units were put in an order that depends on their weights."""
    base, ft = (
        min((c.order_p[side] for c in comparisons), default=1.0) * max(1, len(comparisons)) < ORDERED_BELOW
        for side in (0, 1)
    )
    return base, ft


def order_premises(ordered: Sequence[bool]) -> list[dict[str, Any]]:
    """Returns for the record the premise of the exact tests, that one model's units are in no particular order."""
    return [
        {
            "premise": f"units of {side} in no particular order (index against norms of gate, up and down rows)",
            "holds": not found,
            "needed": "of one of the two models",
        }
        for side, found in zip(("base", "ft"), ordered, strict=True)
    ]


def order_notes(ordered: Sequence[bool]) -> list[str]:
    """Returns what follows if the units of both models are in an order that depends on their weights."""
    if not all(ordered):
        return []
    return [
        "the units of both models are in an order that depends on their norms: rank correlation, which any common rule "
        "for the order raises, is left out, and the p-value is conditional on two orders that do not follow one rule"
    ]


def unit_notes(comparisons: Sequence[Comparison]) -> list[str]:
    """Returns what was left out of the comparisons of all layers: copies and units that write nothing."""
    notes = []
    for side, name in enumerate(("base", "ft")):
        if copies := sum(c.copies[side] for c in comparisons):
            notes.append(f"{name}: {copies} units repeat another; of each group of copies one was compared")
        if silent := sum(c.silent[side] for c in comparisons):
            notes.append(f"{name}: {silent} units write nothing to the residual stream; they carry no evidence")
    return notes


def _depth_notes(pair: Pair) -> list[str]:
    depths = [model.arch.num_layers for model in (pair.base, pair.ft)]
    if depths[0] == depths[1]:
        return []
    return [f"{depths[0]} and {depths[1]} layers: the first {min(depths)} are compared; see match_all"]


def _outstanding_test(comparisons: Sequence[Comparison], places: Sequence[str]) -> Test:
    """Returns the test that more units stand out in place than an order chosen afterwards can make stand out."""
    log_ps = [
        composite_agreement_log_sf(c.outstanding, c.sampled, OUTSTANDING, 1.0) if c.sampled else 0.0
        for c in comparisons
    ]
    values: dict[str, Sequence[float | int]] = {
        "looked at": [c.sampled for c in comparisons],
        "in place and more similar than strangers": [c.outstanding for c in comparisons],
    }
    log10_ps = [log_p / LN10 for log_p in log_ps]
    log10_p = bonferroni(log_ps) / LN10 if log_ps else 0.0
    return Test(
        "similarity in place", log10_p, "Holm's minimum over layers", list(places), log10_ps, values, decides=False
    )


def _compare(p1: np.ndarray, p2: np.ndarray, choices: int) -> Comparison:
    h = len(p1)
    if h < 2:  # one unit carries no evidence
        return Comparison(h, choices, 0.0, 0, 0.0, 0.0)
    rank, k = spearman(p1, p2), agreement(p1, p2)
    return Comparison(h, choices, rank.r, k, rank.log_p, agreement_log_sf(k, h, choices))
