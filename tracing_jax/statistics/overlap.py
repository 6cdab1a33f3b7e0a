"""Work beside work: the units of one layer are assigned on the host while the next layer's similarities are made."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def overlapped(items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """Yields `work(item)` for each item, in order; it is done on a thread while the next item is made.

    Two items are alive at a time: the one worked on, and the one being made.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="overlapped") as thread:
        pending: Future[R] | None = None
        for item in items:
            if pending is not None:
                yield pending.result()
            pending = thread.submit(work, item)
            del item  # else it would live until the next one is there
        if pending is not None:
            yield pending.result()


def side_by_side(*works: Callable[[], R]) -> list[R]:
    """Returns the results of all, each done on a thread of its own."""
    with ThreadPoolExecutor(max_workers=len(works), thread_name_prefix="side by side") as threads:
        return [done.result() for done in [threads.submit(work) for work in works]]
