"""Merge methods as predictions of a child's entries, fitted to one half of the sampled entries.

Every method says what an entry of the child's difference from the reference should be, as one value or as several with
probabilities (DARE drops entries at random). What it leaves is noise of one family for all methods, Student's t of
three degrees with a scale of its own in every tensor, so that no method is preferred for a better model of outliers.

Letters: T terms (differences with a coefficient), S entries, Q values that an entry may have.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from tracing_jax.merges.models import TensorKey
from tracing_jax.merges.normal_equations import TensorSums, columns_of

_DEGREES = 3.0
_LOG_CONSTANT = special.gammaln(2.0) - special.gammaln(1.5) - 0.5 * math.log(_DEGREES * math.pi)
_EM_STEPS = 8
_DARE_STEPS, _SHRINKING = 16, 0.5
_LEAST_WEIGHT = 0.1
"""In TIES, beside the largest: a parent of a smaller share by least squares may have had no part."""
_NO_WEIGHT = 0.02
"""In DARE, beside the largest: no entry follows a parent of a smaller weight."""
_SAMPLED = 1024
"""Entries of a tensor at most that methods are compared on, half of them to fit the methods to."""
MOST_DROPPED = 4
"""DARE of more parents has more than 16 values an entry may have; it is not tried."""

Values = Float[np.ndarray, "Q S"]


@dataclass(frozen=True)
class Entries:
    """Sampled entries of one tensor.

    Attributes:
      place: of the tensor; `size` its number of entries.
      y: the child's difference from the reference; x the other models'; ref the reference itself.
      rank: of each entry among those of its difference, by size: 0 for the largest, below 1 for the smallest.
      train: which entries methods are fitted to; the others are held out.
      gram: products of all columns, over the whole tensor.
      rounding: mean square of the rounding of an entry of the child.
    """

    place: TensorKey
    size: float
    y: Float[np.ndarray, " S"]
    x: Float[np.ndarray, "T S"]
    ref: Float[np.ndarray, " S"]
    rank: Float[np.ndarray, "T S"]
    train: Bool[np.ndarray, " S"]
    gram: Float[np.ndarray, "C C"]
    rounding: float

    @property
    def floor(self) -> float:
        """The least scale of the noise."""
        return 0.05 * math.sqrt(self.rounding) + 1e-12 * float(np.abs(self.ref).max()) + 1e-300

    def part(self, chosen: Bool[np.ndarray, " S"]) -> "Entries":
        """Returns the entries that are chosen."""
        train = np.ones(int(chosen.sum()), bool)
        x, rank = self.x[:, chosen], self.rank[:, chosen]
        return replace(self, y=self.y[chosen], x=x, ref=self.ref[chosen], rank=rank, train=train)


@dataclass(frozen=True)
class Method:
    """A fitted method.

    Attributes:
      name: as mergekit calls it, or `copy`, `stitched`.
      parameters: plain data, for the recipe.
      values: tensor -> what its entries may be, and their log probabilities.
    """

    name: str
    parameters: dict[str, Any]
    values: Callable[[Entries], tuple[Values, Float[np.ndarray, " Q"]]]


def entries_of(tensor: TensorSums, terms: int, seed: int) -> Entries:
    """Returns the sampled entries of a tensor, half of them to fit methods to."""
    columns = columns_of(tensor.sample)
    drawn = np.random.default_rng([seed, columns.shape[1]]).permutation(columns.shape[1])[:_SAMPLED]
    sizes = np.abs(columns[1 : 1 + terms])
    rank = np.argsort(np.argsort(-sizes, axis=1), axis=1) / sizes.shape[1]
    return Entries(
        place=tensor.place,
        size=float(tensor.counts.sum()),
        y=columns[0, drawn],
        x=columns[1 : 1 + terms, drawn],
        ref=columns[-1, drawn],
        rank=rank[:, drawn],
        train=np.arange(len(drawn)) % 2 == 0,
        gram=tensor.gram,
        rounding=tensor.rounding,
    )


def log_likelihood(method: Method, entries: Entries) -> Float[np.ndarray, " S"]:
    """Returns the log density of each entry; the scale of the noise is fitted to the entries for training."""
    values, log_weights = method.values(entries)
    errors = np.abs(entries.y - values)
    scale = _scale(errors[:, entries.train], log_weights, entries.floor)
    found: np.ndarray = special.logsumexp(log_weights[:, None] + _log_t(errors, scale), axis=0)
    return found


def copy(entries: Sequence[Entries], unit: Sequence[np.ndarray]) -> Method:
    """Returns the method by which the child is one of the models everywhere: the reference, or a parent."""
    best = int(np.argmin([sum(_absolute(e, coefficients) for e in entries) for coefficients in unit]))
    return Method("copy", {"of": best}, lambda e: _one(unit[best] @ e.x))


def stitched(entries: Sequence[Entries], unit: Sequence[np.ndarray]) -> Method:
    """Returns the method by which each layer, the embedding and the head are those of one of the models.

    Each expert of a layer may be that of another one.
    """
    groups: dict[str, list[Entries]] = {}
    for own in entries:
        groups.setdefault(group_of(own.place), []).append(own)
    owners = {
        name: int(np.argmin([sum(_absolute(e, coefficients) for e in members) for coefficients in unit]))
        for name, members in groups.items()
    }
    return Method("stitched", {"of": owners}, lambda e: _one(unit[owners.get(group_of(e.place), 0)] @ e.x))


def linear(entries: Sequence[Entries]) -> Method:
    """Returns the method by which all tensors have the same shares."""
    found = _robust_fit([e.part(e.train) for e in entries])
    return Method("linear", {"coefficients": found.tolist()}, lambda e: _one(found @ e.x))


def linear_by_tensor(entries: Sequence[Entries]) -> Method:
    """Returns the method by which every tensor has shares of its own."""
    found = {e.place: _robust_fit([e.part(e.train)]) for e in entries}
    return Method("linear, by tensor", {}, lambda e: _one(found[e.place] @ e.x))


def slerp(entries: Sequence[Entries], one: np.ndarray, other: np.ndarray) -> Method:
    """Returns the spherical interpolation between two of the models, every tensor at a point of its own."""
    ts = {e.place: _slerp_point(e, one, other) for e in entries}
    layers = {str(place): t for place, t in ts.items()}
    return Method("slerp", {"t": layers}, lambda e: _one(_slerp_value(e, one, other, ts[e.place])))


def ties(entries: Sequence[Entries], normalize: bool) -> Method:
    """Returns the TIES merge with one density and weight for each parent: trim, elect signs, add those that agree.

    Source: Yadav et al. 2023 (arXiv 2306.01708), as mergekit does it.
    """
    few = [e.part(e.train) for e in sorted(entries, key=lambda e: -len(e.y))[:16]]
    T = len(few[0].x)
    densities = np.arange(0.05, 1.0, 0.05)
    of_all = [_ties_fit(few, np.full(T, d), np.ones(T), normalize) for d in densities]
    # A parent that had no part elects no signs: its weight is nothing.
    shares = np.maximum(_robust_fit(few, squares=True), 0.0)
    weights = np.where(shares >= _LEAST_WEIGHT * shares.max(), shares / max(shares.max(), 1e-300), 0.0)
    of_some = [_ties_fit(few, np.full(T, d), weights, normalize) for d in densities]
    best = max([*of_all, *of_some], key=lambda fit: fit[0])
    most, some = int(np.argmax(best[2])), np.flatnonzero(best[2] > 0).tolist()
    for step in (0.04, 0.015, 0.005):
        for k in some:
            shifts = [d * step * np.eye(T)[k] for d in (-2, -1, 1, 2)]
            tried = [np.clip(best[1] + shift, 0.005, 1.0) for shift in shifts]
            best = max([best, *(_ties_fit(few, d, best[2], normalize) for d in tried)], key=lambda fit: fit[0])
        for k in [k for k in some if k != most]:
            factors = np.exp(np.linspace(-1.5, 1.5, 10) * step / 0.04)
            ratios = [np.where(np.arange(T) == k, best[2] * factor, best[2]) for factor in factors]
            best = max([best, *(_ties_fit(few, best[1], r, normalize) for r in ratios)], key=lambda fit: fit[0])
    _, density, weights, scale = best
    follows = _over_entries(entries, lambda e: _ties_terms(e, density, weights)[1])
    parameters = {"density": density.tolist(), "weight": weights.tolist(), "scale": scale, "normalize": normalize,
                  "follows": follows}  # fmt: skip
    return Method("ties", parameters, lambda e: _one(scale * _ties_value(e, density, weights, normalize)))


def dare(entries: Sequence[Entries], elect: bool) -> Method:
    """Returns the DARE merge: entries of each difference dropped at random, the rest rescaled; signs elected, or not.

    Source: Yu et al. 2023 (arXiv 2311.03099), as mergekit does it.
    """
    T = len(entries[0].x)
    subsets = np.array(list(itertools.product((0.0, 1.0), repeat=T)))
    few = [e.part(e.train) for e in sorted(entries, key=lambda e: -len(e.y))[:8]]
    start = _robust_fit(few, squares=True)
    tried = [
        (sum(_dare_em(e, start / d, np.full(T, d), subsets, elect, 4)[0] for e in few), d)
        for d in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
    ]
    d = max(tried)[1]
    fits = {e.place: _dare_em(e.part(e.train), start / d, np.full(T, d), subsets, elect, _DARE_STEPS) for e in entries}
    sizes = np.array([len(e.y) for e in entries], float)
    kept = np.average([fits[e.place][2] for e in entries], axis=0, weights=sizes)
    weights = np.average([fits[e.place][1] * kept for e in entries], axis=0, weights=sizes)

    live = np.abs(weights) >= _NO_WEIGHT * np.abs(weights).max()  # whether the others were kept is of no consequence

    def values(e: Entries) -> tuple[Values, np.ndarray]:
        _, scaled, own = fits[e.place]
        return _dare_values(e, scaled, subsets, elect)[0], _log_subsets(own, subsets)

    def followed(e: Entries) -> np.ndarray:
        _, scaled, own = fits[e.place]
        found, parts = _dare_values(e, scaled, subsets, elect)
        errors, log_weights = np.abs(e.y - found), _log_subsets(own, subsets)
        logs = log_weights[:, None] + _log_t(errors, _scale(errors, log_weights, e.floor))
        chances: np.ndarray = np.einsum("qs,qks->ks", special.softmax(logs, axis=0), (parts != 0).astype(float))
        return chances * live[:, None]

    name = "dare_ties" if elect else "dare_linear"
    parameters = {"density": kept.tolist(), "weight": weights.tolist(), "follows": _over_entries(entries, followed)}
    return Method(name, parameters, values)


def _over_entries(entries: Sequence[Entries], share: Callable[[Entries], Float[np.ndarray, "T S"]]) -> list[float]:
    """Returns the share of all entries, tensors by their size, that follow each parent."""
    sizes = np.array([e.size for e in entries])
    found: list[float] = np.average([share(e).mean(1) for e in entries], axis=0, weights=sizes).tolist()
    return found


def _one(value: np.ndarray) -> tuple[Values, np.ndarray]:
    return value[None], np.zeros(1)


def group_of(place: TensorKey) -> str:
    """Returns what a stitched child has of one model: a layer, an expert of it, the embedding or the head."""
    if place.layer is None:
        return place.name.split("/")[0]
    return f"layers/{place.layer}" + ("" if place.expert is None else f"/experts/{place.expert}")


def _absolute(e: Entries, coefficients: np.ndarray) -> float:
    """Returns the mean log error of the entries for training."""
    errors = np.abs(e.y - coefficients @ e.x)[e.train]
    return float(np.log(errors + e.floor + 1e-300).sum())


def _log_t(errors: np.ndarray, scale: float) -> np.ndarray:
    found: np.ndarray = _LOG_CONSTANT - math.log(scale) - 2.0 * np.log1p(np.square(errors / scale) / _DEGREES)
    return found


def _scale(errors: Values, log_weights: np.ndarray, floor: float) -> float:
    """Returns the scale of the noise by EM."""
    floor = max(floor, 1e-300)
    nearest = errors.min(axis=0)
    scale = max(float(np.median(nearest)), floor)
    for _ in range(_EM_STEPS):
        belongs = special.softmax(log_weights[:, None] + _log_t(errors, scale), axis=0)
        weights = 4.0 / (_DEGREES + np.square(errors / scale))
        scale = max(math.sqrt(float((belongs * weights * np.square(errors)).sum() / errors.shape[1])), floor)
    return scale


def _robust_fit(entries: Sequence[Entries], squares: bool = False) -> np.ndarray:
    """Returns one set of coefficients for these tensors, by least squares reweighted for Student's t."""
    units = [1.0 / float(np.sqrt(np.square(e.x).mean())) for e in entries]
    y = np.concatenate([e.y * u for e, u in zip(entries, units)])
    x = np.concatenate([e.x * u for e, u in zip(entries, units)], axis=1).T
    found = np.linalg.lstsq(x, y, rcond=None)[0]
    for _ in range(0 if squares else 12):
        errors = np.abs(y - x @ found)
        scale = max(float(np.median(errors)), 1e-9)
        root = 1 / np.sqrt(_DEGREES + np.square(errors / scale))
        found = np.linalg.lstsq(x * root[:, None], y * root, rcond=None)[0]
    return np.asarray(found)


def _slerp_point(e: Entries, one: np.ndarray, other: np.ndarray) -> float:
    low, high = 0.0, 1.0
    for _ in range(5):
        points = np.linspace(low, high, 11)
        losses = [np.square(e.y - _slerp_value(e, one, other, t))[e.train].sum() for t in points]
        at = int(np.argmin(losses))
        low, high = points[max(at - 1, 0)], points[min(at + 1, 10)]
    return float((low + high) / 2)


def _slerp_value(e: Entries, one: np.ndarray, other: np.ndarray, t: float) -> np.ndarray:
    """Returns the interpolated entries, less the reference; models are `ref + coefficients @ x`."""
    s, u = slerp_weights(e.gram, one, other, t)
    found: np.ndarray = s * (one @ e.x) + u * (other @ e.x) + (s + u - 1) * e.ref
    return found


def slerp_weights(gram: Float[np.ndarray, "C C"], one: np.ndarray, other: np.ndarray, t: float) -> tuple[float, float]:
    """Returns the weights of two models at a point between them, from the products of all columns over a tensor."""
    inner = gram[1:, 1:]
    a, b = np.append(one, 1.0), np.append(other, 1.0)
    cosine = a @ inner @ b / math.sqrt(max((a @ inner @ a) * (b @ inner @ b), 1e-300))
    if abs(cosine) > 0.9995:  # as mergekit does
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _ties_fit(
    entries: Sequence[Entries], density: np.ndarray, weights: np.ndarray, normalize: bool
) -> tuple[float, np.ndarray, np.ndarray, float]:
    """Returns (log likelihood, densities, weights, scale) with the scale as the median of ratios."""
    values = [_ties_value(e, density, weights, normalize) for e in entries]
    y, value = np.concatenate([e.y for e in entries]), np.concatenate(values)
    live = value != 0
    if not live.any():
        return -np.inf, density, weights, 0.0
    order = np.argsort(y[live] / value[live])
    heights = np.cumsum(np.abs(value[live])[order])
    scale = float((y[live] / value[live])[order][np.searchsorted(heights, heights[-1] / 2)])
    total = 0.0
    for e, own in zip(entries, values):
        errors = np.abs(e.y - scale * own)[None]
        total += float(_log_t(errors, _scale(errors, np.zeros(1), e.floor)).sum())
    return total, density, weights, scale


def _ties_value(e: Entries, density: np.ndarray, weights: np.ndarray, normalize: bool) -> np.ndarray:
    weighted, mask = _ties_terms(e, density, weights)
    total: np.ndarray = (weighted * mask).sum(0)
    if not normalize:
        return total
    divisor = (weights[:, None] * mask).sum(0)
    found: np.ndarray = total / np.where(divisor == 0, 1.0, divisor)
    return found


def _ties_terms(
    e: Entries, density: np.ndarray, weights: np.ndarray
) -> tuple[Float[np.ndarray, "T S"], Bool[np.ndarray, "T S"]]:
    """Returns the trimmed and weighted differences, and which of them have the elected sign."""
    weighted = weights[:, None] * e.x * (e.rank < density[:, None])
    return weighted, np.sign(weighted) == np.where(weighted.sum(0) >= 0, 1, -1)


def _log_subsets(kept: np.ndarray, subsets: np.ndarray) -> np.ndarray:
    kept = np.clip(kept, 1e-4, 1 - 1e-4)
    found: np.ndarray = (subsets * np.log(kept) + (1 - subsets) * np.log1p(-kept)).sum(1)
    return found


def _dare_values(e: Entries, scaled: np.ndarray, subsets: np.ndarray, elect: bool) -> tuple[Values, np.ndarray]:
    """Returns the values `[Q, S]` of each subset of parents kept, and the parents' entries in it, `[Q, T, S]`."""
    parts = subsets[:, :, None] * e.x
    if elect:
        weighted = parts * scaled[:, None]
        elected = np.where(weighted.sum(1, keepdims=True) >= 0, 1, -1)
        parts = parts * (np.sign(weighted) == elected)
    return np.einsum("k,qks->qs", scaled, parts), parts


def _dare_em(
    e: Entries, scaled: np.ndarray, kept: np.ndarray, subsets: np.ndarray, elect: bool, steps: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns (log likelihood, rescaled weights, shares kept) of one tensor.

    The scale of the noise shrinks from that of the entries no faster than by half a step: entries that are dropped are
    right from the start, and a scale as small as theirs would leave no weight for those that weights are found from.
    """
    total, least = -np.inf, float(np.sqrt(np.square(e.y).mean()))
    for step in range(steps):
        least *= _SHRINKING
        values, parts = _dare_values(e, scaled, subsets, elect)
        errors, log_weights = np.abs(e.y - values), _log_subsets(kept, subsets)
        found = _scale(errors, log_weights, e.floor)
        scale = found if step == steps - 1 else max(found, least)
        logs = log_weights[:, None] + _log_t(errors, scale)
        total = float(special.logsumexp(logs, axis=0).sum())
        belongs = special.softmax(logs, axis=0)
        kept = (belongs.T @ subsets).mean(0)
        heights = belongs * 4.0 / (_DEGREES + np.square(errors / scale))
        xx = np.einsum("qs,qks,qls->kl", heights, parts, parts, optimize=True)
        xy = np.einsum("qs,qks,s->k", heights, parts, e.y, optimize=True)
        scaled = np.linalg.lstsq(xx, xy, rcond=1e-10)[0]
    return total, scaled, kept
