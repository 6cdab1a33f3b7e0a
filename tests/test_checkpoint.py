"""What is written is read again bit for bit, opening reads no weights, and all that is wrong is said at once."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from counting_store import CountingStore
from make_golden import hf_model, hf_outputs
from parity_cases import CASES, Case
from safetensors.numpy import load_file, save_file

from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import Checkpoint, CheckpointError, cache, load, open_checkpoint, save_checkpoint
from tracing_jax.forward import logits
from tracing_jax.sharding import leaf_spec, make_mesh
from tracing_jax.sources import InMemory, ParamSource, in_memory
from tracing_jax.tree import flatten

_BF16 = ml_dtypes.bfloat16
_UNTIED, _TIED = CASES["qwen3-gqa-untied-default"], CASES["gemma2-mha-tied-default"]
_WITHOUT_GAINS = CASES["olmo-gqa-tied-linear"]  # a tied model without gains has nothing in its head
_GPT2, _MIXTRAL = CASES["gpt2-tied"], CASES["mixtral-no_window"]


def _write(folder: Path, case: Case, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def _hf_folder(folder: Path, case: Case, dtype: Any = np.float32) -> Path:
    return _write(folder, case, case.tensors(dtype))


def _all_files(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        part = load_file(file)
        assert not set(part) & set(tensors)
        tensors |= part
    return tensors


def _assert_same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype, name
        assert found[name].shape == leaf.shape, name
        assert np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes(), name


def _leaves(source: ParamSource) -> dict[str, Any]:
    return flatten(in_memory(source).params)


def _counted(checkpoint: Checkpoint) -> tuple[Checkpoint, Counter[str]]:
    counting = CountingStore(checkpoint.tensors)
    return replace(checkpoint, tensors=counting), counting.reads


@pytest.mark.parametrize("dtype", [np.float32, np.float16, _BF16])
@pytest.mark.parametrize("case", [_UNTIED, _TIED, _WITHOUT_GAINS, _GPT2, _MIXTRAL], ids=lambda case: case.name)
def test_saved_model_is_read_again_bit_for_bit(case, dtype, tmp_path):
    opened = open_checkpoint(str(_hf_folder(tmp_path / "hf", case, dtype)))
    assert {leaf.dtype for leaf in _leaves(opened).values()} == {np.dtype(dtype)}
    save_checkpoint(tmp_path / "ours", opened, companions=tmp_path / "hf")
    _assert_same_bits(load_file(tmp_path / "ours" / "model.safetensors"), case.tensors(dtype))
    _assert_same_bits(_leaves(open_checkpoint(str(tmp_path / "ours"))), _leaves(opened))


def test_model_on_devices_is_saved_with_the_same_bits(tmp_path):
    opened = open_checkpoint(str(_hf_folder(tmp_path / "hf", _UNTIED, _BF16)))
    model = load(opened, make_mesh(data=4, model=2))
    save_checkpoint(tmp_path / "ours", model, companions=tmp_path / "hf")
    _assert_same_bits(load_file(tmp_path / "ours" / "model.safetensors"), _UNTIED.tensors(_BF16))


def test_small_shards_hold_the_same_bits(tmp_path):
    opened = open_checkpoint(str(_hf_folder(tmp_path / "hf", _UNTIED)))
    save_checkpoint(tmp_path / "ours", opened, companions=tmp_path / "hf", max_shard_bytes=12_000)
    files = sorted(file.name for file in (tmp_path / "ours").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    assert all(sum(t.nbytes for t in load_file(tmp_path / "ours" / file).values()) <= 12_000 for file in files)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    expected = _UNTIED.tensors()
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    _assert_same_bits(_all_files(tmp_path / "ours"), expected)
    _assert_same_bits(_leaves(open_checkpoint(str(tmp_path / "ours"))), _leaves(opened))


def test_saving_never_overwrites_and_leaves_nothing_half_done(tmp_path):
    opened = open_checkpoint(str(_hf_folder(tmp_path / "hf", _UNTIED)))
    with pytest.raises(FileExistsError, match="choose another place"):
        save_checkpoint(tmp_path / "hf", opened, companions=tmp_path / "hf")

    class Breaks(InMemory):
        def head(self) -> Any:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        save_checkpoint(tmp_path / "ours", Breaks(opened.arch, in_memory(opened).params), companions=tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.torch
@pytest.mark.parametrize("max_shard_bytes", [2**30, 12_000])
@pytest.mark.parametrize("case", [_UNTIED, _TIED, _GPT2, _MIXTRAL], ids=lambda case: case.name)
def test_transformers_loads_what_we_save(case, max_shard_bytes, tmp_path):
    from transformers import AutoModelForCausalLM

    opened = open_checkpoint(str(_hf_folder(tmp_path / "hf", case)))
    save_checkpoint(tmp_path / "ours", opened, companions=tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager", dtype="float32").eval()
    expected, _ = hf_outputs(model, case.tokens())
    on_device = load(open_checkpoint(str(tmp_path / "ours")), make_mesh())
    np.testing.assert_allclose(logits(on_device, case.tokens()), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.torch
@pytest.mark.parametrize("case", [_GPT2, _MIXTRAL], ids=lambda case: case.name)
def test_what_transformers_saves_is_read(case, tmp_path):
    model = hf_model(case)
    model.save_pretrained(tmp_path / "hf")
    opened = open_checkpoint(str(tmp_path / "hf"))
    _assert_same_bits(_leaves(opened), _leaves(case.source()))
    save_checkpoint(tmp_path / "ours", opened, companions=tmp_path / "hf")
    _assert_same_bits(load_file(tmp_path / "ours" / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors"))


def test_bare_gpt2_with_its_mask_buffers_is_read(tmp_path):
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in _GPT2.tensors().items()}
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 16, 16), np.float32)) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": np.asarray(-1e4, np.float32) for i in range(2)}
    opened = open_checkpoint(str(_write(tmp_path / "hf", _GPT2, tensors | masks)))
    _assert_same_bits(_leaves(opened), _leaves(_GPT2.source()))


def test_experts_in_one_tensor_are_read_like_experts_in_their_own(tmp_path):
    tensors = _MIXTRAL.tensors()
    for i in range(2):
        at = f"model.layers.{i}.block_sparse_moe."
        w1, w2, w3 = ([tensors.pop(f"{at}experts.{e}.{w}.weight") for e in range(3)] for w in ("w1", "w2", "w3"))
        fused = f"model.layers.{i}.mlp."
        tensors[fused + "gate.weight"] = tensors.pop(at + "gate.weight")
        tensors[fused + "experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in zip(w1, w3)])
        tensors[fused + "experts.down_proj"] = np.stack(w2)
    opened = open_checkpoint(str(_write(tmp_path / "hf", _MIXTRAL, tensors)))
    _assert_same_bits(_leaves(opened), _leaves(_MIXTRAL.source()))


def test_what_is_wrong_with_experts_is_said_by_tensor(tmp_path):
    tensors = _MIXTRAL.tensors()
    at = "model.layers.1.block_sparse_moe.experts."
    half = tensors[at + "2.w2.weight"].astype(np.float16)
    with pytest.raises(CheckpointError, match=r"layers/1/mlp/down_proj/kernel .* float16 and float32; convert"):
        open_checkpoint(str(_write(tmp_path / "half", _MIXTRAL, tensors | {at + "2.w2.weight": half})))
    tensors[at + "1.w3.weight"][0, 0] = np.nan
    damaged = open_checkpoint(str(_write(tmp_path / "nan", _MIXTRAL, tensors)))
    with pytest.raises(CheckpointError, match=r"weights in model\.layers\.1\.\S*experts\.1\.w3\.weight;"):
        damaged.layer(1)
    del tensors[at + "0.w1.weight"]
    with pytest.raises(CheckpointError, match=r"missing tensor \S*layers\.1\.\S*experts\.0\.w1\.weight \(40, 24\)$"):
        open_checkpoint(str(_write(tmp_path / "missing", _MIXTRAL, tensors)))


def test_opening_reads_no_weights_and_a_part_reads_only_its_own(tmp_path):
    folder = _hf_folder(tmp_path / "hf", _UNTIED)
    weights = folder / "model.safetensors"
    header_bytes = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    data = weights.read_bytes()
    weights.write_bytes(data[:header_bytes] + b"\xff" * (len(data) - header_bytes))  # NaN in every weight
    checkpoint, reads = _counted(open_checkpoint(str(folder)))
    assert checkpoint.arch == _UNTIED.arch()
    with pytest.raises(CheckpointError):
        checkpoint.layer(1)
    assert all(name.startswith("model.layers.1.") for name in reads)


def test_every_tensor_is_read_once(tmp_path):
    checkpoint, reads = _counted(open_checkpoint(str(_hf_folder(tmp_path / "hf", _UNTIED))))
    load(checkpoint, make_mesh())
    assert reads == dict.fromkeys(_UNTIED.tensors(), 1)


def test_missing_unexpected_and_misshaped_tensors_are_named_together(tmp_path):
    tensors = _UNTIED.tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.router.weight"] = np.zeros((3, 24), np.float32)
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.zeros((32, 24), np.float32)
    tensors["model.embed_tokens.weight"] = np.ones((31, 24), bool)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(_write(tmp_path / "hf", _UNTIED, tensors)))
    assert len(caught.value.problems) == 5
    message = str(caught.value)
    assert "missing tensor model.layers.0.mlp.up_proj.weight (40, 24)" in message
    assert "missing tensor model.norm.weight (24,)" in message
    assert "unexpected tensor model.layers.0.mlp.router.weight (3, 24)" in message
    assert "wrong shape of model.layers.1.self_attn.k_proj.weight: (32, 24), config.json specifies (16, 24)" in message
    assert "bool of model.embed_tokens.weight" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, _BF16])
def test_weights_that_are_not_finite_are_refused_by_name(bad, dtype, tmp_path):
    tensors = _UNTIED.tensors(dtype)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.q_norm.weight"):
        tensors[name].flat[3] = bad
    checkpoint = open_checkpoint(str(_write(tmp_path / "hf", _UNTIED, tensors)))
    checkpoint.layer(0)
    with pytest.raises(CheckpointError, match=r"layers.1.*q_norm.weight") as caught:
        in_memory(checkpoint)
    assert "model.layers.1.mlp.down_proj.weight" in str(caught.value)


def test_tied_model_may_carry_an_equal_copy_of_its_embedding(tmp_path):
    tensors = _TIED.tensors()
    embedding = tensors["model.embed_tokens.weight"]
    same = open_checkpoint(str(_write(tmp_path / "same", _TIED, tensors | {"lm_head.weight": embedding.copy()})))
    _assert_same_bits(_leaves(same), _leaves(_TIED.source()))
    assert not same.notes


def test_bare_backbone_without_model_prefix_is_read(tmp_path):
    tensors = {name.removeprefix("model."): tensor for name, tensor in _TIED.tensors().items()}
    opened = open_checkpoint(str(_write(tmp_path / "hf", _TIED, tensors)))
    _assert_same_bits(_leaves(opened), _leaves(_TIED.source()))


def _adapter(folder: Path, base: str) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    a, b = np.ones((2, 24), np.float32), np.ones((40, 2), np.float32)
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    return folder


def test_base_of_an_adapter_is_logged_and_can_be_overridden(tmp_path, caplog):
    named, given = (_hf_folder(tmp_path / name, _UNTIED) for name in ("named", "given"))
    tensors = _UNTIED.tensors()
    up = "model.layers.0.mlp.up_proj.weight"
    _write(given, _UNTIED, tensors | {up: tensors[up] + 7})
    adapter = str(_adapter(tmp_path / "lora", str(named)))
    with caplog.at_level("INFO", "absl"):
        np.testing.assert_array_equal(open_checkpoint(adapter).tensors.read(up), tensors[up] + 2)
        by_option = open_checkpoint(adapter, adapter_base=str(given))
    np.testing.assert_array_equal(by_option.tensors.read(up), (tensors[up] + 7) + 2)
    first, second = caplog.messages
    assert f"merged into {named} (named by its adapter_config.json), read from folder {named}" in first
    assert f"merged into {given} (as given), read from folder {given}" in second
    with pytest.raises(CheckpointError, match=r"lora: its base model \./nowhere, as given: './nowhere' is no folder"):
        open_checkpoint(adapter, adapter_base="./nowhere")


def test_old_rotary_constants_are_ignored(tmp_path):
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    opened = open_checkpoint(str(_write(tmp_path / "hf", _UNTIED, _UNTIED.tensors() | old)))
    _assert_same_bits(_leaves(opened), _leaves(_UNTIED.source()))


@pytest.mark.slow
@pytest.mark.parametrize("case", [_UNTIED, _WITHOUT_GAINS, _GPT2, _MIXTRAL], ids=lambda case: case.name)
def test_cache_restores_the_same_bits_without_reading_the_checkpoint(case, tmp_path):
    opened = open_checkpoint(str(_hf_folder(tmp_path / "hf", case, _BF16)))
    mesh = make_mesh(data=2, model=2)
    first, first_reads = _counted(opened)
    made = load(first, mesh, str(tmp_path / "cache"))
    again, reads = _counted(opened)
    restored = load(again, mesh, str(tmp_path / "cache"))
    assert first_reads.keys() == case.tensors().keys()
    assert not reads
    assert restored.arch == made.arch
    _assert_same_bits(flatten(restored.params), flatten(made.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(restored.params)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.structure(restored.params) == jax.tree.structure(made.params)


def test_cache_is_restored_onto_another_mesh_and_sharded_by_the_table(tmp_path):
    opened = open_checkpoint(str(_hf_folder(tmp_path / "hf", _UNTIED)))
    load(opened, make_mesh(), str(tmp_path / "cache"))
    mesh = make_mesh(data=1, model=8)
    restored = load(opened, mesh, str(tmp_path / "cache"))
    table = axis_table(opened.arch)
    for name, leaf in flatten(restored.params).items():
        assert leaf.sharding.spec == leaf_spec(table.leaves[name], table, mesh), name
    up = restored.params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    assert len(up.sharding.device_set) == 8
    assert up.addressable_shards[0].data.shape == (24, 5)
    _assert_same_bits(flatten(restored.params), _leaves(opened))


def test_changed_file_makes_a_new_cache_entry(tmp_path):
    folder, cache = tmp_path / "hf", tmp_path / "cache"
    _hf_folder(folder, _UNTIED)
    load(open_checkpoint(str(folder)), make_mesh(), str(cache))
    tensors = _UNTIED.tensors()
    tensors["lm_head.weight"][0, 0] += 1
    _write(folder, _UNTIED, tensors)
    changed = load(open_checkpoint(str(folder)), make_mesh(), str(cache))
    assert changed.params["head"]["lm_head"]["kernel"][0, 0] == tensors["lm_head.weight"][0, 0]
    assert len(list(cache.iterdir())) == 2


def test_same_file_read_with_other_facts_makes_a_new_cache_entry(tmp_path):
    folder, cache = _hf_folder(tmp_path / "hf", _UNTIED), tmp_path / "cache"
    load(open_checkpoint(str(folder)), make_mesh(), str(cache))
    (folder / "config.json").write_text(json.dumps(_UNTIED.config | {"rms_norm_eps": 1e-6}))
    assert load(open_checkpoint(str(folder)), make_mesh(), str(cache)).arch.norm_eps == 1e-6
    assert len(list(cache.iterdir())) == 2


def _of_repository(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The checkpoint as if it were read from the Hub in ranges: no file of it is on this machine."""
    counted, _ = _counted(checkpoint)
    counted.tensors.files = lambda: ()  # type: ignore[method-assign]
    return replace(counted, id=f"{name}/model", revision="0" * 40)


def test_models_of_one_name_and_shape_have_cache_entries_of_their_own(tmp_path):
    tensors = _UNTIED.tensors()
    others = {name: tensor + np.float32(1) for name, tensor in tensors.items()}
    first, second = (
        _of_repository(open_checkpoint(str(_write(tmp_path / name, _UNTIED, weights))), name)
        for name, weights in (("ours", tensors), ("theirs", others))
    )
    for _ in range(2):
        for model in (first, second, replace(second, revision="1" * 40)):
            _assert_same_bits(flatten(load(model, make_mesh(), str(tmp_path / "cache")).params), _leaves(model))
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_weights_read_in_another_way_have_cache_entries_of_their_own(tmp_path):
    """The files are the same: a layout that the user edited says that gate and up change places."""
    opened = open_checkpoint(str(_hf_folder(tmp_path / "hf", _UNTIED)))
    names = [f"layers/0/mlp/{name}_proj/kernel" for name in ("gate", "up")]
    layouts = dict(opened.leaf_layouts)
    other = replace(opened, found_layouts=layouts | dict(zip(names, [layouts[name] for name in reversed(names)])))
    assert other.reading != opened.reading == replace(opened).reading
    for _ in range(2):
        for model in (opened, other):
            _assert_same_bits(flatten(load(model, make_mesh(), str(tmp_path / "cache")).params), _leaves(model))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_worker_that_finds_the_entry_written_meanwhile_leaves_it_alone(tmp_path, monkeypatch):
    opened, folder = open_checkpoint(str(_hf_folder(tmp_path / "hf", _UNTIED))), tmp_path / "cache"
    convert, stamps = cache._converted, []

    def convert_while_another_worker_writes(checkpoint, mesh):
        monkeypatch.setattr(cache, "_converted", convert)
        load(opened, mesh, str(folder))
        stamps.extend(entry.stat().st_ino for entry in folder.iterdir())
        return convert(checkpoint, mesh)

    monkeypatch.setattr(cache, "_converted", convert_while_another_worker_writes)
    slower = load(opened, make_mesh(), str(folder))
    _assert_same_bits(flatten(slower.params), _leaves(opened))
    assert [entry.stat().st_ino for entry in folder.iterdir()] == stamps  # the winner's, and nothing is left beside it


def _truncate(entry: Path) -> None:
    largest = max((file for file in entry.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])


def _garble(entry: Path) -> None:
    for file in (entry / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("damage", [_truncate, _garble, lambda entry: (entry / "manifest.json").unlink()])
def test_damaged_cache_entry_is_ignored_and_written_again(damage, tmp_path):
    opened, folder = open_checkpoint(str(_hf_folder(tmp_path / "hf", _UNTIED))), tmp_path / "cache"
    load(opened, make_mesh(), str(folder))
    (entry,) = folder.iterdir()
    damage(entry)
    _assert_same_bits(flatten(load(opened, make_mesh(), str(folder)).params), _leaves(opened))
    assert list(folder.iterdir()) == [entry]
    again, reads = _counted(opened)
    _assert_same_bits(flatten(load(again, make_mesh(), str(folder)).params), _leaves(opened))
    assert not reads


def test_damaged_model_is_not_cached(tmp_path):
    tensors = _UNTIED.tensors()
    tensors["lm_head.weight"][0, 0] = np.nan
    opened = open_checkpoint(str(_write(tmp_path / "hf", _UNTIED, tensors)))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
            load(opened, make_mesh(), str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_a_slice_that_ends_behind_a_leaf_ends_with_it(family):
    model = open_checkpoint(str(family.member("base")))
    leaf = np.asarray(model.layer(0)["mlp"]["up_proj"]["kernel"])
    for span in (slice(0, 8192), slice(3, 8192), slice(3, 9)):
        np.testing.assert_array_equal(model.leaf_slice("layers/0/mlp/up_proj/kernel", 1, span), leaf[:, span])
