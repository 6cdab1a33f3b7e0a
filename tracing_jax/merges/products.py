"""Sums of products of the columns of normal equations, chunk by chunk, at a few passes over a core's cache.

Letters: M models read together, C = M columns (the child's difference from the reference, those of the other parents,
and the reference itself), N entries.
"""

import sys
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

_CHUNK = 2**14  # entries; all columns of it fit a core's cache, and BLAS starts no threads of its own
_UPPER_HALF = 1 if sys.byteorder == "little" else 0


def products(flat: Sequence[Shaped[np.ndarray, " N"]], start: int, stop: int) -> Float[np.ndarray, "C C"]:
    """Returns the products of all columns, summed over the entries from `start` to `stop`.

    Differences are those of float32, their products and sums those of float64.

    Args:
      flat: the models in their order: child, reference, other parents.
      start: of the entries.
      stop: of the entries.
    """
    M = len(flat)
    order = (*flat[:1], *flat[2:], flat[1])
    values = np.zeros((M, _CHUNK), np.float32)
    # bfloat16 is the upper half of the bits of a float32; the lower half stays zero.
    targets = [row.view(np.uint16)[_UPPER_HALF::2] if is_bfloat16(own) else row for row, own in zip(values, order)]
    sources = [own.view(np.uint16) if is_bfloat16(own) else own for own in order]
    differences = np.empty((M - 1, _CHUNK), np.float32)
    # A B^T of a few long rows is five times as fast as A A^T, which BLAS treats as symmetric: a row of zeros does it.
    columns = np.zeros((M + 1, _CHUNK))
    total = np.zeros((M, M + 1))
    with np.errstate(invalid="ignore", over="ignore"):  # infinities make sums that are no numbers: the caller checks
        for at in range(start, stop, _CHUNK):
            n = min(_CHUNK, stop - at)
            for target, own in zip(targets, sources):
                target[:n] = own[at : at + n]
            np.subtract(values[:-1, :n], values[-1, :n], out=differences[:, :n])
            columns[: M - 1, :n] = differences[:, :n]
            columns[M - 1, :n] = values[-1, :n]
            total += columns[:M, :n] @ columns[:, :n].T
    return total[:, :M].copy()


def as_float32(array: np.ndarray) -> np.ndarray:
    """Returns an array in float32; bfloat16 by its bits, several times as fast as by a cast."""
    if is_bfloat16(array):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def is_bfloat16(array: np.ndarray) -> bool:
    """Returns whether the entries are bfloat16."""
    return bool(array.dtype == ml_dtypes.bfloat16)
