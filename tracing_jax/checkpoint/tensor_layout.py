"""The layout of a leaf in the tensors of a checkpoint: a whole tensor, a slice of one, or several stacked.

GPT-2 keeps queries, keys and values in one tensor (three leaves), Mixtral may keep every expert in its own (one leaf).
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

    @property
    def index(self) -> Index:
        """The slice of the tensor; empty for the whole of it."""
        if (self.start, self.stop) == (0, None):
            return ()
        return (*(slice(None),) * self.axis, slice(self.start, self.stop))

    @property
    def extent(self) -> tuple[int, ...]:
        """The shape of the slice."""
        sizes = list(self.shape)
        sizes[self.axis] = len(range(*slice(self.start, self.stop).indices(sizes[self.axis])))
        return tuple(sizes)

    def narrow(self, axis: int, start: int, stop: int) -> "TensorSlice | None":
        """Returns the part from `start` to `stop` on one axis of the slice; None if it is a slice on another axis."""
        if self.index and axis != self.axis:
            return None
        first = self.start if self.index else 0
        return replace(self, axis=axis, start=first + start, stop=first + stop)


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
        found = self._tensor_axis(unfolded_axis)
        if found is None:
            return None
        tensor_axis, rows = found
        slices = [whole.narrow(tensor_axis, start * rows, stop * rows) for whole in self.slices]
        sizes = tuple(stop - start if at == unfolded_axis else size for at, size in enumerate(self.unfolded))
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
        """Returns the leaf of its slices, a view of them where numpy can make one."""
        whole = slices[0] if len(slices) == 1 else np.stack(slices)
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
            if not part.index:
                found[part.tensor] = np.ascontiguousarray(values)
                continue
            tensor = found.setdefault(part.tensor, np.empty(part.shape, values.dtype))
            if tensor.dtype != values.dtype:
                raise ValueError(f"{name} is {values.dtype}, the rest of {part.tensor} {tensor.dtype}; cast them alike")
            tensor[part.index] = values
    return found
