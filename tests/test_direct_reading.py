"""Reading past the page cache."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from tracing_jax.checkpoint import direct_reading, fits_page_cache
from tracing_jax.checkpoint.tensors import open_tensors


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no such flag on this system")
def test_bytes_read_past_the_cache_are_those_of_the_file(tmp_path, monkeypatch):
    """At any position and of any size, up to the last byte; what a file system refuses is left to the usual way."""
    monkeypatch.setattr(direct_reading, "_AT_ONCE", 8192)
    rng = np.random.default_rng(0)
    content = rng.bytes(50_001)
    (path := tmp_path / "file").write_bytes(content)
    for start, size in [(0, 1), (4095, 2), (4096, 8192), (1, 50_000), (49_999, 2), *rng.integers(1, 25_000, (20, 2))]:
        found = np.zeros(size, np.uint8)
        left = direct_reading.read_past_cache(path, [(int(start), memoryview(found))])
        rest = sum(len(memory) for _, memory in left)
        assert rest in (0, size)  # all of it, or none where the file system cannot
        if not rest:
            assert found.tobytes() == content[start : start + size]
    behind = np.zeros(10, np.uint8)
    assert direct_reading.read_past_cache(path, [(50_001, memoryview(behind))])  # nothing is there
    monkeypatch.setattr(os, "preadv", _refuse)
    targets = [(0, memoryview(behind)), (20, memoryview(behind))]
    assert direct_reading.read_past_cache(path, targets) == targets


def test_tensors_of_shards_read_past_the_cache_are_the_same(tmp_path, monkeypatch):
    index = {}
    for at, name in enumerate("abc"):
        file = f"model-{at + 1:05d}-of-00003.safetensors"
        save_file({name: np.random.default_rng(at).normal(size=(61, 1031))}, tmp_path / file)
        index[name] = file
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {index}}}'.replace("'", '"'))
    store = open_tensors(tmp_path)
    past = store.past_cache()
    for name in "abc":
        np.testing.assert_array_equal(past.read(name), store.read(name))
        part = np.empty((7, 1031))
        past.read_into(part, name, (slice(3, 10),))
        np.testing.assert_array_equal(part, store.read(name)[3:10])
    assert fits_page_cache(store.files())
    monkeypatch.setattr(os, "sysconf", lambda name: 700)  # bytes: the square of it
    assert not fits_page_cache(store.files())


def _refuse(*args):
    raise OSError("not on this file system")
