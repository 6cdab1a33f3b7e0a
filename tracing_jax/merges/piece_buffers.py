"""Memory that pieces of models are read into."""

import numpy as np

from tracing_jax.checkpoint import Checkpoint, ReadBuffer


class PieceBuffers:
    """A buffer for each model, the same for piece after piece: what was read is lost when the next one is."""

    def __init__(self) -> None:
        self._buffers: dict[int, ReadBuffer] = {}

    def read(self, at: int, model: Checkpoint, name: str, axis: int, span: slice) -> np.ndarray | None:
        """Returns units of a leaf of the model at this place; None where its files do not have them in one place."""
        layout = model.leaf_layouts[name]
        if not layout.order or layout.narrow(axis, span.start, span.stop) is None:
            return None
        buffer = self._buffers.setdefault(at, ReadBuffer())
        return buffer.read(model.tensors, layout, axis, (span.start, span.stop), None)[1]
