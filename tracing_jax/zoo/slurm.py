"""The pairs of a zoo as one array of Slurm jobs, through submitit.

The scheduler's state of a job is not relied on: submitit's result files may be those of an earlier job of the same
number, and a task that was cancelled while it waited leaves no trace anywhere. What is done follows from the zoo's
folder, and what still waits from the queue.
"""

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from absl import logging

from tracing_jax.record import atomic_write
from tracing_jax.zoo.folder import ZooFolder
from tracing_jax.zoo.worker import ArrayTask

SLURM = "slurm"
_RESTARTS = 1000
"""How often a job may reach its time limit and go on in another; below ten minutes of limit every preemption counts."""

_SRUN = ("--kill-on-bad-exit=1",)  # of several processes none waits for one that failed


class _Executor(submitit.SlurmExecutor):
    """submitit's, which also shows what it would submit where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def sbatch_text(self, elements: int) -> str:
        """Returns the script that an array of so many elements is submitted with."""
        self.parameters["map_count"] = elements
        try:
            return self._make_submission_file_text(self._submitit_command_str, uid="print")
        finally:
            del self.parameters["map_count"]


def batches(names: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Returns the names in their order, so many together: each batch is the work of one element."""
    return [tuple(names[i : i + size]) for i in range(0, len(names), size)]


def script(folder: ZooFolder, elements: int, options: Mapping[str, Any]) -> str:
    """Returns the sbatch script of an array, as it would be submitted.

    Raises:
      ValueError: options that submitit does not have.
    """
    return _executor(folder, options).sbatch_text(elements)


def submit(folder: ZooFolder, work: Sequence[tuple[str, ...]], options: Mapping[str, Any]) -> list[str]:
    """Submits one element for each batch of pairs, and returns their job ids.

    Raises:
      FileNotFoundError: there is no sbatch.
      RuntimeError: sbatch refuses, with its reason.
    """
    if not shutil.which("sbatch"):
        raise FileNotFoundError("no sbatch on the PATH: run this where Slurm is, or with --executor=local or print")
    executor = _executor(folder, options)
    folder.clear_errors(name for names in work for name in names)
    try:
        with executor.batch():
            jobs = [executor.submit(ArrayTask(folder.path, names)) for names in work]
    except submitit.core.utils.FailedJobError as error:
        raise RuntimeError(f"sbatch refused: {error}") from error
    ids = [str(job.job_id) for job in jobs]
    content = {"elements": dict(zip(ids, map(list, work), strict=True))}
    atomic_write(folder.path / SLURM / f"submitted-{ids[0].split('_')[0]}.json", json.dumps(content).encode())
    logging.info("submitted %d tasks as Slurm job %s; logs are in %s", len(ids), ids[0].split("_")[0], _logs(folder))
    return ids


def queued(folder: ZooFolder) -> dict[str, str]:
    """Returns pair -> the id of the element, waiting or running, that holds it, by Slurm's queue."""
    elements: dict[str, list[str]] = {}
    for file in (folder.path / SLURM).glob("submitted-*.json"):
        elements |= json.loads(file.read_bytes())["elements"]
    jobs = sorted({element.split("_")[0] for element in elements})
    if not jobs or not shutil.which("squeue"):
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(jobs)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # it fails where all jobs are forgotten
    return {name: element for element in done.stdout.split() for name in elements.get(element, ())}


def _logs(folder: ZooFolder) -> Path:
    return folder.path / SLURM / "%j"


def _executor(folder: ZooFolder, options: Mapping[str, Any]) -> _Executor:
    executor = _Executor(_logs(folder), max_num_timeout=_RESTARTS)
    given = {name: value for name, value in options.items() if value is not None}
    given["additional_parameters"] = {"requeue": True, **given.get("additional_parameters", {})}
    executor.update_parameters(**given, srun_args=list(_SRUN))
    return executor
