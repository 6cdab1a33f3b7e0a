"""Single leaves of a model, and all of them as a tree whose leaves are read when they are turned into arrays."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tracing_jax.axes import axis_table
from tracing_jax.sources.prefetch import layer_alone, without_prefetching
from tracing_jax.sources.source import ParamSource, SliceReader, resident_params, subtree
from tracing_jax.tree import Tree, flatten, unflatten


@dataclass(frozen=True)
class LazyLeaf:
    """A leaf of known shape; `jnp.asarray` and `np.asarray` read it."""

    shape: tuple[int, ...]
    read: Callable[[], jax.Array | np.ndarray]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape))

    def __jax_array__(self) -> jax.Array:
        return jax.numpy.asarray(self.read())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def leaf(source: ParamSource, name: str) -> Any:
    """Returns one leaf, such as `layers/3/mlp/up_proj/kernel`; nothing else is read, and nothing ahead."""
    kind, _, rest = name.partition("/")
    if kind != "layers":
        return flatten(subtree(source, f"{kind}/"))[rest]
    index, _, rest = rest.partition("/")
    return flatten(layer_alone(source, int(index), (rest,)))[rest]


def leaf_slice(source: ParamSource, name: str, axis: int, *spans: slice) -> Any:
    """Returns slices of a leaf on one of its axes, joined and read alone; None if the source must read it whole."""
    inner = without_prefetching(source)
    return inner.leaf_slice(name, axis, *spans) if isinstance(inner, SliceReader) else None


def params_of(source: ParamSource) -> Tree:
    """Returns the tree of a model in memory, or one of lazy leaves, each read by itself."""
    if (params := resident_params(source)) is not None:
        return params
    table = axis_table(source.arch)
    shapes = {name: tuple(table.sizes[axis or ""] for axis in row.axes) for name, row in table.leaves.items()}
    return unflatten({name: LazyLeaf(shape, functools.partial(leaf, source, name)) for name, shape in shapes.items()})
