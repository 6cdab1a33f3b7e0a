"""Reading ahead: the next layer is read on a thread while the last one is worked on."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import jax

from tracing_jax.arch import Arch
from tracing_jax.source.reading import ParamSource
from tracing_jax.tree import Tree


class ReadAhead:
    """A source that, asked for a layer, starts to read the next one: the same leaves of layer i + 1.

    At most one part more than was asked for is held, and it is dropped if something else is asked for instead. All
    reading, and whatever the wrapped source does with what it read, happens on one thread, in the order of asking.
    """

    def __init__(self, source: ParamSource):
        self.source = source
        self._next: tuple[int, tuple[str, ...], Future[Tree]] | None = None

    @property
    def arch(self) -> Arch:
        """The facts of the model."""
        return self.source.arch

    def embed(self) -> Tree:
        """Returns the subtree `embed`."""
        return self._read(self.source.embed)

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the subtree `layers/<index>`, or its leaves under the names in `only`, and reads on."""
        only = tuple(only)
        ahead, self._next = self._next, None
        if ahead is not None and ahead[:2] == (index, only):
            found = ahead[2].result()
        else:
            found = self._read(lambda: self.source.layer(index, only))
        # Of several processes each might turn to the thread at another moment, and devices wait for one another.
        if index + 1 < self.arch.num_layers and jax.process_count() == 1:
            self._next = index + 1, only, self._thread.submit(self.source.layer, index + 1, only)
        return found

    def layer_alone(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns what `layer` does, without reading on: for a reader that does not go from layer to layer."""
        return self._read(lambda: self.source.layer(index, only))

    def head(self) -> Tree:
        """Returns the subtree `head`."""
        return self._read(self.source.head)

    def _read(self, read: Callable[[], Tree]) -> Tree:
        if self._next is not None:
            self._next[2].cancel()
            self._next = None
        return self._thread.submit(read).result()

    @cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
