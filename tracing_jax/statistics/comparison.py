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

from tracing_jax.arch import Arch
from tracing_jax.forward import LayerCorrelations
from tracing_jax.matching import UnitMatching
from tracing_jax.run_cache import RunCache
from tracing_jax.statistics.nulls import agreement, agreement_log_sf, spearman
from tracing_jax.statistics.pvalues import LogPs, fisher
from tracing_jax.statistics.statistic import Pair, Result, Test, widths_not_applicable

LN10 = math.log(10)

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
    """

    units: int
    choices: int
    r: float
    agreeing: int
    log_p_rank: float
    log_p_agreement: float


def against_identity(matching: UnitMatching, num_base: int, num_ft: int) -> Comparison:
    """Returns the comparison of a matching with the identity.

    Layers of equal width are compared index by index. Otherwise indices are replaced by their ranks among the matched
    units, since pruning keeps the order of the remaining units.
    """
    p1, p2 = matching.base, matching.ft
    if num_base == num_ft:
        return _compare(p1, p2, num_ft)
    return _compare(np.argsort(np.argsort(p1)), np.argsort(np.argsort(p2)), len(p1))


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


def bonferroni_log10(tests: Sequence[Test]) -> float | None:
    """Returns the decimal log p-value of the smallest of the tests that enter the verdict, after Bonferroni."""
    log10_ps = [test.log10_p for test in tests if test.decides and test.log10_p is not None]
    return min(0.0, min(log10_ps) + math.log10(len(log10_ps))) if log10_ps else None


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
        return ["experts: units are exchangeable only inside their expert, so no exact null; see match_distilled"]
    return []


def rows_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns reasons why units of these models cannot be compared by the cosine of their rows; empty if they can."""
    return units_not_applicable(base, ft) + widths_not_applicable(base, ft)


def layers_in_common(pair: Pair) -> int:
    """Returns the number of layers that have a counterpart of equal index."""
    return min(pair.base.arch.num_layers, pair.ft.arch.num_layers)


def constrained_result(pair: Pair, comparisons: Sequence[Comparison], label: str) -> Result:
    """Returns the result of a comparison per layer: two tests, each combined by Fisher, then Bonferroni over both."""
    places = [f"layer {i}" for i in range(len(comparisons))]
    tests = tests_of(comparisons, places, fisher, "Fisher over layers")
    notes = []
    depths = [model.arch.num_layers for model in (pair.base, pair.ft)]
    if depths[0] != depths[1]:
        notes.append(f"{depths[0]} and {depths[1]} layers: the first {min(depths)} are compared; see match_all")
    smaller = min(pair.base.arch.mlp_dim, pair.ft.arch.mlp_dim)
    if dead := sum(smaller - comparison.units for comparison in comparisons):
        notes.append(f"{dead} units are zero or never vary, or have no partner, and were left out")
    return Result(
        headline=share_agreeing(comparisons),
        label=label,
        log10_p=bonferroni_log10(tests),
        tests=tests,
        per_layer=share_by_layer(comparisons),
        notes=notes,
    ).for_pair(pair)


def _compare(p1: np.ndarray, p2: np.ndarray, choices: int) -> Comparison:
    h = len(p1)
    if h < 2:  # one unit carries no evidence
        return Comparison(h, choices, 0.0, 0, 0.0, 0.0)
    rank, k = spearman(p1, p2), agreement(p1, p2)
    return Comparison(h, choices, rank.r, k, rank.log_p, agreement_log_sf(k, h, choices))
