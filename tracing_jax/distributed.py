"""Several processes as one program: initialisation, agreement between them, and an end for all when one fails.

Every process runs the same code on the same config and draws from the same seed. Devices exchange what they must, all
hosts see the same numbers, and only process 0 writes files and logs.
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
"""Without a heartbeat for so long a process counts as lost, and the others end; a dead connection ends them sooner."""

_SHUTDOWN_SECONDS = 3600
"""The longest that a process waits for the others at the end: process 0 still writes the figures."""


@contextlib.contextmanager
def initialized(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Runs the block as one of several processes: of those named, or of a Slurm step; else as the only one.

    A process that raises prints the error and ends at once, and the others then end too: a normal exit would wait in
    JAX's shutdown barrier for all of them, and they for it.

    Args:
      coordinator: host and port of process 0, where it listens for the others.
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
    """Returns whether this is process 0, the only one that writes files and logs."""
    return jax.process_index() == 0


def broadcast_one(value: T) -> T:
    """Returns process 0's value, which JSON must be able to hold, in all processes; each waits here for the others."""
    if jax.process_count() == 1:
        return value
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(len(encoded), np.int32)))
    encoded = multihost_utils.broadcast_one_to_all(encoded if is_main_process() else np.zeros(size, np.uint8))
    return json.loads(encoded.tobytes())  # type: ignore[no-any-return]


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
    # srun sets it for each step; in the body of an sbatch script, or outside Slurm, there is only this process.
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
