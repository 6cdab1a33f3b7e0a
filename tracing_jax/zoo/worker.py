"""A worker of a zoo: leases one pair after another, traces it, and records errors."""

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from absl import logging

from tracing_jax import experiment
from tracing_jax.checkpoint import Checkpoint
from tracing_jax.distributed import broadcast_one, initialized, is_main_process
from tracing_jax.experiment.metadata import file_stamps
from tracing_jax.experiment.models import open_models
from tracing_jax.options import RunOptions
from tracing_jax.zoo.folder import ZooFolder
from tracing_jax.zoo.plan import PlannedPair
from tracing_jax.zoo.weights import read_model_measures, write_model_measures

Trace = Callable[[RunOptions], Any]


def trace_pairs(folder: ZooFolder, names: Iterable[str], trace: Trace = experiment.trace) -> None:
    """Traces those of the pairs that are not done, have not failed, and are not leased by another worker.

    Several processes that are one program go through the pairs together; only process 0 leases and writes.

    Args:
      folder: the zoo.
      names: of pairs of its plan.
      trace: runs the options of one pair.
    """
    for name in names:
        pair = folder.plan.by_name[name]
        if broadcast_one(folder.is_pending(pair)):
            _trace_leased(folder, pair, trace)


def _trace_leased(folder: ZooFolder, pair: PlannedPair, trace: Trace) -> None:
    if not is_main_process():
        if broadcast_one(False):
            _trace_pair(folder, pair, trace)
        return
    with folder.leased(pair) as mine:
        if broadcast_one(mine and folder.is_pending(pair)):  # another may have finished it since
            _trace_pair(folder, pair, trace)


def _trace_pair(folder: ZooFolder, pair: PlannedPair, trace: Trace) -> None:
    options = folder.plan.options_of(pair, folder.path)
    logging.info("%s ...", pair.name)
    try:
        models = open_models(options)
        if is_main_process():
            folder.begin(pair, file_stamps(file for model in models for file in files_of(model)))
        trace(options)
        if is_main_process():
            _measure(folder, pair, models)
    except Exception as error:
        logging.exception("%s failed", pair.name)
        folder.failed(pair, f"{type(error).__name__}: {error}", traceback.format_exc())
        if jax.process_count() > 1:
            raise  # the other processes wait for this one: all end, and the pairs after this one stay missing


def _measure(folder: ZooFolder, pair: PlannedPair, models: Sequence[Checkpoint]) -> None:
    """Leaves for the report what the weights of each model look like, unless another pair's worker has."""
    for model_id, model in zip((pair.base, pair.ft), models):
        name = folder.plan.names[model_id]
        stamps = file_stamps(files_of(model))
        if read_model_measures(folder.path, name, stamps) is None:
            write_model_measures(folder.path, name, model_id, model, stamps)


def files_of(model: Checkpoint) -> list[Path]:
    """Returns the files that a record of this model depends on."""
    names = ("tokenizer.json", "tokenizer.model")
    return [file for name in names if (file := model.tokenizer_folder / name).is_file()] + list(model.files())


@dataclass
class ArrayTask:
    """The work of one element of a Slurm array, as submitit starts it, and starts it again after a preemption."""

    folder: Path
    names: tuple[str, ...]

    def __call__(self) -> None:
        """Traces the pairs of this element; of several processes that srun started, as one program."""
        run_worker(self.folder, self.names)

    def checkpoint(self) -> Any:
        """Returns what the requeued job is to do: the same, which continues where this one was stopped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run_worker(folder: Path, names: Iterable[str]) -> None:
    """Traces pairs as a program of its own, with the log lines of `main.py`."""
    logging.set_verbosity(logging.INFO)
    with initialized():
        trace_pairs(ZooFolder(folder), names)
