"""The verdict on a pair: related, independent or undecided, with the test, the level and the significant layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tracing_jax.statistics.pvalues import holm
from tracing_jax.statistics.statistic import Result

DECIDING = (
    "csu", "csh", "match", "match_all", "match_moments", "match_distilled", "screen",
    "unseen_tokens", "features_in_place", "csu_procrustes", "heads_in_place",
)  # fmt: skip
"""Statistics whose p-values are exact, or calibrated against a measured null; only these enter the verdict."""

UNDECIDED_BELOW = 0.05
_EVIDENCE = 20

_MEANING = {
    "related": "one descends from the other, or both from a common ancestor",
    "independent": "no evidence of descent was found; independence is never proved",
    "undecided": "evidence too weak to call at this level, and too strong to dismiss",
}


@dataclass(frozen=True)
class Verdict:
    """The verdict of all tests of a pair as given.

    Attributes:
      verdict: `related` below the level, `undecided` from there to 0.05 or where no test applies, else `independent`.
      meaning: the verdict in a sentence.
      level: the significance level.
      statistic: the statistic with the smallest p-value; None if none applies.
      adjusted_log10_p: its p-value, Holm-adjusted over the statistics in `family`.
      family: statistic -> log10 p, of the statistics in the Holm family.
      layers: the layers significant by themselves in that statistic, after Bonferroni over all its places.
      evidence: the 20 places of smallest p-value in all statistics in `family`, not adjusted, smallest first.
    """

    verdict: Literal["related", "independent", "undecided"]
    meaning: str
    level: float
    statistic: str | None
    adjusted_log10_p: float | None
    family: Mapping[str, float]
    layers: Sequence[str]
    evidence: Sequence[Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Returns the verdict as plain data."""
        return asdict(self)


def verdict(results: Mapping[str, Result], level: float) -> Verdict:
    """Returns the verdict of the results on a pair as given; results on an aligned pair have no p-value to enter it.

    Raises:
      ValueError: a level outside (0, 0.05].

    Example:
      >>> tj.verdict({"csu": tj.Result(0.9, "units in place", log10_p=-12.0)}, level=1e-3).verdict
      'related'
    """
    if not 0 < level <= UNDECIDED_BELOW:
        raise ValueError(f"level={level}: expected above 0 and at most {UNDECIDED_BELOW}")
    found = {name: results[name] for name in DECIDING if name in results and results[name].log10_p is not None}
    if not found:
        meaning = "no test with a null applies to this pair: ask for csu, csh or match"
        return Verdict("undecided", meaning, level, None, None, {}, (), ())
    family = {name: result.log10_p for name, result in found.items() if result.log10_p is not None}
    adjusted = holm([log10_p * math.log(10) for log10_p in family.values()]) / math.log(10)
    statistic, log10_p = min(zip(family, map(float, adjusted)), key=lambda item: (item[1], family[item[0]]))
    word: Literal["related", "independent", "undecided"] = "independent"
    if log10_p < math.log10(level):
        word = "related"
    elif log10_p < math.log10(UNDECIDED_BELOW):
        word = "undecided"
    evidence = ranked_evidence(found)
    layers = _layers_below(found[statistic], level) if word == "related" else []
    return Verdict(word, _MEANING[word], level, statistic, log10_p, family, layers, evidence[:_EVIDENCE])


def over_pairs(log10_ps: Sequence[float | None]) -> list[float | None]:
    """Returns the p-values of several pairs, Holm-adjusted over those that have one, as decimal logarithms.

    Each is already adjusted over the statistics of its pair, so it is the p-value of that pair alone.
    """
    known = [log10_p for log10_p in log10_ps if log10_p is not None]
    if not known:
        return list(log10_ps)
    adjusted = iter(map(float, holm([log10_p * math.log(10) for log10_p in known]) / math.log(10)))
    return [None if log10_p is None else next(adjusted) for log10_p in log10_ps]


def ranked_evidence(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Returns every place of every test that enters the verdict with its log10 p, smallest first."""
    rows = [
        {"statistic": name, "test": test.name, "place": place, "log10_p": log10_p}
        for name, result in results.items()
        for test in result.tests
        if test.decides
        for place, log10_p in zip(test.places, test.log10_ps or ())
    ]
    return sorted(rows, key=lambda row: row["log10_p"])


def _layers_below(result: Result, level: float) -> list[str]:
    deciding = [test for test in result.tests if test.decides]
    looked_at = sum(len(test.places) for test in deciding)
    carrying = {
        place: None
        for test in deciding
        for place, log10_p in zip(test.places, test.log10_ps or ())
        if log10_p + math.log10(looked_at) < math.log10(level)
    }
    return sorted(carrying, key=_natural)


def _natural(place: str) -> tuple[list[int], str]:
    return [int(word) if word.isdigit() else 0 for word in place.split()], place
