"""A tensor store that counts what is read of it."""

from collections import Counter
from typing import Any

import numpy as np


class CountingStore:
    """Counts how often each tensor of another store is read, and how many bytes of it."""

    def __init__(self, store: Any) -> None:
        self._store, self.reads, self.bytes = store, Counter[str](), Counter[str]()
        self.names, self.shape, self.dtype, self.files = store.names, store.shape, store.dtype, store.files

    def read(self, name: str, index: Any = ()) -> np.ndarray:
        found = self._store.read(name, index)
        self._count(name, found)
        return found

    def read_many(self, requests: Any) -> list[np.ndarray]:
        return [self.read(name, index) for name, index in requests]

    def read_into(self, out: np.ndarray, name: str, index: Any = ()) -> None:
        self._count(name, out)
        self._store.read_into(out, name, index)

    def _count(self, name: str, found: np.ndarray) -> None:
        self.reads[name] += 1
        self.bytes[name] += found.nbytes
