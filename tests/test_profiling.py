"""Where the time of a run went: every second of the main thread is in one cell, under what it was spent on."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tracing_jax.cli.profiling import EVERY, OTHER, WAITING, StackSampler, kind_of, profiled, stacks, table
from tracing_jax.progress import working

_OURS = ("/x/tracing_jax/statistics/csu.py", "compute")


@pytest.mark.parametrize(
    ("innermost", "kind"),
    [
        (("/y/jax/_src/compiler.py", "backend_compile"), "compile"),
        (("/y/jax/_src/interpreters/mlir.py", "lower_jaxpr_to_fun"), "trace and lower"),
        (("/y/jax/_src/array.py", "_value"), "device"),
        (("/x/tracing_jax/matching/assignment.py", "assign"), "assignment"),
        (("/x/tracing_jax/checkpoint/safetensors_file.py", "read"), "read"),
        (("/x/tracing_jax/record.py", "_sha256"), "hash"),
        (("/x/tracing_jax/record.py", "plain"), OTHER),
        (("/usr/lib/python3.11/threading.py", "wait"), WAITING),
        (("/y/numpy/linalg/_linalg.py", "svd"), OTHER),
    ],
)
def test_the_innermost_frame_that_tells_says_what_a_thread_does(innermost, kind):
    assert kind_of([innermost, _OURS]) == kind
    inside = ("/y/numpy/linalg/_linalg.py", "svd")
    assert kind_of([inside, innermost, _OURS]) == (kind if kind != WAITING else OTHER)


def test_stacks_of_all_threads_are_those_that_they_have(tmp_path):
    ready, done = threading.Event(), threading.Event()

    def deeper(n):
        if n:
            return deeper(n - 1)
        ready.set()
        return done.wait()

    thread = threading.Thread(target=deeper, args=(150,))
    thread.start()
    ready.wait()
    with (tmp_path / "dump").open("w+b") as file:
        found = [stacks(file) for _ in range(2)][1]
    done.set()
    thread.join()
    own, theirs = found[threading.get_ident()], found[thread.ident]
    assert own[0][1] == "stacks"
    assert any(function == "test_stacks_of_all_threads_are_those_that_they_have" for _, function in own)
    assert theirs[0] == (threading.__file__, "wait")
    assert {function for _, function in theirs[2:]} == {"deeper"}
    assert len(theirs) == 100


def test_every_second_of_the_main_thread_is_in_one_cell():
    start = time.perf_counter()
    with StackSampler() as sampler:
        with working("csu (1 of 2)"):
            time.sleep(10 * EVERY)
        with working("match (2 of 2)"):
            threading.Event().wait(10 * EVERY)
    wall = time.perf_counter() - start
    assert sum(sampler.main.values()) == pytest.approx(wall, abs=2 * EVERY + 0.1 * wall)
    assert sampler.main["csu (1 of 2)", OTHER] > 0
    assert sampler.main["match (2 of 2)", WAITING] > 0
    lines = table(sampler).splitlines()
    assert [line.split("  ")[0] for line in lines if "of 2" in line] == ["csu (1 of 2)", "match (2 of 2)"]


def test_a_busy_thread_counts_and_an_idle_one_does_not():
    def work():
        end = time.perf_counter() + 10 * EVERY
        while time.perf_counter() < end:
            pass

    def foreign():
        os.read(ours, 1)  # waits in C, where no frame tells: pytest-xdist and notebooks have such threads

    ours, theirs = os.pipe()
    with ThreadPoolExecutor(1) as outside, os.fdopen(ours), os.fdopen(theirs, "w"):
        outside.submit(foreign)
        start = time.perf_counter()
        with StackSampler() as sampler, ThreadPoolExecutor(2) as pool:
            pool.submit(int).result()  # its thread waits from now on
            pool.submit(work).result()
        elapsed = time.perf_counter() - start  # however long the machine took: two threads would count it twice
        os.write(theirs, b"x")
    assert 3 * EVERY < sum(sampler.others.values()) < elapsed + 2 * EVERY
    assert sampler.others[OTHER] > 3 * EVERY


def test_a_run_that_fails_is_profiled_until_then(tmp_path):
    def run():
        with profiled(str(tmp_path)), working("sleep"):
            time.sleep(3 * EVERY)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run()
    assert "sleep" in (tmp_path / "profile.txt").read_text("utf-8")


def test_profile_is_written_with_a_trace(tmp_path, capsys):
    with profiled(None):
        pass
    assert not list(tmp_path.iterdir())
    with profiled(str(tmp_path / "found")), working("sleep"):
        time.sleep(3 * EVERY)
    assert "sleep" in (tmp_path / "found" / "profile.txt").read_text("utf-8")
    assert list((tmp_path / "found").rglob("*.xplane.pb"))
    assert str(tmp_path) in capsys.readouterr().err
