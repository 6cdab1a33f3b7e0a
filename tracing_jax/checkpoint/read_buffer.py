"""Host memory that leaves are read into one after another: pages that are new to a process cost as much as reading."""

from threading import Lock

import numpy as np

from tracing_jax.checkpoint.tensor_layout import LeafLayout
from tracing_jax.checkpoint.tensors import TensorStore, all_finite

UnitRange = tuple[int, int]
"""The first unit and the one after the last, on one axis of a leaf."""


class ReadBuffer:
    """Host memory in which one leaf at a time is read."""

    def __init__(self) -> None:
        self.lock = Lock()
        self._bytes = np.empty(0, np.uint8)

    def read(
        self, tensors: TensorStore, layout: LeafLayout, axis: int, run: UnitRange, broken: list[str] | None
    ) -> tuple[int, np.ndarray]:
        """Returns the units of `run`, or more where they cannot be read alone, as a view that the next call overwrites.

        Args:
          tensors: where they are read from.
          layout: of the leaf.
          axis: of the leaf.
          run: the units on that axis.
          broken: gets the names of tensors that hold NaN or infinities; None: they are not looked for.

        Returns:
          the first unit of the view, and the view.
        """
        narrowed = layout.narrow(axis, *run)
        start, layout = (run[0], narrowed) if narrowed else (0, layout)
        dtype = tensors.dtype(layout.slices[0].tensor)
        views = self._view((len(layout.slices), *layout.slices[0].read_shape), dtype)
        for view, part in zip(views, layout.slices, strict=True):
            tensors.read_into(view, part.tensor, part.index)
            if broken is not None and not all_finite(view):
                broken.append(part.tensor)
        own = layout.slices[0].of_read(views, axis_offset=1)
        return start, own.reshape(layout.unfolded).transpose(layout.order)

    def _view(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        needed = int(np.prod(shape)) * dtype.itemsize
        if needed > self._bytes.size:
            self._bytes = np.empty(0, np.uint8)  # the old one is gone before the new one is made
            self._bytes = np.empty(needed, np.uint8)
        return self._bytes[:needed].view(dtype).reshape(shape)
