"""`tracing-jax zoo` and `launch.py`: every pair of a list of models, here or on Slurm, ending in one report."""

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

from tracing_jax.cli.arguments import add_options, given
from tracing_jax.cli.errors import configure_logging, exit_on_usage_error, exit_on_user_error
from tracing_jax.dataclass_options import REQUIRED, checked, from_values, option, replaced
from tracing_jax.options import PAIRINGS, ZOO, RunOptions

USAGE = "--save FOLDER --models FILE"
_LEFT_OUT = ("base_model_id", "ft_model_id", "ft_model_ids", "save")
_SUBMITIT = {"max_parallel": "array_parallelism", "tasks_per_node": "ntasks_per_node"}
"""Options that go by another name there."""

_MOST_PAIRS = 20
"""Of a model on average, beyond which pairs are proposed by signatures: lists of more than 41 models."""


@dataclass(frozen=True)
class Slurm:
    """What an element of the job array asks for; what is not set is left to the cluster."""

    partition: str | None = option(None, "Partition.")
    account: str | None = option(None, "Account.")
    qos: str | None = option(None, "Quality of service.")
    constraint: str | None = option(None, "Features that a node must have.")
    exclude: str | None = option(None, "Nodes that are not used.")
    time: int = option(240, "Minutes; at the limit the element is requeued and continues.", at_least=1)
    signal_delay_s: int = option(90, "Seconds of warning before that.", at_least=1)
    nodes: int = option(1, "Nodes of an element.", at_least=1)
    tasks_per_node: int = option(1, "Processes that trace a pair together, as with srun main.py.", at_least=1)
    gpus_per_node: int | None = option(None, "GPUs of a node.")
    cpus_per_task: int | None = option(None, "CPU cores of a process.")
    mem: str | None = option(None, "Memory of a node, such as 64GB.")
    max_parallel: int = option(16, "Elements at a time.", at_least=1)
    job_name: str = option("tracing_jax", "Name of the array.")


@dataclass(frozen=True)
class ZooOptions:
    """Which pairs are traced, and where."""

    save: str = option(REQUIRED, "The folder of the zoo.", group="zoo")
    models: str | None = option(None, "A YAML list of models; see docs/zoo.md.", group="zoo")
    flat: str | None = option(
        None,
        "How pairs are made of the list; by its keys if not set.",
        choices=PAIRINGS,
        group="zoo",
    )
    candidates: str = option(
        "auto",
        "Pairs that are compared in full: all of the list; those in which signatures show a sign of a relation "
        "(scan); auto: scan where a model has more than 20 pairs.",
        choices=("auto", "all", "scan"),
        group="zoo",
    )
    executor: str = option(
        "slurm",
        "Where to run; print shows the plan and the sbatch script, and writes nothing.",
        choices=("slurm", "local", "print"),
        group="zoo",
    )
    workers: int = option(
        1,
        "Processes side by side here: that read models where signatures propose pairs, and, local, trace pairs.",
        at_least=1,
        group="zoo",
    )
    pairs_per_job: int = option(1, "slurm: pairs of one element, one after another.", at_least=1, group="zoo")
    wait: bool = option(True, "slurm: wait for the end and write the report.", group="zoo")
    status: bool = option(False, "Print the state of the pairs, and do nothing.", group="zoo")
    skip_unreadable: bool = option(
        False, "Trace the models that can be read; the report lists the others with the reason.", group="zoo"
    )
    retry: bool = option(False, "Take the list and the options that are in the folder.", group="zoo")
    slurm: Slurm = Slurm()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    add_options(parser, ZooOptions)
    add_options(parser, ZOO, without=_LEFT_OUT)


def run(parsed: argparse.Namespace) -> None:
    """Runs the verb."""
    shared = {name: value for name, value in given(parsed, RunOptions).items() if name not in _LEFT_OUT}
    with exit_on_usage_error():
        zoo = from_values(ZooOptions, given(parsed, ZooOptions))
        config = None if zoo.models is None else checked(replaced(ZOO, shared))
    launch(zoo, config)


def launch(zoo: ZooOptions, config: Any) -> None:
    """Plans, sends off what is left to do, waits, and reports.

    Args:
      zoo: which pairs, and where.
      config: options or a config of the runs of all pairs; None takes what is in the folder.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process computes nothing
    configure_logging()
    with exit_on_usage_error():
        if not (zoo.status or zoo.retry) and (config is None or zoo.models is None):
            raise ValueError("--models is needed; --status and --retry take the list and the options in --save")
    with exit_on_user_error():
        from tracing_jax.zoo import ZooFolder
        from tracing_jax.zoo.launching import status
        from tracing_jax.zoo.report import write_report

        folder = ZooFolder(zoo.save)
        if not (zoo.status or zoo.retry):
            _plan(folder, zoo, config)
        if zoo.status:
            print(status(folder))
            return
        _start(folder, zoo)
        if zoo.executor == "print" or not zoo.wait:
            return
        print(status(folder))
        print(f"report: {write_report(folder)}")
        if any(found.state != "done" for found in folder.states().values()):
            sys.exit(1)


def _plan(folder: Any, zoo: ZooOptions, config: Any) -> None:
    from tracing_jax.experiment import check_config
    from tracing_jax.zoo import make_plan, read_models
    from tracing_jax.zoo.launching import write_plan

    assert zoo.models is not None, "checked before"
    plan = make_plan(read_models(zoo.models, zoo.flat), config)
    by_scan = zoo.candidates == "scan" or (zoo.candidates == "auto" and len(plan.pairs) > _MOST_PAIRS * len(plan.names))
    if zoo.executor == "print":
        check_config(plan.options_of(plan.pairs[0], folder.path))
        if by_scan:
            print("of these pairs, those are traced in which signatures show a sign of a relation (--candidates)")
        folder.plan = plan  # shown, and not written: the folder may hold the records of another
    else:
        write_plan(folder, plan, zoo.skip_unreadable, by_scan, zoo.workers)


def _start(folder: Any, zoo: ZooOptions) -> None:
    """Sends off what is left, the way that was asked for, and waits for it."""
    from tracing_jax.zoo.launching import left_to_do, wait
    from tracing_jax.zoo.local import run_locally
    from tracing_jax.zoo.slurm import batches, script, submit

    slurm = {_SUBMITIT.get(name, name): value for name, value in asdict(zoo.slurm).items()}
    names = left_to_do(folder)
    work = batches(names, zoo.pairs_per_job)
    if zoo.executor == "print":
        for i, batch in enumerate(work):
            print(f"{i}: {', '.join(batch)}")
        print(script(folder, max(1, len(work)), slurm))
        return
    if zoo.executor == "local":
        run_locally(folder, names, min(zoo.workers, max(1, len(names))))
    elif names:
        submit(folder, work, slurm)
    if zoo.wait:
        wait(folder, list(folder.plan.by_name))
