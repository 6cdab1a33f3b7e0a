"""From a plan to pairs that are done: writing the plan, what is left to do, waiting for it, status."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from absl import logging

from tracing_jax.checkpoint import hub_problem
from tracing_jax.experiment import check_config
from tracing_jax.experiment.models import is_local, open_model
from tracing_jax.progress import tqdm
from tracing_jax.report import text_table
from tracing_jax.zoo.folder import STATES, ZooFolder
from tracing_jax.zoo.plan import PLAN, PlannedPair, ZooPlan, without_models
from tracing_jax.zoo.proposing import proposed, write_left_out
from tracing_jax.zoo.slurm import queued

_POLL_SECONDS = 2.0
_IDLE_SECONDS = 15.0
"""If no pair has been queued or running for so long, waiting ends. Shared folders show changes late."""
_SHOWN = 20
_OF_ONE_PAIR = ("adapter_base", "base_layout", "ft_layout")
"""Options that say how one model is to be read."""


def write_plan(
    folder: ZooFolder, plan: ZooPlan, skip_unreadable: bool = False, by_scan: bool = False, workers: int = 1
) -> None:
    """Checks a plan, as far as it can be checked without weights of the Hub, and writes it into the zoo's folder.

    Args:
      folder: of the zoo.
      plan: what is to be traced there.
      skip_unreadable: whether models that cannot be read are left out of the plan, with a warning.
      by_scan: whether only pairs are traced in which signatures show a trace of a relation.
      workers: processes that read the models for that.

    Raises:
      ValueError: the config cannot run, a model cannot be read, or another plan is being worked on there.
    """
    check_config(plan.options_of(plan.pairs[0], folder.path))
    if of_one := [name for name in _OF_ONE_PAIR if plan.config.get(name)]:
        raise ValueError(
            f"{', '.join(of_one)}: what is said of one model would hold for those of all pairs; merge the adapter into "
            "its base or convert the model, and name the folder of the result in the list"
        )
    if by_scan and (component := plan.config.get("component")):
        raise ValueError(
            f"component={component}: signatures are of language models, and say nothing of which {component} parts are "
            "related; compare all pairs with --candidates=all, of a shorter list if need be"
        )
    if unreadable := _unreadable(plan):
        lines = [f"{model}: {reason}" for model, reason in unreadable.items()]
        if not skip_unreadable:
            lines.append("leave them out of the list, or trace the others with --skip_unreadable")
            raise ValueError("\n  ".join(["these models cannot be read:", *lines]))
        logging.warning("%d models are left out, which cannot be read:\n  %s", len(lines), "\n  ".join(lines))
        plan = without_models(plan, unreadable)
    if not _is_same_question(folder, plan, by_scan):
        _check_idle(folder)  # before every model is read twice
    left_out: Sequence[tuple[PlannedPair, str]] = ()
    if by_scan:
        plan, left_out = proposed(plan, folder.path, workers)
        folder.reload_plan()
    if (folder.path / PLAN).exists():
        if folder.plan == plan:
            return
        _check_idle(folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_left_out(folder.path, left_out, plan)
    plan.write(folder.path)
    folder.reload_plan()


def _is_same_question(folder: ZooFolder, plan: ZooPlan, by_scan: bool) -> bool:
    """Returns whether the folder has no plan, or one that may have been made of this one, with all pairs in it."""
    if not (folder.path / PLAN).exists():
        return True
    written = folder.plan
    if replace(written, pairs=(), proposal=None) != replace(plan, pairs=(), proposal=None):
        return False
    if not by_scan or written.proposal is None:
        return not by_scan and written == plan
    return written.proposal.asked == len(plan.pairs) and {*written.pairs} <= {*plan.pairs}


def _check_idle(folder: ZooFolder) -> None:
    """Raises ValueError if pairs of the plan in the folder are being worked on."""
    if busy := running_or_queued(folder):
        raise ValueError(
            f"{folder.path}: another list or config is being traced there: {len(busy)} pairs are queued or run, "
            f"the first {busy[0]}; wait for it, end it, or choose another --save"
        )


def _unreadable(plan: ZooPlan) -> dict[str, str]:
    """Returns the models that cannot be opened, each with the reason; no weight is read or downloaded."""
    found = {model: _problem(model) for model in plan.names}
    return {model: problem for model, problem in found.items() if problem}


def _problem(model: str) -> str | None:
    """Returns why a model cannot be opened; of one of the Hub what can be seen without its weights."""
    if not is_local(model):
        return hub_problem(model)
    try:
        open_model(model)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def running_or_queued(folder: ZooFolder) -> list[str]:
    """Returns the pairs that a worker has leased, or that wait in Slurm's queue."""
    waiting = queued(folder)
    return [name for name, found in folder.states().items() if found.state == "running" or name in waiting]


def left_to_do(folder: ZooFolder) -> list[str]:
    """Returns the pairs that are neither done, nor running, nor queued."""
    states, waiting = folder.states(), queued(folder)
    return [name for name, found in states.items() if found.state in ("failed", "missing") and name not in waiting]


def wait(folder: ZooFolder, names: Sequence[str]) -> None:
    """Waits, with a progress bar, until each pair is done, has failed, or is neither running nor queued any more."""
    left, idle_since = list(names), time.monotonic()
    with tqdm(total=len(names), desc="pairs", unit="pair", disable=None) as bar:
        while left:
            time.sleep(_POLL_SECONDS)
            states = {name: folder.state(folder.plan.by_name[name]).state for name in left}
            waiting = queued(folder)
            ended = [name for name, state in states.items() if state in ("done", "failed") and name not in waiting]
            bar.update(len(ended))
            left = [name for name in left if name not in ended]
            if ended or any(name in waiting or states[name] == "running" for name in left):
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > _IDLE_SECONDS:
                logging.warning(
                    "%d pairs are not done, running or queued (cancelled?); try them with --retry", len(left)
                )
                return


def status(folder: ZooFolder) -> str:
    """Returns the states of the pairs as text: counts, and every pair that failed, with the first line of its error."""
    states, waiting = folder.states(), queued(folder)
    count = Counter(found.state for found in states.values())
    idle = sum(states[name].state != "running" for name in waiting)
    line = ", ".join(f"{count[state]} {state}" for state in STATES) + (f" ({idle} queued)" if idle else "")
    lines = [f"{folder.path}: {len(states)} pairs: {line}"]
    if (proposal := folder.plan.proposal) is not None:
        lines.append(f"left out: {proposal.left_out:,} of {proposal.asked:,} pairs, without a trace in signatures")
    lines += [f"left out, {model}: {reason.splitlines()[0]}" for model, reason in folder.plan.left_out.items()]
    rows = [
        [name, found.state, waiting.get(name, ""), found.error]
        for name, found in states.items()
        if found.state != "done" and (found.state != "missing" or found.error or name in waiting)
    ]
    if rows:
        lines.append(text_table(rows[:_SHOWN], ("pair", "state", "job", "why")))
    if len(rows) > _SHOWN:
        lines.append(f"... and {len(rows) - _SHOWN} more")
    return "\n".join(lines)
