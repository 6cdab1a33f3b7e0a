"""Random bfloat16 weights, and the same weights with noise, faster than a disk writes them.

Sixteen random bits index a table of 65,536 quantiles of the normal distribution, so that every value is drawn on its
own and no row repeats another: a gather for each value in place of a transform of random numbers.
"""

import functools
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt16
from scipy.special import ndtri

_CHUNK = 2**20  # values at once: what they need fits the cache
_PER_WORD = 4  # sixteen-bit draws in a word of 64 bits


@dataclass(frozen=True)
class Distribution:
    """How the weights of a leaf are distributed: normal, around `center`; `noise` is relative to `std`."""

    center: float
    std: float
    noise: float


def draw(
    shape: tuple[int, ...], distribution: Distribution, generator: np.random.Generator
) -> tuple[UInt16[np.ndarray, "..."], UInt16[np.ndarray, "..."]]:
    """Returns the bits of random bfloat16 weights, and of the same weights plus noise."""
    base, ft = np.empty(shape, np.uint16), np.empty(shape, np.uint16)
    quantiles = _quantiles()
    values = (distribution.center + distribution.std * quantiles).astype(ml_dtypes.bfloat16)
    exact, noise = values.astype(np.float32), np.float32(distribution.noise * distribution.std) * quantiles
    for start in range(0, base.size, _CHUNK):
        part = slice(start, min(start + _CHUNK, base.size))
        index, noise_index = _random_bits(generator, part.stop - start), _random_bits(generator, part.stop - start)
        base.reshape(-1)[part] = values.view(np.uint16)[index]
        noisy = exact[index] + noise[noise_index]
        ft.reshape(-1)[part] = noisy.astype(ml_dtypes.bfloat16).view(np.uint16)
    return base, ft


def _random_bits(generator: np.random.Generator, count: int) -> UInt16[np.ndarray, " count"]:
    words = generator.integers(0, 2**64, -(-count // _PER_WORD), np.uint64)
    return words.view(np.uint16)[:count]


@functools.cache
def _quantiles() -> Float[np.ndarray, " 65536"]:
    """Returns the middles of 65,536 equally likely intervals of the standard normal distribution."""
    return ndtri((np.arange(2**16) + 0.5) / 2**16).astype(np.float32)
