"""MATCH: the units of two layers paired by greatest similarity, equivariant under a permutation of either's units.

Equivariance makes p-values exact: if the units of one model are renumbered, the pairs are renumbered with them and
nothing else changes. A solver alone is not equivariant: among equal optima it prefers low indices, and independent
models with a fifth of their units zero then seem to agree. So the solver gets rows and columns in shuffled orders.
"""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracing_jax.matching.assignment import assign
from tracing_jax.matching.device_row_reducers import FactoredSimilarity, row_reducer


@dataclass(frozen=True)
class UnitMatching:
    """Pairs of units: `base[i]` belongs to `ft[i]`. All units of the smaller side are paired.

    Attributes:
      base, ft: indices into all units of the two layers, in increasing order of the smaller side (of base if equal).
      live_base, live_ft: numbers of units that took part; the others have similarity 0 with all.
    """

    base: Int[np.ndarray, " M"]
    ft: Int[np.ndarray, " M"]
    live_base: int
    live_ft: int


def live_units(
    *similarities: Float[Array | np.ndarray, "n m"] | FactoredSimilarity,
) -> tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]:
    """Returns the rows and the columns that have a nonzero entry in every one of these matrices.

    A unit that is all zero, or never varies, has similarity 0 with every other and cannot be matched.
    """
    found = [_has_any(s) if isinstance(s, jax.Array) else (s.any(axis=1), s.any(axis=0)) for s in similarities]
    rows, columns = (np.logical_and.reduce([np.asarray(side) for side in sides]) for sides in zip(*found))
    return np.flatnonzero(rows), np.flatnonzero(columns)


@jax.jit
def _has_any(similarity: Float[Array, "n m"]) -> tuple[Bool[Array, " n"], Bool[Array, " m"]]:
    return similarity.any(axis=1), similarity.any(axis=0)


def match_units(
    similarity: Float[Array | np.ndarray, "n m"] | FactoredSimilarity,
    generator: np.random.Generator,
    live: tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]] | None = None,
    *,
    absolute: bool = False,
) -> UnitMatching:
    """Returns the pairs of greatest total similarity among the live rows and columns; ties are broken at random.

    Args:
      similarity: of each unit of base with each of ft. It is not copied, and stays on its accelerator.
      generator: draws the order in which the solver gets them; give every matching a generator of its own.
      live: rows and columns that take part. By default those of `live_units`.
      absolute: whether the similarities' absolute values count.

    Raises:
      ValueError: a similarity that is not finite.
    Source: Zhu et al. 2025 (arXiv 2502.12292), MATCH, whose solver gets the units in their own order.

    Example:
      >>> similarity = np.array([[0.1, 0.9], [0.8, 0.2]], np.float32)
      >>> tj.match_units(similarity, np.random.default_rng(0)).ft.tolist()
      [1, 0]
    """
    rows, columns = (generator.permutation(units) for units in live or live_units(similarity))
    if not (len(rows) and len(columns)):
        none = np.zeros(0, np.int32)
        return UnitMatching(none, none, len(rows), len(columns))
    if len(rows) <= len(columns):
        base, ft = rows, columns[assign(row_reducer(similarity, rows, columns, absolute))]
        order = np.argsort(base)
    else:
        base, ft = rows[assign(row_reducer(similarity.T, columns, rows, absolute))], columns
        order = np.argsort(ft)
    return UnitMatching(base[order].astype(np.int32), ft[order].astype(np.int32), len(rows), len(columns))
