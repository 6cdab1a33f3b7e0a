"""Tensors that are computed from the stored ones as they are read, slice by slice: renamed, rounded, dequantised."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensors import PastCache, TensorStore, past_cache_of


@runtime_checkable
class Derived(Protocol):
    """A tensor that is computed from stored ones; a slice of it costs what that slice needs."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""

    def read(self, index: Index = ()) -> np.ndarray:
        """Returns the tensor, or a slice of it, computed now."""


class DerivedTensors:
    """A `TensorStore` in which some tensors are derived from those of another, and some are hidden."""

    def __init__(self, store: TensorStore, derived: Mapping[str, Derived], hidden: Collection[str] = ()):
        self._store, self._derived = store, dict(derived)
        self._names = tuple(sorted((set(store.names()) - set(hidden)) | self._derived.keys()))

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._derived[name].shape if name in self._derived else self._store.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._derived[name].dtype if name in self._derived else self._store.dtype(name)

    def files(self) -> tuple[Path, ...]:
        return self._store.files()

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._derived[name].read(index) if name in self._derived else self._store.read(name, index)

    def read_many(self, requests: Sequence[tuple[str, Index]]) -> list[np.ndarray]:
        stored = [(name, index) for name, index in requests if name not in self._derived]
        found = iter(self._store.read_many(stored))
        return [self._derived[name].read(i) if name in self._derived else next(found) for name, i in requests]

    def read_into(self, out: np.ndarray, name: str, index: Index = ()) -> None:
        if name in self._derived:
            out[...] = self._derived[name].read(index)
        else:
            self._store.read_into(out, name, index)

    def past_cache(self) -> TensorStore:
        derived = {name: _past_cache(own) for name, own in self._derived.items()}
        hidden = set(self._store.names()) - set(self._names)
        return DerivedTensors(past_cache_of(self._store), derived, hidden)


def _past_cache(derived: Derived) -> Derived:
    """Returns a tensor that is computed from those of stores with these read past the page cache."""
    if not is_dataclass(derived):
        return derived
    own = {field.name: getattr(derived, field.name) for field in fields(derived)}
    stores = {name: store.past_cache() for name, store in own.items() if isinstance(store, PastCache)}
    return replace(derived, **stores)


class RenamedTensors:
    """A `TensorStore` whose tensors have other names than those of the store that holds them."""

    def __init__(self, store: TensorStore, stored_names: Mapping[str, str]):
        self._store, self._stored = store, stored_names

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._stored))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._store.shape(self._stored[name])

    def dtype(self, name: str) -> np.dtype:
        return self._store.dtype(self._stored[name])

    def files(self) -> tuple[Path, ...]:
        return self._store.files()

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._store.read(self._stored[name], index)

    def read_many(self, requests: Sequence[tuple[str, Index]]) -> list[np.ndarray]:
        return self._store.read_many([(self._stored[name], index) for name, index in requests])

    def read_into(self, out: np.ndarray, name: str, index: Index = ()) -> None:
        self._store.read_into(out, self._stored[name], index)

    def past_cache(self) -> TensorStore:
        return RenamedTensors(past_cache_of(self._store), self._stored)


@dataclass(frozen=True)
class Alias:
    """A stored tensor under a second name."""

    store: TensorStore
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shape(self.name)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype(self.name)

    def read(self, index: Index = ()) -> np.ndarray:
        return self.store.read(self.name, index)


@dataclass(frozen=True)
class Cast:
    """A stored tensor in another dtype, rounded once."""

    store: TensorStore
    name: str
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shape(self.name)

    def read(self, index: Index = ()) -> np.ndarray:
        return self.store.read(self.name, index).astype(self.dtype)


@dataclass(frozen=True)
class Transposed:
    """A stored tensor with its last two axes exchanged."""

    store: TensorStore
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        *first, rows, columns = self.store.shape(self.name)
        return (*first, columns, rows)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype(self.name)

    def read(self, index: Index = ()) -> np.ndarray:
        *first, rows, columns = bounds_of(index, self.shape)
        return np.ascontiguousarray(self.store.read(self.name, (*first, columns, rows)).swapaxes(-1, -2))
