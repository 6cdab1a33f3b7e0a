"""Memory that the pieces of all models are read into, the same for every second piece."""

import numpy as np

from tracing_jax.checkpoint import Checkpoint, ReadBuffer


class PieceBuffers:
    """Two buffers for each model: one piece is summed while the next one is read."""

    def __init__(self) -> None:
        self._turn = 0
        self._buffers: dict[tuple[int, int], ReadBuffer] = {}

    def next_piece(self) -> None:
        """Turns to the other buffers; what was read into them before the last call is lost."""
        self._turn = 1 - self._turn

    def read(self, at: int, model: Checkpoint, name: str, axis: int, start: int, stop: int) -> np.ndarray | None:
        """Returns units of a leaf of the model at this place; None where its files do not have them in one place."""
        layout = model.leaf_layouts[name]
        if not layout.order or layout.narrow(axis, start, stop) is None:
            return None
        buffer = self._buffers.setdefault((self._turn, at), ReadBuffer())
        return buffer.read(model.tensors, layout, axis, (start, stop), None)[1]
