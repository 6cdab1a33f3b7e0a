"""Traces every pair of a list of models, on Slurm or on this machine, and ends in one report.

    python launch.py --config=configs/zoo.py:demo --models=configs/models/demo.yaml --save=runs/zoo --executor=local
    python launch.py --save=runs/zoo --status       # done, running, failed, missing
    python launch.py --save=runs/zoo --retry        # only what failed or is missing

Started again it goes on: a pair with a record of this config and these model files is not traced again.
"""

import os
import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from tracing_jax.cli.errors import configure_logging, exit_on_user_error
from tracing_jax.zoo import PAIRINGS, ZooFolder, make_plan, read_models
from tracing_jax.zoo.launching import left_to_do, status, wait, write_plan
from tracing_jax.zoo.local import run_locally
from tracing_jax.zoo.report import write_report
from tracing_jax.zoo.slurm import batches, script, submit


def _slurm_options() -> ConfigDict:
    """Returns what an element of the array is given; what is None is left to the cluster."""
    return ConfigDict(
        {
            "partition": placeholder(str),
            "account": placeholder(str),
            "qos": placeholder(str),
            "constraint": placeholder(str),
            "exclude": placeholder(str),
            "time": 240,  # minutes; at the limit the element is requeued and goes on
            "signal_delay_s": 90,  # seconds of warning before that
            "nodes": 1,
            "tasks_per_node": 1,  # processes that trace a pair together, as with srun main.py
            "gpus_per_node": placeholder(int),
            "cpus_per_task": placeholder(int),
            "mem": placeholder(str),  # such as 64GB
            "max_parallel": 16,  # elements at a time
            "job_name": "tracing_jax",
        }
    )


_SUBMITIT = {"max_parallel": "array_parallelism", "tasks_per_node": "ntasks_per_node"}
"""Options that go by another name there."""

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/; its fields hold for every pair.")
_SLURM = config_flags.DEFINE_config_dict("slurm", _slurm_options(), "What an element of the array asks for.")
_MODELS = flags.DEFINE_string("models", None, "A YAML list of models; see docs/zoo.md.")
_SAVE = flags.DEFINE_string("save", None, "The folder of the zoo.", required=True)
_FLAT = flags.DEFINE_enum("flat", None, PAIRINGS, "How pairs are made of the list; by default as its keys say.")
_EXECUTOR = flags.DEFINE_enum(
    "executor", "slurm", ["slurm", "local", "print"], "Where to run; print shows the plan and the sbatch script."
)
_WORKERS = flags.DEFINE_integer("workers", 1, "local: processes that trace pairs side by side.", lower_bound=1)
_BATCH = flags.DEFINE_integer("pairs_per_job", 1, "slurm: pairs of one element, one after another.", lower_bound=1)
_WAIT = flags.DEFINE_bool("wait", True, "slurm: wait for the end and write the report.")
_STATUS = flags.DEFINE_bool("status", False, "Say where the pairs stand, and do nothing.")
_RETRY = flags.DEFINE_bool("retry", False, "Take the list and the config that lie in the folder.")


def main(argv: Sequence[str]) -> None:
    """Plans, sends off what is left to do, waits, and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    configure_logging()
    with exit_on_user_error():
        folder = ZooFolder(_SAVE.value)
        if not (_STATUS.value or _RETRY.value):
            _plan(folder)
        if _STATUS.value:
            print(status(folder))
            return
        _run(folder)
        if _EXECUTOR.value == "print" or not _WAIT.value:
            return
        print(status(folder))
        print(f"report: {write_report(folder)}")
        if any(found.state != "done" for found in folder.states().values()):
            sys.exit(1)


def _plan(folder: ZooFolder) -> None:
    if _CONFIG.value is None or _MODELS.value is None:
        raise app.UsageError("--config and --models say what to trace; --status and --retry take what lies in --save")
    write_plan(folder, make_plan(read_models(_MODELS.value, _FLAT.value), _CONFIG.value))


def _run(folder: ZooFolder) -> None:
    """Sends off what is left, the way that was asked for, and waits for it."""
    options = {_SUBMITIT.get(name, name): value for name, value in _SLURM.value.to_dict().items()}
    names = left_to_do(folder)
    if _EXECUTOR.value == "print":
        work = batches(names, _BATCH.value)
        for i, batch in enumerate(work):
            print(f"{i}: {', '.join(batch)}")
        print(script(folder, max(1, len(work)), options))
    elif _EXECUTOR.value == "local":
        run_locally(folder, names, min(_WORKERS.value, max(1, len(names))))
    elif names:
        submit(folder, batches(names, _BATCH.value), options)
    if _EXECUTOR.value != "print" and _WAIT.value:
        wait(folder, list(folder.plan.by_name))


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process computes nothing
    app.run(main)
