"""Several processes are one program: the record of one, written by the first, and a quick end where one fails."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cases import slow

from tracing_jax import experiment
from tracing_jax.cli.config_files import to_config
from tracing_jax.distributed import initialized
from tracing_jax.options import RunOptions

ROOT = Path(__file__).parent.parent
STATISTICS = "csu,match,mode,cos,csh,jsd"
SECONDS = 400
"""Generous, for machines under load; none of this should take more than twenty."""


def _arguments(family, save, ft=None):
    return f"""--base_model_id={family.member("base")} --ft_model_id={ft or family.member("finetune")}
        --dataset={family.text} --stat={STATISTICS} --save={save} --config.block_size=64 --config.num_tokens=1024
        --config.mesh.data=2 --config.mesh.model=2""".split()


_SAVE_EVERY_LAYER = """
import runpy
from tracing_jax import run_cache
run_cache.WRITE_SHARE, run_cache._LEAST_INTERVAL_SECONDS, run_cache.HELD_SECONDS = 1e9, 0, 0
runpy.run_path("main.py", run_name="__main__")
"""


def _start(arguments_of, count=2, program=("main.py",)):
    """Starts processes of two devices each, with the arguments of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"}
    joins = [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [sys.executable, *program, *joins, f"--process_id={i}", *arguments_of(i)],
            cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def _ended(processes):
    """Returns exit status, stdout and stderr of each; none is left behind."""
    try:
        found = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, found)]


@pytest.fixture(scope="module")
def alone(family, tmp_path_factory):
    """The record of one process with as many devices."""
    config = to_config(RunOptions(stat=("mode",)))
    config.base_model_id, config.ft_model_id = str(family.member("base")), str(family.member("finetune"))
    config.dataset, config.block_size, config.num_tokens = str(family.text), 64, 1024
    config.stat, config.mesh.data, config.mesh.model = STATISTICS, 2, 2
    config.save = str(tmp_path_factory.mktemp("alone") / "m.p")
    return json.loads(json.dumps(experiment.trace(config)))


def _assert_close(found, expected, where="statistics"):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            _assert_close(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            _assert_close(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-5), (where, found, expected)
    else:
        assert found == expected, where


@pytest.mark.slow
def test_two_processes_give_the_record_of_one_and_the_first_alone_writes(family, alone, tmp_path):
    ended = _ended(_start(lambda i: _arguments(family, tmp_path / f"process{i}" / "m.p")))
    assert [status for status, *_ in ended] == [0, 0], ended
    first, second = (tmp_path / f"process{i}" for i in range(2))
    assert {"m.p", "m.json", "m.png", "m.html"} <= {file.name for file in first.iterdir()}
    assert not list(second.glob("*"))
    assert "RELATED" in ended[0][1]
    assert "RELATED" not in ended[1][1]
    record = json.loads((first / "m.json").read_text())
    assert record["device"]["count"] == 4

    _assert_close(record["statistics"], alone["statistics"])
    assert record["verdict"]["verdict"] == alone["verdict"]["verdict"]


@pytest.mark.slow
def test_two_processes_that_were_killed_go_on_together(family, alone, tmp_path):
    arguments = [*_arguments(family, tmp_path / "m.p"), "--config.memory=stream"]
    processes = _start(lambda i: arguments, program=("-c", _SAVE_EVERY_LAYER))
    until = time.monotonic() + SECONDS
    while not (half_way := list(tmp_path.rglob("hidden.npz"))) and all(p.poll() is None for p in processes):
        time.sleep(0.01)
        if time.monotonic() > until:
            break
    for process in processes:
        process.kill()
    said = [process.communicate() for process in processes]
    assert half_way, said

    (kept,) = tmp_path.rglob("results/csu.json")
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"headline": 0.125}))  # as no run would find it
    ended = _ended(_start(lambda i: arguments))
    assert [status for status, *_ in ended] == [0, 0], ended
    record = json.loads((tmp_path / "m.json").read_text())
    assert any("continues an interrupted run" in note for note in record["notes"])
    assert record["statistics"].pop("csu")["non_aligned"]["headline"] == 0.125
    _assert_close(record["statistics"], {name: found for name, found in alone["statistics"].items() if name != "csu"})
    assert not list(tmp_path.rglob("*.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("failing", [slow(0), 1])
def test_a_process_that_fails_says_why_and_ends_the_others(failing, family, tmp_path):
    wrong = {failing: "/no/such/model"}
    ended = _ended(_start(lambda i: _arguments(family, tmp_path / f"process{i}" / "m.p", wrong.get(i))))
    assert all(status != 0 for status, *_ in ended)
    assert "error: '/no/such/model' is no folder" in ended[failing][2]
    assert f"process {failing} of 2 ends" in ended[failing][2]
    assert not list(tmp_path.rglob("m.*"))


@pytest.mark.parametrize("given", [("localhost:1", None, None), ("localhost", 2, 0), ("localhost:1", 2, 2)])
def test_flags_that_do_not_fit_are_refused(given):
    with pytest.raises(ValueError, match=r"belong together|host:port"), initialized(*given):
        pass


def test_alone_a_process_joins_nobody(monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    with initialized():
        assert np.sum([1, 2]) == 3
