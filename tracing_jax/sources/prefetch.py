"""Prefetching: the next layer is read on a thread while the caller computes with the last one."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import jax

from tracing_jax.arch import Arch
from tracing_jax.sources.source import ParamSource
from tracing_jax.tree import Tree


class PrefetchingSource:
    """A source that, asked for a layer, starts to read what is likely to be asked for next.

    That is what followed the same leaves the last time: others of the same layer, or some of layer i + 1; at first, the
    same ones of layer i + 1. At most one subtree more than was asked for is held; it is dropped if something else is
    asked for instead. All reading, and whatever the wrapped source does with what it read, happens on one thread, in
    the order of the calls.
    """

    def __init__(self, source: ParamSource):
        self.source = source
        self._next: tuple[int, tuple[str, ...], Future[Tree]] | None = None
        self._last: tuple[int, tuple[str, ...]] | None = None
        self._follows: dict[tuple[str, ...], tuple[int, tuple[str, ...]]] = {}

    @property
    def arch(self) -> Arch:
        """The facts of the model."""
        return self.source.arch

    def embed(self) -> Tree:
        """Returns the subtree `embed`."""
        return self._read(self.source.embed)

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the subtree `layers/<index>`, or its leaves under the names in `only`, and prefetches."""
        only = tuple(only)
        if self._last is not None and 0 <= (step := index - self._last[0]) <= 1:
            self._follows[self._last[1]] = step, only
        self._last = index, only
        if self._next is not None and self._next[:2] == (index, only):
            (_, _, ahead), self._next = self._next, None
            found = ahead.result()
        else:
            found = self._read(lambda: self.source.layer(index, only))
        # Several processes might submit to the thread in different orders, and their collectives would deadlock.
        step, leaves = self._follows.get(only, (1, only))
        if index + step < self.arch.num_layers and jax.process_count() == 1:
            self._next = index + step, leaves, self._thread.submit(self.source.layer, index + step, leaves)
        return found

    def layer_without_prefetch(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns what `layer` does without prefetching: for a caller that does not go from layer to layer."""
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
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")


def read_through(source: ParamSource, over: Callable[[ParamSource], ParamSource]) -> ParamSource:
    """Returns `over(source)`; of a prefetching source one that prefetches what `over` makes of the source below it."""
    return PrefetchingSource(over(source.source)) if isinstance(source, PrefetchingSource) else over(source)


def without_prefetching(source: ParamSource) -> ParamSource:
    """Returns the source below a prefetching one; any other as it is."""
    return source.source if isinstance(source, PrefetchingSource) else source


def layer_alone(source: ParamSource, index: int, only: Sequence[str]) -> Tree:
    """Returns what `layer` does without prefetching: for a caller that does not go from layer to layer."""
    if isinstance(source, PrefetchingSource):
        return source.layer_without_prefetch(index, only)
    return source.layer(index, only)
