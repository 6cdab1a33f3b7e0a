"""Small integers and 4-bit floats in larger words, and scales that belong to blocks of a tensor."""

import math
from collections.abc import Sequence

import numpy as np

from tracing_jax.checkpoint.safetensors_file import Index

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of E2M1 (OCP Microscaling Formats, version 1.0): sign, two bits of exponent, one of significand."""


def unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Returns the integers of `bits` bits each that words hold along an axis, the lowest bits first, as int32.

    Args:
      words: int32, or uint8. Where 32 is no multiple of `bits`, integers may go from one word into the next, and the
        number of words is a multiple of `bits`.
      bits: of an integer.
      axis: along which the integers of a word follow one another.
    """
    if words.dtype.itemsize * 8 % bits:
        return _across_words(words, bits, axis)
    per_word = words.dtype.itemsize * 8 // bits
    unsigned = np.moveaxis(words, axis, -1).view(f"u{words.dtype.itemsize}")[..., None]
    shifts = np.arange(per_word, dtype=unsigned.dtype) * unsigned.dtype.type(bits)
    values = (unsigned >> shifts) & unsigned.dtype.type((1 << bits) - 1)
    flat = values.reshape(*values.shape[:-2], values.shape[-2] * per_word).astype(np.int32)
    return np.moveaxis(flat, -1, axis)


def _across_words(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Returns the integers in a stream of bits that runs through words of 32: `bits` words hold 32 of them."""
    last = np.moveaxis(words, axis, -1)
    periods = last.shape[-1] // bits
    stream = np.ascontiguousarray(last).view(np.uint32).reshape(*last.shape[:-1], periods, bits).astype(np.uint64)
    following = np.concatenate([stream[..., 1:], np.zeros_like(stream[..., :1])], axis=-1)
    word, shift = np.divmod(np.arange(32) * bits, 32)
    both = stream | following << np.uint64(32)
    values = (both[..., word] >> shift.astype(np.uint64)) & np.uint64((1 << bits) - 1)
    return np.moveaxis(values.reshape(*last.shape[:-1], 32 * periods).astype(np.int32), -1, axis)


def words_of(span: slice, per_word: int, words: int = 1) -> tuple[slice, slice]:
    """Returns the words that hold a range of units, and where the range is in what they hold.

    Args:
      span: the range.
      per_word: units that so many `words` hold.
      words: which go together.
    """
    first = span.start // per_word
    last = max(first, -(-span.stop // per_word))
    within = slice(span.start - first * per_word, span.stop - first * per_word)
    return slice(first * words, last * words), within


def period(bits: int) -> tuple[int, int]:
    """Returns how many integers of so many bits are in the fewest words of 32 bits that hold whole ones, and those."""
    return (32, bits) if 32 % bits else (32 // bits, 1)


def block_sizes(shape: Sequence[int], scale_shape: Sequence[int], given: Sequence[int] = ()) -> tuple[int, ...] | None:
    """Returns how many units share a scale on each axis of a tensor; None if the two shapes do not fit.

    Args:
      shape: of the tensor.
      scale_shape: of its scales, with one axis for each of the tensor's last ones.
      given: the sizes by the config, of the last axes; they are needed where a block is cut at the end of an axis.
    """
    sizes = []
    padded = (1,) * (len(shape) - len(scale_shape)) + tuple(scale_shape)
    wanted = (0,) * (len(shape) - len(given)) + tuple(given)
    for units, scales, size in zip(shape, padded, wanted):
        size = size if size and -(-units // size) == scales else 0
        if not size:
            size = units // scales if scales and units % scales == 0 else 0
        if not size and units:
            return None
        sizes.append(max(size, 1))
    return tuple(sizes) if len(scale_shape) <= len(shape) else None


def scale_bounds(bounds: Index, sizes: Sequence[int]) -> Index:
    """Returns the slice of the scales that belong to a slice of a tensor."""
    return tuple(slice(bound.start // size, -(-bound.stop // size)) for bound, size in zip(bounds, sizes))


def scale_of_each(scales: np.ndarray, bounds: Index, sizes: Sequence[int]) -> np.ndarray:
    """Returns the scale of every unit of a slice, from those of `scale_bounds`; axes with one scale are left as one."""
    for axis, (bound, size) in enumerate(zip(bounds, sizes)):
        if scales.shape[axis] == 1 or size == 1:
            continue
        first = bound.start - bound.start // size * size
        repeated = np.repeat(scales, size, axis)
        scales = repeated[(*(slice(None),) * axis, slice(first, first + bound.stop - bound.start))]
    return scales


def elements(shape: Sequence[int]) -> int:
    """Returns the number of elements of a shape."""
    return math.prod(shape)
