"""What is read straight onto devices is what was read and placed, bit for bit, and only bytes that a device holds."""

import itertools
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import torch_zip_writer
from cases import diagonal
from counting_store import CountingStore
from jax.sharding import AxisType, Mesh
from parity_cases import CASES, FAMILIES, leaf_of
from safetensors.numpy import save_file

from tracing_jax.axes import axis_table, kind_of
from tracing_jax.checkpoint import Checkpoint, CheckpointError, ShardedCheckpoint
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.checkpoint.tensors import all_finite, open_tensors
from tracing_jax.sharding import MESH_AXIS, make_mesh
from tracing_jax.sources import in_memory, sharded, subtrees
from tracing_jax.tree import flatten

MESHES = [(1, 1), (2, 4), (1, 8)]
_DIVISIBLE = {"num_kv_heads": 8, "q_group": 2, "mlp_dim": 32, "vocab_size": 64}
_FAMILIES = {
    "llama": tiny.llama_mha(**_DIVISIBLE | {"q_group": 1}),
    "qwen3": tiny.qwen3_gqa(**_DIVISIBLE),
    "olmo2": tiny.olmo2_gqa(**_DIVISIBLE),
    "gemma": tiny.gemma_mqa(mlp_dim=32),
    "gpt2": tiny.gpt2(num_kv_heads=8, head_dim=3, mlp_dim=32),
    "mixtral": tiny.mixtral(**_DIVISIBLE),
}


def _checkpoint(folder, arch, dtype=np.float32, suffix="safetensors", **changed):
    """Returns a checkpoint of random weights; `changed` are tensors put in place of its own."""
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(leaf_layouts(arch).values())
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()} | changed
    if suffix == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        torch_zip_writer.write_arrays(folder / "pytorch_model.bin", tensors)
    return Checkpoint("it", None, folder, folder, arch, open_tensors(folder))


def _spied(checkpoint):
    spy = CountingStore(checkpoint.tensors)
    return replace(checkpoint, tensors=spy), spy.bytes


def _assert_same(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert (found[name].dtype, found[name].shape) == (leaf.dtype, leaf.shape), name
        assert found[name].sharding == leaf.sharding, name
        assert np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes(), name


@pytest.mark.parametrize(("family", "mesh"), diagonal(_FAMILIES, MESHES))
def test_reading_onto_a_mesh_is_reading_and_placing(family, mesh, tmp_path):
    checkpoint, mesh = _checkpoint(tmp_path, _FAMILIES[family], ml_dtypes.bfloat16), make_mesh(*mesh)
    # All parts are kept until the end: a buffer that was filled again too early would show in the first.
    _assert_same(in_memory(ShardedCheckpoint(checkpoint, mesh)).params, in_memory(sharded(checkpoint, mesh)).params)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_is_read_onto_a_mesh(family, tmp_path):
    for case in [case for case in CASES.values() if case.family == family and "linear" not in case.name][:6]:
        (tmp_path / case.name).mkdir()
        checkpoint, mesh = _checkpoint(tmp_path / case.name, case.arch()), make_mesh(1, 2)
        _assert_same(in_memory(ShardedCheckpoint(checkpoint, mesh)).params, in_memory(sharded(checkpoint, mesh)).params)


def test_torch_files_are_read_onto_a_mesh(tmp_path):
    checkpoint, mesh = _checkpoint(tmp_path, _FAMILIES["llama"], suffix="bin"), make_mesh(1, 8)
    _assert_same(in_memory(ShardedCheckpoint(checkpoint, mesh)).params, in_memory(sharded(checkpoint, mesh)).params)


def test_only_the_leaves_asked_for_are_read(tmp_path):
    checkpoint, read = _spied(_checkpoint(tmp_path, _FAMILIES["qwen3"]))
    part = ShardedCheckpoint(checkpoint, make_mesh(1, 8)).layer(1, ("mlp/up_proj", "attn_norm"))
    assert flatten(part).keys() == {"mlp/up_proj/kernel", "attn_norm/scale"}
    assert read.keys() == {"model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"}


@pytest.mark.parametrize(("family", "mesh"), diagonal(["llama", "gpt2", "mixtral"], MESHES))
def test_every_byte_is_read_once_however_many_devices_hold_it(family, mesh, tmp_path):
    checkpoint, read = _spied(_checkpoint(tmp_path, _FAMILIES[family]))
    for _ in subtrees(ShardedCheckpoint(checkpoint, make_mesh(*mesh))):
        pass
    store = checkpoint.tensors
    assert read == {name: 4 * int(np.prod(store.shape(name))) for name in store.names()}


def _held_by(monkeypatch, devices):
    """Makes this process hold these devices only, as if the others belonged to other processes."""
    every = jax.sharding.NamedSharding.addressable_devices_indices_map
    monkeypatch.setattr(
        jax.sharding.NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {device: index for device, index in every(self, shape).items() if device in devices},
    )
    made: list[list[jax.Array]] = []
    monkeypatch.setattr(
        jax, "make_array_from_single_device_arrays", lambda shape, sharding, shards: made.append(shards) or shards[0]
    )
    return made


@pytest.mark.parametrize(("family", "held"), diagonal(["llama", "gpt2", "mixtral"], [[0], [5], [2, 3], [0, 7]]))
def test_a_process_reads_only_what_its_devices_hold(family, held, tmp_path, monkeypatch):
    checkpoint, read = _spied(_checkpoint(tmp_path, _FAMILIES[family]))
    mesh = make_mesh(1, 8)
    expected = in_memory(sharded(checkpoint, mesh)).layer(1)
    devices = set(mesh.devices.flat[held])
    read.clear()
    made = _held_by(monkeypatch, devices)
    ShardedCheckpoint(checkpoint, mesh).layer(1)
    shards = list(flatten(expected).values())
    for leaf, ours in zip(shards, made, strict=True):
        theirs = [shard for shard in leaf.addressable_shards if shard.device in devices]
        assert {shard.device for shard in theirs} == {device for array in ours for device in array.devices()}
        by_device = {device: array for array in ours for device in array.devices()}
        for shard in theirs:
            np.testing.assert_array_equal(by_device[shard.device], shard.data)
    bytes_held = sum(
        len(held) * leaf.addressable_shards[0].data.nbytes if not leaf.is_fully_replicated else leaf.nbytes
        for leaf in shards
    )
    assert read.total() == bytes_held


def test_meshes_in_any_order_of_devices_are_read(tmp_path):
    devices = np.asarray(jax.devices())[[3, 0, 6, 1]].reshape(1, 4)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    checkpoint = _checkpoint(tmp_path, _FAMILIES["llama"])
    _assert_same(in_memory(ShardedCheckpoint(checkpoint, mesh)).params, in_memory(sharded(checkpoint, mesh)).params)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    broken = np.ones((24, 32), np.float32)
    broken[3, 30] = np.nan
    source = ShardedCheckpoint(_checkpoint(tmp_path, _FAMILIES["llama"], **{name: broken}), make_mesh(1, 8))
    source.layer(0)
    source.layer(1, ("attn",))
    for _ in range(2):  # only leaves that were found finite are not searched again
        with pytest.raises(CheckpointError, match=rf"NaN or infinite weights in {name};"):
            source.layer(1)


@pytest.mark.parametrize("changed_row", [None, 0, 60])
def test_copy_of_a_tied_embedding_must_be_the_same(changed_row, tmp_path):
    arch = _FAMILIES["qwen3"]
    embedding = np.random.default_rng(1).normal(size=(64, 24)).astype(np.float32)
    copy = embedding.copy()
    if changed_row is not None:
        copy[changed_row] += 1
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": copy}
    source = ShardedCheckpoint(_checkpoint(tmp_path, arch, **tensors), make_mesh(1, 8))
    if changed_row is None:
        np.testing.assert_array_equal(source.embed()["embedding"], embedding)
        return
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs.*tie_word_embeddings"):
        source.embed()


# Of these a tensor holds queries, keys and values of each head in turn, or is one for each head: leaves are read whole.
_IN_TURN = ("gpt_neox", "stablelm", "falcon")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_leaves_are_slices_of_tensors(family):
    """On the axes that the mesh splits always; on others the slice is refused, or right."""
    for case in [case for case in CASES.values() if case.family == family]:
        layouts, table = leaf_layouts(case.arch()), axis_table(case.arch())
        tensors = {name: case.weight(name, shape) for name, shape in tensor_shapes(layouts.values()).items()}
        for name, layout in layouts.items():
            leaf = leaf_of(layout, tensors)
            for axis, size in enumerate(layout.shape):
                for start, stop in itertools.combinations({0, 1, size // 2, size}, 2):
                    cut = layout.narrow(axis, *sorted((start, stop)))
                    kind = kind_of(table.leaves[name].axes[axis])
                    assert cut or kind not in MESH_AXIS or (kind == "kv_heads" and family in _IN_TURN)
                    if cut:
                        found = leaf_of(cut, tensors)
                        index = (slice(None),) * axis + (slice(*sorted((start, stop))),)
                        np.testing.assert_array_equal(found, leaf[index], err_msg=f"{case.name} {name} {axis}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_one_weight_that_is_no_number_is_found_anywhere(dtype, bad):
    weights = np.full((3, 1 << 16), np.finfo(np.float16).max, dtype)
    assert all_finite(weights)
    assert all_finite(weights.T[::2])
    assert all_finite(weights[:0])
    for place in [(0, 0), (1, 7), (2, (1 << 16) - 1)]:
        broken = weights.copy()
        broken[place] = bad
        assert not all_finite(broken)
        assert not all_finite(broken.T)
