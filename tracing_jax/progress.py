"""Progress of long loops: bars on a terminal, and elsewhere a line in the log where none was written for a while."""

import contextlib
import logging as stdlib_logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import tqdm as bars
from absl import logging

LOG_INTERVAL = 15.0
"""Seconds without a line in the log, after which one says what is going on."""

_working: list["tqdm | str"] = []
"""What is going on, the innermost last; changed by the thread that works, and read by the one that reports."""


class tqdm(bars.tqdm):  # noqa: N801  # a bar of tqdm, by its name
    """A bar of `tqdm`; where it is not drawn, since there is no terminal, `reporting` logs its progress."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.what = str(kwargs.get("desc") or "")
        self.kind = str(kwargs.get("unit") or "step")
        self.first = self.done = int(kwargs.get("initial") or 0)
        self.all = self.total if self.total is not None else _length(self.iterable)
        self.start = time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        if not self.disable:
            yield from super().__iter__()
            return
        with working(self):
            for item in self.iterable:
                yield item
                self.done += 1

    def __enter__(self) -> "tqdm":
        _working.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _remove(self)
        self.close()

    def update(self, n: int | float | None = 1) -> bool | None:
        """Counts `n` more."""
        self.done += int(n or 0)
        return super().update(n)

    def so_far(self) -> str:
        """How far the loop is: `match_io: 12 of 80 layers, 0:45, about 4:15 left`."""
        count = f"{self.done} of {self.all}" if self.all else f"{self.done}"
        seconds = time.monotonic() - self.start
        text = f"{self.what}: {count} {self.kind}s, {_clock(seconds)}"
        newly = self.done - self.first
        if not self.all or newly <= 0 or self.done >= self.all:
            return text
        return f"{text}, about {_clock(seconds / newly * (self.all - self.done))} left"


def trange(*args: int, **kwargs: Any) -> tqdm:
    """Returns a bar over a range."""
    return tqdm(range(*args), **kwargs)


@contextlib.contextmanager
def working(on: "tqdm | str") -> Iterator[None]:
    """Lets `reporting` say what is going on inside."""
    _working.append(on)
    try:
        yield
    finally:
        _remove(on)


def innermost() -> str:
    """Returns what is going on, without its counts: `csu (1 of 10)` of a statistic; empty without a description."""
    return next((on for on in reversed(list(_working)) if isinstance(on, str)), "")


@contextlib.contextmanager
def reporting(interval: float = LOG_INTERVAL) -> Iterator[None]:
    """Writes a line to the log whenever nothing was written for so many seconds: what is going on, and how far it is.

    A run that is shorter than that has no line more.
    """
    clock, stop = _LastLine(), threading.Event()
    logger = logging.get_absl_logger()
    logger.addHandler(clock)
    thread = threading.Thread(target=_report, args=(clock, stop, interval), daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        logger.removeHandler(clock)


class _LastLine(stdlib_logging.Handler):
    """Remembers the time of the last line."""

    def __init__(self) -> None:
        super().__init__()
        self.at = time.monotonic()

    def emit(self, record: stdlib_logging.LogRecord) -> None:
        self.at = time.monotonic()


def _report(clock: _LastLine, stop: threading.Event, interval: float) -> None:
    while not stop.wait(max(0.01, interval - (time.monotonic() - clock.at))):
        if time.monotonic() - clock.at >= interval:
            clock.at = time.monotonic()  # a line that is not written, by the level of the log, counts too
            if text := "; ".join(on if isinstance(on, str) else on.so_far() for on in list(_working)):
                logging.info("%s", text)


def _remove(on: "tqdm | str") -> None:
    # By identity from the end: loops are left in any order where a generator is dropped.
    for i in range(len(_working) - 1, -1, -1):
        if _working[i] is on:
            del _working[i]
            return


def _length(iterable: Any) -> int | None:
    return len(iterable) if hasattr(iterable, "__len__") else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
