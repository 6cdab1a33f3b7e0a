"""Whether the difference of two matrices has low rank, up to the rounding of the dtype that they are stored in."""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

from tracing_jax.claims.claim import ClaimInputs, ClaimResult, identical_result, result
from tracing_jax.claims.tensor_pairs import STEP_BITS, TensorPair, is_equal, step_of, tensor_pairs

SAMPLE = 1024
"""Rows and columns of a matrix that are sampled. A submatrix has no greater rank than the matrix."""

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
      min_dim: the smaller dimension of the matrix that was sampled.
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
        return [_difference(pair.leaf, *_columns(*pair.sample(SAMPLE), rng), pair.dtypes)]
    found = []
    for i in range(pair.shape[0]):
        ours, theirs = (stack[0] for stack in pair.rows(i, i + 1))
        rows = np.sort(rng.permutation(len(ours))[:SAMPLE])
        found.append(_difference(f"{pair.leaf}[{i}]", *_columns(ours[rows], theirs[rows], rng), pair.dtypes))
    return found


def _columns(ours: np.ndarray, theirs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    columns = np.sort(rng.permutation(ours.shape[1])[:SAMPLE])
    return ours[:, columns].astype(np.float64), theirs[:, columns].astype(np.float64)


def _difference(
    leaf: str, ours: Float[np.ndarray, "m n"], theirs: Float[np.ndarray, "m n"], dtypes: tuple[np.dtype, np.dtype]
) -> LowRankDifference:
    """Returns the rank by the rounding of ft alone or, where that leaves too much, by the coarser of both."""
    coarse = min(dtypes, key=lambda dtype: STEP_BITS[dtype.name])
    found = [_by_rounding(leaf, ours, theirs, dtype) for dtype in dict.fromkeys((dtypes[1], coarse))]
    return next((difference for difference in found if difference.is_low), found[-1])


def _by_rounding(leaf: str, ours: np.ndarray, theirs: np.ndarray, dtype: np.dtype) -> LowRankDifference:
    difference = theirs - ours
    # The sum was rounded once to the step at its size, and the update itself may have been, before.
    unit = 2.0 ** -(STEP_BITS[dtype.name] + 1)
    rounding = np.sqrt(np.mean(step_of(theirs, dtype) ** 2 / 12 + (unit * difference) ** 2))
    rms = float(np.sqrt(np.mean(difference**2)))
    scale = float(np.sqrt(np.mean(ours**2))) or 1.0
    min_dim = min(difference.shape)
    rank = numerical_rank(difference, _ALLOWANCE * rounding) if rms else 0
    return LowRankDifference(leaf, min_dim, rank, rms / scale, rms / float(rounding or 1.0))


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
    why = f"{len(found)} matrices differ by a matrix of rank {rank} or less, and the other tensors are identical"
    why += f"; in {hidden} of them rounding masks the rank" if hidden else ""
    return result(name, "holds", why, **facts, rank=rank)
