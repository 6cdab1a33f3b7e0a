"""The layout of a leaf in the tensors of a checkpoint: a whole tensor, a slice of one, or several stacked.

GPT-2 keeps queries, keys and values in one tensor (three leaves), Mixtral may keep every expert in its own (one leaf),
and gpt-oss alternates rows of gate and up (two leaves).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tracing_jax.checkpoint.tensors import Index


@dataclass(frozen=True)
class TensorSlice:
    """A tensor, or the slice of it that belongs to one leaf."""

    tensor: str
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    axis: int = 0
    start: int = 0
    stop: int | None = None
    """The slice runs from `start` to `stop` on `axis`; all other axes are whole."""
    step: int = 1
    """Of the rows from `start` to `stop` every `step`-th belongs to the leaf; all of them are read."""

    @property
    def index(self) -> Index:
        """What is read of the tensor; empty for the whole of it."""
        if (self.start, self.stop) == (0, None):
            return ()
        return (*(slice(None),) * self.axis, slice(self.start, self.stop))

    @property
    def is_whole(self) -> bool:
        """Whether all of the tensor belongs to the leaf."""
        return not self.index and self.step == 1

    @property
    def places(self) -> Index:
        """What of the tensor belongs to the leaf."""
        return (*(slice(None),) * self.axis, slice(self.start, self.stop, self.step))

    @property
    def read_shape(self) -> tuple[int, ...]:
        """The shape of what is read."""
        return self._shape(1)

    @property
    def extent(self) -> tuple[int, ...]:
        """The shape of the slice."""
        return self._shape(self.step)

    def of_read(self, values: np.ndarray, axis_offset: int = 0) -> np.ndarray:
        """Returns what of the values that were read belongs to the leaf, a view; they may have more axes in front."""
        if self.step == 1:
            return values
        return values[(*(slice(None),) * (axis_offset + self.axis), slice(None, None, self.step))]

    def narrow(self, axis: int, start: int, stop: int) -> "TensorSlice | None":
        """Returns the part from `start` to `stop` on one axis of the slice; None if it is a slice on another axis."""
        if not self.is_whole and axis != self.axis:
            return None
        first = self.start if axis == self.axis else 0
        last = first + (stop - 1) * self.step + 1
        return replace(self, axis=axis, start=first + start * self.step, stop=max(last, first + start * self.step))

    def _shape(self, step: int) -> tuple[int, ...]:
        sizes = list(self.shape)
        sizes[self.axis] = len(range(*slice(self.start, self.stop, step).indices(sizes[self.axis])))
        return tuple(sizes)


@dataclass(frozen=True)
class LeafLayout:
    """The layout of one leaf in a checkpoint: `leaf = stack(slices).reshape(unfolded).transpose(order)`."""

    slices: tuple[TensorSlice, ...]
    unfolded: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return tuple(self.unfolded[axis] for axis in self.order)

    def narrow(self, axis: int, start: int, stop: int) -> "LeafLayout | None":
        """Returns the layout of the units `start` to `stop` on one axis of the leaf.

        None where they are no slice of each tensor, as for an axis that is folded into an outer one.
        """
        unfolded_axis = self.order[axis]
        if (start, stop) == (0, self.unfolded[unfolded_axis]):
            return self
        sizes = tuple(stop - start if at == unfolded_axis else size for at, size in enumerate(self.unfolded))
        if unfolded_axis == 0 and len(self.slices) > 1 and len(self.slices) % self.unfolded[0] == 0:
            each = len(self.slices) // self.unfolded[0]  # slices are units, or parts of one
            return LeafLayout(self.slices[start * each : stop * each], sizes, self.order) if start < stop else None
        found = self._tensor_axis(unfolded_axis)
        if found is None:
            return None
        tensor_axis, rows = found
        slices = [whole.narrow(tensor_axis, start * rows, stop * rows) for whole in self.slices]
        return LeafLayout(tuple(part for part in slices if part), sizes, self.order) if all(slices) else None

    def _tensor_axis(self, unfolded_axis: int) -> tuple[int, int] | None:
        """Returns the axis of a slice whose outermost factor is an unfolded axis, and the rows of one unit there."""
        stacked = (len(self.slices),) if len(self.slices) > 1 else ()
        before = math.prod(self.unfolded[:unfolded_axis])
        outside = 1
        for axis, size in enumerate(stacked + self.slices[0].extent):
            inside = axis >= len(stacked) and size % self.unfolded[unfolded_axis] == 0
            if outside == before and inside and size > 1:
                return axis - len(stacked), size // self.unfolded[unfolded_axis]
            outside *= size
        return None

    def to_leaf(self, slices: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the leaf of what was read of its tensors, a view of them where numpy can make one."""
        own = [part.of_read(values) for part, values in zip(self.slices, slices, strict=True)]
        whole = own[0] if len(own) == 1 else np.stack(own)
        return whole.reshape(self.unfolded).transpose(self.order)

    def to_slices(self, leaf: np.ndarray) -> Iterator[tuple[TensorSlice, np.ndarray]]:
        """Yields each slice with its part of the leaf, in the shape of the slice: the inverse of `to_leaf`."""
        whole = leaf.transpose(np.argsort(self.order))
        parts = [whole] if len(self.slices) == 1 else whole.reshape(len(self.slices), -1)
        for tensor_slice, part in zip(self.slices, parts, strict=True):
            yield tensor_slice, part.reshape(tensor_slice.extent)


def tensor_shapes(layouts: Iterable[LeafLayout]) -> dict[str, tuple[int, ...]]:
    """Returns tensor name -> shape of every tensor that the layouts read."""
    return {part.tensor: part.shape for layout in layouts for part in layout.slices}


def to_tensors(layouts: Mapping[str, LeafLayout], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the contiguous tensors of these leaves, by tensor name; all leaves of a tensor must be given.

    Raises:
      ValueError: leaves of one tensor that differ in dtype.
    """
    found: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        for part, values in layouts[name].to_slices(leaf):
            if part.is_whole:
                found[part.tensor] = np.ascontiguousarray(values)
                continue
            tensor = found.setdefault(part.tensor, np.empty(part.shape, values.dtype))
            if tensor.dtype != values.dtype:
                raise ValueError(f"{name} is {values.dtype}, the rest of {part.tensor} {tensor.dtype}; cast them alike")
            tensor[part.places] = values
    return found
