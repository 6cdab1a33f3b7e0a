"""How often do the tests of `match` call independent models related?"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from benchmarks.agreements import Agreements
from benchmarks.intervals import clopper_pearson, rounds, upper_bound
from tracing_jax.statistics import Test
from tracing_jax.statistics.calibration import DEFAULT_ALLOWANCE, measured_allowance, null_of
from tracing_jax.statistics.comparison import LN10, bonferroni_log10
from tracing_jax.statistics.match import form_tests
from tracing_jax.statistics.pvalues import fisher

LEVELS = (1e-2, 1e-3)
CONFIDENCE = 0.99  # of the bounds on the share of units that convergence adds
_CONTROLS = 2  # models given as outside controls to each pair

SharesByForm = Mapping[str, Agreements]
"""The comparisons of one zoo by form."""


@dataclass(frozen=True)
class Alarms:
    """How often one test found p below a level among independent models.

    Attributes:
      zoo, test, u: the models, the test, and where the allowance for convergent units came from.
      level: of the test.
      pairs, hits: pairs of models, and those with p below the level.
      low, high: 95 % Clopper-Pearson interval of the rate, as if pairs were independent.
      high_models: the same upper end, or that of the interval that takes models, not pairs, for the sample, if higher.
      worst_round: the most hits in one of the rounds that divide the pairs so that no model is in two of a round.
      round_high: upper end of the 95 % Clopper-Pearson interval of that round alone, whose pairs are independent.
    """

    zoo: str
    test: str
    u: str
    level: float
    pairs: int
    hits: int
    low: float
    high: float
    high_models: float
    worst_round: int
    round_high: float


Allowance = Callable[[str, int, int], Sequence[float]]
"""Form and pair -> for each layer the share of units that may agree by convergence."""


def false_alarms(zoos: Mapping[str, SharesByForm]) -> list[Alarms]:
    """Returns the false alarms of every test on every zoo, at each level."""
    found: list[Alarms] = []
    for name, forms in zoos.items():
        found += _alarms(name, "none", forms, _constant(forms, 0.0))
        found += _alarms(name, f"{DEFAULT_ALLOWANCE:g}", forms, _constant(forms, DEFAULT_ALLOWANCE))
        found += _alarms(name, f"{_CONTROLS} controls", forms, _from_controls(forms))
    largest = max(zoos, key=lambda name: len(next(iter(zoos[name].values())).layers))
    bounds = {form: measured_bounds(half_of(one, 0)) for form, one in zoos[largest].items()}
    others = {form: half_of(one, 1) for form, one in zoos[largest].items()}
    return found + list(_alarms(largest, "measured on other seeds", others, lambda form, i, j: bounds[form]))


def _constant(forms: SharesByForm, u: float) -> Allowance:
    return lambda form, i, j: [u] * forms[form].agreeing.shape[-1]


def _from_controls(forms: SharesByForm) -> Allowance:
    """Returns the allowance that other models of the zoo give, each against both models of the pair."""

    def allowance(form: str, i: int, j: int) -> Sequence[float]:
        one = forms[form]
        others = np.delete(np.arange(len(one.layers)), [i, j])
        drawn = np.random.default_rng([5, i, j]).choice(others, _CONTROLS, replace=False)
        return measured_allowance([one.pair(int(control), model)[0] for control in drawn for model in (i, j)], 1e-3)

    return allowance


def half_of(measured: Agreements, half: int) -> Agreements:
    """Returns the comparisons among every second model."""
    return Agreements(measured.layers[half::2, half::2], measured.controls[half::2, half::2])


def measured_bounds(measured: Agreements) -> list[float]:
    """Returns for each layer the upper bound on the share of units that convergence adds."""
    units = measured.layers[0, 1, 0, 0]
    excess = (measured.agreeing - measured.agreeing_controls[..., None]) / units
    return [max(0.0, upper_bound(layer, CONFIDENCE)) for layer in np.moveaxis(excess, -1, 0)]


def _alarms(zoo: str, source: str, forms: SharesByForm, u: Allowance) -> Iterator[Alarms]:
    for test, log10_ps in _log10_ps(forms, u).items():
        parametric = "parametric" in test
        if parametric and source != "none":
            continue  # it has no allowance and has been counted
        for level in LEVELS:
            yield _count(log10_ps < np.log10(level), zoo, test, "-" if parametric else source, level)


def _log10_ps(forms: SharesByForm, u: Allowance) -> dict[str, Float[np.ndarray, "S S"]]:
    """Returns by test the decimal log p-values of all pairs, symmetric."""
    S = len(next(iter(forms.values())).layers)
    tables: dict[str, np.ndarray] = {}
    for i, j in itertools.combinations(range(S), 2):
        for name, log10_p in _tests(forms, u, i, j):
            table = tables.setdefault(name, np.zeros((S, S)))
            table[i, j] = table[j, i] = log10_p
    return tables


def _tests(forms: SharesByForm, u: Allowance, i: int, j: int) -> Iterator[tuple[str, float]]:
    tests: list[Test] = []
    for form, measured in forms.items():
        layers, controls = measured.pair(i, j)
        found = form_tests(form, layers, null_of(controls, u(form, i, j), ""))
        tests += found
        yield from ((test.name, test.log10_p) for test in found if test.log10_p is not None)
        yield f"{form}, rank correlation, parametric, Fisher", fisher([c.log_p_rank for c in layers]) / LN10
    log10_p = bonferroni_log10(tests)
    assert log10_p is not None
    yield "match: any of the calibrated, Bonferroni", log10_p


def _count(hit: np.ndarray, zoo: str, test: str, u: str, level: float) -> Alarms:
    S = len(hit)
    divided = rounds(S, np.random.default_rng(0))
    by_round = hit[divided[..., 0], divided[..., 1]].sum(-1)
    hits, pairs = int(by_round.sum()), S * (S - 1) // 2
    worst = int(by_round.max())
    low, high = clopper_pearson(hits, pairs)
    return Alarms(
        zoo, test, u, level, pairs, hits, low, high, max(high, upper_bound(hit.astype(float), 0.975)), worst,
        clopper_pearson(worst, S // 2)[1],
    )  # fmt: skip
