"""A folder's weights are one store of named arrays, whatever its format; what is wrong with it is said at once."""

import gc
import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_zip_writer
from safetensors.numpy import save_file

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.tensors import TensorStore, open_file, open_tensors, read_json

MAPS = Path("/proc/self/maps")
INDICES = [
    (),
    (slice(None),),
    (slice(1, 3),),
    (slice(-2, None), slice(None, -1)),
    (slice(None), slice(1, 2)),
    (slice(0, 0),),
    (slice(3, 1), slice(0, 2)),
    (slice(2, 99, 1), slice(None, None, None)),
]


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "b.weight": rng.normal(size=(4, 3)).astype(np.float32),
        "a.weight": rng.normal(size=(5, 3)).astype(ml_dtypes.bfloat16),
        "c.bias": rng.normal(size=7).astype(np.float16),
        "d.position_ids": np.arange(6, dtype=np.int64).reshape(2, 3),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
    }


def save_sharded(folder, arrays, kind="model.safetensors"):
    stem, suffix = kind.split(".")
    save = save_file if suffix == "safetensors" else lambda part, path: torch_zip_writer.write_arrays(path, part)
    names = sorted(arrays)
    files = [f"{stem}-0000{i + 1}-of-00002.{suffix}" for i in range(2)]
    for i, file in enumerate(files):
        save({name: arrays[name] for name in names[i::2]}, folder / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


LAYOUTS = {
    "whole safetensors": lambda folder, arrays: save_file(arrays, folder / "model.safetensors"),
    "lone safetensors": lambda folder, arrays: save_file(arrays, folder / "weights.safetensors"),
    "sharded safetensors": save_sharded,
    "whole bin": lambda folder, arrays: torch_zip_writer.write_arrays(folder / "pytorch_model.bin", arrays),
    "sharded bin": lambda folder, arrays: save_sharded(folder, arrays, "pytorch_model.bin"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_arrays(tmp_path, arrays, layout):
    LAYOUTS[layout](tmp_path, arrays)
    store = open_tensors(tmp_path)
    assert isinstance(store, TensorStore)
    assert store.names() == tuple(sorted(arrays))
    assert store.files() == tuple(sorted(path for path in tmp_path.iterdir() if path.suffix != ".json"))
    for name, expected in arrays.items():
        assert (store.shape(name), store.dtype(name)) == (expected.shape, expected.dtype)
        for index in [index for index in INDICES if len(index) <= expected.ndim]:
            actual = store.read(name, index)
            assert actual.dtype == expected.dtype
            assert actual.flags.writeable
            np.testing.assert_array_equal(actual, expected[index])
            out = np.full(expected[index].shape, 7, expected.dtype)
            store.read_into(out, name, index)
            np.testing.assert_array_equal(out, expected[index])


def test_opening_and_slicing_take_no_more_memory_than_a_slice(tmp_path):
    save_file({"w": np.ones((1024, 4096), np.float32)}, tmp_path / "model.safetensors")
    tracemalloc.start()
    row = open_tensors(tmp_path).read("w", (slice(7, 8), slice(5, 99)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert row.shape == (1, 94)
    assert peak_bytes < 1 << 18


def test_steps_and_surplus_slices_are_refused(tmp_path, arrays):
    save_file(arrays, tmp_path / "model.safetensors")
    for index in [(slice(None, None, 2),), (slice(None),) * 3, (slice(None, None, -1),)]:
        with pytest.raises(IndexError, match="steps of one"):
            open_tensors(tmp_path).read("b.weight", index)


def test_safetensors_win_over_bin_and_adapters_are_no_weights(tmp_path, arrays):
    torch_zip_writer.write_arrays(tmp_path / "pytorch_model.bin", {"old": arrays["b.weight"]})
    save_file({"lora": arrays["b.weight"]}, tmp_path / "adapter_model.safetensors")
    assert open_tensors(tmp_path).names() == ("old",)
    save_file({"new": arrays["b.weight"]}, tmp_path / "model.safetensors")
    assert open_tensors(tmp_path).names() == ("new",)


def test_all_problems_of_shards_are_said_at_once(tmp_path, arrays):
    files = save_sharded(tmp_path, arrays)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = read_json(index)["weight_map"]
    extra = {"ghost": files[0], "far": "model-00009-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map | extra}))
    cut = tmp_path / files[1]
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(CheckpointError) as error:
        open_tensors(tmp_path)
    lacking, truncated, missing = sorted(error.value.problems)
    assert f"{files[0]}: lacks 'ghost'" in lacking
    assert f"{files[1]}: truncated or corrupt: expected {size} bytes by its header, found {size - 3} bytes" in truncated
    assert "model-00009-of-00002.safetensors: missing" in missing
    assert str(error.value).count("\n- ") == 2


def test_a_tensor_in_two_shards_is_refused(tmp_path, arrays):
    files = save_sharded(tmp_path, arrays)
    save_file(arrays, tmp_path / files[0])
    with pytest.raises(CheckpointError, match=r"'b\.weight' is in 2 shards"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", 7, "config.json"])
def test_an_index_leads_nowhere_else(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(CheckpointError, match="no name of a weight file"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, "\ufeff{}"])
def test_a_broken_index_is_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        open_tensors(tmp_path)


def test_missing_weights_and_missing_index(tmp_path, arrays):
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"no weights; .* found config\.json"):
        open_tensors(tmp_path)
    save_sharded(tmp_path, arrays)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_tensors(tmp_path)


def header_only(path, **tensors):
    """A safetensors file whose tensors are given as (dtype, shape, bytes) and all zero."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return path


@pytest.mark.parametrize(("dtype", "size"), [("F4", 2), ("F6_E2M3", 3), ("C64", 32), ("I4", 2)])
def test_quantised_dtypes_are_named(tmp_path, dtype, size):
    path = header_only(tmp_path / "model.safetensors", fine=("F32", [1], 4), w=(dtype, [4], size))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{dtype}.*use the original checkpoint"):
        open_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found 0 bytes; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\xff" * 99, "truncated or corrupt"),
        (b"\x02\0\0\0\0\0\0\0[]", "truncated or corrupt"),
        (b"<!DOCTYPE html><html>Sign in", "a web page; sign in"),
        (b"GGUF\3\0\0\0" + bytes(9), r"a GGUF file; name it \*\.gguf"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        open_tensors(tmp_path)


def test_no_damage_surfaces_as_another_error(tmp_path, arrays):
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(whole[: rng.integers(len(whole))] if rng.integers(5) == 0 else whole)
        for place in rng.integers(max(1, len(damaged)), size=3):
            damaged[place : place + 1] = bytes([rng.integers(256)])
        path.write_bytes(damaged)
        try:
            store = open_tensors(tmp_path)
            [store.read(name) for name in store.names()]
        except CheckpointError as error:
            refused += 1
            str(error).encode()
    assert 0 < refused < 500


@pytest.mark.skipif(not MAPS.exists(), reason="reads the kernel's list of mapped files")
def test_stores_leave_nothing_open(tmp_path, arrays):
    for layout in LAYOUTS.values():
        layout(tmp_path, arrays)
        store = open_tensors(tmp_path)
        store.read("b.weight")
        del store
    gc.collect()  # an unclosed file would be a ResourceWarning, which is an error
    assert str(tmp_path) not in MAPS.read_text()
