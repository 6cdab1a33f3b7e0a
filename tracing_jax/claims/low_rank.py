"""Whether the difference of two matrices has low rank, up to the rounding of the dtype that they are stored in."""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tracing_jax.claims.claim import ClaimInputs, ClaimResult, identical_result, result
from tracing_jax.claims.tensor_pairs import STEP_BITS, TensorPair, coarser, is_equal, step_of, tensor_pairs

SKETCH = 1024
"""Rows and columns that those of a larger matrix are added up to, with random signs. Every entry takes part, the rank
is kept with high probability up to this size, and the sum of squares on average.

Source: Clarkson and Woodruff 2013 (arXiv 1207.6365), sparse embeddings."""

LOW, FULL = 4, 2
"""A rank is low if it is at most the smaller side divided by the first, and not low if above it divided by the second.
Between them the result is not_testable."""

_ALLOWANCE = 1.5
"""The most, times the rounding, that is left of a difference beyond its rank: a merge may round more than once."""

CLEAR = 8.0
"""A difference of at least so many times the rounding (root mean square) shows that its rank is low. Below it a part of
the change is rounded away: of an adapter by amounts that follow the change and have no low rank, and of other training
the many small directions, so that what is left looks like a few large ones."""


@dataclass(frozen=True)
class LowRankDifference:
    """The difference of one matrix.

    Attributes:
      leaf: of the params.
      min_dim: the smaller dimension of the matrix, `SKETCH` at most.
      rank: how many singular values hold all of the difference that rounding does not explain.
      change: root mean square of the difference, relative to that of base.
      over_rounding: root mean square of the difference, relative to that of the rounding.
    """

    leaf: str
    min_dim: int
    rank: int
    change: float
    over_rounding: float

    @property
    def is_clear(self) -> bool:
        """Whether the difference is large enough, against the rounding, for its rank to show."""
        return self.over_rounding >= CLEAR

    @property
    def is_low(self) -> bool:
        """Whether the rank is low for the size of the matrix."""
        return self.rank * LOW <= self.min_dim

    @property
    def is_full(self) -> bool:
        """Whether the rank is not low, even if rounding masks it."""
        return self.rank * FULL > self.min_dim


def low_rank_differences(pair: TensorPair, rng: np.random.Generator) -> list[LowRankDifference]:
    """Returns the rank of the difference of a matrix, or of each of a stack of matrices."""
    if len(pair.shape) == 2:
        return [_difference(pair.leaf, pair.chunks(), pair.shape, pair.dtypes, rng)]
    found = []
    for i in range(pair.shape[0]):
        ours, theirs = (stack[0] for stack in pair.rows(i, i + 1))
        found.append(_difference(f"{pair.leaf}[{i}]", [(ours, theirs)], pair.shape[-2:], pair.dtypes, rng))
    return found


def _difference(
    leaf: str,
    chunks: Iterable[tuple[np.ndarray, np.ndarray]],
    shape: Sequence[int],
    dtypes: tuple[np.dtype, np.dtype],
    rng: np.random.Generator,
) -> LowRankDifference:
    """Returns the rank by the rounding of ft alone or, where that leaves too much, by the coarser of both."""
    coarse = coarser(dtypes)
    rounding = dict.fromkeys((dtypes[1], coarse), 0.0)
    rows, columns = (_Buckets.drawn(size, rng) for size in shape)
    sketch, start, squares, size = np.zeros((rows.number, columns.number)), 0, 0.0, 0.0
    for pair in chunks:
        ours, theirs = (weights.astype(np.float64) for weights in pair)
        difference = theirs - ours
        for dtype in rounding:
            # The sum was rounded once to the step at its size, and the update itself may have been, before.
            unit = 2.0 ** -(STEP_BITS[dtype.name] + 1)
            rounding[dtype] += float((step_of(theirs, dtype) ** 2 / 12 + (unit * difference) ** 2).sum())
        squares, size = squares + float((difference**2).sum()), size + float((ours**2).sum())
        part = columns.summed(difference.T, 0).T
        sketch += rows.summed(part, start)
        start += len(part)
    found = []
    for masked in rounding.values():
        rank = numerical_rank(sketch, _ALLOWANCE * math.sqrt(masked / sketch.size)) if squares else 0
        change = math.sqrt(squares / (size or 1.0))
        found.append(LowRankDifference(leaf, min(sketch.shape), rank, change, math.sqrt(squares / (masked or 1.0))))
    return next((difference for difference in found if difference.is_low), found[-1])


class _Buckets(NamedTuple):
    """Which of a few rows each row of a matrix is added to, and with which sign; itself where there are few."""

    number: int
    of_row: Int[np.ndarray, " n"]
    signs: Float[np.ndarray, " n"]

    @classmethod
    def drawn(cls, size: int, rng: np.random.Generator) -> "_Buckets":
        """Returns random ones for so many rows."""
        if size <= SKETCH:
            return cls(size, np.arange(size), np.ones(size))
        return cls(SKETCH, rng.permutation(np.arange(size) % SKETCH), rng.choice([-1.0, 1.0], size))

    def summed(self, rows: Float[np.ndarray, "r m"], start: int) -> Float[np.ndarray, "b m"]:
        """Returns the sums of some rows of the matrix, of which the first has this index."""
        of_row, signs = (which[start : start + len(rows)] for which in (self.of_row, self.signs))
        order = np.argsort(of_row, kind="stable")
        used, first = np.unique(of_row[order], return_index=True)
        found = np.zeros((self.number, rows.shape[1]))
        found[used] = np.add.reduceat(rows[order] * signs[order, None], first, axis=0)
        return found


def numerical_rank(matrix: Float[np.ndarray, "m n"], rms: float) -> int:
    """Returns the least rank of a matrix that differs from this one by at most `rms` (root mean square) per entry.

    Source: Eckart and Young (1936): the best approximation keeps the largest singular values.
    """
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    left = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])  # after the first r were taken
    return int(np.argmax(left <= rms**2 * matrix.size))


def adapter_of(inputs: ClaimInputs) -> ClaimResult:
    """Tests the claim that ft is base with a low-rank adapter merged into its matrices."""
    if inputs.is_identical:
        return identical_result("adapter-of", inputs)
    pairs, others = tensor_pairs(inputs.base, inputs.ft)
    if others:
        why = f"{len(others)} tensors have no counterpart of the same shape, such as {others[0]}"
        return result("adapter-of", "contradicted", why, others=others[:20])
    changed = [pair for pair in pairs if not is_equal(pair)]
    vectors = [pair.leaf for pair in changed if not pair.is_matrix]
    if vectors:
        why = f"{len(vectors)} vectors (norms, biases) were changed, such as {vectors[0]}"
        return result("adapter-of", "contradicted", why, vectors=vectors[:20])
    rng = np.random.default_rng([inputs.seed, zlib.crc32(b"adapter-of")])
    found = [difference for pair in changed for difference in low_rank_differences(pair, rng)]
    found = [difference for difference in found if difference.change]
    return _by_rank(found, len(pairs))


def _by_rank(found: Sequence[LowRankDifference], total: int) -> ClaimResult:
    """Returns the outcome by the ranks of the matrices that changed."""
    name, facts = (
        "adapter-of",
        {"changed": len(found), "tensors": total, "matrices": [asdict(one) for one in found][:200]},
    )
    clear = [difference for difference in found if difference.is_clear]
    # A matrix of few rows cannot show that its rank is low; it may have the rank that others have.
    rank = max((difference.rank for difference in clear if difference.is_low), default=0)
    full = [difference for difference in found if difference.is_full and difference.rank > rank]
    if full:
        worst = max(full, key=lambda difference: difference.rank / difference.min_dim)
        why = f"the difference of {len(full)} of {len(found)} changed matrices is not of low rank"
        why += f": {worst.rank} of {worst.min_dim} in {worst.leaf}"
        return result(name, "contradicted", why, **facts, rank=worst.rank)
    between = [difference for difference in clear if not difference.is_low and difference.rank > rank]
    if between:
        one = between[0]
        why = (
            f"a rank of {one.rank} of {one.min_dim}, in {one.leaf} and {len(between) - 1} more, is neither low nor full"
        )
        return result(name, "not_testable", why, **facts)
    hidden = len(found) - len(clear)
    if hidden > len(clear):
        why = (
            f"in {hidden} of {len(found)} changed matrices the change is too close to the rounding for its rank to show"
        )
        return result(name, "not_testable", why, **facts)
    why = f"{len(clear)} matrices differ, in all their rows, by one of rank {rank} or less"
    why += f", and {hidden} by so little that rounding masks the rank" if hidden else ""
    why += "; other tensors are identical"
    return result(name, "holds", why, **facts, rank=rank)
