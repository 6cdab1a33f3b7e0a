"""Null distributions for two matchings of the same units: their rank correlation and their agreement.

A matching is an index vector: unit i is matched to unit `p[i]` of the other model. If the other model has more units,
matchings are injections and leave some of its units out. The null is a uniformly random matching; for the agreement
there is also one under which some units agree by convergence. All tail probabilities are natural logarithms, none -inf.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import special

_EXACT_BELOW = 10  # 9! permutations are listed in a quarter of a second
_SIMULATED_BELOW = 64  # up to here the t distribution is too light in its tail: at 10 units 1e-3 is 1.4e-3
_SIMULATED = 200_000  # permutations
_FRACTION_TERMS = 100  # at p = .005 and many units, where it converges slowest, 60 give all digits of float64
_SERIES_TERMS = 24  # the terms fall at least as fast as 1 / n!, and 1 / 24! is below 1e-23


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of two matchings.

    Attributes:
      r: the correlation, from -1 to 1.
      log_p: one-sided log p-value; small when the two matchings agree.
    """

    r: float
    log_p: float


def spearman(p1: Int[np.ndarray, " _"], p2: Int[np.ndarray, " _"]) -> RankCorrelation:
    """Returns the rank correlation of two matchings of h units, with a one-sided p-value.

    `r = 1 - 6 sum (p1 - p2)^2 / (h (h^2 - 1))`; injections are first reduced to the ranks of their indices. The p-value
    is exact below 10 units, else that of `rank_log_sf`.

    Raises:
      ValueError: not two injections of the same two or more units.
    Source: Zhu et al. 2025 (arXiv 2502.12292), SPEARMAN.
    """
    _check(p1, p2)
    h = len(p1)
    if h < 2:
        raise ValueError("the rank correlation of one unit is undefined; at least two are needed")
    differences = np.argsort(np.argsort(p1)) - np.argsort(np.argsort(p2))
    squares = int((differences.astype(np.int64) ** 2).sum())
    scale = h * (h * h - 1)
    one_minus_r, one_plus_r = 6 * squares / scale, (2 * scale - 6 * squares) / scale  # each rounded once
    r = (one_plus_r - one_minus_r) / 2
    if h < _EXACT_BELOW:
        log_p = math.log(int(_permutations_up_to(h)[squares]) / math.factorial(h))
    else:
        log_p = rank_log_sf(one_minus_r, h)
    return RankCorrelation(r, log_p)


def rank_log_sf(one_minus_r: float, h: int) -> float:
    """Returns the log p-value of a rank correlation r of h units: that of `spearman_log_sf` where it is accurate.

    Below 64 units, where that tail is too light, a p-value below .05 is at least that of the rank of r among 200,000
    random permutations, which is exact.

    Raises:
      ValueError: as `spearman_log_sf`.
    """
    log_p = spearman_log_sf(one_minus_r, h)
    if h >= _SIMULATED_BELOW or log_p > math.log(0.05):
        return log_p
    squares = one_minus_r * h * (h * h - 1) / 6
    smaller = int(np.searchsorted(_simulated_squares(h), squares * (1 + 1e-12), side="right"))
    return max(log_p, math.log((1 + smaller) / (1 + _SIMULATED)))


def spearman_log_sf(one_minus_r: float, h: int) -> float:
    """Returns `log P(T_{h-2} > t)` at a rank correlation r of h units; never below -log h!, the p-value of r = 1.

    With `t = r sqrt((h - 2) / (1 - r^2))` and a = (h - 2) / 2 the tail is `I_{1 - r^2}(a, 1/2) / 2` for r >= 0. Its
    logarithm has a relative error below 1e-11 up to h = 30,000. As a p-value of a permutation it is approximate: far in
    the tail it is too small (at h = 12, 2e-6 where 9e-6 is exact), and the more so the fewer the units; see
    `rank_log_sf`.

    Args:
      one_minus_r: 1 - r, in [0, 2], since r has too few digits close to 1.
      h: the number of units, 3 or more.

    Raises:
      ValueError: fewer than 3 units, or 1 - r outside [0, 2].
    Source: DLMF 8.17 (incomplete beta function); Kendall and Gibbons, Rank Correlation Methods.
    """
    if not (0 <= one_minus_r <= 2 and h >= 3):
        raise ValueError(f"1 - r = {one_minus_r} of {h} units: 0 <= 1 - r <= 2 and at least 3 units are needed")
    smallest = -float(special.gammaln(h + 1))
    a, r, distance = (h - 2) / 2, 1 - one_minus_r, min(one_minus_r, 2 - one_minus_r)
    within = float(special.betainc(0.5, a, r * r))  # P(|R| < |r|)
    if within < 0.99:
        return max(smallest, math.log(0.5) + math.log1p(-math.copysign(within, r)))
    log_tail = _log_beta_tail(distance, a) if distance else -math.inf
    return max(smallest, log_tail) if r > 0 else math.log1p(-math.exp(log_tail))


def agreement(p1: Int[np.ndarray, " _"], p2: Int[np.ndarray, " _"]) -> int:
    """Returns the number of units that two matchings match to the same unit.

    Raises:
      ValueError: not two injections of the same units.
    """
    _check(p1, p2)
    return int((p1 == p2).sum())


def agreement_log_sf(k: int, h1: int, h2: int | None = None) -> float:
    """Returns log P(K >= k) for the agreement K of a matching of h1 units with a uniformly random one into h2 (or h1).

    With `S_j = C(h1, j) (h2 - j)! / h2!`, the expected number of ways to choose j units that agree, the tail is usually
    written `sum_{j >= k} (-1)^(j-k) C(j-1, k-1) S_j`, which cancels. Here it is `sum_{j >= k} S_j d(h1 - j, h2 - j)`,
    d being the chance that no unit agrees: all terms are positive. For h1 = h2 this is the rencontres distribution,
    close to Poisson(1). The relative error of the logarithm is below 1e-12. K is discrete, so as a p-value the tail is
    conservative; see `randomised_agreement_log_p`.

    Raises:
      ValueError: not 1 <= h1 <= h2, or k not in 0, ..., h1.
    Source: Riordan, An Introduction to Combinatorial Analysis, chapter 3.
    """
    h2 = _checked_size(k, h1, h2)
    return 0.0 if k == 0 else _agreement_log_tail(k, h1, h2, share=1.0)


def randomised_agreement_log_p(k: int, h1: int, h2: int | None = None, *, generator: np.random.Generator) -> float:
    """Returns `log(P(K > k) + V P(K = k))`, V uniform on (0, 1]: a p-value exactly uniform under the null.

    The arguments are those of `agreement_log_sf`, which is never smaller.

    Raises:
      ValueError: as `agreement_log_sf`.
    """
    h2 = _checked_size(k, h1, h2)
    return _agreement_log_tail(k, h1, h2, share=1.0 - generator.random())


def total_agreement_log_sf(k: int, sizes: Sequence[int]) -> float:
    """Returns log P(K >= k) for the fixed points K of independent uniform permutations of these sizes, all together.

    A permutation of n has k fixed points with probability `C(n, k) D(n - k) / n!`, D being the number of derangements.
    The distributions are convolved in log space, where all terms are positive.

    Raises:
      ValueError: no sizes, a size below 1, or k not in 0, ..., the sum of the sizes.
    Source: Riordan, An Introduction to Combinatorial Analysis, chapter 3.
    """
    if not sizes or min(sizes) < 1 or not 0 <= k <= sum(sizes):
        raise ValueError(
            f"{k} fixed points of permutations of {list(sizes)}: sizes >= 1 and 0 <= k <= their sum must hold"
        )
    total = np.zeros(1)
    for size in sizes:
        one = log_fixed_points(size)
        longer = np.full(len(total) + size, -np.inf)
        for j in np.flatnonzero(np.isfinite(one)):
            longer[j : j + len(total)] = np.logaddexp(longer[j : j + len(total)], one[j] + total)
        total = longer
    return 0.0 if k == 0 else min(0.0, log_sum_exp(total[k:]))


@functools.cache
def log_fixed_points(n: int) -> np.ndarray:
    """Returns the log probabilities that a uniform permutation of n has 0, ..., n fixed points."""
    derangements = [1, 0]
    while len(derangements) <= n:
        derangements.append((len(derangements) - 1) * (derangements[-1] + derangements[-2]))
    counts = [math.comb(n, k) * derangements[n - k] for k in range(n + 1)]
    return np.array([math.log(count) if count else -np.inf for count in counts]) - math.lgamma(n + 1)


def composite_agreement_log_sf(k: int, h: int, u: float, lam: float) -> float:
    """Returns log P(K >= k) for the sum K of Binomial(h, u) and Poisson(lam).

    Each of h units agrees by convergence with probability u, and on average lam more by chance. Both tails of the
    convolution are sums of positive terms in log space; where the upper tail is close to 1, its logarithm is computed
    from the lower tail. The relative error of the logarithm is below 1e-12 up to h = 30,000.

    Args:
      k: the number of units that agree.
      h: the number of all units.
      u: the share that may agree by convergence, in [0, 1).
      lam: the mean number of chance agreements, in (0, h]; 1 for a uniformly random matching.

    Raises:
      ValueError: an argument outside its range.
    Source: Gurnee et al. 2024, Universal Neurons in GPT2 Language Models (arXiv 2401.12181), for convergent units.
    """
    if not (0 <= k <= h and h >= 1 and 0 <= u < 1 and 0 < lam <= h):
        raise ValueError(
            f"k = {k}, h = {h}, u = {u}, lambda = {lam}: 0 <= k <= h, 1 <= h, 0 <= u < 1 and 0 < lambda <= h must hold"
        )
    if k == 0:
        return 0.0
    by_convergence, by_chance = log_binomial(h, u), log_poisson(lam, k)
    log_at_least = np.logaddexp.accumulate(by_chance[::-1])[::-1]
    needed = np.maximum(k - np.arange(h + 1), 0)
    log_sf = log_sum_exp(by_convergence + log_at_least[needed])
    if log_sf < math.log(0.5):
        return log_sf
    log_at_most = np.logaddexp.accumulate(by_chance)
    return math.log1p(-math.exp(log_sum_exp(by_convergence[:k] + log_at_most[k - 1 :: -1])))


@functools.cache
def _simulated_squares(h: int) -> np.ndarray:
    """Returns the sums of squared differences of random permutations of h to the identity, in increasing order."""
    permutations = np.tile(np.arange(h, dtype=np.int16), (_SIMULATED, 1))
    np.random.default_rng(h).permuted(permutations, axis=1, out=permutations)
    return np.sort(((permutations - np.arange(h, dtype=np.int32)) ** 2).sum(axis=1))


@functools.cache
def _permutations_up_to(h: int) -> np.ndarray:
    """Returns at d how many permutations of h have a sum of squared differences from the identity of at most d."""
    permutations = np.asarray(list(itertools.permutations(range(h))), np.int32)
    return np.cumsum(np.bincount(((permutations - np.arange(h)) ** 2).sum(1)))


def _log_beta_tail(distance: float, a: float) -> float:
    """Returns `log(I_x(a, 1/2) / 2)` at `x = 1 - r^2`, distance being 1 - r > 0, for a tail of .005 or less.

    `I_x(a, 1/2) = x^a / (a B(a, 1/2) r) F(1/2, 1; a + 1; -x / r^2)`, F by its continued fraction, whose terms are all
    positive, so nothing cancels (DLMF 8.17.8, 15.8.1 and 15.7.1).
    """
    r = 1 - distance
    x, odds = distance * (1 + r), distance * (1 + r) / (r * r)
    fraction = 1.0
    for n in range(_FRACTION_TERMS, 0, -1):
        m, odd = divmod(n, 2)
        numerator = (0.5 + m) * (a + m) if odd else m * (a - 0.5 + m)
        fraction = 1 + numerator * odds / ((a + n - 1) * (a + n) * fraction)
    log_beta = 0.5 * math.log(math.pi) - _log_gamma_half_step(a)
    return a * math.log(x) - math.log(2 * a * r * fraction) - log_beta


def _log_gamma_half_step(a: float) -> float:
    """Returns `log(Gamma(a + 1/2) / Gamma(a))`, without the cancellation of two large logarithms."""
    if a < 20:
        return float(special.gammaln(a + 0.5) - special.gammaln(a))
    return 0.5 * math.log(a) - 1 / (8 * a) + 1 / (192 * a**3) - 1 / (640 * a**5) + 17 / (14336 * a**7)


def _agreement_log_tail(k: int, h1: int, h2: int, share: float) -> float:
    """Returns `log(share P(K = k) + P(K > k))`."""
    before = np.arange(k)
    log_expected = np.log((h1 - before) / (h2 - before)).sum() - special.gammaln(k + 1)  # log S_k
    expected = np.cumprod(np.concatenate([[1.0], _expected_ratios(h1, h2, k)]))  # S_j / S_k
    chances = np.asarray([_no_agreement(h1 - j, h2 - j) for j in range(k, k + len(expected))])
    chances[0] *= share
    return min(0.0, float(log_expected) + math.log(expected @ chances))


def _no_agreement(h1: int, h2: int) -> float:
    """Returns the chance d(h1, h2) that no unit agrees.

    It is 0 for a single unit, else 1/4 or more, and the terms are at most 1 / j!: this alternating sum does not cancel.
    """
    return 1.0 + float(np.cumprod(-_expected_ratios(h1, h2, 0)).sum())


def _expected_ratios(h1: int, h2: int, start: int) -> np.ndarray:
    """Returns `S_{j+1} / S_j` for j from start on, up to the terms that are negligible."""
    j = np.arange(start, min(start + _SERIES_TERMS, h1))
    return (h1 - j) / ((j + 1) * (h2 - j))


def _checked_size(k: int, h1: int, h2: int | None) -> int:
    h2 = h1 if h2 is None else h2
    if not (1 <= h1 <= h2 and 0 <= k <= h1):
        raise ValueError(f"{k} agreeing units of {h1} matched into {h2}: 0 <= k <= h1 and 1 <= h1 <= h2 must hold")
    return h2


def _check(p1: np.ndarray, p2: np.ndarray) -> None:
    if len(p1) != len(p2) or not len(p1):
        raise ValueError(
            f"matchings of {len(p1)} and {len(p2)} units cannot be compared; both must match the same units"
        )
    for name, p in {"p1": p1, "p2": p2}.items():
        if p.min() < 0 or len(np.unique(p)) != len(p):
            raise ValueError(
                f"{name} is not a matching: of its {len(p)} indices {len(p) - len(np.unique(p))} repeat another and "
                f"{int((p < 0).sum())} are negative; each must be a different index >= 0"
            )


def log_sum_exp(logs: Float[np.ndarray, " n"]) -> float:
    """Returns the logarithm of the sum of so many numbers, which are given by theirs.

    As scipy's, which takes a fifth of a millisecond for a few of them: tests of signatures ask hundreds of times.
    """
    largest = float(logs.max())
    return largest + math.log(float(np.exp(logs - largest).sum())) if math.isfinite(largest) else largest


def log_binomial(h: int, u: float) -> np.ndarray:
    """Returns the log probabilities of 0, ..., h."""
    b = np.arange(h)
    return _log_probabilities(np.log((h - b) / (b + 1)) + special.logit(u), int((h + 1) * u))


def log_poisson(lam: float, k: int) -> np.ndarray:
    """Returns the log probabilities of 0, 1, ..., until the remainder is below 1e-19 of P(K >= k)."""
    last = max(k, math.ceil(lam)) + math.ceil(10 * math.sqrt(lam)) + 40
    return _log_probabilities(math.log(lam) - np.log(np.arange(1, last + 1)), int(lam))


def _log_probabilities(log_ratios: np.ndarray, mode: int) -> np.ndarray:
    """Returns the log probabilities whose successive differences these are.

    They are summed from the mode outwards: differences of log-gammas would lose five digits.
    """
    up, down = np.cumsum(log_ratios[mode:]), np.cumsum(-log_ratios[:mode][::-1])
    weights = np.concatenate([down[::-1], [0.0], up])
    return weights - log_sum_exp(weights)
