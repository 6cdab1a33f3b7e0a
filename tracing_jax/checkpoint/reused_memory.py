"""Memory of large arrays, used again once they are gone: pages that are new to a process cost as much as reading."""

import math
import weakref
from collections.abc import Sequence
from threading import RLock
from typing import Any

import numpy as np

LARGE = 2**20
"""Bytes from which on the memory of an array is kept."""

MOST_IDLE = 2**29
"""Bytes that are kept while no array has them: about those of a layer of a 7B model."""

_ALIGNMENT = 64  # of a cache line, which also lets JAX use the array as it is


class _Idle:
    """Memory that no array has: sizes in the order of their last use, with blocks of that size.

    An array can end at any point, also in the thread that is in one of these methods: each step is one of a list or a
    dict, and what it takes may be gone.
    """

    def __init__(self) -> None:
        self._lock = RLock()
        self._blocks: dict[int, list[np.ndarray]] = {}

    def take(self, size: int) -> np.ndarray:
        """Returns memory of so many bytes, and as many more as it takes to align it."""
        with self._lock:
            if blocks := self._blocks.get(size):
                return blocks.pop()
        return np.empty(size + _ALIGNMENT, np.uint8)

    def give_back(self, size: int, block: np.ndarray) -> None:
        """Keeps memory, in place of what was not used for longest; not if it is too large."""
        if size > MOST_IDLE:
            return
        with self._lock:
            blocks = self._blocks.pop(size, [])
            self._blocks[size] = [*blocks, block]
            for other in [*self._blocks]:
                while self.bytes > MOST_IDLE and self._blocks.get(other):
                    self._blocks[other].pop()

    @property
    def bytes(self) -> int:
        """How much it is in all."""
        return sum(size * len(blocks) for size, blocks in [*self._blocks.items()])


_IDLE = _Idle()


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Returns an array as `np.empty` does, if it is large with memory of an earlier one of its size.

    The memory is free again when neither the array nor a view of it, nor a JAX array that shares it, is left.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < LARGE:
        return np.empty(shape, dtype)
    block = _IDLE.take(size)
    first = -block.ctypes.data % _ALIGNMENT
    # Views of an array made from a buffer keep that array, and not what is behind it.
    whole = np.frombuffer(block.data[first : first + size], np.uint8)
    weakref.finalize(whole, _IDLE.give_back, size, block).atexit = False
    found: np.ndarray = whole.view(dtype).reshape(tuple(shape))
    return found
