"""Approximate dual prices of the columns of an assignment, from a sample of its rows, by entropic optimal transport.

Where a few columns resemble every row (low rank, strong common directions), the most similar columns of a row are not
the ones it is assigned. Transporting the sampled rows, each of the mass of many, onto all columns gives each column
its price; an optimal assignment consists of entries that are large after these prices are subtracted.

Source: Cuturi 2013, Sinkhorn Distances (arXiv 1306.0895), at falling temperatures.
"""

import numpy as np
from jaxtyping import Float

_SWEEPS, _LEVELS, _COOLING = 4, 12, 0.5
_SPREAD = 32.0
"""Effective number of columns per row at which the temperature is low enough."""
_TINY = np.float32(1e-30)


def approximate_dual_prices(rows: Float[np.ndarray, "S m"], num_rows: int) -> Float[np.ndarray, " m"]:
    """Returns a price of each column, at least 0, in units of similarity; unused columns have price 0.

    Args:
      rows: similarities of a sample of rows with all columns.
      num_rows: the number of all rows, at most the number of columns.
    """
    S, m = rows.shape
    mass, unbalanced = np.float32(num_rows / S), num_rows < m
    u, v = rows.max(axis=1), np.zeros(m, np.float32)
    temperature = np.float32(rows.std()) or np.float32(1)
    for _ in range(_LEVELS):
        plan = _transport_plan(rows, u, v, temperature)
        a, b = _balanced(plan, mass, np.exp(np.minimum(v / temperature, 50)) if unbalanced else np.float32(np.inf))
        u, v = u - temperature * np.log(a), v - temperature * np.log(b)
        if _columns_per_row(plan, b) < _SPREAD * mass:
            break
        temperature *= np.float32(_COOLING)
    return v - v.min()


def _transport_plan(
    rows: Float[np.ndarray, "S m"], u: Float[np.ndarray, " S"], v: Float[np.ndarray, " m"], temperature: np.float32
) -> Float[np.ndarray, "S m"]:
    plan = rows - v
    plan -= u[:, None]
    plan /= temperature
    np.minimum(plan, 50, out=plan)
    return np.exp(plan, out=plan)


def _balanced(
    plan: Float[np.ndarray, "S m"], mass: np.float32, most: np.ndarray | np.float32
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, " m"]]:
    """Returns row and column factors that scale the plan to row sums `mass` and column sums 1, factors up to `most`."""
    b = np.ones(plan.shape[1], np.float32)
    for _ in range(_SWEEPS):
        a = mass / (plan @ b + _TINY)
        b = np.minimum(1 / (a @ plan + _TINY), most)
    return mass / (plan @ b + _TINY), b


def _columns_per_row(plan: Float[np.ndarray, "S m"], b: Float[np.ndarray, " m"]) -> float:
    """Returns the effective number of columns of a row, the inverse participation ratio, as a mean over rows."""
    return float((np.square(plan @ b) / (np.square(plan) @ np.square(b) + _TINY)).mean())
