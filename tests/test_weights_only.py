"""Models that are read by their weights alone: what is found in them, and what is said of pairs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import tracing_jax as tj
from tests import foreign_layouts as layouts
from tests.foreign_layouts import D, E, F, V
from tracing_jax import cli, experiment
from tracing_jax.arch import UnsupportedModelError
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import Checkpoint, CheckpointError, WeightsOnly, open_checkpoint
from tracing_jax.checkpoint.weights_only import norms, numbers
from tracing_jax.options import COMPARE
from tracing_jax.statistics import NEEDS, REGISTRY
from tracing_jax.statistics.unwritten_features import share_unwritten
from tracing_jax.tree import flatten


def _opened(folder: Path, layout: Callable[[int], layouts.Tensors], tensors: layouts.Tensors) -> Checkpoint:
    return open_checkpoint(layouts.write(folder, layout, tensors), weights_only=WeightsOnly())


def _record(base: str, ft: str, **options: object) -> dict:
    return experiment.compute(
        replace(COMPARE, base_model_id=base, ft_model_id=ft, save=None, **options)  # type: ignore[arg-type]
    ).record


_ROWS = {
    layouts.chatglm: ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "transformer.encoder.layers.{}."),
    layouts.baichuan: ("mlp.up_proj", "mlp.down_proj", "model.layers.{}."),
    layouts.internlm2: ("feed_forward.w3", "feed_forward.w2", "model.layers.{}."),
    layouts.mpt: ("ffn.up_proj", "ffn.down_proj", "transformer.blocks.{}."),
}


@pytest.mark.parametrize("layout", _ROWS, ids=lambda layout: layout.__name__)
def test_the_mlp_is_found_in_layouts_of_remote_code(layout, tmp_path):
    tensors = layout(0)
    model = _opened(tmp_path, layout, tensors)
    up, down, at = _ROWS[layout]
    assert model.arch.num_layers == layouts.LAYERS
    assert model.arch.vocab_size == V
    for i in range(layouts.LAYERS):
        mlp = model.layer(i)["mlp"]
        stored = tensors[f"{at.format(i)}{up}.weight"][-F:]  # of a fused tensor the second half
        np.testing.assert_array_equal(mlp["up_proj"]["kernel"], stored.T)
        np.testing.assert_array_equal(mlp["down_proj"]["kernel"], tensors[f"{at.format(i)}{down}.weight"].T)
    assert model.arch.gated == (layout is not layouts.mpt)


@pytest.mark.parametrize("layout", layouts.CONFIGS, ids=lambda layout: layout.__name__)
def test_leaves_have_the_axes_of_the_table(layout, tmp_path):
    model = _opened(tmp_path, layout, layout(0))
    table = axis_table(model.arch)
    leaves = {f"layers/{i}/{name}": leaf for i in range(model.arch.num_layers)
              for name, leaf in flatten(model.layer(i)).items()}  # fmt: skip
    leaves |= {f"embed/{name}": leaf for name, leaf in flatten(model.embed()).items()}
    leaves |= {f"head/{name}": leaf for name, leaf in flatten(model.head()).items()}
    assert leaves.keys() == table.leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.shape == tuple(table.sizes[axis] for axis in table.leaves[name].axes), name


def test_of_several_kinds_of_mlps_the_one_that_every_token_passes_is_read(tmp_path):
    model = _opened(tmp_path, layouts.experts, layouts.experts(0))
    assert (model.arch.num_layers, model.arch.num_experts, model.arch.mlp_dim) == (layouts.LAYERS, None, F)
    assert any(f"{E} experts in {layouts.LAYERS} layers" in note for note in model.notes)


def test_a_mixer_of_tokens_is_no_mlp(tmp_path):
    model = _opened(tmp_path, layouts.mamba, layouts.mamba(0))
    assert not model.arch.has("mlp/down_proj")
    others = [name for name in axis_table(model.arch).leaves if "/other/" in name]
    assert {name.rpartition(".mixer.")[2] for name in others} == {"in_proj.weight/kernel", "out_proj.weight/kernel"}


def test_halves_of_a_fused_tensor_that_numbers_do_not_tell_apart_are_not_guessed(tmp_path):
    model = _opened(tmp_path, layouts.chatglm, layouts.chatglm(0, trained=False))
    assert not model.arch.has("mlp/up_proj")
    assert model.arch.has("mlp/down_proj")
    assert any("doubtful" in note for note in model.notes)


def test_a_layout_file_says_what_is_stored_where(tmp_path):
    folder = layouts.write(tmp_path / "model", layouts.chatglm, layouts.chatglm(0, trained=False))
    file = tmp_path / "layout.yaml"
    fused = "transformer.encoder.layers.{layer}.mlp.dense_h_to_4h.weight"
    file.write_text(f"gate: {{tensor: '{fused}', half: even}}\nup: {{tensor: '{fused}', half: odd}}\nnorm: rms\n")
    model = open_checkpoint(folder, weights_only=WeightsOnly(layout=str(file)))
    stored = layouts.chatglm(0, trained=False)[fused.replace("{layer}", "1")]
    np.testing.assert_array_equal(model.layer(1)["mlp"]["gate_proj"]["kernel"], stored[::2].T)
    np.testing.assert_array_equal(model.layer(1)["mlp"]["up_proj"]["kernel"], stored[1::2].T)


def test_what_is_found_is_printed_as_a_layout_file_that_reads_the_same(tmp_path, capsys):
    folder = layouts.write(tmp_path / "model", layouts.internlm2, layouts.internlm2(0))
    cli.main(["inspect", folder])
    (tmp_path / "layout.yaml").write_text(capsys.readouterr().out)
    models = [open_checkpoint(folder, weights_only=WeightsOnly(layout=layout))
              for layout in (None, str(tmp_path / "layout.yaml"))]  # fmt: skip
    assert models[0].arch == models[1].arch
    assert models[0].leaf_layouts == models[1].leaf_layouts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gates: x", "gates: no such parts"),
        ("gate: {tensor: x, half: third}", "gate: expected the name of a tensor"),
        ("norm: batch", "norm: expected unknown"),
        ("[1", "no readable layout"),
        ("up: 'model.layers.{layer}.mlp.absent.weight'", "is not in the files"),
        ("up: 'model.layers.{layer}.input_layernorm.weight'", f"expected {D} features on one axis"),
    ],
)
def test_a_wrong_layout_file_is_one_clear_error(text, said, tmp_path):
    folder = layouts.write(tmp_path / "model", layouts.baichuan, layouts.baichuan(0))
    (tmp_path / "layout.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=said.replace("{", r"\{")):
        open_checkpoint(folder, weights_only=WeightsOnly(layout=str(tmp_path / "layout.yaml")))


@pytest.mark.parametrize(("names", "has_final", "before", "after"), [
    (("self_attn_layer_norm", "final_layer_norm"), True, "final_layer_norm", None),
    (("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"), True, "final_layer_norm", None),
    (("self_attn_layer_norm", "final_layer_norm"), False, None, None),
    (("temporal_pre_norm", "channel_pre_norm"), True, "channel_pre_norm", None),
    (("input_layernorm", "post_attention_layernorm", "post_attn_norm", "post_ffn_norm"), True,
     "post_attention_layernorm", "post_ffn_norm"),
    (("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"), True,
     "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (("post_attention_layernorm", "post_feedforward_layernorm"), True, None, "post_feedforward_layernorm"),
])  # fmt: skip
def test_the_norm_before_the_mlp_is_found_by_the_names_of_all(names, has_final, before, after):
    found = norms.mlp_norms([f"{name}.weight" for name in names], has_final)
    assert found.before == (before and f"{before}.weight")
    assert found.after == (after and f"{after}.weight")
    assert (found.problem is None) == has_final


def _reading(folder: Path, tensors: layouts.Tensors, **config: object) -> tuple[Checkpoint, dict[str, str]]:
    """Returns an opened checkpoint, and what could not be found out about it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": D, "vocab_size": V, **config}))
    save_file(tensors, folder / "model.safetensors")
    found = open_checkpoint(str(folder), weights_only=WeightsOnly())
    return found, dict(found.arch.reading.unknown)


def test_a_model_without_gains_reads_no_norm_where_the_config_says_what_norms_compute(tmp_path):
    bare = {name: t for name, t in layouts.baichuan(0).items() if "norm" not in name}
    _, facts = _reading(tmp_path / "rms", bare, model_type="x", rms_norm_eps=1e-6)
    assert "norm" not in facts
    _, facts = _reading(tmp_path / "unknown", bare, model_type="x")
    assert "no norms were found" in facts["norm"]
    hidden = bare | {f"model.layers.{i}.mlp.pre.0.norm.weight": np.ones(2 * D, np.float32) for i in range(3)}
    _, facts = _reading(tmp_path / "other", hidden, model_type="x", rms_norm_eps=1e-6)
    assert "no norms were found" in facts["norm"]


def test_what_norms_compute_is_known_of_types_whose_config_does_not_say_it(tmp_path):
    tensors = layouts.baichuan(0)
    for kind, norm in (("lfm2", "rms"), ("cohere2_moe", "layer_norm")):
        found, facts = _reading(tmp_path / kind, tensors, model_type=kind, norm_eps=1e-6)
        assert ("norm" in facts, found.arch.norm) == (False, norm)
    assert "whether norms subtract the mean" in _reading(tmp_path / "x", tensors, model_type="x")[1]["norm"]


def test_the_only_norm_outside_layers_is_the_last_unless_it_has_a_bias(tmp_path):
    tensors = {n.replace("model.norm", "model.embedding_norm"): t for n, t in layouts.baichuan(0).items()}
    assert "norm" not in _reading(tmp_path / "last", tensors, model_type="x", rms_norm_eps=1e-6)[1]
    tensors["model.embedding_norm.bias"] = np.zeros(D, np.float32)
    _, facts = _reading(tmp_path / "first", tensors, model_type="x", rms_norm_eps=1e-6)
    assert "there is no norm after the last layer" in facts["norm"]


def test_a_projection_with_a_bias_is_no_table_of_tokens(tmp_path):
    tensors = {n.replace("embed_tokens", "context_embedder"): t for n, t in layouts.baichuan(0).items()}
    assert "embedding" not in _reading(tmp_path / "table", tensors, model_type="x", rms_norm_eps=1e-6)[1]
    bare = {n.replace("context_embedder.weight", "context_embedder"): t for n, t in tensors.items()}
    assert "embedding" not in _reading(tmp_path / "bare", bare, model_type="x", rms_norm_eps=1e-6)[1]
    tensors["model.context_embedder.bias"] = np.zeros(D, np.float32)
    _, facts = _reading(tmp_path / "projection", tensors, model_type="x", rms_norm_eps=1e-6)
    assert "no table of tokens" in facts["embedding"]


def test_norms_with_a_negative_epsilon_are_refused_by_weights_alone_too(tmp_path):
    folder = layouts.write(tmp_path, layouts.baichuan, layouts.baichuan(0))
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {"text_config": {"rms_norm_eps": -0.4}}))
    with pytest.raises(CheckpointError, match=r"epsilon of norms is -0\.4"):
        open_checkpoint(folder, weights_only=WeightsOnly())


def test_negative_epsilons_of_the_base_of_an_adapter_and_of_a_gguf_file_are_refused_too(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    layouts.write(base, layouts.baichuan, layouts.baichuan(0))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": -1e-3}))
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.x.lora_A.weight": np.zeros((2, 4), np.float32)}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"epsilon of norms is -0\.001"):
        open_checkpoint(str(adapter), weights_only=WeightsOnly())
    file = layouts.write_gguf(tmp_path / "m.gguf", layouts.llama_cpp(0), "starchild", epsilon=-0.5)
    with pytest.raises(CheckpointError, match=r"epsilon of norms is -0\.5"):
        open_checkpoint(file, weights_only=WeightsOnly())


def test_weights_without_a_config_are_read(tmp_path):
    folder = layouts.write(tmp_path, layouts.internlm2, layouts.internlm2(0))
    known = open_checkpoint(folder, weights_only=WeightsOnly())
    assert "is not supported" in known.notes[0]
    assert "supported: " not in known.notes[0]
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(folder)
    file = tmp_path / "layout.yaml"
    file.write_text("norm: rms\n")
    for layout in (None, str(file)):
        model = open_checkpoint(folder, weights_only=WeightsOnly(layout))
        assert any("no config.json" in note for note in model.notes)
        assert model.leaf_layouts["layers/1/mlp/up_proj/kernel"] == known.leaf_layouts["layers/1/mlp/up_proj/kernel"]
    assert model.arch.norm == "rms"


def test_without_being_asked_a_family_that_is_not_supported_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="baichuan"):
        open_checkpoint(layouts.write(tmp_path, layouts.baichuan, layouts.baichuan(0)))


def test_a_model_read_by_its_weights_is_opened_and_what_needs_a_forward_pass_is_refused(tmp_path):
    folder = layouts.write(tmp_path / "model", layouts.baichuan, layouts.baichuan(0))
    model, tokens = tj.open(folder), np.zeros((1, 8), np.int32)
    assert model.arch.reading is not None
    assert tj.load(folder).params["layers"]["0"]["mlp"].keys() == {"gate_proj", "up_proj", "down_proj"}
    assert tj.trace(model, folder, "csu").verdict == "identical"
    for compute in (
        lambda: tj.logits(model, tokens),
        lambda: tj.path_losses(model, model, tokens),
        lambda: tj.generate(model, ["a"]),
        lambda: tj.align(model, model),
    ):
        with pytest.raises(ValueError, match="without a forward pass"):
            compute()


def test_a_merge_of_models_read_by_their_weights_has_its_shares(tmp_path):
    one, other = layouts.baichuan(0), layouts.baichuan(1)
    mixed = {name: 0.75 * one[name] + 0.25 * other[name] for name in one}
    child, *parents = (
        layouts.write(tmp_path / name, layouts.baichuan, tensors)
        for name, tensors in (("child", mixed), ("one", one), ("other", other))
    )
    found = tj.merge_shares(child, parents)
    np.testing.assert_allclose([found.shares[parent] for parent in parents], [0.75, 0.25], atol=1e-3)


def test_a_gguf_file_of_a_family_that_is_not_supported_is_read_by_its_weights(tmp_path):
    tensors = layouts.llama_cpp(0)
    path = layouts.write_gguf(tmp_path / "model.gguf", tensors, "dbrx")
    with pytest.raises(UnsupportedModelError, match="dbrx"):
        open_checkpoint(path)
    model = open_checkpoint(path, weights_only=WeightsOnly())
    assert (model.arch.family, model.arch.num_experts, model.arch.norm) == ("dbrx", E, "rms")
    mlp = model.layer(2)["mlp"]
    for name in ("gate", "up", "down"):
        stored = tensors[f"blk.2.ffn_{name}_exps.weight"]
        np.testing.assert_array_equal(mlp[f"{name}_proj"]["kernel"], stored.swapaxes(1, 2))
    np.testing.assert_array_equal(model.head()["lm_head"]["kernel"], tensors["output.weight"].T)


def test_an_adapter_is_merged_into_a_base_that_is_read_by_its_weights(tmp_path):
    tensors = layouts.baichuan(0)
    base, adapter, rng = tmp_path / "base", tmp_path / "adapter", np.random.default_rng(0)
    plain = _opened(base, layouts.baichuan, tensors)
    adapter.mkdir()
    a, b = rng.normal(size=(2, D)).astype(np.float32), rng.normal(size=(F, 2)).astype(np.float32)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    at = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    save_file({f"{at}A.weight": a, f"{at}B.weight": b}, adapter / "adapter_model.safetensors")
    with pytest.raises(UnsupportedModelError, match="is not supported"):
        open_checkpoint(str(adapter))
    merged = open_checkpoint(str(adapter), weights_only=WeightsOnly())
    for i in range(layouts.LAYERS):
        before, after = (model.layer(i)["mlp"]["up_proj"]["kernel"] for model in (plain, merged))
        np.testing.assert_allclose(after, before + (i == 1) * 3 * (b @ a).T, rtol=0, atol=1e-5)
    end = {f"base_model.model.lm_head.lora_{name}.weight": np.ones(shape, np.float32)
           for name, shape in (("A", (2, D)), ("B", (V, 2)))}  # fmt: skip
    save_file(end, adapter / "adapter_model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "baichuan"}))
    with pytest.raises(CheckpointError, match="they may be tied; merge it with PEFT"):
        open_checkpoint(str(adapter), weights_only=WeightsOnly())


def test_a_component_is_a_model_of_its_own(tmp_path):
    folder = layouts.write(tmp_path, layouts.stitched, layouts.stitched(1))
    language = open_checkpoint(folder, weights_only=WeightsOnly())
    assert language.arch.gated
    assert language.components().keys() == {"vision"}
    tower = open_checkpoint(folder, weights_only=WeightsOnly(component="vision"))
    assert not tower.arch.gated
    assert (tower.arch.vocab_size, tower.arch.norm, tower.arch.num_layers) == (0, "layer_norm", layouts.LAYERS)
    assert share_unwritten(tower) == 0  # without embeddings it is not known what is written
    assert share_unwritten(language) < 0.02
    stored = layouts.vision_tower(0)["vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight"]
    np.testing.assert_array_equal(tower.layer(1)["mlp"]["up_proj"]["kernel"], stored.T)
    with pytest.raises(CheckpointError, match="no tensors of a component audio by their names; components are: vision"):
        open_checkpoint(folder, weights_only=WeightsOnly(component="audio"))


@pytest.mark.slow
def test_of_a_stitched_model_the_copied_tower_is_related_and_the_language_model_is_not(tmp_path):
    base = layouts.write(tmp_path / "base", layouts.stitched, layouts.stitched(1))
    copied = layouts.noisy_copy(layouts.stitched(2))
    ft = layouts.write(tmp_path / "ft", layouts.stitched, copied)
    record = _record(base, ft)
    assert record["verdict"]["verdict"] in ("no_evidence", "undecided")
    assert any("components that were not compared: vision" in note for note in record["notes"])
    found = _record(base, ft, component="vision")["verdict"]
    assert found["verdict"] == "related"
    assert "only their component vision was compared" in found["meaning"]
    unrelated = layouts.write(tmp_path / "unrelated", layouts.stitched, layouts.stitched(1, vision_seed=7))
    assert _record(base, unrelated, component="vision")["verdict"]["verdict"] in ("no_evidence", "undecided")


def test_what_every_statistic_needs_is_known():
    assert NEEDS.keys() == REGISTRY.keys()


def test_rows_with_a_direction_in_common_are_told_from_rows_of_either_sign():
    rng = np.random.default_rng(0)
    up, shift = rng.normal(size=(200, 64)), rng.normal(size=64)
    alone = [numbers.common_direction(rng.normal(size=(200, 64))) for _ in range(20)]
    assert max(alone) < 4
    assert numbers.common_direction(up + 0.3 * shift) > 8
    assert numbers.which_is_gate([20.0, 12.0], [0.1, -1.0]) == 0
    assert numbers.which_is_gate([0.0, 1.0], [9.0, 30.0]) == 1
    assert numbers.which_is_gate([20.0, 12.0], [15.0, 9.0]) is None


def test_gains_that_are_stored_minus_one_are_known_by_their_signs():
    rng = np.random.default_rng(0)
    assert numbers.guess_gain_offset([1 + 0.1 * rng.normal(size=500)]) == 0.0
    assert numbers.guess_gain_offset([0.1 * rng.normal(size=500)]) == 1.0
    assert numbers.guess_gain_offset([0.25 + 0.1 * rng.normal(size=5000)]) is None


_UNITS = {
    layouts.chatglm: {"mlp.dense_h_to_4h": (0, 2), "mlp.dense_4h_to_h": (1, 1)},
    layouts.internlm2: {"feed_forward.w1": (0, 1), "feed_forward.w3": (0, 1), "feed_forward.w2": (1, 1)},
    layouts.mpt: {"ffn.up_proj": (0, 1), "ffn.down_proj": (1, 1)},
    layouts.mamba: {},
    layouts.experts: {},
}
_FEATURES_ALONE = (layouts.mpt, layouts.mamba)
"""Of a permuted copy of these, only `features_in_place` finds anything: it has no gate, or no MLP."""


@pytest.mark.slow
@pytest.mark.parametrize("layout", _UNITS, ids=lambda layout: layout.__name__)
def test_a_permuted_copy_is_related_and_a_stranger_is_not(layout, tmp_path):
    base = layouts.write(tmp_path / "base", layout, layout(0))
    copy = layouts.write(tmp_path / "copy", layout, noisy_permuted(layout))
    unrelated = layouts.write(tmp_path / "unrelated", layout, layout(1))
    record = _record(base, copy)
    if layout in _FEATURES_ALONE:  # reserved: what features are compared on can be chosen
        assert record["verdict"]["verdict"] == "undecided"
        assert record["statistics"]["features_in_place"]["non_aligned"]["log10_p"] < -8
    else:
        assert record["verdict"]["verdict"] == "related"
        assert "by their weights alone" in record["verdict"]["meaning"]
    record = _record(base, unrelated)
    assert record["verdict"]["verdict"] in ("no_evidence", "undecided")
    assert "parts that were read" in record["verdict"]["meaning"] or record["verdict"]["verdict"] == "undecided"


def test_what_is_said_of_a_pair_is_no_more_than_was_read(tmp_path):
    base = layouts.write(tmp_path / "base", layouts.baichuan, layouts.baichuan(0))
    ft = layouts.write(tmp_path / "ft", layouts.baichuan, layouts.noisy_copy(layouts.baichuan(0)))
    verdict = _record(base, ft, stat=("csu", "csh", "heads_in_place"))["verdict"]
    assert verdict["verdict"] == "related"
    assert verdict["meaning"].endswith("both models were read by their weights alone")
    assert verdict["not_applicable"].keys() == {"csh", "heads_in_place"}
    assert "without a forward pass" in verdict["not_applicable"]["csh"]
    assert not verdict["sees_all_rewrites"]
    with pytest.raises(experiment.ConfigError, match=r"align: .*weights alone"):
        _record(base, ft, align=True)


def noisy_permuted(layout: Callable[[int], layouts.Tensors]) -> layouts.Tensors:
    """Returns a copy of the model of seed 0, its units in another order, with noise."""
    return layouts.permuted(layouts.noisy_copy(layout(0)), _UNITS[layout])
