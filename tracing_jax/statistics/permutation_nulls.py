"""Two matchings of the same units compared, against a uniformly random matching: rank correlation and agreement.

Matchings are index vectors: unit i belongs to unit `p[i]` of the other model. If the other model has more units they
are injections and leave some of its units out. All tails are natural logarithms, and none is -inf.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy import special

_EXACT_BELOW = 10  # 9! permutations are listed in a quarter of a second
_FRACTION_TERMS = 100  # at p = .005 and many units, where it converges slowest, 60 give all digits of float64
_SERIES_TERMS = 24  # the terms fall at least as fast as 1 / n!, and 1 / 24! is below 1e-23


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of two matchings.

    Attributes:
      r: the correlation, from -1 to 1.
      t: `r sqrt((h - 2) / (1 - r^2))`, Student-t with h - 2 degrees under the null; infinite where r is 1 or -1.
      log_p: one-sided log p-value; small when the two matchings agree.
    """

    r: float
    t: float
    log_p: float


def spearman(p1: Int[np.ndarray, " _"], p2: Int[np.ndarray, " _"]) -> RankCorrelation:
    """Returns the rank correlation of two matchings of h units, with a one-sided p-value.

    `r = 1 - 6 sum (p1 - p2)^2 / (h (h^2 - 1))`; injections are first reduced to the ranks of their indices. The p-value
    is exact below 10 units, else that of `spearman_log_sf`.

    Raises:
      ValueError: not two injections of the same two or more units.
    Source: Zhu et al. 2025 (arXiv 2502.12292), SPEARMAN.
    """
    _check(p1, p2)
    h = len(p1)
    if h < 2:
        raise ValueError("one unit has no rank correlation; two are the fewest")
    differences = np.argsort(np.argsort(p1)) - np.argsort(np.argsort(p2))
    squares = int((differences.astype(np.int64) ** 2).sum())
    scale = h * (h * h - 1)
    one_minus_r, one_plus_r = 6 * squares / scale, (2 * scale - 6 * squares) / scale  # each rounded once
    r = (one_plus_r - one_minus_r) / 2
    t = r * math.sqrt((h - 2) / one_minus_r / one_plus_r) if one_minus_r and one_plus_r else math.copysign(math.inf, r)
    if h < _EXACT_BELOW:
        log_p = math.log(int(_permutations_up_to(h)[squares]) / math.factorial(h))
    else:
        log_p = spearman_log_sf(one_minus_r, h)
    return RankCorrelation(r, t, log_p)


def spearman_log_sf(one_minus_r: float, h: int) -> float:
    """Returns `log P(T_{h-2} > t)` at a rank correlation r of h units; never below -log h!, the p-value of r = 1.

    With `t = r sqrt((h - 2) / (1 - r^2))` and a = (h - 2) / 2 the tail is `I_{1 - r^2}(a, 1/2) / 2` for r >= 0. Its
    logarithm has a relative error below 1e-11 up to h = 30,000. As a p-value of a permutation it is approximate: far
    out it is too small (at h = 12, 2e-6 where 9e-6 is exact), and the more so the fewer the units.

    Args:
      one_minus_r: 1 - r rather than r, which has too few digits close to 1.
      h: the number of units, 3 or more.

    Raises:
      ValueError: fewer units, or no correlation.
    Source: DLMF 8.17 (incomplete beta function); Kendall and Gibbons, Rank Correlation Methods.
    """
    if not (0 <= one_minus_r <= 2 and h >= 3):
        raise ValueError(f"1 - r = {one_minus_r} of {h} units; it lies in [0, 2], and the units are at least 3")
    smallest = -float(special.gammaln(h + 1))
    a, r, distance = (h - 2) / 2, 1 - one_minus_r, min(one_minus_r, 2 - one_minus_r)
    within = float(special.betainc(0.5, a, r * r))  # P(|R| < |r|)
    if within < 0.99:
        return max(smallest, math.log(0.5) + math.log1p(-math.copysign(within, r)))
    log_tail = _log_beta_tail(distance, a) if distance else -math.inf
    return max(smallest, log_tail) if r > 0 else math.log1p(-math.exp(log_tail))


def agreement(p1: Int[np.ndarray, " _"], p2: Int[np.ndarray, " _"]) -> int:
    """Returns the number of units that two matchings send to the same unit.

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

    It is 0 only for a single unit, else 1/4 or more, and the terms are at most 1 / j!: this alternating sum is safe.
    """
    return 1.0 + float(np.cumprod(-_expected_ratios(h1, h2, 0)).sum())


def _expected_ratios(h1: int, h2: int, start: int) -> np.ndarray:
    """Returns `S_{j+1} / S_j` for j from start on, as many as matter."""
    j = np.arange(start, min(start + _SERIES_TERMS, h1))
    return (h1 - j) / ((j + 1) * (h2 - j))


def _checked_size(k: int, h1: int, h2: int | None) -> int:
    h2 = h1 if h2 is None else h2
    if not (1 <= h1 <= h2 and 0 <= k <= h1):
        raise ValueError(f"{k} agreeing units of {h1} matched into {h2}: 0 <= k <= h1 and 1 <= h1 <= h2 must hold")
    return h2


def _check(p1: np.ndarray, p2: np.ndarray) -> None:
    if len(p1) != len(p2) or not len(p1):
        raise ValueError(f"matchings of {len(p1)} and {len(p2)} units cannot be compared; match the same units twice")
    for name, p in {"p1": p1, "p2": p2}.items():
        if p.min() < 0 or len(np.unique(p)) != len(p):
            raise ValueError(
                f"{name} is no matching: of its {len(p)} indices {len(p) - len(np.unique(p))} repeat another and "
                f"{int((p < 0).sum())} are negative; every unit needs a unit of its own"
            )
