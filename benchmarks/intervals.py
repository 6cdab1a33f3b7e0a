"""Confidence for what is measured on pairs: shares of pairs, and means over pairs that have models in common."""

import math

import numpy as np
from jaxtyping import Float, Int
from scipy import stats


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the exact two-sided confidence interval of a chance seen `hits` times in independent trials.

    Source: Clopper and Pearson 1934.
    """
    miss = (1 - confidence) / 2
    low = float(stats.beta.ppf(miss, hits, trials - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - miss, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high


def mean_over_pairs(values: Float[np.ndarray, "S S"]) -> float:
    """Returns the mean of a symmetric table over its pairs of different models."""
    return float(values[np.triu_indices(len(values), 1)].mean())


def upper_bound(values: Float[np.ndarray, "S S"], confidence: float = 0.99) -> float:
    """Returns a one-sided confidence bound of the mean over pairs in the population that the models were drawn from.

    Pairs that share a model are not independent, models are: the mean is a U-statistic of the models, whose variance
    comes from leaving out one model at a time, and the bound is that of Student's t with S - 1 degrees.

    Source: Arvesen 1969, Jackknifing U-statistics.
    """
    S = len(values)
    keep = [np.delete(np.arange(S), left_out) for left_out in range(S)]
    means = np.array([mean_over_pairs(values[np.ix_(kept, kept)]) for kept in keep])
    deviation = math.sqrt((S - 1) / S * ((means - means.mean()) ** 2).sum())
    return mean_over_pairs(values) + float(stats.t.ppf(confidence, S - 1)) * deviation


def rounds(num_models: int, generator: np.random.Generator) -> Int[np.ndarray, "R P 2"]:
    """Returns all pairs of an even number of models, once each, in rounds in which no model is in two pairs.

    Raises:
      ValueError: an odd number of models.
    Source: the circle method of round-robin tournaments.
    """
    if num_models % 2:
        raise ValueError(f"{num_models} models cannot all be paired; leave one out")
    order, last = generator.permutation(num_models), num_models - 1
    turned = [np.append(np.roll(np.arange(last), turn), last) for turn in range(last)]
    return np.stack([np.stack([order[t[: num_models // 2]], order[t[: num_models // 2 - 1 : -1]]], 1) for t in turned])
