"""The null distribution of the number of heads on which two matchings of a layer's query heads agree."""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from tracing_jax.statistics.nulls import log_binomial, log_fixed_points, log_poisson, log_sum_exp


def heads_log_sf(agreeing: Sequence[int], groups: int, queries: int, u: Sequence[float], lam: float) -> float:
    """Returns the log probability that so many heads or more agree in all layers together.

    In each layer the number of agreeing heads is the sum of three independent ones: of random matchings
    (`log_grouped_agreement`), Poisson(lam - 1), and Binomial(groups * queries, u).

    Args:
      agreeing: the agreeing heads of each layer; only their sum counts.
      groups: kv heads of a layer.
      queries: query heads of each of them.
      u: for each layer the share of heads that may agree by convergence.
      lam: the mean number of heads of a layer that agree by chance, at least 1.
    """
    k, heads = sum(agreeing), groups * queries
    if k <= 0:
        return 0.0
    total = np.zeros(1)
    for share in u:
        total = _log_convolved(total, _of_one_layer(heads, groups, queries, share, lam, k), k)
    return float(min(0.0, total[k])) if len(total) > k else -np.inf


def best_layers_log_sf(
    agreeing: Sequence[int], heads: Sequence[int], groups: int, queries: int, u: float, lam: float, choices: int
) -> float:
    """Returns the log probability that so many heads or more agree in total, each layer with the best of several.

    The most heads on which a layer agrees with one of `choices` others has at most `choices` times the probability of
    one of them; layers are independent.

    Args:
      agreeing: for each layer the most heads that agree with another; only their sum counts.
      heads: for each layer the heads that were compared, which may be some of its heads.
      groups: kv heads of a layer.
      queries: query heads of each of them.
      u: the share of heads that may agree by convergence.
      lam: the mean number of heads of a layer that agree by chance, at least 1.
      choices: the layers that each was compared with.
    """
    k, total = sum(agreeing), np.zeros(1)
    if k <= 0:
        return 0.0
    for n in heads:
        of_one = _of_one_layer(n, groups, queries, u, lam, n)
        tail = np.logaddexp.accumulate(of_one[::-1])[::-1]
        best = np.append(np.minimum(0.0, tail + np.log(choices)), -np.inf)
        best[0] = 0.0
        with np.errstate(divide="ignore"):
            total = _log_convolved(total, best[:-1] + np.log(-np.expm1(best[1:] - best[:-1])))
    return min(0.0, log_sum_exp(total[k:])) if len(total) > k else -np.inf


def best_ordered_map(counts: Int[np.ndarray, "L L2"]) -> list[tuple[int, int]]:
    """Returns the places of greatest total, one for each row or column of the fewer, increasing in both."""
    if counts.shape[0] > counts.shape[1]:
        return [(i, j) for j, i in best_ordered_map(counts.T)]
    rows, columns = counts.shape
    best = np.full((rows + 1, columns + 1), -1)
    best[0] = 0
    for i, j in itertools.product(range(rows), range(columns)):
        with_place = best[i, j] + counts[i, j] if best[i, j] >= 0 else -1
        best[i + 1, j + 1] = max(best[i + 1, j], with_place)
    places, j = list[tuple[int, int]](), columns
    for i in reversed(range(rows)):
        while best[i + 1, j - 1] == best[i + 1, j]:
            j -= 1
        j -= 1
        places.append((i, j))
    return places[::-1]


def ordered_maps_log_sf(
    agreeing: Sequence[int], groups: tuple[int, int], depths: Sequence[int], u: float, lam: float
) -> float:
    """Returns the log probability that on any ordered map of the layers so many heads agree: at most the sum of all."""
    maps = math.lgamma(max(depths) + 1) - math.lgamma(min(depths) + 1) - math.lgamma(abs(depths[0] - depths[1]) + 1)
    return min(0.0, heads_log_sf(agreeing, *groups, [u] * len(agreeing), lam) + maps)


def _of_one_layer(
    heads: int, groups: int, queries: int, share: float, lam: float, most: int
) -> Float[np.ndarray, " k"]:
    """Returns the log probabilities that 0, 1, ... of so many heads of a layer agree; of `most` or more in one."""
    chance = log_binomial(heads, share)
    if lam > 1:
        more = np.append(log_poisson(lam - 1, most)[:most], np.log(special.pdtrc(most - 1, lam - 1)))
        chance = _log_convolved(chance, more, most)
    return _log_convolved(chance, log_grouped_agreement(groups, queries), most)


@functools.cache
def log_grouped_agreement(groups: int, queries: int) -> Float[np.ndarray, " k"]:
    """Returns the log probabilities that 0, 1, ... heads agree, if the queries of each kv head stay together.

    Two independent uniform permutations of the groups agree on N of them; in each of these, two independent uniform
    permutations of its queries agree on some. The mean is 1, as for free permutations of all heads, the variance
    larger; with one query per group, or one group, both are the same.
    """
    inner, outer = log_fixed_points(queries), log_fixed_points(groups)
    total, power = np.full(groups * queries + 1, -np.inf), np.zeros(1)
    for log_p in outer:
        total[: len(power)] = np.logaddexp(total[: len(power)], log_p + power)
        power = _log_convolved(power, inner)
    return total


def _log_convolved(
    one: Float[np.ndarray, " n"], other: Float[np.ndarray, " m"], most: int | None = None
) -> Float[np.ndarray, " k"]:
    """Returns the log probabilities of the sum of two independent numbers; all of `most` or more in one at `most`."""
    total = np.full(len(one) + len(other) - 1, -np.inf)
    for at, log_p in enumerate(one):
        span = slice(at, at + len(other))
        total[span] = np.logaddexp(total[span], log_p + other)
    if most is None or len(total) <= most:
        return total
    return np.append(total[:most], log_sum_exp(total[most:]))
