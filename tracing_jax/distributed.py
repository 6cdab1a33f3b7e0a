"""Several processes as one program: how they find each other, and how they all end when one fails.

Every process runs the same code on the same config and draws from the same seed. Devices exchange what they must; the
host sees the same numbers everywhere, and the first process alone writes files and speaks.
"""

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

T = TypeVar("T")

_HEARTBEAT_SECONDS = 30
"""A process that has not been heard of for so long is gone, and the others end; a dead connection ends them sooner."""

_SHUTDOWN_SECONDS = 3600
"""The longest that a process waits for the others at the end: the first still writes the figures."""


@contextlib.contextmanager
def initialized(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Runs what stands inside as one of several processes: of those named, or of a Slurm step; else as the only one.

    A process that raises says why and ends at once, without waiting for the others, which then end too: Python's own
    way out would wait for all of them, and they for it.

    Args:
      coordinator: host and port of the first process, where it listens for the others.
      num_processes: how many there are.
      process_id: which of them this is, from 0.

    Raises:
      ValueError: some of the three are given and others not, or they do not fit.
    """
    if not _join(coordinator, num_processes, process_id):
        yield
        return
    if not is_main_process():
        logging.set_verbosity(logging.ERROR)
    try:
        yield
    except BaseException as error:
        _end_at_once(error)
        raise
    jax.distributed.shutdown()


def is_main_process() -> bool:
    """Returns whether this process is the one that writes files and speaks."""
    return jax.process_index() == 0


def broadcast_one(value: T) -> T:
    """Returns the first process's value, one that JSON can say, in all of them; each waits here for the others."""
    if jax.process_count() == 1:
        return value
    said = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(said), np.int32)))
    said = multihost_utils.broadcast_one_to_all(said if is_main_process() else np.zeros(size, np.uint8))
    return json.loads(said.tobytes())  # type: ignore[no-any-return]


def all_agree(value: bool) -> bool:
    """Returns whether a value is true in all processes; each waits here for the others."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.asarray(value)).all())


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        if coordinator is None or num_processes is None or process_id is None:
            raise ValueError(
                "--coordinator, --num_processes and --process_id belong together; give all three to every process"
            )
        if ":" not in coordinator or not 0 <= process_id < num_processes:
            raise ValueError(
                f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: expected "
                "host:port of process 0, and an id from 0 up to the number of processes less one"
            )
        initialize(coordinator, num_processes, process_id)
        return True
    # srun sets it for each step; in the body of an sbatch script, or on one's own machine, nobody else is there.
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        initialize()
        return True
    return False


def _end_at_once(error: BaseException) -> None:
    """Ends this process unless the error is a plain exit status, on which all processes agree."""
    if isinstance(error, SystemExit) and not isinstance(error.code, str):
        jax.distributed.shutdown()
        return
    if isinstance(error, SystemExit):
        sys.stderr.write(f"{error.code}\n")
    else:
        traceback.print_exception(error)
    sys.stderr.write(f"process {jax.process_index()} of {jax.process_count()} ends, and with it all others\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)
