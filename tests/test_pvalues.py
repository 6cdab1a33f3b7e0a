"""P-values in log space: exact where they can be listed, right to the last digits far in the tail, uniform under H0.

Logarithms written out below were computed with 50 and more digits, by numerical integration or exact fractions.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from tracing_jax.statistics.nulls import (
    agreement,
    agreement_log_sf,
    composite_agreement_log_sf,
    randomised_agreement_log_p,
    rank_log_sf,
    spearman,
    spearman_log_sf,
)
from tracing_jax.statistics.pvalues import bonferroni, fisher, holm, permutation_test

LOG_PS = st.lists(st.floats(-1e5, 0.0), min_size=1, max_size=20)

# h, 1 - r, log P(T > t)
STUDENT_TAILS = [
    (10, 0.1, -8.549829380208207),
    (10, 0.75, -1.414607372908244),
    (10, 1.0, -0.6931471805599453),
    (10, 1.9, -0.0001935968636635425),
    (100, 0.5, -16.6453115078836),
    (100, 1.25, -0.006080045266929467),
    (512, 0.9, -4.437847166241929),
    (512, 1.0625, -0.08224604545706943),
    (4096, 0.25, -1697.001185514589),
    (11008, 0.98, -4.020887676283061),
    (11008, 0.5, -1587.993629042167),
    (11008, 1e-4, -46875.9612484326),
    (30000, 0.99, -3.178818247261882),
    (30000, 0.45, -5408.906856240917),
    (30000, 1e-8, -265901.3493821709),
    (30000, 1.01, -0.04252639215232419),
]

# k, h1, h2, log P(K >= k)
AGREEMENT_TAILS = [
    (1, 30000, 30000, -0.4586751453870819),
    (5, 30000, 30000, -5.610333982897155),
    (1000, 30000, 30000, -5913.127178988828),
    (30000, 30000, 30000, -279274.6532369701),
    (2, 11008, 14336, -1.716452721467853),
    (50, 11008, 14336, -162.46314865708513),
    (11007, 11008, 14336, -99187.91736312816),
    (29998, 29999, 30000, -279264.3442843094),
]

# k, h, u, lambda, log P(K >= k)
COMPOSITE_TAILS = [
    (5, 5, 0.0, 0.3, -11.05644786759145),
    (3, 5, 0.5, 5.0, -0.012394302371352549),
    (9, 512, 0.01, 1.0, -1.8045507947933241),
    (512, 512, 0.05, 1.0, -1350.2048645934976),
    (4, 512, 0.05, 1.0, -5.837879516067614e-09),
    (1, 512, 0.05, 1.0, -1.4460770243501894e-12),
    (1000, 11008, 0.05, 200.0, -42.13929715814353),
    (11008, 11008, 0.05, 1.0, -32077.097505984377),
    (1400, 30000, 0.05, 1.0, -0.0033355375633238723),
    (30000, 30000, 0.999, 1.0, -21.972240676873632),
    (1, 30000, 1e-9, 1e-6, -10.381538852955222),
]


def injections(h1, h2):
    return [np.array(p) for p in itertools.permutations(range(h2), h1)]


def is_log_p(log_p):
    return math.isfinite(log_p) and log_p <= 0


def assert_uniform(log_ps):
    assert all(is_log_p(log_p) for log_p in log_ps)
    assert scipy.stats.kstest(np.exp(log_ps), "uniform").pvalue > 0.01


@pytest.mark.parametrize("h", range(2, 8))
def test_spearman_of_few_units_counts_all_permutations(h):
    identity = np.arange(h)
    distances = np.array([((p - identity) ** 2).sum() for p in injections(h, h)])
    for p in injections(h, h)[:: 1 + math.factorial(h) // 100]:
        at_least = np.mean(distances <= ((p - identity) ** 2).sum())
        assert spearman(identity, p).log_p == pytest.approx(math.log(at_least), rel=1e-12, abs=1e-15)


def test_spearman_is_that_of_scipy():
    rng = np.random.default_rng(0)
    for h in (9, 30, 300):
        p1, p2 = rng.permutation(h), rng.permutation(h)
        ours, theirs = spearman(p1, p2), scipy.stats.spearmanr(p1, p2, alternative="greater")
        assert ours.r == pytest.approx(theirs.statistic, rel=1e-12)
        if h > 9:
            assert math.exp(ours.log_p) == pytest.approx(theirs.pvalue, rel=1e-10)


def test_spearman_of_injections_is_that_of_their_ranks():
    wide = np.array([3, 90, 17, 41, 5, 60])
    ranks = np.array([0, 5, 2, 3, 1, 4])
    other = np.array([1, 5, 0, 3, 2, 4])
    assert spearman(wide, other * 7) == spearman(ranks, other)


@pytest.mark.parametrize(("h", "one_minus_r", "log_p"), STUDENT_TAILS)
def test_student_tail_keeps_its_digits(h, one_minus_r, log_p):
    assert spearman_log_sf(one_minus_r, h) == pytest.approx(log_p, rel=1e-11)


@pytest.mark.parametrize("h", [3, 10, 41, 42, 512, 11008, 30000])
def test_student_tail_rises_with_the_distance_and_is_floored(h):
    distances = np.concatenate([[0.0], np.geomspace(1e-12, 1, 200), 2 - np.geomspace(1, 1e-12, 200)[1:], [2.0]])
    tails = np.array([spearman_log_sf(float(distance), h) for distance in distances])
    assert (np.diff(tails) >= -1e-14 * np.abs(tails[1:])).all()
    assert tails[0] == pytest.approx(-math.lgamma(h + 1), rel=1e-14)
    assert tails[-1] == 0
    assert all(is_log_p(tail) for tail in tails)


@pytest.mark.parametrize("h", [2, 9, 64, 2000])
def test_spearman_of_equal_and_of_reversed_matchings(h):
    p = np.random.default_rng(h).permutation(h)
    same, opposite = spearman(p, p), spearman(p, h - 1 - p)
    assert (same.r, opposite.r) == (1, -1)
    assert same.log_p == pytest.approx(-math.lgamma(h + 1), rel=1e-14)
    assert opposite.log_p == 0


@pytest.mark.parametrize("h", [10, 12])
def test_rank_correlation_of_few_units_is_no_smaller_than_its_exact_tail(h):
    """By the exact counts of all permutations, from a walk over sets of used indices; the t tail alone is too small."""
    counts = {0: {0: 1}}
    for i in range(h):
        following = {}
        for used, sums in counts.items():
            for j in (j for j in range(h) if not used >> j & 1):
                to = following.setdefault(used | 1 << j, {})
                for total, number in sums.items():
                    to[total + (i - j) ** 2] = to.get(total + (i - j) ** 2, 0) + number
        counts = following
    ((_, sums),) = counts.items()
    tails, below = [], 0
    for total in sorted(sums):
        below += sums[total]
        exact = below / math.factorial(h)
        if 1e-4 < exact < 0.04:
            tails.append((total, exact))
    found = [math.exp(rank_log_sf(6 * total / (h * (h * h - 1)), h)) for total, _ in tails]
    by_t = [math.exp(spearman_log_sf(6 * total / (h * (h * h - 1)), h)) for total, _ in tails]
    exact = np.array([tail for _, tail in tails])
    spread = 4 * np.sqrt(exact / 200_000) + 1e-5
    assert (np.array(found) > exact - spread).all()
    assert (np.array(found) < 1.15 * exact + spread).all()
    at = np.abs(exact - 1e-3).argmin()
    assert by_t[at] < 0.85 * exact[at]  # 1e-3 is 1.4e-3 at 10 units


@settings(deadline=None)
@given(st.permutations(range(12)), st.permutations(range(12)), st.permutations(range(12)))
def test_both_compare_matchings_whatever_their_order(p1, p2, order):
    p1, p2, order = np.array(p1), np.array(p2), np.array(order)
    assert spearman(p1, p2) == spearman(p2, p1) == spearman(p1[order], p2[order])
    assert agreement(p1, p2) == agreement(p2, p1) == agreement(order[p1], order[p2])
    assert is_log_p(spearman(p1, p2).log_p)


def test_spearman_is_uniform_under_the_null():
    rng = np.random.default_rng(1)
    p = rng.permutation(200)
    assert_uniform([spearman(p, rng.permutation(200)).log_p for _ in range(3000)])


@pytest.mark.parametrize(("h1", "h2"), [(1, 1), (2, 2), (7, 7), (1, 3), (4, 5), (3, 7)])
def test_agreement_of_few_units_counts_all_injections(h1, h2):
    found = np.array([agreement(np.arange(h1), p) for p in injections(h1, h2)])
    for k in range(h1 + 1):
        at_least = math.log(np.mean(found >= k))
        assert agreement_log_sf(k, h1, h2) == pytest.approx(at_least, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("h1", "h2"), [(30, 30), (30, 31), (40, 90)])
def test_agreement_is_the_alternating_sum_in_fractions(h1, h2):
    s = [Fraction(math.comb(h1, j) * math.factorial(h2 - j), math.factorial(h2)) for j in range(h1 + 1)]
    for k in range(1, h1 + 1):
        exact = sum((-1) ** (j - k) * math.comb(j - 1, k - 1) * s[j] for j in range(k, h1 + 1))
        log_exact = math.log(exact.numerator) - math.log(exact.denominator)
        assert agreement_log_sf(k, h1, h2) == pytest.approx(log_exact, rel=1e-12)


@pytest.mark.parametrize(("k", "h1", "h2", "log_p"), AGREEMENT_TAILS)
def test_agreement_tail_keeps_its_digits(k, h1, h2, log_p):
    assert agreement_log_sf(k, h1, h2) == pytest.approx(log_p, rel=1e-12)


@pytest.mark.slow
def test_agreement_is_that_of_simulated_injections():
    rng, draws = np.random.default_rng(2), 20000
    found = np.array([agreement(np.arange(15), rng.permutation(20)[:15]) for _ in range(draws)])
    for k in range(1, 5):
        p = math.exp(agreement_log_sf(k, 15, 20))
        assert np.mean(found >= k) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 400))
def test_agreement_tail_falls_with_k_and_randomising_stays_within_a_step(h1, wider, k):
    h2, k = h1 + wider, min(k, h1)
    log_p = agreement_log_sf(k, h1, h2)
    randomised = randomised_agreement_log_p(k, h1, h2, generator=np.random.default_rng(0))
    assert is_log_p(log_p)
    assert is_log_p(randomised)
    assert randomised <= log_p + 1e-12 * abs(log_p)
    if k < h1:
        next_log_p = agreement_log_sf(k + 1, h1, h2)
        assert next_log_p <= log_p
        assert randomised >= next_log_p - 1e-12 * abs(next_log_p)


@pytest.mark.slow
@pytest.mark.parametrize(("h1", "h2"), [(12, 12), (300, 300), (12, 20), (1, 1)])
def test_randomised_agreement_is_uniform_under_the_null(h1, h2):
    rng, p = np.random.default_rng(3), np.arange(h1)
    found = [agreement(p, rng.permutation(h2)[:h1]) for _ in range(3000)]
    assert_uniform([randomised_agreement_log_p(k, h1, h2, generator=rng) for k in found])


@pytest.mark.parametrize(("k", "h", "u", "lam", "log_p"), COMPOSITE_TAILS)
def test_composite_tail_keeps_its_digits(k, h, u, lam, log_p):
    assert composite_agreement_log_sf(k, h, u, lam) == pytest.approx(log_p, rel=1e-12)


@pytest.mark.parametrize(("k", "h", "u", "lam"), [(7, 40, 0.1, 2.0), (3, 40, 0.0, 2.0), (30, 40, 0.6, 0.5)])
def test_composite_tail_is_the_convolution(k, h, u, lam):
    b = np.arange(h + 1)
    direct = scipy.stats.binom.pmf(b, h, u) @ scipy.stats.poisson.sf(k - b - 1, lam)
    assert composite_agreement_log_sf(k, h, u, lam) == pytest.approx(math.log(direct), rel=1e-9)


def test_composite_tail_falls_with_k_and_rises_with_both_allowances():
    ks = [composite_agreement_log_sf(k, 300, 0.05, 1.5) for k in range(301)]
    shares = [composite_agreement_log_sf(40, 300, u, 1.5) for u in np.linspace(0, 0.9, 40).tolist()]
    rates = [composite_agreement_log_sf(40, 300, 0.05, lam) for lam in np.geomspace(1e-6, 300, 40).tolist()]
    assert ks[0] == 0
    assert all(is_log_p(log_p) for log_p in ks + shares + rates)
    assert (np.diff(ks) <= 0).all()
    assert (np.diff(shares) >= 0).all()
    assert (np.diff(rates) >= 0).all()


@settings(deadline=None)
@given(LOG_PS)
def test_fisher_is_the_chi_square_tail_in_any_order(log_ps):
    combined = fisher(log_ps)
    assert is_log_p(combined)
    assert fisher(log_ps[::-1]) == pytest.approx(combined, rel=1e-12, abs=1e-300)
    expected = scipy.stats.chi2.logsf(-2 * sum(log_ps), 2 * len(log_ps))
    if expected > -600:  # below, scipy's tail underflows
        assert combined == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize(("count", "s"), [(1, 4312.75), (2, 800.0), (32, 5000.0), (32, 250000.0)])
def test_fisher_is_the_erlang_sum_in_fractions_where_floats_underflow(count, s):
    erlang = sum(Fraction(s) ** i / math.factorial(i) for i in range(count))
    expected = math.log(erlang.numerator) - math.log(erlang.denominator) - s
    assert fisher([-s / count] * count) == pytest.approx(expected, rel=1e-13)


@settings(deadline=None)
@given(st.floats(-1e6, 0.0))
def test_one_p_value_alone_stays_itself(log_p):
    for alone in (fisher([log_p]), bonferroni([log_p]), holm([log_p])[0]):
        assert alone == pytest.approx(log_p, rel=1e-12, abs=1e-300)


def test_fisher_of_uniform_p_values_is_uniform():
    rng = np.random.default_rng(4)
    assert_uniform([fisher(np.log(1 - rng.random(12))) for _ in range(3000)])


@settings(deadline=None)
@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=12))
def test_holm_is_the_step_down_procedure(ps):
    order, largest, expected = sorted(range(len(ps)), key=ps.__getitem__), 0.0, [0.0] * len(ps)
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        expected[index] = largest
    np.testing.assert_allclose(np.exp(holm(np.log(ps))), expected, rtol=1e-12)


@settings(deadline=None)
@given(LOG_PS, st.randoms())
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(log_ps, random):
    adjusted = holm(log_ps)
    assert (adjusted <= 0).all()
    assert (adjusted >= log_ps).all()
    assert (adjusted <= np.minimum(0, np.add(log_ps, math.log(len(log_ps)))) + 1e-12).all()
    assert adjusted.min() == pytest.approx(bonferroni(log_ps), rel=1e-12, abs=1e-12)
    assert (np.diff(adjusted[np.argsort(log_ps)]) >= 0).all()
    shuffled = random.sample(range(len(log_ps)), len(log_ps))
    np.testing.assert_array_equal(holm([log_ps[i] for i in shuffled]), adjusted[shuffled])


def test_holm_of_the_textbook():
    np.testing.assert_allclose(np.exp(holm(np.log([0.01, 0.04, 0.03, 0.005]))), [0.03, 0.06, 0.06, 0.02])
    assert math.exp(bonferroni(np.log([0.03, 0.01, 0.5]))) == pytest.approx(0.03, rel=1e-12)
    assert bonferroni(np.log([0.9, 0.8])) == 0


@pytest.mark.parametrize("larger_is_similar", [True, False])
def test_permutation_test_ranks_the_observed_value(larger_is_similar):
    rng, sign = np.random.default_rng(5), 1 if larger_is_similar else -1

    def p_of(observed):
        values = sign * np.arange(1.0, 20.0)
        log_p = permutation_test(sign * observed, values, generator=rng, larger_is_similar=larger_is_similar)
        return math.exp(log_p)

    assert p_of(20.0) == pytest.approx(1 / 20)
    assert p_of(17.5) == pytest.approx(3 / 20)
    assert p_of(0.0) == 1


@pytest.mark.parametrize("levels", [1, 3, 10**9])
def test_permutation_test_is_uniform_even_when_values_tie(levels):
    rng, count = np.random.default_rng(6), 9
    values = rng.integers(levels, size=(4000, count + 1)).astype(float)
    log_ps = [permutation_test(row[0], row[1:], generator=rng, larger_is_similar=True) for row in values]
    ranks = np.rint(np.exp(log_ps) * (count + 1)).astype(int)
    assert ranks.min() == 1
    assert ranks.max() == count + 1
    assert scipy.stats.chisquare(np.bincount(ranks)[1:]).pvalue > 0.01


@pytest.mark.parametrize("compare", [spearman, agreement])
@pytest.mark.parametrize(
    ("p1", "p2", "message"),
    [
        ([0, 1, 2], [0, 1], "matchings of 3 and 2 units"),
        ([], [], "matchings of 0 and 0 units"),
        ([0, 1, 2], [0, 2, 2], "p2 is not a matching: of its 3 indices 1 repeat"),
        ([0, -1, 2], [0, 1, 2], "p1 is not a matching: .* 1 are negative"),
    ],
)
def test_what_is_no_matching_is_refused(compare, p1, p2, message):
    with pytest.raises(ValueError, match=message):
        compare(np.array(p1, int), np.array(p2, int))


def test_one_unit_has_no_rank_correlation():
    with pytest.raises(ValueError, match="at least two are needed"):
        spearman(np.array([0]), np.array([0]))


@pytest.mark.parametrize(("one_minus_r", "h"), [(-0.1, 10), (2.1, 10), (math.nan, 10), (0.5, 2)])
def test_what_is_no_correlation_is_refused(one_minus_r, h):
    with pytest.raises(ValueError, match="0 <= 1 - r <= 2"):
        spearman_log_sf(one_minus_r, h)


@pytest.mark.parametrize(("k", "h1", "h2"), [(-1, 5, 5), (6, 5, 5), (0, 0, 0), (3, 5, 4)])
def test_impossible_agreement_is_refused(k, h1, h2):
    with pytest.raises(ValueError, match="agreeing units"):
        agreement_log_sf(k, h1, h2)
    with pytest.raises(ValueError, match="agreeing units"):
        randomised_agreement_log_p(k, h1, h2, generator=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("k", "h", "u", "lam"),
    [(-1, 5, 0.1, 1.0), (6, 5, 0.1, 1.0), (0, 0, 0.1, 1.0), (1, 5, 1.0, 1.0), (1, 5, -0.1, 1.0), (1, 5, 0.1, 0.0),
     (1, 5, 0.1, 6.0), (1, 5, math.nan, 1.0), (1, 5, 0.1, math.nan)],
)  # fmt: skip
def test_composite_null_out_of_range_is_refused(k, h, u, lam):
    with pytest.raises(ValueError, match="must hold"):
        composite_agreement_log_sf(k, h, u, lam)


@pytest.mark.parametrize("combine", [fisher, holm, bonferroni])
def test_what_is_no_log_p_value_is_refused(combine):
    with pytest.raises(ValueError, match="no p-values were given"):
        combine([])
    for bad in (math.nan, -math.inf, 0.05):
        with pytest.raises(ValueError, match=r"1 of 3 log p-values are not .*1: "):
            combine([-1.0, bad, -2.0])


def test_permutation_test_without_values_or_of_nan_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least one permuted copy"):
        permutation_test(1.0, [], generator=rng, larger_is_similar=True)
    with pytest.raises(ValueError, match="2 of 3 values of the permutation test are NaN"):
        permutation_test(math.nan, [1.0, math.nan], generator=rng, larger_is_similar=True)
