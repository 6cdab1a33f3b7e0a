"""Entries that a sparse method predicts to rounding, and those of them that it could not without one of the parents.

TIES and DARE take entries of the parents' differences as they are, times one number. What they drop is much of what a
parent explains by least squares, so that no squared correlation tells such a part from what training on similar text
leaves in common. But training makes no entries of a parent's difference again, times a number, to the last digits: that
many entries are equal is beyond what training leaves, however small the part.

Letters: T terms, S entries.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Bool

from tracing_jax.merges.methods import Entries, Method

SPARSE = ("ties", "dare_linear", "dare_ties")
_SHARE, _NEEDS, _TIMES = 0.6, 0.05, 6.0
"""Of the entries that the child has of its own, those that are predicted; those that need a parent, at least, and times
as many as do by chance. Fine-tunes on one text reached .23, and 1.7 times (`benchmarks/merge_nulls.py`)."""
_FEWEST = 200
_ARITHMETIC = 0.004
"""Of an entry: merging tools may compute in bfloat16, of eight binary digits."""


@dataclass(frozen=True)
class ReproducedEntries:
    """Of the held-out entries that differ from the origin by more than rounding, the shares with these properties.

    Attributes:
      count: of these entries.
      share: predicted to rounding.
      needs: of each parent, predicted with its entries and not without.
      by_chance: the same with the parent's entries in another order.
    """

    count: int
    share: float
    needs: tuple[float, ...]
    by_chance: tuple[float, ...]

    def shows(self, parent: int) -> bool:
        """Returns whether more entries are those of a parent than training on similar text makes."""
        enough = self.count >= _FEWEST and self.share >= _SHARE
        return enough and self.needs[parent] >= max(_NEEDS, _TIMES * self.by_chance[parent])

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for the record."""
        return asdict(self)


def reproduced_entries(method: Method, entries: Sequence[Entries], dtype: str) -> ReproducedEntries | None:
    """Returns which held-out entries a sparse method predicts to rounding; None for other methods.

    Args:
      method: fitted to the entries for training.
      entries: sampled.
      dtype: of the child.
    """
    if method.name not in SPARSE:
        return None
    found = [_of_tensor(method, e.part(~e.train), dtype) for e in entries]
    predicted, needs, by_chance = (np.concatenate(rows, axis=-1) for rows in zip(*found, strict=True))
    if not predicted.size:
        return None
    shares = [tuple(rows.mean(1).tolist()) for rows in (needs, by_chance)]
    return ReproducedEntries(predicted.size, float(predicted.mean()), *shares)


def _of_tensor(
    method: Method, e: Entries, dtype: str
) -> tuple[Bool[np.ndarray, " S"], Bool[np.ndarray, "T S"], Bool[np.ndarray, "T S"]]:
    spacing = np.exp2(np.frexp(np.abs(e.y + e.ref))[1] - 1.0) * float(ml_dtypes.finfo(np.dtype(dtype)).eps)
    own = np.abs(e.y) > 2 * spacing  # what is less may be rounding
    near = spacing + _ARITHMETIC * np.abs(e.y)

    def predicted(x: np.ndarray, rank: np.ndarray) -> Bool[np.ndarray, " S"]:
        values = method.values(replace(e, x=x, rank=rank))[0]
        hit: np.ndarray = (np.abs(e.y - values) <= near).any(0)[own]
        return hit

    order = np.random.default_rng(0).permutation(len(e.y))
    hits = predicted(e.x, e.rank)
    needs, by_chance = [], []
    for k in range(len(e.x)):
        this = (np.arange(len(e.x)) == k)[:, None]
        without = predicted(np.where(this, 0.0, e.x), e.rank)
        exchanged = predicted(np.where(this, e.x[:, order], e.x), np.where(this, e.rank[:, order], e.rank))
        needs.append(hits & ~without)
        by_chance.append(exchanged & ~without)
    return hits, np.stack(needs), np.stack(by_chance)
