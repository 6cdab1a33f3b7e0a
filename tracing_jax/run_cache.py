"""Finished work of an interrupted run: small files in its folder, from which a second start continues.

Several processes must find the same results finished, or one would wait for the others in work that they skip. So they
agree at the start on what there is, and read nothing that was written since; only process 0 writes.
"""

import contextlib
import functools
import io
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging

from tracing_jax.distributed import all_agree, broadcast_one, is_main_process
from tracing_jax.record import atomic_write, plain

T = TypeVar("T")

RUN_CACHE = "run_cache"
"""The subfolder of a run's folder with its finished results; it is deleted at the end of the run."""

_FACTS = "facts.json"
_SUFFIXES = (".json", ".npz")

WRITE_SHARE = 0.02
"""The largest share of the time of a run that writing the state of unfinished work may take."""

_LEAST_INTERVAL_SECONDS = 30
"""Between two writes of state: a restart repeats so much work without harm."""

_ASSUMED_BYTES_PER_SECOND = 100e6
"""The rate at which the first state is expected to be written: that of a slow shared disk."""


HELD_SECONDS = 10.0
"""The age of a run from which on its results are written: a restart repeats so much work without harm."""


class WriteBudget:
    """When the state of unfinished work may be written, so that writing takes at most `WRITE_SHARE` of the time.

    A write is expected to take as many seconds per byte as the last one did. It is allowed if all writes together,
    this one included, then stay within the share of the time since the start: a write of `s` seconds is thus followed
    by at least `s / WRITE_SHARE` seconds without one, less what was saved up before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._start = self._last_write = clock()
        self._seconds_writing = 0.0
        self._bytes_per_second = _ASSUMED_BYTES_PER_SECOND
        self._written_bytes, self._written_seconds = 0, 0.0

    def allows(self, num_bytes: int) -> bool:
        """Returns whether so many bytes may be written now."""
        now = self.clock()
        expected = self._seconds_writing + num_bytes / self._bytes_per_second
        return now - self._last_write >= _LEAST_INTERVAL_SECONDS and expected <= WRITE_SHARE * (now - self._start)

    def count(self, num_bytes: int, seconds: float) -> None:
        """Counts a file that was written, of finished or unfinished work."""
        self._written_bytes += num_bytes
        self._written_seconds += seconds

    @property
    def spent(self) -> str:
        """What was written so far, and the share of the time that it took, in words; empty if nothing was."""
        if not self._written_bytes:
            return ""
        share = self._written_seconds / max(self.clock() - self._start, 1e-9)
        return f"{self._written_bytes / 2**20:.1f} MiB in {self._written_seconds:.2f} s, {share:.1%} of the time"

    @contextlib.contextmanager
    def measured(self, num_bytes: int) -> Iterator[None]:
        """Measures a write of so many bytes."""
        start = self.clock()
        yield
        self._last_write = self.clock()
        seconds = self._last_write - start
        self._seconds_writing += seconds
        self._bytes_per_second = num_bytes / max(seconds, 1e-3)


class HeldResults:
    """Results of the first seconds of a run, which are written only if it goes on: dozens of files are a short run's.

    Attributes:
      content: what makes the bytes that are to be written, by file, in the order in which the results were finished.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.content: dict[Path, Callable[[], bytes]] = {}
        self._clock, self._start = clock, clock()

    def released(self) -> dict[Path, Callable[[], bytes]]:
        """Returns what may be written now, and forgets it; empty while the run is young."""
        if self._clock() - self._start < HELD_SECONDS:
            return {}
        due, self.content = self.content, {}
        return due


class RunCache:
    """Finished results of a run by name, each written whole or not at all; without a folder nothing is saved."""

    def __init__(
        self,
        folder: Path | None = None,
        facts: tuple[Path, bytes] | None = None,
        agreed_on: set[Path] | None = None,
        budget: WriteBudget | None = None,
        held: HeldResults | None = None,
    ):
        self.folder = folder
        self._facts = facts  # a file and its content, written with the first result: a refused run leaves nothing
        self._agreed_on = agreed_on  # the files of several processes; None for one, which reads whatever is there
        self._budget = budget or WriteBudget()
        self._held = held or HeldResults()

    @classmethod
    def open(cls, folder: Path, facts: Mapping[str, Any]) -> tuple["RunCache", str | None]:
        """Returns the results of an interrupted run with these facts (its config, its files), and a note about it.

        Results of a run with other facts are deleted. The note is None if there was no earlier run.
        """
        wanted = json.loads(json.dumps(plain(facts)))
        names, note = broadcast_one(_left_in(folder, wanted) if is_main_process() else ([], None))
        finished = {folder / name for name in names}
        if not all_agree(all(file.exists() for file in finished)):
            finished = set()
            note = f"an interrupted run is in {folder}, which not all processes see: it is started over"
            shutil.rmtree(folder, ignore_errors=True)
        if note is not None:
            logging.info("%s", note)
        agreed_on = finished if jax.process_count() > 1 else None
        return cls(folder, (folder / _FACTS, json.dumps(wanted).encode()), agreed_on), note

    def scope(self, *names: str | int) -> "RunCache":
        """Returns the cache of the results under this name."""
        folder = None if self.folder is None else self.folder.joinpath(*map(str, names))
        return RunCache(folder, self._facts, self._agreed_on, self._budget, self._held)

    def load(self, kind: Callable[..., T], *names: str | int) -> T | None:
        """Returns the result of this name, made by `kind(**fields)`; None if it is not finished."""
        file = self._file(names, ".json")
        content = None if file is None else self._read(file)
        return None if content is None else kind(**json.loads(content))

    def cached(self, kind: Callable[..., T], names: tuple[str | int, ...], make: Callable[[], T]) -> T:
        """Returns the result of this name, a dataclass of plain fields; it is made and saved if it is not finished."""
        found = self.load(kind, *names)
        if found is None:
            found = make()
            self.save(asdict(found), *names)  # type: ignore[call-overload]
        return found

    def save(self, fields: Mapping[str, Any], *names: str | int) -> None:
        """Saves a result under this name, for `load`; numbers and arrays of numpy become plain ones."""
        if (file := self._file(names, ".json")) is not None and is_main_process():
            content = json.dumps(fields, default=lambda value: value.tolist()).encode()
            self._keep(file, lambda: content)

    def count(self, kind: Callable[..., Any]) -> int:
        """Returns how many results named 0, 1, 2 ... are finished, up to the first that is not."""
        return next(i for i in itertools.count() if self.load(kind, i) is None)

    def load_arrays(self, *names: str | int) -> dict[str, np.ndarray] | None:
        """Returns the arrays of this name; None if they are not finished."""
        file = self._file(names, ".npz")
        content = None if file is None else self._read(file)
        if content is None:
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)

    def save_arrays(self, arrays: Callable[[], Mapping[str, np.ndarray]], *names: str | int) -> None:
        """Saves arrays under this name; they are made, by all processes, only if there is a folder to save them in."""
        if (file := self._file(names, ".npz")) is not None:
            made = arrays()
            if is_main_process():
                self._keep(file, functools.partial(_npz, made))

    def save_if_due(
        self, arrays: Callable[[], Mapping[str, np.ndarray]], num_bytes: int, *names: str | int
    ) -> None:  # fmt: skip
        """Saves the state of unfinished work, replacing an earlier one, if the write budget allows so many bytes now.

        All processes do as process 0, whose clock decides.
        """
        if self.folder is None or not broadcast_one(self._budget.allows(num_bytes)):
            return
        with self._budget.measured(num_bytes):
            self.save_arrays(arrays, *names)

    def cached_arrays(
        self, names: tuple[str | int, ...], make: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of this name; they are made and saved if they are not finished."""
        found = self.load_arrays(*names)
        if found is None:
            found = make()
            self.save_arrays(functools.partial(dict, found), *names)
        return found

    def delete(self, *names: str | int) -> None:
        """Deletes the arrays of this name: the work that they were saved for is finished."""
        if (file := self._file(names, ".npz")) is not None:
            self._await_readers()
            if self._agreed_on is not None:
                self._agreed_on.discard(file)
            self._held.content.pop(file, None)
            if is_main_process():
                file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes everything: the run is finished, and its record holds the results."""
        if self.folder is None:
            return
        self._await_readers()
        self._held.content.clear()
        if spent := self._budget.spent:
            logging.info("kept for a restart, and deleted now: %s", spent)
        if is_main_process():
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds the run's other files
                self.folder.parent.rmdir()

    def _await_readers(self) -> None:
        """Waits until every process has read what is about to be deleted."""
        if self._agreed_on is not None:
            all_agree(True)

    def _read(self, file: Path) -> bytes | None:
        """Returns the content of a result; None if it is not finished."""
        if self._agreed_on is None and (held := self._held.content.get(file)) is not None:
            return held()
        is_finished = file.exists() if self._agreed_on is None else file in self._agreed_on
        return file.read_bytes() if is_finished else None

    def _file(self, names: tuple[str | int, ...], suffix: str) -> Path | None:
        if self.folder is None:
            return None
        *parents, last = (str(name).replace("/", ".").replace(" ", "_") for name in names)
        return self.folder.joinpath(*parents, last + suffix)

    def _keep(self, file: Path, content: Callable[[], bytes]) -> None:
        """Writes a result, after the facts of the run if it is the first, or holds it while the run is young."""
        if self._facts is not None and not self._facts[0].exists():
            path, facts = self._facts
            self._held.content.setdefault(path, lambda: facts)
        self._held.content[file] = content
        for path, due in self._held.released().items():
            encoded = due()
            start = time.monotonic()
            self._write(path, encoded)
            self._budget.count(len(encoded), time.monotonic() - start)

    @staticmethod
    def _write(file: Path, content: bytes) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, content)


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _left_in(folder: Path, wanted: Mapping[str, Any]) -> tuple[list[str], str | None]:
    """Returns the names of the files of an interrupted run with these facts, and a note; deletes one with others."""
    if not (folder / _FACTS).exists():
        return [], None
    if different := _differences(json.loads((folder / _FACTS).read_text("utf-8")), wanted):
        shutil.rmtree(folder)
        return [], f"an interrupted run is in {folder}, of other {', '.join(different)}: it is started over"
    files = [file for file in folder.rglob("*") if file.suffix in _SUFFIXES and file != folder / _FACTS]
    found = sorted(str(file.relative_to(folder)) for file in files)
    return found, f"continues an interrupted run: {len(found)} finished results"


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns the names whose facts differ, those inside a mapping with the name that holds them: `config.level`."""
    found = []
    for name in sorted(one.keys() | other.keys()):
        a, b = one.get(name), other.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += [f"{name}.{inner}" for inner in _differences(a, b)]
        elif a != b:
            found.append(name)
    return found
