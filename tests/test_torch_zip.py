"""A torch.save file gives exactly the tensors that torch would, and can neither run code nor read outside itself."""

import os
import pickle
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import torch_zip_writer as w

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.torch_pickle import saved_tensors
from tracing_jax.checkpoint.torch_zip import TorchZip

INDICES = [(), (slice(1, 3),), (slice(None), slice(-2, None)), (slice(0, 0),), (slice(2, 99), slice(1, 2))]
ARRAYS = {
    "float32": np.arange(12, dtype=np.float32).reshape(4, 3),
    "bfloat16": np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16),
    "float16": np.arange(12, dtype=np.float16).reshape(4, 3),
    "int64": np.arange(12, dtype=np.int64).reshape(4, 3),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(7, np.float32),
}


def same(actual, expected):
    assert actual.dtype == expected.dtype
    assert type(actual) is np.ndarray
    assert actual.flags.writeable
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("compress", [False, True])
def test_reads_dtypes_and_slices(tmp_path, compress):
    path = w.write_arrays(tmp_path / "a.bin", ARRAYS, compress=compress)
    store = TorchZip(path)
    assert store.names() == tuple(sorted(ARRAYS))
    assert store.files() == (path,)
    for name, values in ARRAYS.items():
        assert (store.shape(name), store.dtype(name)) == (values.shape, values.dtype)
        same(store.read(name), values)
        for index in INDICES if values.ndim == 2 else ():
            same(store.read(name, index), values[index])


def test_views_share_a_storage(tmp_path):
    base = np.arange(24, dtype=np.float32)
    stored = w.storage("FloatStorage", "0", 24)
    views = {
        "transposed": w.tensor(stored, w.number(0), (6, 4), (1, 6)),
        "offset": w.tensor(stored, w.number(5), (2, 3), (8, 2)),
        "tied": w.tensor(stored, w.number(0), (24,), (1,)),
        "expanded": w.tensor(stored, w.number(3), (2, 5), (0, 1)),
    }
    store = TorchZip(w.write(tmp_path / "a.bin", w.state_dict(views), {"0": base.tobytes()}))
    same(store.read("transposed"), base.reshape(4, 6).T)
    same(store.read("transposed", (slice(1, 3), slice(2, 4))), base.reshape(4, 6).T[1:3, 2:4])
    same(store.read("offset"), base[[[5, 7, 9], [13, 15, 17]]])
    same(store.read("tied"), base)
    same(store.read("expanded"), np.tile(base[3:8], (2, 1)))


def test_a_slice_takes_no_more_memory_than_itself(tmp_path):
    store = TorchZip(w.write_arrays(tmp_path / "a.bin", {"w": np.ones((1024, 4096), np.float32)}))
    tracemalloc.start()
    store.read("w", (slice(7, 8), slice(5, 99)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 16


def hostile(marker: str) -> dict[str, bytes]:
    """Programs that make the folder `marker` when they are unpickled."""
    make, path = w.name("posix", "mkdir"), w.text(marker)
    return {
        "reduce": make + w.pack(path) + b"R",
        "stack_global": w.text("posix") + w.text("mkdir") + b"\x93" + w.pack(path) + b"R",
        "inst": b"(" + path + b"iposix\nmkdir\n",
        "obj": b"(" + make + path + b"o",
        "import_through_admitted": w.name("collections", "_sys.modules['posix'].mkdir") + w.pack(path) + b"R",
        "getattr": w.name("builtins", "getattr") + w.pack(w.name("posix", "mkdir"), path) + b"R",
    }


PROGRAMS = tuple(hostile(""))
RUNNING = ("reduce", "stack_global", "inst", "obj")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("place", ["value", "offset", "persistent_id", "state", "alone"])
def test_hostile_pickle_is_refused_and_runs_nothing(tmp_path, program, place):
    marker = tmp_path / "executed"
    code = hostile(str(marker))[program]
    stored = w.storage("FloatStorage", "0", 1)
    pickles = {
        "value": w.state_dict({"w": code}),
        "offset": w.state_dict({"w": w.tensor(stored, code, (1,), (1,))}),
        "persistent_id": w.state_dict({"w": w.tensor(code + b"Q", w.number(0), (1,), (1,))}),
        "state": b"\x80\x02}}" + w.text("__setstate__") + code + b"sb.",
        "alone": b"\x80\x02" + code + b".",
    }
    path = w.write(tmp_path / "a.bin", pickles[place], {"0": bytes(4)})
    with pytest.raises(CheckpointError, match=r"a\.bin: its pickle (asks for|uses the opcode)") as error:
        TorchZip(path)
    assert not marker.exists()
    if program in ("reduce", "stack_global"):
        assert "'posix.mkdir'" in str(error.value)


@pytest.mark.skipif(os.name != "posix", reason="the programs call posix")
@pytest.mark.parametrize("program", RUNNING)
def test_the_hostile_programs_would_run(tmp_path, program):
    marker = tmp_path / "executed"
    pickle.loads(b"\x80\x04" + hostile(str(marker))[program] + b".")
    assert marker.exists()


@pytest.mark.parametrize(
    "body",
    {
        "extension registry": b"\x82\x01",
        "newobj": w.name("collections", "OrderedDict") + b")\x81",
        "text persistent id": b"Pposix\n",
        "strange persistent id": w.text("posix") + b"Q",
        "persistent id of another kind": w.pack(w.text("module"), *[w.text("a")] * 4) + b"Q",
        "negative storage": w.storage("FloatStorage", "0", -1),
        "build on a tensor": w.array("0", np.zeros(1, np.float32)) + b"}b",
        "call of text": w.text("posix") + b")R",
        "call of a storage marker": w.name("torch", "FloatStorage") + b")R",
        "attribute of an admitted name": w.name("collections", "OrderedDict.__init__"),
        "quantised tensor": w.name("torch._utils", "_rebuild_qtensor"),
        "out-of-band buffer": b"\x97",
        "underflow": b"R",
        "no mark": b"t",
        "unknown memo": b"h\x07",
        "append to a dict": b"}K\x01a",
        "unhashable key": b"}]K\x01s",
        "surrogates": b"X\x03\0\0\0\xed\xa0\x80c",
        "not a pickle": b"\xff",
        "a list": b"]",
    }.items(),
    ids=lambda item: item[0],
)
def test_malformed_pickle_is_refused(body):
    with pytest.raises(CheckpointError):
        saved_tensors(b"\x80\x02" + body[1] + b".")


def test_bombs_do_not_go_off():
    """A memo index of 4 billion, and a key of 2^200 shared parts whose hash would never end."""
    started = time.monotonic()
    assert saved_tensors(b"\x80\x02}r\xff\xff\xff\xff.") == {}
    nested = b"K\x01" + b"q\x00h\x00\x86" * 200
    for body in (b"}" + nested + b"K\x01s", b"}" + w.text("w") + nested + b"s", nested + b"Q", nested + b"}b"):
        with pytest.raises(CheckpointError):
            saved_tensors(b"\x80\x02" + body + b".")
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides", "record"),
    [
        (4, 1, (4,), (1,), 16),
        (4, 0, (2, 2), (3, 1), 16),
        (4, 4, (), (), 16),
        (4, -1, (2,), (1,), 16),
        (4, 3, (2,), (-1,), 16),
        (4, 0, (-4,), (1,), 16),
        (4, 0, (4,), (1, 1), 16),
        (5, 0, (4,), (1,), 16),
        (1 << 62, 0, (1 << 62,), (1,), 16),
        (4, 0, (1,) * 99, (1,) * 99, 16),
        (4, 0, (1 << 20, 4), (0, 1), 16),
    ],
)
def test_no_tensor_reaches_outside_its_record(tmp_path, numel, offset, shape, strides, record):
    entry = w.tensor(w.storage("FloatStorage", "0", numel), w.number(offset), shape, strides)
    path = w.write(tmp_path / "a.bin", w.state_dict({"w": entry}), {"0": bytes(record), "1": b"secret" * 99})
    with pytest.raises(CheckpointError):
        TorchZip(path)


def test_record_that_claims_bytes_behind_the_end_is_refused(tmp_path):
    path = w.write(tmp_path / "a.bin", w.state_dict({"w": w.array("0", np.zeros(4, np.float32))}), {"0": bytes(16)})
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02")
    sizes = (1 << 20).to_bytes(4, "little") * 2
    path.write_bytes(content[: entry + 20] + sizes + content[entry + 28 :])
    with pytest.raises(CheckpointError, match="is outside the file"):
        TorchZip(path)


def test_missing_record_nested_dict_and_other_byte_order(tmp_path):
    good = w.state_dict({"w": w.array("0", np.zeros(4, np.float32))})
    with pytest.raises(CheckpointError, match="data/0' is missing"):
        TorchZip(w.write(tmp_path / "a.bin", good, {}))
    with pytest.raises(CheckpointError, match="not little-endian"):
        TorchZip(w.write(tmp_path / "b.bin", good, {"0": bytes(16)}, byteorder="big"))
    nested = w.state_dict({"state_dict": b"}", "epoch": b"K\x01"})
    with pytest.raises(CheckpointError, match=r"not a flat .*'state_dict' \(nested dict\), 'epoch' \(int\)"):
        TorchZip(w.write(tmp_path / "c.bin", nested, {}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "before 1.6"),
        (b"\0" * 257 + b"ustar" + b"\0" * 250, "before 1.6"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(50), "found 54 bytes; download it again"),
        (b"", "found 0 bytes"),
    ],
)
def test_other_formats_are_named(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        TorchZip(tmp_path / "a.bin")


@pytest.mark.slow
def test_no_damage_surfaces_as_another_error(tmp_path):
    """Any change of up to three bytes gives tensors or a CheckpointError."""
    pickled = w.state_dict({name: w.array("0", ARRAYS[name]) for name in ("float32", "int64")})
    whole = w.write_arrays(tmp_path / "a.bin", ARRAYS).read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for trial in range(3000):
        damaged = bytearray(whole if trial % 6 == 0 else pickled)
        for place in rng.integers(len(damaged), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        try:
            if trial % 6:
                saved_tensors(bytes(damaged))
            else:
                (tmp_path / "a.bin").write_bytes(damaged)
                store = TorchZip(tmp_path / "a.bin")
                [store.read(name) for name in store.names() if np.prod(store.shape(name)) < 1000]
            outcomes.add("read")
        except CheckpointError as error:
            outcomes.add("refused")
            str(error).encode()
    assert outcomes == {"read", "refused"}


@pytest.mark.torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_agrees_with_torch(tmp_path, protocol):
    import torch

    path = tmp_path / "a.bin"
    values = torch.arange(24).reshape(4, 6)
    state = {str(t): values.to(t) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)}
    state |= {str(t): values.to(t) for t in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}
    module = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    state |= {
        "transposed": state["torch.float32"].T,
        "view": state["torch.bfloat16"][1:, 2:5],
        "scalar": torch.ones(()),
    }
    state |= {"parameter": torch.nn.Parameter(torch.rand(3, 2)), "empty": torch.ones(0, 3), **module.state_dict()}
    state["tied"] = state["parameter"]
    torch.save(state, path, pickle_protocol=protocol)
    store = TorchZip(path)
    assert store.names() == tuple(sorted(state))
    for name, value in state.items():
        wide = value.detach().double().numpy()
        assert store.dtype(name).name == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(store.read(name).astype(np.float64), wide)
        if value.ndim == 2:
            np.testing.assert_array_equal(store.read(name, (slice(1, 3), slice(0, 2))).astype(float), wide[1:3, :2])


@pytest.mark.torch
def test_module_state_dict_of_torch_and_its_refusals(tmp_path):
    import torch

    path = tmp_path / "a.bin"
    torch.save(torch.nn.Linear(5, 3).state_dict(), path)
    assert TorchZip(path).names() == ("bias", "weight")
    refused = {
        "a whole module": torch.nn.Linear(2, 2),
        "fp8": {"w": torch.ones(2).to(torch.float8_e4m3fn)},
        "complex": {"w": torch.ones(2, dtype=torch.complex64)},
        "a negated view": {"w": torch.ones(2, dtype=torch.complex64).conj().imag},
        "trainer": {"model": torch.nn.Linear(2, 2).state_dict(), "step": 3},
    }
    for content in refused.values():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"a\.bin: .*safetensors"):
            TorchZip(path)
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        TorchZip(path)
