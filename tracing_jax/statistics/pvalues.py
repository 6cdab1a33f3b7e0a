"""Combination and multiplicity correction of p-values, and the permutation test; all p-values are natural logarithms.

A log p-value is finite and at most 0; a p-value of 0 is refused, since no test can give one.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

LogPs = Float[np.ndarray, " _"] | Sequence[float]
"""Natural logarithms of p-values, each finite and at most 0."""


def fisher(log_ps: LogPs) -> float:
    """Returns the log p-value of L independent p-values combined.

    Under the null `-2 sum log p` is chi-square with 2L degrees, whose upper tail at 2s is the Erlang sum
    `exp(-s) sum_{i<L} s^i / i!`. Valid only for independent p-values that are uniform or conservative under the null.

    Raises:
      ValueError: no log p-values, or values that are not finite or above 0.
    Source: R. A. Fisher, Statistical Methods for Research Workers, section 21.1.
    """
    log_ps = _checked(log_ps)
    s = -float(log_ps.sum())
    if s < len(log_ps):  # below the mean the tail is close to 1; its complement is accurate
        return math.log1p(-special.gammainc(len(log_ps), s))
    i = np.arange(len(log_ps))
    return min(0.0, float(special.logsumexp(special.xlogy(i, s) - special.gammaln(i + 1))) - s)


def bonferroni(log_ps: LogPs) -> float:
    """Returns the log p-value of the smallest of m p-values, `log min(1, m min p)`; valid under any dependence.

    It is the first step of Holm's procedure.

    Raises:
      ValueError: no log p-values, or values that are not finite or above 0.
    """
    log_ps = _checked(log_ps)
    return min(0.0, float(log_ps.min()) + math.log(len(log_ps)))


def holm(log_ps: LogPs) -> Float[np.ndarray, " _"]:
    """Returns the Holm-adjusted log p-values, in the order given; the smallest equals Bonferroni's.

    With `p_1 <= ... <= p_m` the i-th becomes `max_{j <= i} min(1, (m - j + 1) p_j)`. Rejecting what is below a level
    keeps the probability of any false rejection below it, under any dependence of the tests.

    Raises:
      ValueError: no log p-values, or values that are not finite or above 0.
    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    log_ps = _checked(log_ps)
    order = np.argsort(log_ps, kind="stable")
    steps = log_ps[order] + np.log(np.arange(len(log_ps), 0, -1))
    adjusted = np.empty_like(log_ps)
    adjusted[order] = np.minimum(0.0, np.maximum.accumulate(steps))
    return adjusted


def permutation_test(
    observed: float,
    permuted: Float[np.ndarray, " _"] | Sequence[float],
    *,
    generator: np.random.Generator,
    larger_is_similar: bool,
) -> float:
    """Returns the log p-value of the observed value among T values of permuted copies; exact for every T.

    `p = (1 + xi + #{more similar}) / (T + 1)`, xi uniform on {0, ..., #ties}: ties are broken at random, and p is
    uniform on {1, ..., T + 1} / (T + 1) under the null even when all values are equal.

    Args:
      observed: the value of the pair as given.
      permuted: the values of T permuted copies, exchangeable with the observed one under the null.
      generator: breaks the ties.
      larger_is_similar: whether large values are evidence of dependence (a similarity) or small ones (a distance).

    Raises:
      ValueError: no permuted value, or a value that is NaN.
    Source: Zhu et al. 2025 (arXiv 2502.12292), PERMTEST.
    """
    values = np.asarray(permuted, np.float64)
    if not values.size:
        raise ValueError("a permutation test needs at least one permuted copy")
    if nans := int(np.isnan(values).sum()) + math.isnan(observed):
        raise ValueError(f"{nans} of {values.size + 1} values of the permutation test are NaN")
    more = values > observed if larger_is_similar else values < observed
    ties = int((values == observed).sum())
    rank = 1 + int(more.sum()) + int(generator.integers(ties, endpoint=True))
    return math.log(rank / (values.size + 1))


def _checked(log_ps: LogPs) -> np.ndarray:
    values = np.asarray(log_ps, np.float64)
    if not values.size:
        raise ValueError("no p-values were given")
    if bad := [f"{i}: {values[i]}" for i in np.flatnonzero(~np.isfinite(values) | (values > 0))]:
        raise ValueError(
            f"{len(bad)} of {values.size} log p-values are not finite numbers of at most 0 "
            f"({', '.join(bad[:8])}); pass natural logarithms of p-values, not the p-values themselves"
        )
    return values
