"""Whether all weights are numbers: cheap enough to ask of every byte that is read."""

import numpy as np

# The bits of a dtype's exponent, all of which are set in NaN and in the infinities alone.
_EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F80_0000, "float64": 0x7FF0_0000_0000_0000}
_CHUNK = 1 << 16  # weights at a time: what is made of them stays in the cache of a core


def all_finite(weights: np.ndarray) -> bool:
    """Returns whether a floating array holds neither NaN nor infinities, in memory that does not grow with it."""
    bits = np.ravel(weights, order="K").view(f"u{weights.dtype.itemsize}")
    mask = bits.dtype.type(_EXPONENT[weights.dtype.name])
    room = np.empty(min(_CHUNK, bits.size), bits.dtype)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if np.bitwise_and(chunk, mask, out=room[: chunk.size]).max() == mask:
            return False
    return True
