"""`--profile`: where the wall time of a run goes, by samples of the stacks of all threads, and a JAX trace."""

import contextlib
import faulthandler
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tracing_jax.progress import innermost

EVERY = 0.02
"""Seconds between two samples: a whole of them costs a run about one per cent."""

OTHER, WAITING = "Python, NumPy, dispatch", "idle"
_OUTSIDE = "start and end"

_WAITS = ("/threading.py", "concurrent/futures/", "/queue.py", "/selectors.py")

ACTIVITIES = {
    "compile": ("jax/_src/compiler.py", "jax/_src/compilation_cache.py"),
    "trace and lower": ("jax/_src/interpreters/mlir.py", "jax/_src/interpreters/partial_eval.py", "jax/_src/pjit.py"),
    "device": ("jax/_src/array.py",),
    "transfer": ("jax/_src/api.py:device_put", "jax/_src/dispatch.py:_device_put", "multihost_utils.py"),
    "assignment": ("tracing_jax/matching/",),
    "hash": ("tracing_jax/record.py:_sha256", "hashlib.py"),
    "read": ("tracing_jax/checkpoint/", "tracing_jax/sources/"),
    "figures and pages": ("tracing_jax/report/", "matplotlib/"),
    "import": ("importlib._bootstrap",),
}
"""Activity -> the files, or functions of files, that identify it as the innermost frame. `device` waits for a result:
on a CPU the arithmetic, on a GPU with its copy to the host."""

Frame = tuple[str, str]
"""File and function of a frame."""


def kind_of(stack: Sequence[Frame]) -> str:
    """Returns what a thread was doing, by its innermost frame that is recognised.

    It was idle if the innermost of all waits for another thread. If none is recognised, it ran our own Python, NumPy's
    arithmetic, or a compiled program that a CPU runs where it is called.

    Args:
      stack: its frames, the innermost first.
    """
    if stack and any(part in stack[0][0] for part in _WAITS):
        return WAITING
    for file, function in stack:
        for kind, places in ACTIVITIES.items():
            for place in places:
                part, _, name = place.partition(":")
                if part in file and function.startswith(name):
                    return kind
    return OTHER


class StackSampler:
    """Counts what the main thread, and all others together, were doing at each sample.

    Attributes:
      main: (step, kind) -> seconds of the main thread; together they are the wall time.
      others: kind -> seconds of the threads started since that were not idle; they may run at the same time. A thread
        that was there before is the caller's (of a test runner, a notebook), and may wait in C, which no frame shows.
    """

    def __init__(self) -> None:
        self.main: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.others: defaultdict[str, float] = defaultdict(float)
        self._stop = threading.Event()
        self._main = threading.get_ident()
        self._last = time.perf_counter()
        self._before: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="profile", daemon=True)

    def __enter__(self) -> "StackSampler":
        self._dump = tempfile.TemporaryFile()
        self._before = set(stacks(self._dump))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._dump.close()

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            self._look()

    def _look(self) -> None:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        found = stacks(self._dump)
        self._before &= set(found)  # the number of a thread that ended may be given to a new one
        for thread, stack in found.items():
            if thread == self._main:
                self.main[innermost() or _OUTSIDE, kind_of(stack)] += seconds
            elif thread in self._before or thread == self._thread.ident:
                continue
            elif (kind := kind_of(stack)) != WAITING:
                self.others[kind] += seconds


_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'^  File "(.*)", line \S+ in (.*)$')


def stacks(file: BinaryIO) -> dict[int, list[Frame]]:
    """Returns the number of each thread with its frames, the innermost first, at most a hundred of them.

    Python writes them into the file without making objects of the frames, which the threads go on using: with
    `sys._current_frames` a run of CPython 3.11 can end in a segmentation fault.
    """
    file.seek(0)
    file.truncate()
    faulthandler.dump_traceback(file, all_threads=True)
    file.seek(0)
    found: dict[int, list[Frame]] = {}
    for line in file.read().decode("utf-8", "replace").splitlines():
        if thread := _THREAD.match(line):
            found[int(thread[1], 16)] = frames = []
        elif found and (frame := _FRAME.match(line)):
            frames.append((frame[1], frame[2]))
    return found


def table(sampler: StackSampler) -> str:
    """Returns where the time went: a row for each step and statistic, a column for each kind, in seconds."""
    from tracing_jax.report import text_table

    kinds = [
        kind
        for kind in (*ACTIVITIES, WAITING, OTHER)
        if any(kind == k for _, k in sampler.main) or sampler.others[kind]
    ]
    steps = list(dict.fromkeys(step for step, _ in sampler.main))
    rows = {step: [sampler.main[step, kind] for kind in kinds] for step in steps}
    rows["in all"] = [sum(column) for column in zip(*rows.values())]
    rows["other threads"] = [sampler.others[kind] for kind in kinds]
    shown = [
        [name, *(f"{s:.2f}" if s else "" for s in seconds), f"{sum(seconds):.2f}"] for name, seconds in rows.items()
    ]
    return text_table(shown, ["seconds", *kinds, "sum"])


@contextlib.contextmanager
def profiled(folder: str | None) -> Iterator[None]:
    """Writes `profile.txt` and a JAX trace of what happens inside into a folder; does nothing without one.

    The trace opens in Perfetto, XProf or TensorBoard.

    Of several processes the first is measured.

    Raises:
      OSError: the folder cannot be written; before anything else happens.
    """
    if folder is None:
        yield
        return
    import jax

    from tracing_jax.distributed import is_main_process

    if not is_main_process():
        yield
        return
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    (path / "profile.txt").write_text("")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing every call of Python would slow the run, and the samples show Python
    sampler = StackSampler()
    try:
        with jax.profiler.trace(str(path), profiler_options=options), sampler:
            yield
    finally:  # of a run that failed, where the time went until then
        text = table(sampler)
        (path / "profile.txt").write_text(f"{text}\n", encoding="utf-8")
        print(text, f"JAX trace and this table: {path}", sep="\n", file=sys.stderr)
