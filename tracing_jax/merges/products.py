"""Sums of products of the columns of normal equations, chunk by chunk, at a few passes over a core's cache.

Differences of float32 and float16 weights are multiplied and summed in float64. Those of bfloat16 weights are so in
float32, in half the time, after a change of columns: what shares found in a sample leave of the child takes the place
of the child's difference. The sums go back in float64. So the error of float32, some 1e-6, is one of what is left and
not of the whole, of which rounding to bfloat16 may leave less than that.

Letters: M models read together, C = M columns (the child's difference from the reference, those of the other parents,
and the reference itself), N entries, S sampled entries.
"""

import sys
import threading
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped

_CHUNK = 2**14  # entries; all columns of it fit a core's cache, and BLAS starts no threads of its own
_SHORT_CHUNK = 2**15  # of float32, of which columns of three models fit the cache
_WORK_OF_A_CHUNK = 2**20  # multiplications from which BLAS starts threads
_UPPER_HALF = 1 if sys.byteorder == "little" else 0
_ALIKE = 0.5
"""A parent's difference is replaced by what the parents before it leave, where that is a smaller part of it."""


class _Scratch(threading.local):
    """Arrays of each thread that are used again: pages that are new to a process cost as much as the sums."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Returns an array whose entries are those of the last use."""
        found = self._arrays.get(name)
        if found is None or found.shape != shape:
            found = self._arrays[name] = np.zeros(shape, dtype)
        return found


_SCRATCH = _Scratch()


def products(
    flat: Sequence[Shaped[np.ndarray, " N"]], start: int, stop: int, change: Float[np.ndarray, "C C"] | None = None
) -> Float[np.ndarray, "C C"]:
    """Returns the products of all columns, summed over the entries from `start` to `stop`.

    Args:
      flat: the models in their order: child, reference, other parents.
      start: of the entries.
      stop: of the entries.
      change: of columns, by which bfloat16 is summed in float32; see `change_of_columns`. In float64 without.
    """
    if change is None or not all(is_bfloat16(own) for own in flat):
        return _in_float64(flat, start, stop)
    return _in_float32(flat, start, stop, change)


def change_of_columns(columns: Float[np.ndarray, "C S"]) -> Float[np.ndarray, "C C"]:
    """Returns the matrix by which columns become nearly uncorrelated, from sampled entries of them.

    The child's difference is replaced by what shares leave of it, fitted to the sample; a parent's that is much like
    those before it by what they leave. The reference stays. Its entries are float32 numbers.
    """
    C = len(columns)
    change = np.eye(C)
    for k in (*range(2, C - 1), 0):
        before = slice(1, C - 1 if k == 0 else k)
        fit = np.linalg.lstsq(columns[before].T, columns[k], rcond=1e-10)[0]
        rest = columns[k] - fit @ columns[before]
        if k == 0 or np.square(rest).sum() < _ALIKE**2 * np.square(columns[k]).sum():
            change[k, before] = -fit
    return change.astype(np.float32).astype(np.float64)


def _in_float32(
    flat: Sequence[Shaped[np.ndarray, " N"]], start: int, stop: int, change: Float[np.ndarray, "C C"]
) -> Float[np.ndarray, "C C"]:
    """Returns the products of bfloat16 models."""
    M = len(flat)
    # The columns as sums of the models, each coefficient of a difference once for the model and once for the reference.
    of_models = np.zeros((M, M))
    of_models[:, [0, *range(2, M)]] = change[:, : M - 1]
    of_models[:, 1] = change[:, M - 1] - change[:, : M - 1].sum(1)
    mixing = of_models.astype(np.float32)
    even = start + (stop - start) // 2 * 2
    chunk = max(2, min(_SHORT_CHUNK, _WORK_OF_A_CHUNK // (M * (M + 1)), even - start)) // 2 * 2
    half = chunk // 2
    bits = _SCRATCH.get("bits", (M, chunk), np.uint32)
    values = bits.view(np.float32)
    # A B^T of a few long rows is many times as fast as A A^T, which BLAS treats as symmetric: a row of zeros does it.
    columns = _SCRATCH.get("columns", (M + 1, chunk), np.float32)
    columns[M] = 0
    total = np.zeros((M, M + 1))
    pairs = [own[start:even].view(np.uint32) if _is_aligned(own, start) else None for own in flat]
    with np.errstate(invalid="ignore", over="ignore"):  # infinities make sums that are no numbers: the caller checks
        for at in range(0, even - start, chunk):
            n = min(chunk, even - start - at) // 2
            for row, own, words in zip(bits, flat, pairs):
                if words is None:
                    words = own[start + at : start + at + 2 * n].copy().view(np.uint32)
                else:
                    words = words[at // 2 : at // 2 + n]
                # Two weights in a word: bfloat16 is the upper half of the bits of a float32.
                np.left_shift(words, np.uint32(16), out=row[:n])
                np.bitwise_and(words, np.uint32(0xFFFF0000), out=row[half : half + n])
            if n < half:
                bits[:, n:half] = bits[:, half + n :] = 0
            np.matmul(mixing, values, out=columns[:M])
            total += columns[:M] @ columns.T
    back = np.linalg.inv(_mixed_columns(mixing))
    found: np.ndarray = back @ total[:, :M] @ back.T
    return found if even == stop else found + _in_float64(flat, even, stop)


def _mixed_columns(mixing: Float[np.ndarray, "C M"]) -> Float[np.ndarray, "C C"]:
    """Returns the change of columns that float32 coefficients of models make."""
    wide = mixing.astype(np.float64)
    M = len(wide)
    change = np.empty((M, M))
    change[:, : M - 1] = wide[:, [0, *range(2, M)]]
    change[:, M - 1] = wide.sum(1)
    return change


def _is_aligned(own: np.ndarray, start: int) -> bool:
    return own.flags.c_contiguous and (own.ctypes.data + 2 * start) % 4 == 0


def _in_float64(flat: Sequence[Shaped[np.ndarray, " N"]], start: int, stop: int) -> Float[np.ndarray, "C C"]:
    """Returns the products: differences are those of float32, their products and sums those of float64."""
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
