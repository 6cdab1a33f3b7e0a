"""Approximate prices of columns, from a sample of rows: what a column is worth to the rows that contend for it.

Where a few columns resemble every row (low rank, strong common directions), the most similar columns of a row are not
the ones it can have. Entropic transport of the sampled rows, each standing for many, onto all columns finds what each
column costs; the entries that are greatest less these prices are the ones an assignment is made of.

Source: Cuturi 2013, Sinkhorn Distances (arXiv 1306.0895), at falling temperatures.
"""

import numpy as np
from jaxtyping import Float

_SWEEPS, _LEVELS, _COOLING = 4, 12, 0.5
_CLOSE = 32.0
"""Columns that a row still hesitates between when the temperature is low enough."""
_TINY = np.float32(1e-30)


def approximate_prices(rows: Float[np.ndarray, "S m"], num_rows: int) -> Float[np.ndarray, " m"]:
    """Returns a price for each column, at least 0; 0 for columns that nobody wants if there are more than rows.

    Args:
      rows: similarities of a sample of rows with all columns.
      num_rows: the rows that there are in all, at most as many as columns.
    """
    S, m = rows.shape
    mass, spare = np.float32(num_rows / S), num_rows < m
    u, v = rows.max(axis=1), np.zeros(m, np.float32)
    temperature = np.float32(rows.std()) or np.float32(1)
    for _ in range(_LEVELS):
        plan = _plan(rows, u, v, temperature)
        a, b = _balanced(plan, mass, np.exp(np.minimum(v / temperature, 50)) if spare else np.float32(np.inf))
        u, v = u - temperature * np.log(a), v - temperature * np.log(b)
        if _hesitation(plan, b) < _CLOSE * mass:
            break
        temperature *= np.float32(_COOLING)
    return v - v.min()


def _plan(
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
    """Returns the factors of rows and of columns that give rows their mass, and columns 1 or the factor `most`."""
    b = np.ones(plan.shape[1], np.float32)
    for _ in range(_SWEEPS):
        a = mass / (plan @ b + _TINY)
        b = np.minimum(1 / (a @ plan + _TINY), most)
    return mass / (plan @ b + _TINY), b


def _hesitation(plan: Float[np.ndarray, "S m"], b: Float[np.ndarray, " m"]) -> float:
    """Returns the number of columns that a row is spread over: one over the chance that two draws are the same."""
    return float((np.square(plan @ b) / (np.square(plan) @ np.square(b) + _TINY)).mean())
