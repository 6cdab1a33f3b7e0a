"""A whole zoo from YAML to report in one command, killed and restarted: is every verdict right, and is nothing lost?

    python -m benchmarks.zoos --seeds=11,12,13 --kills=2

For each seed the demo's zoo (three trees of four models: roots, fine-tunes, disguised and pruned members) is trained
and traced by `launch.py` on this machine. After a random while all its processes are killed (SIGKILL), and the same
command is given again. Then it is counted which verdicts are right, whether the families are those of the tree, and
whether a pair that had a record before a kill was traced twice.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from absl import app, flags

from tracing_jax import demo
from tracing_jax.report import text_table
from tracing_jax.zoo import ZooFolder

_SEEDS = flags.DEFINE_list("seeds", ["0"], "of the zoos")
_KILLS = flags.DEFINE_integer("kills", 2, "how often each launch is killed", lower_bound=0)
_WORKERS = flags.DEFINE_integer("workers", 2, "processes that trace pairs")
_SAVE = flags.DEFINE_string("save", None, "keep the zoos in this folder")
_REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class Run:
    """What one zoo came to: seconds of training and of tracing, and what of it was right."""

    seed: int
    training: float
    tracing: float
    pairs: int
    done: int
    right: int
    families: bool
    twice: int


def tree_of(seed: int) -> dict[str, Mapping]:
    """Returns the zoo's tree as YAML has it, each model with the seed."""

    def below(parent: str | None) -> dict[str, Mapping]:
        return {f"demo:{name}@{seed}": below(name) for name, its_parent in demo.TREE.items() if its_parent == parent}

    return below(None)


def run_zoo(seed: int, folder: Path, kills: int) -> Run:
    """Trains and traces one zoo, killing and restarting the tracing so many times."""
    start = time.monotonic()
    for name in demo.TREE:
        demo.member(f"{name}@{seed}")
    trained = time.monotonic()
    models = folder / "models.yaml"
    models.write_text(yaml.safe_dump({"tree": tree_of(seed)}, sort_keys=False))
    command = [
        sys.executable,
        "launch.py",
        "--config=configs/zoo.py:demo",
        f"--models={models}",
        f"--save={folder}/zoo",
    ]
    command += ["--executor=local", f"--workers={_WORKERS.value}"]
    kept: dict[str, int] = {}
    for _ in range(kills):
        _killed(command, random.Random(seed).uniform(30, 90))
        kept |= {name: when for name, when in _records(folder / "zoo").items() if name not in kept}
    subprocess.run(command, cwd=_REPOSITORY, check=True)
    tracing = time.monotonic() - trained
    twice = sum(_records(folder / "zoo")[name] != when for name, when in kept.items())
    return _summary(seed, folder / "zoo", trained - start, tracing, twice)


def _killed(command: list[str], seconds: float) -> None:
    """Starts a command in a process group of its own, and kills the group after so many seconds."""
    process = subprocess.Popen(command, cwd=_REPOSITORY, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _records(folder: Path) -> dict[str, int]:
    """Returns when the record of each pair that is done was written."""
    zoo = ZooFolder(folder)
    if not (folder / "zoo.json").exists():
        return {}
    return {pair.name: zoo.record_file(pair).stat().st_mtime_ns for pair in zoo.plan.pairs if zoo.record(pair)}


def _summary(seed: int, folder: Path, training: float, tracing: float, twice: int) -> Run:
    zoo = ZooFolder(folder)
    report = json.loads((folder / "report.json").read_text())
    verdicts = {pair["pair"]: pair["verdict"] for pair in report["pairs"]}  # after Holm over all pairs
    right = sum(verdicts[pair.name] == ("related" if pair.related else "no_evidence") for pair in zoo.plan.pairs)
    found = {frozenset(family["models"]) for family in report["families"]}
    names = zoo.plan.names
    wanted = {
        frozenset(names[f"demo:{name}@{seed}"] for name in demo.TREE if name.split("-")[0] == root)
        for root in demo.ROOTS
    }
    done = sum(verdict is not None for verdict in verdicts.values())
    return Run(seed, training, tracing, len(verdicts), done, right, found == wanted, twice)


def main(argv: list[str]) -> None:
    """Runs the zoos and prints a line for each; the status is 1 where anything was wrong."""
    del argv
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in map(int, _SEEDS.value):
            folder = Path(_SAVE.value or temporary) / f"seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            runs.append(run_zoo(seed, folder, _KILLS.value))
    rows = [
        [
            r.seed,
            round(r.training),
            round(r.tracing),
            f"{r.done} of {r.pairs}",
            f"{r.right} of {r.pairs}",
            r.families,
            r.twice,
        ]
        for r in runs
    ]
    headers = ("seed", "training, s", "tracing, s", "pairs done", "verdicts right", "families exact", "done twice")
    print(text_table(rows, headers))
    if any(run.right < run.pairs or not run.families or run.twice for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
