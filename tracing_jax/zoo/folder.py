"""The folder of a zoo: which pairs are done, running, failed or missing.

The state of a pair follows from files, not from a scheduler: a pair is *done* when its record is there and was made
with the plan's config from the model files as they are now; *running* while a worker holds a lease on it (see
`leases`); *failed* when a worker wrote an error, or its lease is stale; else *missing*. Beside the record
`pairs/NAME.json` are `NAME.error.json`, `NAME.lease.json`, and `NAME.files.json`, the sizes and times of the models'
files that the record was made from.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tracing_jax.options import RunOptions
from tracing_jax.record import atomic_write, plain
from tracing_jax.zoo.leases import leased, read_lease, worker_id
from tracing_jax.zoo.plan import PAIRS, PlannedPair, ZooPlan, read_plan

State = Literal["done", "running", "failed", "missing"]
STATES: tuple[State, ...] = ("done", "running", "failed", "missing")


@dataclass(frozen=True)
class PairState:
    """The state of a pair; `error` is one line on why it failed, or why its record does not count."""

    state: State
    error: str = ""


class ZooFolder:
    """A zoo on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()

    @cached_property
    def plan(self) -> ZooPlan:
        """The plan, as it was when it was first asked for.

        Raises:
          FileNotFoundError: there is none.
        """
        return read_plan(self.path)

    def reload_plan(self) -> None:
        """Has the plan read again: it was replaced."""
        self.__dict__.pop("plan", None)

    def record_file(self, pair: PlannedPair) -> Path:
        """Returns the file of a pair's record, whether or not it exists."""
        return self._file(pair, "json")

    def record(self, pair: PlannedPair) -> dict[str, Any] | None:
        """Returns the record of a pair that is done; None if it is not."""
        return _read(self.record_file(pair)) if self.state(pair).state == "done" else None

    def states(self) -> dict[str, PairState]:
        """Returns the state of every pair of the plan, by name."""
        return {pair.name: self.state(pair) for pair in self.plan.pairs}

    def state(self, pair: PlannedPair) -> PairState:
        """Returns the state of a pair."""
        lease = read_lease(self._file(pair, "lease.json"))
        if lease is not None and lease.is_held():
            return PairState("running", lease.worker)
        stale = self._stale(pair)
        if stale == "":
            return PairState("done")
        if (failure := _read(self._file(pair, "error.json"))) is not None:
            return PairState("failed", failure["error"].splitlines()[0])
        if lease is not None:
            return PairState("failed", f"{lease.worker} ended without an error message: killed or out of memory")
        return PairState("missing", stale or "")

    def is_pending(self, pair: PlannedPair) -> bool:
        """Returns whether a worker may try a pair: it is not done, and it failed in no worker of this launch."""
        return self._stale(pair) != "" and not self._file(pair, "error.json").exists()

    def clear_errors(self, names: Iterable[str]) -> None:
        """Lets workers try pairs again that failed."""
        for name in names:
            self._file(self.plan.by_name[name], "error.json").unlink(missing_ok=True)

    def begin(self, pair: PlannedPair, stamps: Mapping[str, Any]) -> None:
        """Writes down what the record of a pair is going to be made from; what came out before no longer counts."""
        for ending in ("json", "error.json"):
            self._file(pair, ending).unlink(missing_ok=True)
        atomic_write(self._file(pair, "files.json"), json.dumps(plain(stamps)).encode())

    def failed(self, pair: PlannedPair, error: str, trace: str = "") -> None:
        """Writes down why a pair could not be traced."""
        content = {
            "error": error,
            "worker": worker_id(),
            "when": time.strftime("%Y-%m-%d %H:%M:%S"),
            "traceback": trace,
        }
        atomic_write(self._file(pair, "error.json"), json.dumps(plain(content), indent=1).encode())

    def leased_by(self, pid: int) -> list[PlannedPair]:
        """Returns the pairs that a process of this host has leased, whether it still runs or not."""
        here = {"host": socket.gethostname(), "pid": pid}.items()
        leases = {pair: read_lease(self._file(pair, "lease.json")) for pair in self.plan.pairs}
        return [pair for pair, lease in leases.items() if lease is not None and here <= lease.holder.items()]

    def leased(self, pair: PlannedPair) -> contextlib.AbstractContextManager[bool]:
        """Holds the exclusive right to work on a pair while inside; gives False if another worker has it."""
        return leased(self._file(pair, "lease.json"))

    def _stale(self, pair: PlannedPair) -> str | None:
        """Returns "" if the record counts, why it does not, or None if there is none."""
        record, stamps = _read(self.record_file(pair)), _read(self._file(pair, "files.json"))
        if record is None or stamps is None:
            return None
        asked = plain(_result_fields(self.plan.options_of(pair, self.path)))
        if changed := sorted(name for name, value in asked.items() if record["args"].get(name) != value):
            return f"the config has changed: {', '.join(changed)}"
        if changed := sorted(file for file, stamp in stamps.items() if _stamp(Path(file)) not in (stamp, None)):
            return f"a model's file has changed: {changed[0]}"
        return ""

    def _file(self, pair: PlannedPair, ending: str) -> Path:
        return self.path / PAIRS / f"{pair.name}.{ending}"


def _result_fields(options: RunOptions) -> dict[str, Any]:
    """Returns the fields that change what comes out."""
    return {name: value for name, value in options.as_dict().items() if name not in ("save", "cache_dir")}


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
