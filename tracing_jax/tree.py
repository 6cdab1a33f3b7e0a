"""Pytrees by leaf name: `layers/3/mlp/up_proj/kernel` is the one way in which this package addresses a weight."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Int

Tree = Any
"""Any pytree; for model parameters, nested dicts with arrays at the leaves."""


def name_of(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf, its keys joined by slashes, from a `jax.tree_util` key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of a pytree by name, in the tree's own order."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict with these leaves: the inverse of `flatten` for trees made of dicts with string keys."""
    root: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def parsed_prefix(prefix: str) -> tuple[str, str]:
    """Returns name and index of the subtree with this prefix: `layers` and `3` of `layers/3/`; `embed` has no index."""
    name, _, index = prefix.strip("/").partition("/")
    return name, index


def select(tree: Tree, names: Collection[str]) -> Tree:
    """Returns the tree with only the leaves at or under these names, such as `mlp` or `mlp/up_proj`; all if none is."""
    if not names:
        return tree
    wanted = tuple(f"{name}/" for name in names)
    return unflatten({name: leaf for name, leaf in flatten(tree).items() if f"{name}/".startswith(wanted)})


def map_named(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Returns the tree with every leaf replaced by `function(name, leaf, *leaves of rest)`."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(name_of(path), *leaves), tree, *rest)


def to_host(tree: Tree) -> Tree:
    """Returns the tree with numpy leaves, each whole.

    Where several processes share the leaves, each must ask for the same ones in the same order: what the devices of the
    others hold comes from them.
    """
    return jax.tree.map(_whole, tree)


def _whole(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def readable(array: jax.Array) -> jax.Array | np.ndarray:
    """Returns an array whose every element this process can read: itself, or where others hold parts of it, a copy."""
    return array if jax.process_count() == 1 else to_host(array)


def taken(leaf: jax.Array | np.ndarray, indices: Int[np.ndarray, " n"], axis: int = 0) -> jax.Array | np.ndarray:
    """Returns the leaf at these indices of an axis, all within it, as one compiled program where it is on a device.

    Of a leaf in the memory of this process it is an array of numpy: each shape would be another program.
    """
    if isinstance(leaf, np.ndarray) or _is_on_one_cpu(leaf):
        return np.asarray(leaf).take(indices, axis=axis)
    return _taken(leaf, indices, axis)


def _is_on_one_cpu(array: jax.Array) -> bool:
    devices = array.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu" and array.is_fully_addressable


@functools.partial(jax.jit, static_argnames="axis")
def _taken(leaf: jax.Array, indices: Int[Array, " n"], axis: int) -> jax.Array:
    return jnp.take(leaf, indices, axis=axis, mode="clip")  # other modes compute what no index here needs
