"""The tensors of two checkpoints side by side, as stored, whole or by a sample of rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tracing_jax.checkpoint import Checkpoint
from tracing_jax.checkpoint.tensor_layout import TensorSlice

_CHUNK = 1 << 22  # weights read at a time
_RUNS = 16  # of neighbouring rows, of which a sample consists

STEP_BITS = {"float32": 23, "float16": 10, "bfloat16": 7, "float64": 52}
"""Dtype -> bits of the fraction of its numbers."""


@dataclass(frozen=True)
class TensorPair:
    """One tensor of both models, `[out, in]` as the files have it, or the slice of one that belongs to a leaf.

    Attributes:
      leaf: the leaf of the params that it belongs to.
      base, ft: the two checkpoints.
      slice_base, slice_ft: where it is in each; both of one shape.
    """

    leaf: str
    base: Checkpoint
    ft: Checkpoint
    slice_base: TensorSlice
    slice_ft: TensorSlice

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return self.slice_base.extent

    @property
    def dtypes(self) -> tuple[np.dtype, np.dtype]:
        """The dtypes that it is read in, of base and of ft; a quantised tensor is read as floats."""
        return self.base.tensors.dtype(self.slice_base.tensor), self.ft.tensors.dtype(self.slice_ft.tensor)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, or a stack of matrices such as experts, and no vector."""
        return len(self.shape) > 1 and min(self.shape[-2:]) > 1

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the same rows, on the first axis, of both."""
        found = []
        for checkpoint, part in ((self.base, self.slice_base), (self.ft, self.slice_ft)):
            index = [slice(start, stop), *(slice(0, size) for size in self.shape[1:])]
            first, own = slice(part.start, part.stop).indices(part.shape[part.axis])[0], index[part.axis]
            index[part.axis] = slice(first + own.start * part.step, first + (own.stop - 1) * part.step + 1)
            found.append(part.of_read(checkpoint.tensors.read(part.tensor, tuple(index))))
        return found[0], found[1]

    def chunks(self, multiple: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields all rows of both, some at a time, so many that they are a multiple of this number, but the last."""
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        rows = max(1, _CHUNK // max(1, width) // multiple) * multiple
        for start in range(0, self.shape[0], rows):
            yield self.rows(start, min(start + rows, self.shape[0]))

    def sample(self, at_most: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows of both as float32: all, or runs of neighbouring rows evenly spread over the tensor."""
        count = self.shape[0]
        if count <= at_most:
            found = [self.rows(0, count)]
        else:
            length = max(1, at_most // _RUNS)
            starts = map(int, np.linspace(0, count - length, _RUNS))
            found = [self.rows(start, start + length) for start in starts]
        ours, theirs = (np.concatenate([pair[side] for pair in found]).astype(np.float32) for side in (0, 1))
        return ours, theirs


def tensor_pairs(base: Checkpoint, ft: Checkpoint) -> tuple[list[TensorPair], list[str]]:
    """Returns the tensors that both models have in one shape, and the leaves of which that is not so."""
    ours, theirs = base.leaf_layouts, ft.leaf_layouts
    pairs, others = [], []
    for leaf in dict.fromkeys([*ours, *theirs]):
        parts = [layouts[leaf].slices if leaf in layouts else () for layouts in (ours, theirs)]
        if len(parts[0]) != len(parts[1]) or [p.extent for p in parts[0]] != [p.extent for p in parts[1]]:
            others.append(leaf)
            continue
        pairs += [TensorPair(leaf, base, ft, one, other) for one, other in zip(*parts)]
    return pairs, others


def step_of(weights: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the distance of each weight to the next number of a dtype, as float64."""
    _, exponent = np.frexp(np.abs(weights.astype(np.float64)))
    smallest = np.finfo(np.float32).tiny if dtype.name != "float16" else 2.0**-14
    exponent = np.maximum(exponent, np.frexp(smallest)[1])
    return np.ldexp(1.0, exponent - 1 - STEP_BITS[dtype.name])


def coarser(dtypes: Sequence[np.dtype]) -> np.dtype:
    """Returns the dtype of the fewest bits of fraction."""
    return min(dtypes, key=lambda dtype: STEP_BITS[dtype.name])


def is_rounded(pair: TensorPair) -> bool:
    """Returns whether one tensor is the other, rounded to its dtype if that is the coarser one."""
    coarse = coarser(pair.dtypes)
    with np.errstate(over="ignore"):  # float16 ends at 65504
        return all(np.array_equal(ours.astype(coarse), theirs.astype(coarse)) for ours, theirs in pair.chunks())


def is_equal(pair: TensorPair) -> bool:
    """Returns whether both tensors hold the same numbers."""
    return all(np.array_equal(ours, theirs) for ours, theirs in pair.chunks())
