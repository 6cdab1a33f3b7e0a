"""Reading past the page cache."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tracing_jax import host_memory
from tracing_jax.checkpoint import direct_reading, fits_page_cache, safetensors_file
from tracing_jax.checkpoint.derived_tensors import Alias, DerivedTensors, RenamedTensors
from tracing_jax.checkpoint.tensors import open_tensors, past_cache_of


@pytest.fixture
def direct(tmp_path, monkeypatch):
    """Where the file system of the tests reads past the cache: the bytes of each file that were read so."""
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no such flag on this system")
    (probe := tmp_path / "probe").write_bytes(bytes(4096))
    opened: dict[int, str] = {}
    read: dict[str, int] = {}
    try:
        file = os.open(probe, os.O_RDONLY | os.O_DIRECT)
        os.close(file)
    except OSError:
        pytest.skip("the file system of temporary files refuses O_DIRECT")
    usual_open, usual_read = os.open, os.preadv

    def spying_open(path, flags, *rest, **named):
        file = usual_open(path, flags, *rest, **named)
        if flags & os.O_DIRECT:
            opened[file] = Path(path).name
        return file

    def spying_read(file, *rest):
        count = usual_read(file, *rest)
        read[opened[file]] = read.get(opened[file], 0) + count  # a KeyError where it was opened without the flag
        return count

    monkeypatch.setattr(os, "open", spying_open)
    monkeypatch.setattr(os, "preadv", spying_read)
    return read


def test_bytes_read_past_the_cache_are_those_of_the_file(direct, tmp_path, monkeypatch):
    """At any position and of any size, up to the last byte; what a file system refuses is left to the usual way."""
    monkeypatch.setattr(direct_reading, "_AT_ONCE", 8192)
    rng = np.random.default_rng(0)
    content = rng.bytes(50_001)
    (path := tmp_path / "file").write_bytes(content)
    for start, size in [(0, 1), (4095, 2), (4096, 8192), (1, 50_000), (49_999, 2), *rng.integers(1, 25_000, (20, 2))]:
        found = np.zeros(size, np.uint8)
        before = direct.get("file", 0)
        assert direct_reading.read_past_cache(path, [(int(start), memoryview(found))]) == []
        assert found.tobytes() == content[start : start + size]
        assert direct["file"] - before >= size
    behind = np.zeros(10, np.uint8)
    assert direct_reading.read_past_cache(path, [(50_001, memoryview(behind))])  # nothing is there
    monkeypatch.setattr(os, "preadv", _refuse)
    targets = [(0, memoryview(behind)), (20, memoryview(behind))]
    assert direct_reading.read_past_cache(path, targets) == targets


def test_tensors_of_shards_read_past_the_cache_are_the_same(direct, tmp_path, monkeypatch):
    """Under other names and derived from others too; none of them is read the usual way."""
    index = {}
    for at, name in enumerate("abc"):
        file = f"model-{at + 1:05d}-of-00003.safetensors"
        save_file({name: np.random.default_rng(at).normal(size=(61, 1031))}, tmp_path / file)
        index[name] = file
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    stored = open_tensors(tmp_path)
    store = RenamedTensors(DerivedTensors(stored, {"d": Alias(stored, "a")}, "b"), {"x": "a", "y": "c", "z": "d"})
    past = past_cache_of(store)
    assert past.names() == store.names() == ("x", "y", "z")
    expected = {name: store.read(name) for name in store.names()}
    assert not direct
    left = []
    monkeypatch.setattr(safetensors_file, "read_past_cache", lambda *given: left.append(_read(*given)) or left[-1])
    for name in store.names():
        np.testing.assert_array_equal(past.read(name), expected[name])
        part = np.empty((7, 1031))
        past.read_into(part, name, (slice(3, 10),))
        np.testing.assert_array_equal(part, expected[name][3:10])
    assert left == [[]] * 6
    size = 61 * 1031 * 8
    assert direct[index["a"]] >= 2 * size
    assert direct[index["c"]] >= size
    assert index["b"] not in direct


_read = direct_reading.read_past_cache


def test_memory_that_a_process_may_use(tmp_path, monkeypatch):
    """The least of the machine's and that of its control groups, of both versions; more files do not fit the cache."""
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    monkeypatch.setattr(host_memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "_OWN_GROUPS", own)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert host_memory.memory_limit() == machine
    for group, limit in (("job/step", "max"), ("job", "1000")):
        (tmp_path / group / "memory.max").write_text(limit)
        (tmp_path / group / "memory.current").write_text("300")
    assert (host_memory.memory_limit(), host_memory.free_memory()) == (1000, 700)
    (file := tmp_path / "file").write_bytes(bytes(1001))
    assert not fits_page_cache([file])
    assert fits_page_cache([own, own])
    (tmp_path / "memory" / "a").mkdir(parents=True)
    own.write_text("4:cpu,memory:/a\n3:pids:/b\n")
    (tmp_path / "memory" / "a" / "memory.limit_in_bytes").write_text("500")
    (tmp_path / "memory" / "a" / "memory.usage_in_bytes").write_text("100")
    assert (host_memory.memory_limit(), host_memory.free_memory()) == (500, 400)
    (tmp_path / "memory" / "a" / "memory.stat").write_text("cache 90\ntotal_inactive_file 60\n")
    assert host_memory.free_memory() == 460


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked on this system")
def test_processes_after_a_fork_read_into_memory_of_their_own():
    script = f"""
import importlib.util, os, sys, types
sys.modules["tracing_jax.host_memory"] = types.ModuleType("tracing_jax.host_memory")  # JAX warns of a fork
sys.modules["tracing_jax.host_memory"].memory_limit = None
sys.modules["tracing_jax"] = types.ModuleType("tracing_jax")
spec = importlib.util.spec_from_file_location("direct_reading", {direct_reading.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module._MEMORY.view[:6] = b"parent"
child = os.fork()
module._MEMORY.view[6:] = bytes(module._AT_ONCE - 6)
if not child:
    module._MEMORY.view[:6] = b"child "
    os._exit(0)
os.waitpid(child, 0)
print(bytes(module._MEMORY.view[:6]).decode())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "parent\n"


def _refuse(*args):
    raise OSError("not on this file system")
