"""Linear assignment against scipy's, on the three kinds of similarity that statistics meet."""

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from benchmarks.speed.rows import Row
from tracing_jax.matching.assignment import assign

_FEATURES = 256
_COMMON = 3.0  # size of the direction that all activations share, in standard deviations of the others
_RANK = 32


def assigning(units: int) -> Iterator[Row]:
    """Yields the speed of `assign` as a multiple of scipy's at so many units, on each kind of input."""
    assign(INPUTS["related"](64, np.random.default_rng(0)))  # compiles, if the solver does
    for name, make in INPUTS.items():
        similarity = make(units, np.random.default_rng(1))
        ours, found = _timed(assign, similarity)
        theirs, best = _timed(_scipy, similarity)
        picked = [similarity[np.arange(units), columns].sum(dtype=np.float64) for columns in (found, best)]
        note = f"{units} units; objective less by {(picked[1] - picked[0]) / abs(picked[1]):.1e} of scipy's"
        yield Row("assignment", name, units / ours, units / theirs, "units/s", "scipy's linear_sum_assignment", note)


def related(units: int, generator: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Returns cosines of random rows with the same rows plus noise, shuffled: the plain maximum decides almost all."""
    rows = generator.standard_normal((units, _FEATURES), np.float32)
    noisy = rows + 0.3 * generator.standard_normal(rows.shape, np.float32)
    return _cosines(rows, noisy[generator.permutation(units)])


def independent(units: int, generator: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Returns cosines of random rows with others."""
    one, other = generator.standard_normal((2, units, _FEATURES), np.float32)
    return _cosines(one, other)


def activation_like(units: int, generator: np.random.Generator) -> Float[np.ndarray, "n n"]:
    """Returns cosines of units in a few strong common directions: low rank, and far from zero on average."""
    shared = generator.standard_normal((_RANK, _FEATURES), np.float32)
    sides = []
    for _ in range(2):
        weights = generator.standard_normal((units, _RANK), np.float32)
        weights[:, 0] += _COMMON
        sides.append(weights @ shared)
    return _cosines(sides[0], sides[1])


INPUTS: Mapping[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "related": related,
    "independent": independent,
    "activation-like": activation_like,
}
"""Kind of input -> how to make one."""


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
    return one @ other.T


def _scipy(similarity: Float[np.ndarray, "n n"]) -> Int[np.ndarray, " n"]:
    return linear_sum_assignment(similarity, maximize=True)[1]


def _timed(solver: Callable[[np.ndarray], np.ndarray], similarity: np.ndarray) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = solver(similarity)
    return time.perf_counter() - start, found
