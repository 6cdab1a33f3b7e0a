"""Shares by least squares, with standard errors by a block jackknife over rows.

The model of a tensor is `child = ref + sum_k a_k (P_k - ref) + noise`, ref being the origin, or the first parent where
the origin is unknown: the shares then sum to one. Shares of several tensors together are those of all their entries.

Letters: K parents, T terms (differences with a coefficient), C columns, R row blocks.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from scipy import stats

from tracing_jax.merges.models import MergeModels
from tracing_jax.merges.normal_equations import TensorSums, columns_of, rounded

COLLINEAR = 1e8
"""Condition number of the correlations of the differences from which their shares cannot be distinguished at all."""
ONE_OF_THESE = 100.0
"""Variance inflation from which parents are named together: of two, their differences have a cosine above .995."""

_COARSE = ("bfloat16", "float16")
_DITHERED = 8.0
"""Where more is left than so many times the square of rounding, that noise leaves no bias of rounding."""
_EXACT = 1e-3
"""Where less is left, nothing was rounded: the child is a copy."""
_TRIED, _AROUND = 8, 0.25
_NOTHING = 1e-13

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Fit:
    """Sums of squares of some tensors; those of several are the sums.

    Attributes:
      total: of the child's difference from the reference.
      rest: of what the parents leave of it.
      without: of what is left without one of the parents.
      rounding: expected of the rounding of the child.
    """

    total: float
    rest: float
    without: Float[np.ndarray, " K"]
    rounding: float

    def __add__(self, other: "Fit") -> "Fit":
        return Fit(self.total + other.total, self.rest + other.rest, self.without + other.without,
                   self.rounding + other.rounding)  # fmt: skip

    @property
    def unexplained(self) -> float:
        """Of what the child differs from the reference, the share that no parent explains."""
        return _ratio(self.rest, self.total)

    @property
    def rounded(self) -> float:
        """The share that rounding of the child explains."""
        return _ratio(self.rounding, self.total)

    @property
    def alone(self) -> Float[np.ndarray, " K"]:
        """For each parent the squared partial correlation with the child, given the others."""
        nothing = _NOTHING * self.total  # the error of float64
        return np.array([1 - min(1.0, self.rest / left) if left > nothing else 0.0 for left in self.without])


@dataclass(frozen=True)
class Shares:
    """The shares of all parents in some tensors.

    Attributes:
      values: NaN where they are undefined.
      covariance: by the jackknife, and of what rounding to a coarse dtype, or an alignment, can bias.
      degrees: of freedom of the jackknife; intervals use Student's t.
      fit: sums of squares.
      condition: condition number of the correlations of the parents' differences from the reference.
      inflation: by what factor the other parents increase the variance of each share (variance inflation factor).
      cosines: of the parents' differences from the reference; NaN of the reference itself where it is a parent.
      undefined: why there are no shares; None if there are.
      bias: what an alignment does to each share, which the covariance contains as a variance; None without one.
    """

    values: Float[np.ndarray, " K"]
    covariance: Float[np.ndarray, "K K"]
    degrees: float
    fit: Fit
    condition: float
    inflation: Float[np.ndarray, " K"]
    cosines: Float[np.ndarray, "K K"]
    undefined: str | None = None
    bias: Float[np.ndarray, " K"] | None = None

    @property
    def errors(self) -> Float[np.ndarray, " K"]:
        """The standard errors."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0.0))

    def with_bias(self, bias: Float[np.ndarray, " K"]) -> "Shares":
        """Returns the shares with errors that contain a bias of this size in each, whose sign is not known."""
        return replace(self, covariance=self.covariance + np.diag(np.square(bias)), bias=bias)

    def interval(self, level: float = 0.95) -> Float[np.ndarray, "2 K"]:
        """Returns the confidence interval of each share by itself."""
        reach = stats.t.ppf((1 + level) / 2, max(self.degrees, 1.0)) * self.errors
        return np.stack([self.values - reach, self.values + reach])

    def as_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Returns plain data for the record."""
        low, high = self.interval()
        shares = {
            name: {"share": finite(self.values[k]), "se": finite(self.errors[k]), "low": finite(low[k]),
                   "high": finite(high[k]), "alone": float(self.fit.alone[k])}
            for k, name in enumerate(names)
        }  # fmt: skip
        if self.bias is not None:
            shares = {name: {**own, "bias": float(self.bias[k])} for k, (name, own) in enumerate(shares.items())}
        covariance = [[finite(value) for value in row] for row in self.covariance]
        return {
            "shares": shares,
            "covariance": covariance,
            "degrees": self.degrees,
            "unexplained": self.fit.unexplained,
            "rounded": self.fit.rounded,
            "condition": finite(self.condition),
            "inflation": {name: finite(self.inflation[k]) for k, name in enumerate(names)},
            "undefined": self.undefined,
        }


def estimate(models: MergeModels, tensors: Sequence[TensorSums]) -> Shares:
    """Returns the shares in these tensors together."""
    grams = np.concatenate([tensor.grams for tensor in tensors])
    total = grams.sum(0)
    fit = _fit(models, total, sum(tensor.rounding * tensor.counts.sum() for tensor in tensors))
    terms = slice(1, 1 + models.terms)
    xx, xy = total[terms, terms], total[terms, 0]
    scale = np.sqrt(np.diag(xx))
    if reason := _undefined(scale, models):
        return _without(fit, reason, np.inf)
    correlations = xx / np.outer(scale, scale)
    condition = float(np.linalg.cond(correlations))
    if condition > COLLINEAR:
        return _without(fit, "the parents differ from the reference in the same way here", condition)
    weights = np.trace(grams[:, terms, terms], axis1=1, axis2=2)
    if _equal_blocks(weights) < 2:
        return _without(fit, "what distinguishes the parents lies in one block of rows", condition)
    found = np.linalg.solve(xx, xy)
    others = total - grams  # each without one block
    moved = models.shares_of(_solved(others[:, terms, terms], others[:, terms, 0], found)) - models.shares_of(found)
    blocks = int((weights > 0).sum())
    covariance = (blocks - 1) / blocks * moved.T @ moved
    covariance = covariance + np.diag(rounding_bias(models, tensors, found, xx, fit))
    degrees = _degrees(weights, moved, [len(tensor.grams) for tensor in tensors])
    inflation = np.diag(np.linalg.inv(correlations))
    if models.origin is None:  # the reference is among them
        inflation = np.concatenate([[inflation.max()], inflation])
        correlations = np.pad(correlations, ((1, 0), (1, 0)), constant_values=np.nan)
    return Shares(models.shares_of(found), covariance, degrees, fit, condition, inflation, correlations)


def rounding_bias(
    models: MergeModels, tensors: Sequence[TensorSums], found: Float[np.ndarray, " T"], xx: np.ndarray, fit: Fit
) -> Float[np.ndarray, " K"]:
    """Returns the squares of what rounding of the child biases its shares by, where rounding is all that is left of it.

    Differences of a few steps of a coarse grid are rounded to steps, and the error goes with the difference. The
    sampled entries are merged and rounded, and shares are found of the result: how far these are from those of the
    merge is the bias: at the shares that were found, or, where that is more, the root mean square around them, for
    other shares may round to the same child. Noise of more than a step leaves none: it makes errors independent.
    """
    none = np.zeros(len(models.names))
    coarse = [tensor for tensor in tensors if tensor.dtype in _COARSE and len(tensor.sample)]
    if not coarse or not _EXACT * fit.rounding < fit.rest <= _DITHERED * fit.rounding:
        return none
    shifts = np.random.default_rng(0).uniform(-_AROUND, _AROUND, size=(_TRIED, len(found)))
    near = found + np.concatenate([np.zeros((1, len(found))), shifts])
    pulls = np.zeros(near.shape)
    for tensor in coarse:
        columns = columns_of(tensor.sample)
        merged = columns[-1] + near @ columns[1:-1]
        errors = rounded(merged, tensor.dtype) - merged
        pulls += tensor.counts.sum() / len(tensor.sample) * errors @ columns[1:-1].T
    bias = models.shares_of(np.linalg.solve(xx, pulls.T).T) - models.shares_of(0 * found)
    return np.maximum(np.square(bias[0]), np.square(bias[1:]).mean(0))


def grouped_shares(
    models: MergeModels, tensors: Sequence[TensorSums], key: Callable[[TensorSums], Key | None]
) -> dict[Key, Shares]:
    """Returns the shares of tensors with the same key; those whose key is None are left out."""
    groups: dict[Key, list[TensorSums]] = {}
    for tensor in tensors:
        if (own := key(tensor)) is not None:
            groups.setdefault(own, []).append(tensor)
    return {own: estimate(models, members) for own, members in groups.items()}


def _equal_blocks(weights: Float[np.ndarray, " R"]) -> float:
    """Returns how many blocks of equal weight say as much."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


def _degrees(weights: Float[np.ndarray, " R"], moved: Float[np.ndarray, "R K"], blocks: Sequence[int]) -> float:
    """Returns the degrees of freedom of the jackknife, by Satterthwaite's formula.

    What a block adds to the variance goes with its weight and with the noise of its tensor, which is often larger where
    the differences are: the blocks that count are fewer than weights alone say. The lower of the two counts is taken,
    for the noise of a tensor is an estimate too.

    Args:
      weights: squares of the parents' differences in each block.
      moved: of the shares without each block.
      blocks: of each tensor.
    """
    size = np.square(moved).sum(0)
    own = (np.square(moved) / np.where(size > 0, size, 1.0)).sum(1)
    first = np.cumsum([0, *blocks[:-1]])
    in_tensor = np.add.reduceat(weights, first)
    noise = np.add.reduceat(own, first) / np.where(in_tensor > 0, in_tensor, 1.0)
    added = np.repeat(noise, blocks) * weights
    return min(_equal_blocks(weights), _equal_blocks(added) if added.any() else np.inf) - 1


def _solved(xx: np.ndarray, xy: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Returns the coefficients without each block; those of all where a block holds all that distinguishes parents."""
    size = np.trace(xx, axis1=1, axis2=2)
    singular = np.linalg.det(xx / np.where(size > 0, size, 1.0)[:, None, None]) <= 1e-30
    safe = np.where(singular[:, None, None], np.eye(xx.shape[1]), xx)
    return np.where(singular[:, None], otherwise, np.linalg.solve(safe, xy[..., None])[..., 0])


def _undefined(scale: np.ndarray, models: MergeModels) -> str | None:
    same = [name for name, size in zip(models.names[-models.terms :], scale) if not size > 0]
    reference = "the origin" if models.origin is not None else models.names[0]
    return f"{', '.join(same)} equal{'s' if len(same) == 1 else ''} {reference} here" if same else None


def _without(fit: Fit, reason: str, condition: float) -> Shares:
    K = len(fit.without)
    nothing, nothings = np.full(K, np.nan), np.full((K, K), np.nan)
    return Shares(nothing, nothings, 0.0, fit, condition, nothing, nothings, reason)


def _fit(models: MergeModels, total: np.ndarray, rounding: float) -> Fit:
    rests = [_rest((rows := _columns_without(models, k)) @ total @ rows.T) for k in range(len(models.names))]
    everything = total[: 1 + models.terms, : 1 + models.terms]
    return Fit(float(total[0, 0]), _rest(everything), np.array(rests), float(rounding))


def _rest(gram: np.ndarray) -> float:
    """Returns the squares of the first column that are left after the others."""
    xx, xy = gram[1:, 1:], gram[1:, 0]
    explained = xy @ np.linalg.lstsq(xx, xy, rcond=1e-12)[0] if len(xx) else 0.0
    return max(0.0, float(gram[0, 0] - explained))


def _columns_without(models: MergeModels, k: int) -> np.ndarray:
    """Returns rows that make, of all columns, those of the child and of the parents but the k-th.

    Without an origin the parents left decide the reference: shares of the others then sum to one.
    """
    C = models.terms + 2
    unit = np.eye(C)
    if models.origin is not None:
        return unit[[0, *(1 + j for j in range(models.terms) if j != k)]]
    if k > 0:
        return unit[[0, *(1 + j for j in range(models.terms) if j != k - 1)]]
    return np.stack([unit[0] - unit[1], *(unit[1 + j] - unit[1] for j in range(1, models.terms))])


def _ratio(part: float, whole: float) -> float:
    return min(1.0, float(part / whole)) if whole > 0 else 0.0


def finite(value: float) -> float | None:
    """Returns a number for the record, which has none that is infinite or not a number."""
    return float(value) if np.isfinite(value) else None
