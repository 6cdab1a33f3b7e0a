"""Tests that match units in several ways apart, and count on how many of them two of the matchings agree.

Agreement does not depend on the order of the units of either model. Its null is that of `calibration.py`: controls are
layers of the two models that do not correspond.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Array, Int

from tracing_jax.arch import Arch
from tracing_jax.matching import UnitMatching, live_units, match_units
from tracing_jax.statistics.calibration import (
    BY_CONVERGENCE,
    DEFAULT_ALLOWANCE,
    DEFAULT_SOURCE,
    Null,
    agreement_effect,
    calibrated_test,
    control_source,
    measured_allowance,
    null_of,
)
from tracing_jax.statistics.comparison import (
    Comparison,
    against_each_other,
    bonferroni_log10,
    one_test,
    reserved,
    share_agreeing,
    share_by_layer,
)
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.statistic import Pair, Result, Test

Similarities = Mapping[str, Array | np.ndarray]
"""What units are matched by -> the similarity of each unit of base with each of ft."""

Agreements = dict[str, Comparison]
"""Two of these, such as `up and effect` -> the comparison of the two matchings."""

_HOLM = "Holm's minimum over layers"


@dataclass(frozen=True)
class PairAgreements:
    """All agreements of two models.

    Attributes:
      layers: of each pair of layers that correspond.
      controls: of pairs of layers that do not.
    """

    layers: Sequence[Agreements]
    controls: Sequence[Agreements]

    def of(self, name: str) -> tuple[list[Comparison], list[Comparison]]:
        """Returns the comparisons of this name: of the layers, and of the controls."""
        return [found[name] for found in self.layers], [found[name] for found in self.controls]


def agreements(
    similarities: Similarities, pairs: Sequence[tuple[str, str]], pair: Pair, names: Sequence[str | int]
) -> Agreements:
    """Returns for each of the named pairs of similarities the agreement of their matchings.

    All are over the same units, those with a nonzero entry in every similarity: a unit that reads nothing, or writes
    nothing, takes no part.
    """
    found = matchings(similarities, pair, names, live_units(*similarities.values()))
    return {f"{one} and {other}": against_each_other(found[one], found[other]) for one, other in pairs}


def matchings(
    similarities: Similarities,
    pair: Pair,
    names: Sequence[str | int],
    units: tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]],
    absolute: Collection[str] = (),
) -> dict[str, UnitMatching]:
    """Returns the matching of these units of base and of ft by each similarity, with a random order of its own.

    Args:
      similarities: what units are matched by.
      pair: the pair, for the seed of the run.
      names: what distinguishes the generators of these matchings from others.
      units: of base and of ft, those that are matched.
      absolute: the similarities of which the sign does not count.
    """

    def matched(name: str) -> UnitMatching:
        return match_units(similarities[name], pair.generator(*names, name), units, absolute=name in absolute)

    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="matching") as threads:
        return dict(zip(similarities, threads.map(matched, similarities)))


def nulls_of(
    compared: PairAgreements, pair: Pair, compare: Callable[[Pair, str], PairAgreements], level: float
) -> dict[str, Null]:
    """Returns the null of every agreement, with an allowance from control models where the pair has them.

    Args:
      compared: the agreements of the pair, with their controls.
      pair: the pair, with its control models.
      compare: compares a control model, in the place of base, with base or with ft; each such pair has its own name.
      level: of the verdict; see `measured_allowance`.
    """
    measured = [
        compare(replace(other, base=control, controls=()), f"control {i} {side}")
        for i, control in enumerate(pair.controls)
        for side, other in (("base", pair.of_base()), ("ft", pair))
    ]
    nulls = {}
    for name in compared.layers[0]:
        u, source = [DEFAULT_ALLOWANCE] * len(compared.layers), DEFAULT_SOURCE
        if measured:
            u = measured_allowance([found.of(name)[0] for found in measured], level, models=len(pair.controls))
            source = control_source(len(pair.controls), 2)
        nulls[name] = null_of(compared.of(name)[1], u, source)
    return nulls


def agreement_tests(name: str, layers: Sequence[Comparison], null: Null, places: Sequence[str]) -> list[Test]:
    """Returns the calibrated test of an agreement, which enters the verdict, and the parametric one, which does not."""
    calibrated = [null.log_p_agreement(i, found) for i, found in enumerate(layers)]
    parametric = [found.log_p_agreement for found in layers]
    shares = [share_agreeing([found]) for found in layers]
    return [
        calibrated_test(f"{name}, agreement, calibrated", calibrated, shares, layers, places, null),
        replace(
            one_test(f"{name}, agreement, parametric", layers, parametric, places, bonferroni, _HOLM), decides=False
        ),
    ]


def agreement_result(
    statistic: str,
    pair: Pair,
    compared: PairAgreements,
    nulls: Mapping[str, Null],
    label: str,
    places: Sequence[str],
) -> Result:
    """Returns the result of all agreements: each by Holm's minimum over layers, then Bonferroni over all.

    The effect size is that of the agreement with the greatest share, beside what the statistic of this name shows of
    independent models.
    """
    layers = {name: compared.of(name)[0] for name in nulls}
    tests = [test for name, null in nulls.items() for test in agreement_tests(name, layers[name], null, places)]
    best = max(layers.values(), key=share_agreeing)
    return Result(
        headline=share_agreeing(best),
        label=label,
        log10_p=bonferroni_log10(tests),
        tests=tests,
        null={name: null.as_dict() for name, null in nulls.items()},
        per_layer=share_by_layer(best),
        notes=[f"{name}: {note}" for name, null in nulls.items() for note in null.notes],
        effect=agreement_effect(best, statistic),
        **reserved(tests, BY_CONVERGENCE),
    ).for_pair(pair)


def dense_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns the reason why the models have no one MLP per layer; empty if they have."""
    sides = [side for side, arch in (("base", base), ("ft", ft)) if getattr(arch, "num_experts", None)]
    return [f"{side} has experts: no two layers have the same units; see match_mlps" for side in sides]


def some_units(units: int, most: int, pair: Pair, *names: str | int) -> np.ndarray:
    """Returns at most so many of the units of a layer, drawn from the seed of the run, in increasing order."""
    return np.sort(pair.generator(*names, "units", units).permutation(units)[:most])
