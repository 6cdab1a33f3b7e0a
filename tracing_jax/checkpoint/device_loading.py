"""Reading straight onto devices: of each leaf, the slices that the devices of this process hold.

Bytes go from the file into one host buffer, reused for every leaf, and from there to each device, which transposes the
file's `[out, in]` to our `[in, out]` as it copies. Peak memory of a subtree is its own size and its largest leaf.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table
from tracing_jax.checkpoint.checkpoint import Checkpoint
from tracing_jax.checkpoint.read_buffer import ReadBuffer, UnitRange
from tracing_jax.checkpoint.tensor_layout import LeafLayout
from tracing_jax.sharding import leaf_spec
from tracing_jax.tree import Tree, unflatten


@dataclass(frozen=True)
class ShardedCheckpoint:
    """A checkpoint as a source whose subtrees are read onto the devices of a mesh, split by the axis table.

    A process reads only what its devices hold, and each byte of that once, however many of them hold it.
    """

    checkpoint: Checkpoint
    mesh: Mesh
    _buffer: ReadBuffer = field(default_factory=ReadBuffer, repr=False, compare=False)
    _finite: set[str] = field(default_factory=set, repr=False, compare=False)
    """Leaves that were read once: they are not searched for NaN and infinities again."""

    @property
    def arch(self) -> Arch:
        """The facts of the model."""
        return self.checkpoint.arch

    def embed(self) -> Tree:
        """Returns the subtree `embed`, read now; a tied model's copy of it in the file must be the same."""
        found = self._subtree("embed/")
        for start, stop in _held_rows(found["embedding"]) if "embedding" in found else ():
            self.checkpoint.check_tied_copy(start, stop)
        return found

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the subtree `layers/<index>`, or its leaves under the names in `only`, read now."""
        return self._subtree(f"layers/{index}/", only)

    def head(self) -> Tree:
        """Returns the subtree `head`, read now."""
        return self._subtree("head/")

    def leaf_slice(self, name: str, axis: int, *spans: slice) -> np.ndarray | None:
        """Returns slices of a leaf in host memory, as `Checkpoint.leaf_slice` does."""
        return self.checkpoint.leaf_slice(name, axis, *spans)

    def _subtree(self, prefix: str, only: Sequence[str] = ()) -> Tree:
        broken: list[str] = []
        leaves = {}
        for name, layout in self.checkpoint.layouts_of_subtree(prefix, only).items():
            spec = leaf_spec(self._table.leaves[prefix + name], self._table, self.mesh)
            searched = None if prefix + name in self._finite else broken
            leaves[name] = self._leaf(layout, NamedSharding(self.mesh, spec), searched)
        self.checkpoint.refuse(broken)
        self._finite.update(prefix + name for name in leaves)
        return unflatten(leaves)

    def _leaf(self, layout: LeafLayout, sharding: NamedSharding, broken: list[str] | None) -> jax.Array:
        axis = next((axis for axis, split in enumerate(sharding.spec) if split is not None), 0)
        held = _held(sharding, layout.shape, axis)
        shards = []
        for run in _runs(held.values()):
            with self._buffer.lock:
                start, part = self._buffer.read(self.checkpoint.tensors, layout, axis, run, broken)
                shards += [
                    _copied(part[_at(axis, first - start, last - start)], device)
                    for device, (first, last) in held.items()
                    if run[0] <= first < run[1]
                ]
                jax.block_until_ready(shards)  # then the buffer may be filled again
        return jax.make_array_from_single_device_arrays(layout.shape, sharding, shards)

    @cached_property
    def _table(self) -> AxisTable:
        return axis_table(self.arch)


def _held(sharding: NamedSharding, shape: tuple[int, ...], axis: int) -> dict[jax.Device, UnitRange]:
    """Returns the units of one axis that each device of this process holds, by device."""
    indices = sharding.addressable_devices_indices_map(shape)
    return {device: index[axis].indices(shape[axis])[:2] for device, index in indices.items() if index is not None}


def _runs(ranges: Iterable[UnitRange]) -> list[UnitRange]:
    """Returns the fewest ranges that hold the same units, in order."""
    runs: list[UnitRange] = []
    for start, stop in sorted(set(ranges)):
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
        else:
            runs.append((start, stop))
    return runs


def _copied(view: np.ndarray, device: jax.Device) -> jax.Array:
    """Returns the view on a device, in memory of its own.

    A CPU device aliases a contiguous array, whatever `may_alias` is; any other it copies into C order.
    """
    if device.platform == "cpu" and view.flags.c_contiguous:
        view = view.copy()
    return jax.device_put(view, device, may_alias=False)


def _at(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, stop))


def _held_rows(leaf: jax.Array) -> list[UnitRange]:
    return _runs([shard.index[0].indices(leaf.shape[0])[:2] for shard in leaf.addressable_shards])
