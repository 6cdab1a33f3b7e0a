"""Exclusive leases of workers on pairs, by atomic creation of a file: on a shared file system too, without locks.

A lease is a JSON file with the worker's id, host and process, and a token that no other lease has. Creating it succeeds
for one worker only (O_EXCL). Its time of change is the heartbeat: a thread of the worker renews it, and a lease whose
heartbeat is old is stale. Whoever takes a stale lease over first creates a file named after the token of that lease,
which again succeeds for one worker only, and then replaces the lease by its own in one atomic rename. A worker gives
its lease back under the same rule, so that it never removes the lease of another that took it over meanwhile.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from tracing_jax.record import atomic_write

_HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
"""A worker that has not renewed its lease for so long has ended. File systems may show a change up to a minute late."""


@dataclass(frozen=True)
class Lease:
    """A lease as it was read.

    Attributes:
      holder: what its file says: `worker`, `restarts` of its Slurm job, `host`, `pid`, `token`; empty while the file is
        being written.
      heartbeat: seconds since the epoch, by the clock of the file system.
    """

    holder: Mapping[str, Any]
    heartbeat: float

    @property
    def worker(self) -> str:
        """The id of the worker."""
        return self.holder.get("worker", "a worker")

    def is_held(self, now: float | None = None) -> bool:
        """Returns whether its worker is running, as far as this process can tell."""
        age = (time.time() if now is None else now) - self.heartbeat
        return age < STALE_SECONDS and not self._has_ended()

    def _has_ended(self) -> bool:
        """Returns whether the worker is known to have ended: it is not on this host, or its job was requeued."""
        if self.holder.get("worker") == worker_id() and self.holder.get("restarts") != _restarts():
            return True
        if self.holder.get("host") != socket.gethostname() or "pid" not in self.holder:
            return False
        try:
            os.kill(self.holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


def worker_id() -> str:
    """Returns the name of this worker in leases and errors: its Slurm job, else its host and process."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job is None:
        return f"process {os.getpid()} on {socket.gethostname()}"
    element = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"Slurm job {job}" + (f"_{element}" if element else "")


def read_lease(file: Path) -> Lease | None:
    """Returns the lease in a file; None if there is none."""
    try:
        with open(file, "rb") as opened:
            heartbeat = os.fstat(opened.fileno()).st_mtime
            content = opened.read()
    except FileNotFoundError:
        return None
    try:
        return Lease(json.loads(content), heartbeat)
    except ValueError:
        return Lease({}, heartbeat)


@contextlib.contextmanager
def leased(file: Path) -> Iterator[bool]:
    """Holds a lease while inside; yields False if another worker has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    token = take_lease(file)
    if token is None:
        yield False
        return
    ended = threading.Event()
    heartbeat = threading.Thread(target=_heartbeat, args=(file, token, ended), daemon=True, name="heartbeat")
    heartbeat.start()
    try:
        yield True
    finally:
        ended.set()
        heartbeat.join()
        _give_back(file, token)


def take_lease(file: Path) -> str | None:
    """Creates a lease, or takes over one that is stale; returns its token, or None if another worker has it."""
    token = secrets.token_hex(8)
    here = {"worker": worker_id(), "restarts": _restarts(), "host": socket.gethostname(), "pid": os.getpid()}
    mine = json.dumps({**here, "token": token}).encode()
    if _create(file, mine):
        return token
    found = read_lease(file)
    if found is None or found.is_held():
        return None
    with _replacing(file, found) as moment:
        # The moment is by the clock of the file system, like the heartbeat: clocks of hosts may differ.
        if moment is None or (now := read_lease(file)) is None or now.holder != found.holder or now.is_held(moment):
            return None
        atomic_write(file, mine)
        return token


def _give_back(file: Path, token: str) -> None:
    found = read_lease(file)
    if found is None or found.holder.get("token") != token:
        logging.warning("%s: taken over by another worker while this one could not renew it", file.stem)
        return
    with _replacing(file, found) as moment:
        if moment is not None:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _replacing(file: Path, found: Lease) -> Iterator[float | None]:
    """Holds the right to replace or remove one lease; yields when it was gained, or None if another worker has it."""
    right = file.with_name(f".{file.name}.{found.holder.get('token', 'unreadable')}")
    if not _create(right):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - right.stat().st_mtime > STALE_SECONDS:  # its worker ended between two system calls
                right.unlink()
        yield None
        return
    try:
        yield right.stat().st_mtime
    finally:
        right.unlink(missing_ok=True)


def _create(file: Path, content: bytes = b"") -> bool:
    """Creates a file with this content; returns False if there is one."""
    try:
        with open(file, "xb") as created:
            created.write(content)
    except FileExistsError:
        return False
    return True


def _restarts() -> int:
    """Returns how often Slurm has requeued the job that this process belongs to."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _heartbeat(file: Path, token: str, ended: threading.Event) -> None:
    while not ended.wait(_HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            found = read_lease(file)
            if found is not None and found.holder.get("token") == token:
                os.utime(file)
