"""One layer's evidence: a matching of units compared with the identity, or with another matching of the same units."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracing_jax.forward import LayerCorrelations
from tracing_jax.matching import UnitMatching
from tracing_jax.run_cache import RunCache
from tracing_jax.statistics.permutation_nulls import (
    agreement,
    agreement_log_sf,
    randomised_agreement_log_p,
    spearman,
)
from tracing_jax.statistics.pvalues import LogPs
from tracing_jax.statistics.statistic import Test

LN10 = math.log(10)


@dataclass(frozen=True)
class Comparison:
    """How far two matchings of units agree, with the p-values of a uniformly random matching.

    Attributes:
      units: h, the units matched in both.
      choices: h2, the units that each could have been matched to; `units` where they are permutations.
      r: rank correlation of the two.
      agreeing: k, units that both send to the same unit.
      log_p_rank, log_p_agreement: natural logarithms, one-sided. The second is conservative, since k is discrete.
    """

    units: int
    choices: int
    r: float
    agreeing: int
    log_p_rank: float
    log_p_agreement: float

    def randomised_log_p_agreement(self, generator: np.random.Generator) -> float:
        """Returns the log p-value of the agreement with its ties broken by lot: exactly uniform under the null."""
        if not self.units:
            return 0.0
        return randomised_agreement_log_p(self.agreeing, self.units, self.choices, generator=generator)


def against_identity(matching: UnitMatching, num_base: int, num_ft: int) -> Comparison:
    """Returns how far a matching keeps units in their place.

    Layers of equal width are compared index by index. Else the indices are reduced to their ranks among the matched
    units, since pruning keeps the order of the units that stay.
    """
    p1, p2 = matching.base, matching.ft
    if num_base == num_ft:
        return _compare(p1, p2, num_ft)
    return _compare(np.argsort(np.argsort(p1)), np.argsort(np.argsort(p2)), len(p1))


def against_each_other(one: UnitMatching, other: UnitMatching) -> Comparison:
    """Returns how far two matchings of the same live units agree."""
    if one.live_base <= one.live_ft:
        return _compare(one.ft, other.ft, one.live_ft)
    return _compare(one.base, other.base, one.live_base)


def compare_layers(
    layers: Iterable[LayerCorrelations], compare: Callable[[LayerCorrelations], Comparison], run_cache: RunCache
) -> list[Comparison]:
    """Returns the comparison of every layer: of an interrupted run's layers the one that was kept.

    A layer is assigned before the next one is walked: assigning takes a few per cent of the time of a 7B layer at most
    (measured on two cores), and beside the walk its correlations would take more memory than a 70B pair leaves.
    """
    found: dict[int, Comparison] = {}
    for layer in layers:
        found[layer.layer] = run_cache.cached(Comparison, (layer.layer,), functools.partial(compare, layer))
        del layer  # its correlations go before those of the next one are made
    run_cache.delete("hidden")
    comparisons: list[Comparison] = []
    while (known := found.get(len(comparisons)) or run_cache.load(Comparison, len(comparisons))) is not None:
        comparisons.append(known)
    return comparisons


def tests_of(
    comparisons: Sequence[Comparison], places: Sequence[str], combine: Callable[[LogPs], float], combined: str
) -> tuple[Test, Test]:
    """Returns the tests by rank correlation and by agreement, each over all places."""
    return (
        one_test("rank correlation", comparisons, [c.log_p_rank for c in comparisons], places, combine, combined),
        one_test("agreement", comparisons, [c.log_p_agreement for c in comparisons], places, combine, combined),
    )


def one_test(
    name: str,
    comparisons: Sequence[Comparison],
    log_ps: Sequence[float],
    places: Sequence[str],
    combine: Callable[[LogPs], float],
    combined: str,
) -> Test:
    """Returns one test of these log p-values, beside what was compared."""
    values: dict[str, Sequence[float | int]] = {
        "units": [c.units for c in comparisons],
        "agreeing": [c.agreeing for c in comparisons],
        "r": [c.r for c in comparisons],
    }
    log10_ps = [log_p / LN10 for log_p in log_ps]
    return Test(name, combine(log_ps) / LN10, combined, list(places), log10_ps, values)


def share_agreeing(comparisons: Sequence[Comparison]) -> float:
    """Returns the share of all matched units that the two matchings send to the same unit."""
    return sum(c.agreeing for c in comparisons) / max(1, sum(c.units for c in comparisons))


def share_by_layer(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Returns the share of its matched units on which the two matchings of each layer agree, for the record."""
    return {"label": "units that agree, share", "values": [share_agreeing([layer]) for layer in comparisons]}


def bonferroni_log10(tests: Sequence[Test]) -> float:
    """Returns the decimal log p-value of a decision that may use any of these tests."""
    return min(0.0, min(test.log10_p for test in tests if test.log10_p is not None) + math.log10(len(tests)))


def _compare(p1: np.ndarray, p2: np.ndarray, choices: int) -> Comparison:
    h = len(p1)
    if h < 2:  # nothing can be said of one unit
        return Comparison(h, choices, 0.0, 0, 0.0, 0.0)
    rank, k = spearman(p1, p2), agreement(p1, p2)
    return Comparison(h, choices, rank.r, k, rank.log_p, agreement_log_sf(k, h, choices))
