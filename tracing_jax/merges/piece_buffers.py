"""Memory that the pieces of all models are read into, the same for every second piece, each model by its own thread."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np

from tracing_jax.checkpoint import Checkpoint, ReadBuffer


class PieceBuffers:
    """Two buffers for each model: one piece is summed while the next one is read.

    Several files are read at a time: a disk gives more to several readers than to one.
    """

    def __init__(self, models: int) -> None:
        self._turn = 0
        self._buffers: dict[tuple[int, int], ReadBuffer] = {}
        self._threads = ThreadPoolExecutor(models, "read model")

    def __enter__(self) -> "PieceBuffers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()

    def next_piece(self) -> None:
        """Turns to the other buffers; what was read into them before the last call is lost."""
        self._turn = 1 - self._turn

    def each(self, read: Callable[[int], np.ndarray], count: int) -> Iterator[np.ndarray]:
        """Returns what `read` gives for each of so many models, all at a time."""
        return self._threads.map(read, range(count))

    def read(self, at: int, model: Checkpoint, name: str, axis: int, span: slice) -> np.ndarray | None:
        """Returns units of a leaf of the model at this place; None where its files do not have them in one place."""
        layout = model.leaf_layouts[name]
        if not layout.order or layout.narrow(axis, span.start, span.stop) is None:
            return None
        buffer = self._buffers.setdefault((self._turn, at), ReadBuffer())
        return buffer.read(model.tensors, layout, axis, (span.start, span.stop), None)[1]
