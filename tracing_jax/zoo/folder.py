"""The folder of a zoo: which pairs are done, running, failed or missing, and who may work on one.

Files are the truth, not what a scheduler says: a pair is *done* when its record is there, was made with the plan's
config and the model files that lie there now; *running* while the worker that claimed it keeps touching its claim;
*failed* when a worker wrote down an error, or claimed it and fell silent; else *missing*. Beside the record
`pairs/NAME.json` lie `NAME.error.json`, `NAME.claim.json`, and `NAME.files.json`, the sizes and times of the models'
files that the record was made from.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tracing_jax.options import RunOptions
from tracing_jax.record import atomic_write, plain
from tracing_jax.zoo.plan import PAIRS, Plan, PlannedPair, read_plan

State = Literal["done", "running", "failed", "missing"]
STATES: tuple[State, ...] = ("done", "running", "failed", "missing")

_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 120.0
"""A worker that has not touched its claim for so long is gone."""


@dataclass(frozen=True)
class PairState:
    """Where a pair stands; `error` says in one line why it failed, or why a record that is there does not count."""

    state: State
    error: str = ""


class ZooFolder:
    """A zoo on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()

    @cached_property
    def plan(self) -> Plan:
        """The plan, as it was when it was first asked for.

        Raises:
          FileNotFoundError: there is none.
        """
        return read_plan(self.path)

    def forget_plan(self) -> None:
        """Has the plan read again: it was replaced."""
        self.__dict__.pop("plan", None)

    def record_file(self, pair: PlannedPair) -> Path:
        """Returns where the record of a pair lies, or will lie."""
        return self._file(pair, "json")

    def record(self, pair: PlannedPair) -> dict[str, Any] | None:
        """Returns the record of a pair that is done; None if it is not."""
        return _read(self.record_file(pair)) if self.state(pair).state == "done" else None

    def states(self) -> dict[str, PairState]:
        """Returns where every pair of the plan stands, by name."""
        return {pair.name: self.state(pair) for pair in self.plan.pairs}

    def state(self, pair: PlannedPair) -> PairState:
        """Returns where a pair stands."""
        claim = self._file(pair, "claim.json")
        held, age = _read(claim) or {}, _age(claim)
        if age is not None and age < _SILENT_SECONDS and not _is_over(held):
            return PairState("running", held.get("who", ""))
        stale = self._stale(pair)
        if stale == "":
            return PairState("done")
        if (failure := _read(self._file(pair, "error.json"))) is not None:
            return PairState("failed", failure["error"].splitlines()[0])
        if age is not None:
            return PairState("failed", f"{held.get('who', 'a worker')} ended without a word: killed or out of memory")
        return PairState("missing", stale or "")

    def is_open(self, pair: PlannedPair) -> bool:
        """Returns whether a worker may try a pair: it is not done, and no worker of this launch saw it fail."""
        return self._stale(pair) != "" and not self._file(pair, "error.json").exists()

    def reopen(self, names: Iterable[str]) -> None:
        """Lets workers try pairs again that failed."""
        for name in names:
            self._file(self.plan.by_name[name], "error.json").unlink(missing_ok=True)

    def begin(self, pair: PlannedPair, stamps: Mapping[str, Any]) -> None:
        """Writes down what the record of a pair is going to be made from; what came out before no longer counts."""
        for ending in ("json", "error.json"):
            self._file(pair, ending).unlink(missing_ok=True)
        atomic_write(self._file(pair, "files.json"), json.dumps(plain(stamps)).encode())

    def failed(self, pair: PlannedPair, error: str, trace: str = "") -> None:
        """Writes down why a pair could not be traced; nobody works on it any more."""
        content = {"error": error, "who": me(), "when": time.strftime("%Y-%m-%d %H:%M:%S"), "traceback": trace}
        atomic_write(self._file(pair, "error.json"), json.dumps(plain(content), indent=1).encode())
        self._file(pair, "claim.json").unlink(missing_ok=True)

    def claimed_by(self, pid: int) -> list[PlannedPair]:
        """Returns the pairs in the hands of a process of this machine, alive or not."""
        claims = {pair: _read(self._file(pair, "claim.json")) or {} for pair in self.plan.pairs}
        here = {"host": socket.gethostname(), "pid": pid}
        return [pair for pair, claim in claims.items() if here.items() <= claim.items()]

    @contextlib.contextmanager
    def claimed(self, pair: PlannedPair) -> Iterator[bool]:
        """Holds the right to work on a pair while inside; yields False if another worker that is alive has it."""
        claim = self._file(pair, "claim.json")
        claim.parent.mkdir(parents=True, exist_ok=True)
        with _alone(claim.parent):
            mine = _take(claim)
        if not mine:
            yield False
            return
        over = threading.Event()
        beat = threading.Thread(target=_beat, args=(claim, over), daemon=True, name="claim")
        beat.start()
        try:
            yield True
        finally:
            over.set()
            beat.join()
            with _alone(claim.parent):
                if _read(claim) == _mine():  # else it fell silent, and another has taken it
                    claim.unlink()

    def _stale(self, pair: PlannedPair) -> str | None:
        """Returns "" if the record counts, why it does not, or None if there is none."""
        record, stamps = _read(self.record_file(pair)), _read(self._file(pair, "files.json"))
        if record is None or stamps is None:
            return None
        asked = plain(_told_apart(self.plan.options_of(pair, self.path)))
        if changed := sorted(name for name, value in asked.items() if record["args"].get(name) != value):
            return f"the config has changed: {', '.join(changed)}"
        if changed := sorted(file for file, stamp in stamps.items() if _stamp(Path(file)) not in (stamp, None)):
            return f"a model's file has changed: {changed[0]}"
        return ""

    def _file(self, pair: PlannedPair, ending: str) -> Path:
        return self.path / PAIRS / f"{pair.name}.{ending}"


def me() -> str:
    """Returns this worker, as claims and errors call it: its Slurm job, else its host and process."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job is None:
        return f"process {os.getpid()} on {socket.gethostname()}"
    element = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"Slurm job {job}" + (f"_{element}" if element else "")


def _told_apart(options: RunOptions) -> dict[str, Any]:
    """Returns the fields that change what comes out."""
    return {name: value for name, value in options.as_dict().items() if name not in ("save", "cache_dir")}


def _take(claim: Path) -> bool:
    """Creates the claim if nobody has it, if its holder has fallen silent, or was this very worker before a restart."""
    held = _read(claim) or {}
    age = _age(claim)
    if age is not None and age < _SILENT_SECONDS and not _is_over(held):
        return False
    atomic_write(claim, json.dumps(_mine()).encode())
    return True


def _mine() -> dict[str, Any]:
    return {"who": me(), "host": socket.gethostname(), "pid": os.getpid()}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one worker at a time look at claims and take one; the lock goes with its process."""
    with open(folder / ".claims.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_over(held: Mapping[str, Any]) -> bool:
    """Returns whether the holder of a claim is known to have ended: requeued as this job, or gone from this host."""
    here = held.get("host") == socket.gethostname()
    if held.get("who") == me():
        return not (here and held.get("pid") == os.getpid())
    if not here or "pid" not in held:
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _beat(claim: Path, over: threading.Event) -> None:
    while not over.wait(_BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(claim)


def _age(file: Path) -> float | None:
    """Returns the seconds since a file was touched; None if it is not there."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return None


def _stamp(file: Path) -> list[int] | None:
    try:
        found = file.stat()
    except OSError:  # a Hub cache that was cleared since, or another node's disk: the record holds the hashes
        return None
    return [found.st_size, found.st_mtime_ns]


def _read(file: Path) -> dict[str, Any] | None:
    """Returns what a JSON file holds; None if it is not there, or is being replaced."""
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
