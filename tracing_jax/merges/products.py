"""Sums of products of the columns of normal equations, in one pass over the entries.

Differences of float32 and float16 weights are multiplied and summed in float64. Those of bfloat16 weights are so in
float32, by a program of XLA, after a change of columns: what shares found in a sample leave of the child takes the
place of the child's difference. The sums go back in float64. So the error of float32, some 1e-6, is one of what is left
and not of the whole, of which rounding to bfloat16 may leave less than that.

Letters: M models read together, C = M columns (the child's difference from the reference, those of the other parents,
and the reference itself), N entries, S sampled entries, P pairs of columns, R rows of entries.
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int, Shaped

from tracing_jax.sharding import cpu_device

_CHUNK = 2**14  # entries; all columns of it fit a core's cache, and BLAS starts no threads of its own
_ROW = 2**10  # entries that are summed in float32
_PROGRAM = 2**16  # entries of a compiled program, of which there are few; fewer are summed in float64
_ALIGNED = 32  # bfloat16 entries in the 64 bytes to which XLA's arrays on a CPU are aligned
_UPPER_HALF = 1 if sys.byteorder == "little" else 0
_ALIKE = 0.5
"""A parent's difference is replaced by what the parents before it leave, where that is a smaller part of it."""


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
    """Returns the products of bfloat16 models; of the first entries, and of those after the last rows, in float64."""
    begin = start + _ALIGNED
    size = max(0, stop - _ALIGNED - begin) // _PROGRAM * _PROGRAM
    if not size:
        return _in_float64(flat, start, stop)
    # An array at an address that is not aligned would be copied: each starts before `begin`, where its address is.
    before = [(own.ctypes.data + 2 * begin) % (2 * _ALIGNED) // 2 for own in flat]
    words = [
        own[begin - skipped : begin - skipped + size + _ALIGNED].view(np.uint16) for own, skipped in zip(flat, before)
    ]
    with jax.default_device(cpu_device()):  # where the words are; an accelerator would be sent all of them
        sums = np.asarray(_row_products(words, np.array(before, np.int32), change.astype(np.float32)))
    C = len(change)
    total = np.zeros((C, C))
    total[np.triu_indices(C)] = sums.sum(1, dtype=np.float64)
    back = np.linalg.inv(change)
    found: np.ndarray = back @ (total + np.triu(total, 1).T) @ back.T
    return found + _in_float64(flat, start, begin) + _in_float64(flat, begin + size, stop)


@jax.jit
def _row_products(
    words: Sequence[Shaped[jax.Array, " N"]], before: Int[jax.Array, " M"], change: Float[jax.Array, "C C"]
) -> Float[jax.Array, "P R"]:
    """Returns the products of changed columns, each pair once, summed over rows of entries, in one pass over them.

    Args:
      words: bits of bfloat16 entries of each model.
      before: entries that each model has before the first that counts.
      change: of columns; a column has coefficients of those that `change_of_columns` gives it.
    """
    size = words[0].shape[0] - _ALIGNED
    child, reference, *parents = (
        jax.lax.bitcast_convert_type(jax.lax.dynamic_slice(own, (skipped,), (size,)), jnp.bfloat16)
        .reshape(-1, _ROW)
        .astype(jnp.float32)
        for own, skipped in zip(words, before)
    )
    differences = [own - reference for own in (child, *parents)]
    columns = []
    for k, own in enumerate(differences):
        for j in range(1, k or len(differences)):
            own = own + change[k, j] * differences[j]
        columns.append(own)
    columns.append(reference)
    of_pairs = [one * other for k, one in enumerate(columns) for other in columns[k:]]

    def add(some: Sequence[jax.Array], others: Sequence[jax.Array]) -> Sequence[jax.Array]:
        return tuple(one + other for one, other in zip(some, others))

    # One reduction of all pairs reads the entries once; XLA would read them anew for each sum of its own.
    return jnp.stack(jax.lax.reduce(tuple(of_pairs), (jnp.float32(0),) * len(of_pairs), add, (1,)))


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
