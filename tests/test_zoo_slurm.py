"""Zoos on a real Slurm: an element that fails, one cancelled, one requeued, and two processes in one."""

import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tracing_jax import demo
from tracing_jax.options import Mesh, RunOptions
from tracing_jax.zoo import ModelList, ZooFolder, make_plan
from tracing_jax.zoo.launching import left_to_do, status, wait, write_plan
from tracing_jax.zoo.slurm import queued, submit

ROOT = Path(__file__).parent.parent
SECONDS = 300
"""Generous, for machines under load."""

pytestmark = pytest.mark.skipif(
    not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True, check=False).returncode != 0,
    reason="no Slurm here: no sbatch on the PATH, or no controller that answers",
)


@pytest.fixture(autouse=True)
def elements_find_this_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def zoo_of(tmp_path, models, pairs=None, **fields) -> ZooFolder:
    config = RunOptions(stat=("csu",), **fields)
    folder = ZooFolder(tmp_path / "zoo")
    listed = ModelList(tuple(models), tuple(pairs or [(models[0], model) for model in models[1:]]))
    write_plan(folder, make_plan(listed, config))
    return folder


def launch(folder: ZooFolder, **options) -> list[str]:
    asked = {"time": 30, "cpus_per_task": 1, "array_parallelism": 2, "signal_delay_s": 20, **options}
    return submit(folder, [(name,) for name in left_to_do(folder)], asked)


def until(condition, what):
    start = time.monotonic()
    while not (found := condition()):
        assert time.monotonic() - start < SECONDS, what
        time.sleep(0.2)
    return found


def states(folder):
    return {name: found.state for name, found in folder.states().items()}


def test_element_that_fails_stops_no_other_and_is_tried_again_when_it_is_mended(family, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(family.member("finetune"), broken)
    tensors = load_file(broken / "model.safetensors")
    bad = {name: tensor * (float("nan") if "up_proj" in name else 1) for name, tensor in tensors.items()}
    save_file(bad, broken / "model.safetensors")
    members = [str(family.member(name)) for name in demo.MEMBERS]
    every_two = list(itertools.combinations(members, 2))
    folder = zoo_of(tmp_path, [*members, str(broken)], [*every_two, (members[0], str(broken))])
    launch(folder, array_parallelism=4)
    wait(folder, list(folder.plan.by_name))
    wanted = dict.fromkeys(folder.plan.by_name, "done") | {"base--broken": "failed"}
    assert states(folder) == wanted
    assert "up_proj" in folder.states()["base--broken"].error
    assert "base--broken" in status(folder)
    save_file(tensors, broken / "model.safetensors")
    first = folder.record_file(folder.plan.pairs[0]).stat().st_mtime_ns
    assert left_to_do(folder) == ["base--broken"]
    launch(folder)
    wait(folder, list(folder.plan.by_name))
    assert set(states(folder).values()) == {"done"}
    assert folder.record_file(folder.plan.pairs[0]).stat().st_mtime_ns == first  # it was not traced again


def test_cancelled_element_is_missed_and_a_requeued_one_goes_on(family, tmp_path):
    members = [str(family.member(name)) for name in ("base", "finetune", "independent")]
    folder = zoo_of(tmp_path, members)
    first, second = launch(folder, array_parallelism=1)
    assert left_to_do(folder) == []  # what is queued is not submitted twice
    pair = folder.plan.by_name["base--finetune"]
    until(lambda: folder.state(pair).state == "running" or None, "the first element never began")
    subprocess.run(["scancel", second], check=True)  # it waits: nothing will ever report it
    subprocess.run(["scancel", "--signal=USR2", first], check=True)  # as before a preemption or the time limit
    wait(folder, list(folder.plan.by_name))
    assert states(folder) == {"base--finetune": "done", "base--independent": "missing"}
    log = "".join(file.read_text() for file in (folder.path / "slurm" / first).glob("*_log.*"))
    assert "Caught signal" in log
    assert not queued(folder)
    launch(folder)
    wait(folder, list(folder.plan.by_name))
    assert set(states(folder).values()) == {"done"}


def test_two_processes_trace_a_pair_together_and_one_that_fails_ends_both(family, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(family.member("finetune"), broken)
    tensors = load_file(broken / "model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, broken / "model.safetensors")
    base, finetune = (str(family.member(name)) for name in ("base", "finetune"))
    folder = zoo_of(tmp_path, [base, finetune, str(broken)], mesh=Mesh(data=2, model=1))
    os.environ.pop("JAX_NUM_CPU_DEVICES", None)
    launch(folder, ntasks_per_node=2, array_parallelism=1)
    wait(folder, list(folder.plan.by_name))
    assert states(folder) == {"base--finetune": "done", "base--broken": "failed"}
    record = json.loads(folder.record_file(folder.plan.by_name["base--finetune"]).read_text())
    assert record["device"]["count"] == 2
    assert record["verdict"]["verdict"] == "related"
    assert "NaN" in folder.states()["base--broken"].error or "finite" in folder.states()["base--broken"].error
