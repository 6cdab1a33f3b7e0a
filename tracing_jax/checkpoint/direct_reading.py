"""Reading past the page cache, where what is read does not fit it: each page of the cache costs more than its bytes.

Source: `O_DIRECT` of open(2) on Linux. Positions in the file, sizes and memory are multiples of a block.
"""

import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tracing_jax.host_memory import memory_limit

_BLOCK = 4096
_AT_ONCE = 2**22


def fits_page_cache(files: Iterable[Path]) -> bool:
    """Returns whether the memory that this process may use is as large as these files; true where it is not known."""
    memory = memory_limit()
    return memory is None or sum(file.stat().st_size for file in set(files)) <= memory


class _AlignedMemory(threading.local):
    """Memory of each thread that begins at a page."""

    def __init__(self) -> None:
        self._process = -1

    @property
    def view(self) -> memoryview:
        """The memory of this thread in this process.

        The mapping is shared, for no other may be read into while the process forks (open(2)), and so a forked process
        gets one of its own.
        """
        if self._process != os.getpid():
            self._process, self._view = os.getpid(), memoryview(mmap.mmap(-1, _AT_ONCE))
        return self._view


_MEMORY = _AlignedMemory()


def read_past_cache(path: Path, targets: Sequence[tuple[int, memoryview]]) -> list[tuple[int, memoryview]]:
    """Reads bytes of a file past the page cache, and returns what could not be read so.

    Args:
      path: of the file.
      targets: positions in the file, with the memory that the bytes from there on are read into.

    Returns:
      those targets, or the rest of one, that are left to read: all where the file system cannot.
    """
    if not hasattr(os, "O_DIRECT"):  # macOS, Windows
        return list(targets)
    left = list(targets)
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return left
    try:
        while left:
            start, memory = left[0]
            while memory:
                count = _read(file, start, memory)
                if count <= 0:
                    return left
                start, memory = start + count, memory[count:]
                left[0] = start, memory
            del left[0]
    except OSError:  # left to the usual way, which names what is wrong
        return left
    finally:
        os.close(file)
    return left


def _read(file: int, start: int, memory: memoryview) -> int:
    """Reads the first bytes, and returns how many."""
    skipped = start % _BLOCK
    wanted = min(len(memory), _AT_ONCE - skipped)
    blocks = -(-(skipped + wanted) // _BLOCK)
    view = _MEMORY.view
    found = min(os.preadv(file, [view[: blocks * _BLOCK]], start - skipped) - skipped, wanted)
    if found > 0:
        own = np.frombuffer(view, np.uint8)[skipped : skipped + found]
        np.copyto(np.frombuffer(memory[:found], np.uint8), own)  # other threads run meanwhile
    return found
