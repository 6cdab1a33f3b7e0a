"""The device mesh, and which mesh axis splits which axis of a weight."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Shaped

from tracing_jax.axes import AxisTable, LeafSpec, kind_of
from tracing_jax.tree import Tree, map_named, to_host

MESH_AXIS = {"mlp": "model", "kv_heads": "model", "vocab": "model"}
"""Axis kind -> mesh axis (tensor parallelism). Token blocks are split over `data`. Experts are computed one at a time:
each is split over its units (mlp), and the axis of the experts is not."""


@dataclass(frozen=True)
class Compute:
    """Where and how a forward pass runs.

    Attributes:
      mesh: devices `(data, model)`; see `make_mesh`.
      batch_size: token blocks in flight at a time, rounded up to a multiple of the `data` axis.
      dtype: of hidden states and matmuls; norms, softmax, losses and sums are float32 in any case.

    Example:
      >>> compute = tj.Compute(tj.make_mesh(), batch_size=4)
      >>> [batch.shape for batch in compute.batches(np.zeros((8, 16), np.int32))]
      [(4, 16), (4, 16)]
    """

    mesh: Mesh
    batch_size: int = 8
    dtype: DTypeLike = jnp.float32

    def batches(self, tokens: Shaped[np.ndarray, "N T"]) -> list[np.ndarray]:
        """Returns batches of one shape, the last padded with copies of the first block."""
        data = self.mesh.shape["data"]
        size = min(-(-self.batch_size // data), -(-len(tokens) // data)) * data
        filler = np.repeat(tokens[:1], -len(tokens) % size, axis=0)
        return np.split(np.concatenate([tokens, filler]), (len(tokens) + len(filler)) // size)

    def put(self, batch: np.ndarray) -> jax.Array:
        """Returns a batch on the mesh, its first axis split over `data`."""
        return _put(batch, NamedSharding(self.mesh, P("data")))

    def get(self, arrays: Tree) -> Tree:
        """Returns sharded arrays as whole ones on the host."""
        return to_host(arrays)


def cpu_device() -> jax.Device:
    """Returns a CPU of this process; its first device where JAX_PLATFORMS excludes the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def put_like(array: np.ndarray, batch: jax.Array) -> jax.Array:
    """Returns hidden states `[*, B, T, D]` on the mesh of a batch `[B, T]` from `Compute.put`, split like it."""
    assert isinstance(batch.sharding, NamedSharding), batch.sharding
    leading = (None,) * (array.ndim - batch.ndim - 1)
    return _put(array, NamedSharding(batch.sharding.mesh, P(*leading, *batch.sharding.spec)))


def make_mesh(data: int = 1, model: int = 1) -> Mesh:
    """Returns a mesh `(data, model)` over the devices of all processes; -1 for one of them takes the remaining ones.

    Raises:
      ValueError: more devices asked for than there are, a count that is not positive, or a process without a device.

    Example:
      >>> dict(tj.make_mesh(data=1, model=1).shape)
      {'data': 1, 'model': 1}
    """
    available = len(jax.devices())
    if data == -1:
        data = available // max(model, 1)
    if model == -1:
        model = available // max(data, 1)
    if min(data, model) < 1 or data * model > available:
        raise ValueError(
            f"mesh (data={data}, model={model}) needs {data * model} devices, {available} are there; "
            "set config.mesh.data and config.mesh.model (-1 takes what is left)"
        )
    devices = jax.devices()[: data * model]
    idle = set(range(jax.process_count())) - {device.process_index for device in devices}
    if idle:
        raise ValueError(
            f"mesh (data={data}, model={model}) takes no device of process {min(idle)}, and {available} are there; "
            "set config.mesh.data and config.mesh.model (-1 takes what is left), or start fewer processes"
        )
    # Explicit axes, the default, would ask for the sharding of every intermediate result.
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def leaf_spec(row: LeafSpec, table: AxisTable, mesh: Mesh) -> P:
    """Returns the partition spec of a leaf: split on the first axis with a mesh axis that divides its size evenly."""
    used: set[str] = set()
    spec: list[str | None] = []
    for axis in row.axes:
        mesh_axis = MESH_AXIS.get(kind_of(axis)) if axis is not None else None
        fits = mesh_axis is not None and mesh_axis not in used and table.sizes[axis] % mesh.shape[mesh_axis] == 0  # type: ignore[index]
        spec.append(mesh_axis if fits else None)
        used |= {mesh_axis} if fits else set()  # type: ignore[arg-type]
    return P(*spec)


def shard(tree: Tree, table: AxisTable, mesh: Mesh) -> Tree:
    """Returns the tree on the devices of the mesh, each leaf split as its axes say."""
    return map_named(
        lambda name, leaf: _put(leaf, NamedSharding(mesh, leaf_spec(table.leaves[name], table, mesh))), tree
    )


def _put(array: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns an array that every process has, on the devices of all of them."""
    if sharding.is_fully_addressable or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
