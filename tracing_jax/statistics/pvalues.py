"""Combining and correcting p-values, and the permutation test; every p-value is held as its natural logarithm.

A log p-value is finite and at most 0: a p-value of 0 would claim what no test can show, so it is refused here.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

LogPs = Float[np.ndarray, " _"] | Sequence[float]
"""Natural logarithms of p-values, each finite and at most 0."""


def fisher(log_ps: LogPs) -> float:
    """Returns the log p-value that L independent p-values have together.

    Under the null `-2 sum log p` is chi-square with 2L degrees, whose upper tail at 2s is the Erlang sum
    `exp(-s) sum_{i<L} s^i / i!`. Valid only for independent p-values that are uniform or conservative under the null.

    Raises:
      ValueError: log p-values that are none.
    Source: R. A. Fisher, Statistical Methods for Research Workers, section 21.1.
    """
    log_ps = _checked(log_ps)
    s = -float(log_ps.sum())
    if s < len(log_ps):  # below the mean the tail is close to 1 and only its complement keeps its digits
        return math.log1p(-special.gammainc(len(log_ps), s))
    i = np.arange(len(log_ps))
    return min(0.0, float(special.logsumexp(special.xlogy(i, s) - special.gammaln(i + 1))) - s)


def bonferroni(log_ps: LogPs) -> Float[np.ndarray, " _"]:
    """Returns `log min(1, m p)` for each of m p-values, however they depend on each other.

    Raises:
      ValueError: log p-values that are none.
    """
    log_ps = _checked(log_ps)
    return np.minimum(0.0, log_ps + math.log(len(log_ps)))


def holm(log_ps: LogPs) -> Float[np.ndarray, " _"]:
    """Returns the Holm-adjusted log p-values, in the order given; the smallest is as Bonferroni's, none is larger.

    With `p_1 <= ... <= p_m` the i-th becomes `max_{j <= i} min(1, (m - j + 1) p_j)`. Rejecting what is below a level
    keeps the chance of any false rejection below it, however the tests depend on each other.

    Raises:
      ValueError: log p-values that are none.
    Source: Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    log_ps = _checked(log_ps)
    order = np.argsort(log_ps, kind="stable")
    steps = log_ps[order] + np.log(np.arange(len(log_ps), 0, -1))
    adjusted = np.empty_like(log_ps)
    adjusted[order] = np.minimum(0.0, np.maximum.accumulate(steps))
    return adjusted


def smallest(log_ps: LogPs) -> float:
    """Returns the log p-value of the smallest of m p-values: the first of Holm's steps, `log min(1, m min p)`.

    Raises:
      ValueError: log p-values that are none.
    """
    return float(bonferroni(log_ps).min())


def permutation_test(
    observed: float,
    permuted: Float[np.ndarray, " _"] | Sequence[float],
    *,
    generator: np.random.Generator,
    larger_is_similar: bool,
) -> float:
    """Returns the log p-value of the observed value among T values of permuted copies; exact for every T.

    `p = (1 + xi + #{more similar}) / (T + 1)`, xi uniform on {0, ..., #ties}. Ties are broken by lot, so p is uniform
    on {1, ..., T + 1} / (T + 1) under the null even when all values are equal.

    Args:
      observed: the value of the pair as given.
      permuted: the values of T permuted copies, exchangeable with the observed one under the null.
      generator: breaks the ties.
      larger_is_similar: whether large values are evidence of dependence (a similarity), or small ones (a distance).

    Raises:
      ValueError: no permuted value, or a value that is NaN.
    Source: Zhu et al. 2025 (arXiv 2502.12292), PERMTEST.
    """
    values = np.asarray(permuted, np.float64)
    if not values.size:
        raise ValueError("there is no permuted value to compare the observed one with; permute at least once")
    if nans := int(np.isnan(values).sum()) + math.isnan(observed):
        raise ValueError(f"{nans} of {values.size + 1} values are NaN; find out which permuted copy broke, and why")
    more = values > observed if larger_is_similar else values < observed
    ties = int((values == observed).sum())
    rank = 1 + int(more.sum()) + int(generator.integers(ties, endpoint=True))
    return math.log(rank / (values.size + 1))


def _checked(log_ps: LogPs) -> np.ndarray:
    values = np.asarray(log_ps, np.float64)
    if not values.size:
        raise ValueError("no p-values were given; leave out a family without members")
    if bad := [f"{i}: {values[i]}" for i in np.flatnonzero(~np.isfinite(values) | (values > 0))]:
        raise ValueError(
            f"{len(bad)} of {values.size} log p-values are not finite numbers of at most 0 "
            f"({', '.join(bad[:8])}); pass natural logarithms of p-values, not the p-values themselves"
        )
    return values
