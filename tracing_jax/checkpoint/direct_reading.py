"""Reading past the page cache, where what is read does not fit it: each page of the cache costs more than its bytes.

Source: `O_DIRECT` of open(2) on Linux. Positions in the file, sizes and memory are multiples of a block.
"""

import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_BLOCK = 4096
_AT_ONCE = 2**22


def fits_page_cache(files: Iterable[Path]) -> bool:
    """Returns whether the memory of the machine is as large as these files; true where that is not known."""
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return True
    return sum(file.stat().st_size for file in set(files)) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _AlignedMemory(threading.local):
    """Memory of each thread that begins at a page."""

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, _AT_ONCE))


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
    found = min(os.preadv(file, [_MEMORY.view[: blocks * _BLOCK]], start - skipped) - skipped, wanted)
    if found > 0:
        own = np.frombuffer(_MEMORY.view, np.uint8)[skipped : skipped + found]
        np.copyto(np.frombuffer(memory[:found], np.uint8), own)  # other threads run meanwhile
    return found
