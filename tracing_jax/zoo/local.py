"""The pairs of a zoo in worker processes on this machine; whichever is free takes the next pair."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import logging

from tracing_jax.progress import tqdm
from tracing_jax.zoo.folder import ZooFolder

LOGS = "logs"
_POLL_SECONDS = 0.5


def run_locally(folder: ZooFolder, names: Sequence[str], workers: int) -> None:
    """Traces pairs in so many processes, with a progress bar, until each is done or has failed.

    If a worker ends unexpectedly, its pair has failed, and a new worker continues with the others. Interrupted,
    all workers end, and what they had finished of their pairs is kept.
    """
    folder.clear_errors(names)
    left, failed = list(names), 0
    with _workers(folder, names, workers) as processes, _bar(names) as bar:
        while left and sum(_runs_or_is_replaced(folder, processes, i, left) for i in range(workers)):
            time.sleep(_POLL_SECONDS)
            states = {name: folder.state(folder.plan.by_name[name]).state for name in left}
            failed += sum(state == "failed" for state in states.values())
            left = [name for name, state in states.items() if state not in ("done", "failed")]
            bar.set_postfix(failed=failed, refresh=False)
            bar.update(len(states) - len(left))


def _runs_or_is_replaced(
    folder: ZooFolder, processes: list[subprocess.Popen[bytes]], index: int, left: Sequence[str]
) -> bool:
    """Returns whether a worker runs; one that died is replaced, and its pair has failed."""
    status = processes[index].poll()
    if status is None or status == 0:
        return status is None
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    log = folder.path / LOGS / _log_name(index)
    for pair in folder.leased_by(processes[index].pid):
        folder.failed(pair, f"the worker died ({how}); out of memory, perhaps: see {log}")
    logging.warning("a worker died (%s) and is replaced; see %s", how, log)
    processes[index] = _worker(folder, left, index)
    return True


def _bar(names: Sequence[str]) -> tqdm:
    return tqdm(total=len(names), desc="pairs", unit="pair", disable=None)


@contextlib.contextmanager
def _workers(folder: ZooFolder, names: Sequence[str], count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Starts the workers, and ends those that still run when something interrupts this process."""
    processes = [_worker(folder, names, i) for i in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()


def _worker(folder: ZooFolder, names: Sequence[str], index: int) -> subprocess.Popen[bytes]:
    """Starts a worker, whose output is appended to its log."""
    file = folder.path / LOGS / _log_name(index)
    file.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tracing_jax.zoo", "run", str(folder.path), "--pairs=-"]
    with open(file, "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.PIPE, env=_environment(index))
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin:  # it may have ended already, which the next poll finds
        process.stdin.write("\n".join(names).encode())
    return process


def _log_name(index: int) -> str:
    return f"worker-{index}.log"


def _environment(index: int) -> dict[str, str]:
    """Returns the environment of a worker: each worker uses one of several NVIDIA GPUs."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = {} if gpus < 2 or "CUDA_VISIBLE_DEVICES" in os.environ else {"CUDA_VISIBLE_DEVICES": str(index % gpus)}
    return {**os.environ, **visible}
