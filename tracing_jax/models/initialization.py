"""Fresh params: normal(0.02) for kernels and embeddings, unit gains, zero biases."""

import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.tree import Tree, unflatten

_STD = 0.02


def init_params(arch: Arch, key: PRNGKeyArray) -> Tree:
    """Returns freshly initialised float32 params `{embed, layers: {"0": ...}, head}`: normal(0.02), unit gains.

    The axis table says which leaves there are, and their shapes. Each leaf is drawn from a key of its own, derived as
    Flax linen derives it: models initialised by it have these very weights.
    """
    part_keys = jax.random.split(key, arch.num_layers + 2)
    table, leaves = axis_table(arch), {}
    for name, row in table.leaves.items():
        shape = tuple(table.sizes[axis or ""] for axis in row.axes)
        index, own_name = _part_of(name)
        leaves[name] = _initial(arch, part_keys[index], own_name, shape)
    return unflatten(leaves | ({} if any(name.startswith("head/") for name in leaves) else {"head": {}}))


def _part_of(name: str) -> tuple[int, str]:
    """Returns which of the keys of embed, head and the layers is that of a leaf, and its name within the subtree."""
    subtree, _, rest = name.partition("/")
    if subtree != "layers":
        return ("embed", "head").index(subtree), rest
    layer, _, rest = rest.partition("/")
    return 2 + int(layer), rest


def _initial(arch: Arch, key: PRNGKeyArray, name: str, shape: tuple[int, ...]) -> Float[Array, "..."]:
    if name.endswith("bias"):
        return jnp.zeros(shape)
    if name.endswith("multiplier"):
        return jnp.ones(shape)
    if name.endswith("scale"):
        return jnp.zeros(shape) if arch.norm == "rms_unit_offset" else jnp.ones(shape)
    return jax.nn.initializers.normal(_STD)(_leaf_key(key, name), shape, jnp.float32)


def _leaf_key(key: PRNGKeyArray, name: str) -> PRNGKeyArray:
    """Returns the key of a leaf, from the names of its modules and the number of draws in the last one up to it.

    Source: flax.core.scope, `LazyRng`.
    """
    modules = name.split("/")[:-1]
    draw = 2 if name == "positions" else 1  # the only leaf that is not the first drawn of its module
    digest = hashlib.sha1("".join(modules).encode() + bytes([draw])).digest()
    return jax.random.fold_in(key, jnp.uint32(int.from_bytes(digest[:4], "big")))
