"""Checkpoints as real tools write them are read as transformers and PEFT read them, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from parity_cases import CASES, Case
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models
from torch_zip_writer import write_arrays

from tracing_jax.alignment.applicability import alignment_problems
from tracing_jax.arch import WEIGHTS_ONLY
from tracing_jax.checkpoint import Checkpoint, CheckpointError, WeightsOnly, load, open_checkpoint, save_checkpoint
from tracing_jax.experiment.disguising import write_disguised
from tracing_jax.forward import logits
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sharding import make_mesh
from tracing_jax.sources import in_memory
from tracing_jax.statistics import Vocabularies
from tracing_jax.statistics.csu import Csu
from tracing_jax.statistics.match_heads import MatchHeads
from tracing_jax.statistics.match_io import MatchIo
from tracing_jax.statistics.mode import Mode
from tracing_jax.tree import flatten

_UNTIED, _TIED = CASES["qwen3-gqa-untied-default"], CASES["gemma2-mha-tied-default"]
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
NO_TOKENS = Vocabularies(False, np.zeros(0, np.int32), np.zeros(0, np.int32), known=False)
_Q = "model.layers.0.self_attn.q_proj"


def _write(folder: Path, case: Case, tensors: dict[str, np.ndarray], file: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config))
    save_file(tensors, folder / file) if file.endswith("safetensors") else write_arrays(folder / file, tensors)
    return folder


def _open(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


def _assert_same(found: Checkpoint, expected: Any) -> None:
    ours, theirs = (flatten(in_memory(source).params) for source in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        np.testing.assert_array_equal(ours[name], leaf, err_msg=name)


def _said(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _open(folder)
    assert len(str(caught.value)) < 4000
    return str(caught.value)


# Tied heads


def test_head_that_differs_from_a_tied_embedding_is_the_models_own(tmp_path):
    tensors = _TIED.tensors()
    head = tensors[_EMBEDDING] + 1
    opened = _open(_write(tmp_path, _TIED, tensors | {_HEAD: head}))
    for found in (opened, open_checkpoint(str(tmp_path), in_ranges=True)):  # as one of the Hub for `screen`
        assert not found.arch.tied
        np.testing.assert_array_equal(found.head()["lm_head"]["kernel"], head.T)
        np.testing.assert_array_equal(found.embed()["embedding"], tensors[_EMBEDDING])
    assert "differs from the embedding, so the two are not tied" in opened.notes[0]
    save_checkpoint(tmp_path / "ours", opened, companions=tmp_path)
    _assert_same(_open(tmp_path / "ours"), opened)


def test_a_difference_in_the_last_row_alone_unties(tmp_path):
    tensors = _TIED.tensors()
    head = tensors[_EMBEDDING].copy()
    head[-1, -1] += 1
    assert not _open(_write(tmp_path, _TIED, tensors | {_HEAD: head})).arch.tied


def test_tied_model_of_which_only_the_head_is_stored(tmp_path):
    tensors = _TIED.tensors()
    stored = tensors | {_HEAD: tensors[_EMBEDDING]}
    del stored[_EMBEDDING]
    opened = _open(_write(tmp_path, _TIED, stored))
    _assert_same(opened, _TIED.source())
    assert "the embedding is lm_head.weight, to which it is tied" in opened.notes[0]


def test_index_may_promise_what_follows_from_other_tensors(tmp_path):
    folder = _write(tmp_path, _TIED, _TIED.tensors(), "part.safetensors")
    names = [*_TIED.tensors(), _HEAD, "model.layers.0.self_attn.rotary_emb.inv_freq"]
    index = {"weight_map": dict.fromkeys(names, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _assert_same(_open(folder), _TIED.source())


def test_untied_model_without_a_head_is_read_and_predicts_nothing(tmp_path):
    tensors = _UNTIED.tensors() | {"score.weight": np.ones((2, 24), np.float32)}
    del tensors[_HEAD]
    opened = _open(_write(tmp_path, _UNTIED, tensors))
    assert not opened.arch.has_head
    assert "lm_head.weight is missing: the model predicts no tokens" in opened.notes
    assert sorted(flatten(opened.head())) == ["norm/scale"]
    assert Mode().not_applicable(_UNTIED.arch(), opened.arch, NO_TOKENS)[0].startswith("ft: its checkpoint has no head")
    assert not Csu().not_applicable(_UNTIED.arch(), opened.arch, NO_TOKENS)
    with pytest.raises(ValueError, match="no head"):
        logits(load(opened, make_mesh()), np.zeros((1, 3), np.int32))


def test_head_that_the_index_names_and_no_file_has_is_a_damaged_download(tmp_path):
    tensors = _UNTIED.tensors()
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    del tensors[_HEAD]
    folder = _write(tmp_path, _UNTIED, tensors, "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "the index names lm_head.weight, which no file has" in _said(folder)


def test_what_needs_a_head_says_so_at_once_where_there_is_none(tmp_path):
    tensors = _UNTIED.tensors()
    del tensors[_HEAD]
    opened = _open(_write(tmp_path / "model", _UNTIED, tensors))
    tokens = Vocabularies(True, np.arange(64, dtype=np.int32), np.arange(64, dtype=np.int32))
    for statistic in (MatchIo(), MatchHeads()):
        assert "has no head" in statistic.not_applicable(opened.arch, opened.arch, tokens)[0]
    assert "has no head" in alignment_problems(_UNTIED.arch(), opened.arch, ("mlp",))[0]
    with pytest.raises(ValueError, match="has no head"):
        write_disguised(str(tmp_path / "model"), "permute", 0, str(tmp_path / "disguised"))
    drawn = draw_rewrites("all", jax.random.key(0), opened.arch)
    assert drawn
    assert not any(rewrite.unties(opened.arch) for rewrite in drawn)
    with pytest.raises(ValueError, match="unties the head"):
        draw_rewrites("rotate", jax.random.key(0), opened.arch)


def test_model_without_a_head_is_written_as_it_was_read(tmp_path):
    tensors = {name: tensor for name, tensor in _UNTIED.tensors().items() if name != _HEAD}
    opened = _open(_write(tmp_path / "model", _UNTIED, tensors))
    save_checkpoint(tmp_path / "written", opened, tmp_path / "model")
    assert (tmp_path / "written/config.json").read_text() == (tmp_path / "model/config.json").read_text()
    assert {name: tensor.tobytes() for name, tensor in load_file(tmp_path / "written/model.safetensors").items()} == {
        name: tensor.tobytes() for name, tensor in tensors.items()
    }


# Adapters of tied models


def _adapter(folder: Path, base: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    named = {f"base_model.model.{name}": np.asarray(value, np.float32) for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def test_head_of_a_tied_base_stays_when_an_adapter_saves_the_embedding(tmp_path):
    tensors = _TIED.tensors()
    base = _write(tmp_path / "base", _TIED, tensors)
    opened = _open(_adapter(tmp_path / "lora", base, {_EMBEDDING: tensors[_EMBEDDING] + 1}))
    assert not opened.arch.tied
    np.testing.assert_array_equal(opened.head()["lm_head"]["kernel"], tensors[_EMBEDDING].T)
    np.testing.assert_array_equal(opened.embed()["embedding"], tensors[_EMBEDDING] + 1)


def test_adapter_that_saves_both_alike_keeps_them_tied(tmp_path):
    tensors = _TIED.tensors()
    base, new = _write(tmp_path / "base", _TIED, tensors), tensors[_EMBEDDING] + 1
    opened = _open(_adapter(tmp_path / "lora", base, {_EMBEDDING: new, _HEAD: new}, ensure_weight_tying=True))
    assert opened.arch.tied
    np.testing.assert_array_equal(opened.embed()["embedding"], new)


def test_adapter_of_other_layers_leaves_a_tied_model_tied(tmp_path):
    base = _write(tmp_path / "base", _TIED, _TIED.tensors())
    rows, columns = _TIED.tensors()[f"{_Q}.weight"].shape
    factors = {f"{_Q}.lora_A.weight": np.ones((2, columns)), f"{_Q}.lora_B.weight": np.ones((rows, 2))}
    assert _open(_adapter(tmp_path / "lora", base, factors)).arch.tied


def test_head_for_another_task_in_an_adapter_is_left_out(tmp_path):
    base = _write(tmp_path / "base", _UNTIED, _UNTIED.tensors())
    rows, columns = _UNTIED.tensors()[f"{_Q}.weight"].shape
    factors = {f"{_Q}.lora_A.weight": np.ones((2, columns)), f"{_Q}.lora_B.weight": np.ones((rows, 2))}
    heads = {"score.modules_to_save.weight": np.ones((2, 24)), "v_head.summary.weight": np.ones((1, 24))}
    opened = _open(_adapter(tmp_path / "lora", base, factors | heads))
    _assert_same(opened, _open(_adapter(tmp_path / "alone", base, factors)))


def test_adapters_that_are_each_others_base_are_refused(tmp_path):
    first = _adapter(tmp_path / "first", tmp_path / "second", {_EMBEDDING: np.ones((2, 2))})
    _adapter(tmp_path / "second", first, {_EMBEDDING: np.ones((2, 2))})
    assert "its base is an adapter that has it as its base" in _said(first)


def test_adapter_on_an_adapter_is_merged_into_both(tmp_path):
    tensors = _UNTIED.tensors()
    base = _write(tmp_path / "base", _UNTIED, tensors)
    rows, columns = tensors[f"{_Q}.weight"].shape
    factors = {f"{_Q}.lora_A.weight": np.ones((2, columns)), f"{_Q}.lora_B.weight": np.ones((rows, 2))}
    first = _adapter(tmp_path / "first", base, factors)
    opened = _open(_adapter(tmp_path / "second", first, factors))
    np.testing.assert_allclose(opened.tensors.read(f"{_Q}.weight"), tensors[f"{_Q}.weight"] + 4, rtol=1e-6)


_PEFT: dict[str, dict[str, Any]] = {
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved, tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "factors, tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "embedding beside the adapter": {"target_modules": ["q_proj"]},
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", ["tied", "stored beside the embedding", "untied"])
@pytest.mark.parametrize("case", _PEFT)
def test_logits_of_an_adapter_are_those_of_peft_whatever_its_base_ties(tmp_path, case, head):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 11, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=head == "tied")
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    if head == "stored beside the embedding":
        raw = json.loads((tmp_path / "base/config.json").read_text())
        (tmp_path / "base/config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == (head == "tied")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **_PEFT[case]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    whole = case == "embedding beside the adapter"  # as PEFT saves it after its vocabulary was resized
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        if whole:
            base.get_input_embeddings().weight.normal_()
        model.save_pretrained(tmp_path / "lora", save_embedding_layers=whole or "auto")
        tokens = np.arange(10).reshape(2, 5)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        expected = peft.PeftModel.from_pretrained(again, tmp_path / "lora").eval()(torch.tensor(tokens)).logits.numpy()
    found = logits(load(_open(tmp_path / "lora"), make_mesh()), tokens.astype(np.int32))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


_ADDED = {
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "beside the adapter": {"target_modules": ["q_proj"]},
    "factors of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved, tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", _ADDED)
def test_logits_of_an_adapter_with_added_tokens_are_those_of_peft(tmp_path, case, tied):
    torch, transformers, peft = map(pytest.importorskip, ("torch", "transformers", "peft"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 11, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)
    base = transformers.LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    base.resize_token_embeddings(14)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **_ADDED[case]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path / "lora")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(14)}, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(tmp_path / "lora")
    if case == "factors of the embedding" and not tied:  # PEFT saves no head: its new rows are drawn when it is loaded
        assert "lm_head.weight is not in the adapter with as many" in _said(tmp_path / "lora")
        return
    tokens = np.arange(14).reshape(2, 7)
    with torch.no_grad():
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
        expected = again(torch.tensor(tokens)).logits.numpy()
    opened = _open(tmp_path / "lora")
    assert opened.arch.vocab_size == 14
    assert any("the adapter has 14 tokens, the base 11" in note for note in opened.notes)
    found = logits(load(opened, make_mesh()), tokens.astype(np.int32))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_new_tokens_that_only_one_end_has_are_refused(tmp_path):
    tensors = _UNTIED.tensors()
    base = _write(tmp_path / "base", _UNTIED, tensors)
    more = np.concatenate([tensors[_EMBEDDING], tensors[_EMBEDDING][:3]])
    count = len(more)
    opened = _open(_adapter(tmp_path / "both", base, {_EMBEDDING: more, _HEAD: more + 1}))
    assert opened.arch.vocab_size == count
    np.testing.assert_array_equal(opened.head()["lm_head"]["kernel"], more.T + 1)
    said = _said(_adapter(tmp_path / "one", base, {_EMBEDDING: more}))
    assert f"has {count} tokens, the base {count - 3}, and lm_head.weight is not in the adapter with as many" in said
    wide = np.concatenate([more, more], axis=1)
    assert "expected" in _said(_adapter(tmp_path / "wide", base, {_EMBEDDING: wide, _HEAD: wide}))
    assert "expected" in _said(_adapter(tmp_path / "less", base, {_EMBEDDING: more[:2], _HEAD: more[:2]}))


# Names


@pytest.mark.parametrize(
    ("stored", "what"),
    [
        (lambda name: f"_orig_mod.{name}", "compiled"),
        (lambda name: f"module.{name}", "parallel"),
        (lambda name: f"module._orig_mod.{name}", "both"),
        (lambda name: f"_orig_mod.module.{name}", "both, the other way round"),
        (lambda name: f"language_model.{name}", "LLaVA before transformers 4.52"),
        (
            lambda name: name if name == _HEAD else "model.language_model." + name.removeprefix("model."),
            "multimodal models since",
        ),
        (lambda name: f"model.language_model.{name}", "its text model whole"),
        (lambda name: f"_fsdp_wrapped_module.{name}".replace("self_attn", "_fsdp_wrapped_module.self_attn"), "FSDP"),
        (lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."), "activation checkpointing"),
    ],
)
def test_what_tools_put_in_front_of_names_is_left_out(stored, what, tmp_path):
    named = {stored(name): tensor for name, tensor in _UNTIED.tensors().items()}
    opened = _open(_write(tmp_path, _UNTIED, named))
    _assert_same(opened, _UNTIED.source())
    assert "tensors were renamed" in opened.notes[0], what


def test_two_names_for_one_tensor_are_refused(tmp_path):
    tensors = _UNTIED.tensors()
    said = _said(_write(tmp_path, _UNTIED, tensors | {f"_orig_mod.{_HEAD}": tensors[_HEAD] + 1}))
    assert "would all be lm_head.weight" in said


def test_unknown_prefix_of_all_names_is_named_once(tmp_path):
    named = {f"policy.actor.{name}": tensor for name, tensor in _UNTIED.tensors().items()}
    said = _said(_write(tmp_path, _UNTIED, named))
    assert "names of all tensors begin with 'policy.actor.', as in policy.actor.model." in said
    assert len(said) < 400


def test_messages_of_all_layers_are_one(tmp_path):
    tensors = {name: value for name, value in _UNTIED.tensors().items() if ".up_proj." not in name}
    extra = {f"model.layers.{i}.mlp.router.weight": np.zeros((3, 24), np.float32) for i in range(2)}
    said = _said(_write(tmp_path, _UNTIED, tensors | extra | {"x" * 5000: np.zeros(1, np.float32)}))
    assert "missing tensor model.layers.{0..1}.mlp.up_proj.weight (40, 24) (2 of them)" in said
    assert "unexpected tensor model.layers.{0..1}.mlp.router.weight (3, 24) (2 of them)" in said
    assert len(said) < 1000


def test_extra_tensors_that_no_language_model_reads_are_a_note(tmp_path):
    extra = {
        "v_head.summary.weight": (1, 24),
        "v_head.summary.bias": (1,),
        "score.weight": (2, 24),
        "model.layers.0.self_attn.k_proj.k_scale": (1,),
        "model.layers.1.self_attn.v_scale": (1,),
        "model.layers.0.self_attn.rotary_emb.cos_cached": (1, 4),
        "model.layers.0.self_attn.rotary_emb.sin_cached": (1, 4),
        "vision_tower.encoder.layers.0.weight": (2, 2),
        "medusa_head.0.weight": (24, 24),
        "model.causal_mask": (4, 4),
        "iteration": (1,),
    }
    tensors = _UNTIED.tensors() | {name: np.ones(shape, np.float32) for name, shape in extra.items()}
    opened = _open(_write(tmp_path, _UNTIED, tensors))
    _assert_same(opened, _UNTIED.source())
    notes = "\n".join(opened.notes)
    assert "3 tensors are left out, heads for other tasks" in notes
    assert "2 tensors are left out, scales of cached keys" in notes
    assert "1 tensor is left out, parts for other inputs" in notes


@pytest.mark.parametrize("partly", [False, True])
def test_float64_weights_are_rounded_once(partly, tmp_path):
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {
        name: rng.normal(size=tensor.shape).astype(np.float32 if partly and "proj" in name else np.float64)
        for name, tensor in _UNTIED.tensors().items()
    }
    opened = _open(_write(tmp_path, _UNTIED, tensors))
    kernel = opened.layer(0)["attn_norm"]["scale"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors["model.layers.0.input_layernorm.weight"].astype(np.float32))
    assert "are float64 and were rounded to float32" in opened.notes[0]


# Files


def test_bin_is_read_beside_a_stray_safetensors(tmp_path):
    folder = _write(tmp_path, _UNTIED, _UNTIED.tensors(), "pytorch_model.bin")
    save_file({"stray": np.ones(3, np.float32)}, folder / "training_state.safetensors")
    _assert_same(_open(folder), _UNTIED.source())


def test_shards_that_the_index_does_not_name_are_not_opened(tmp_path):
    folder = _write(tmp_path, _UNTIED, _UNTIED.tensors(), "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(_UNTIED.tensors(), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"stale")
    _assert_same(_open(folder), _UNTIED.source())


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("tf_model.h5", "TensorFlow weights"),
        ("flax_model.msgpack", "Flax weights"),
        ("consolidated.00.pth", "Meta's original format"),
        ("model.pt", "rename it to pytorch_model.bin"),
        ("__0_0.distcp", "distributed checkpoint of PyTorch"),
        ("model.onnx", "ONNX"),
        ("weights.npz", "MLX"),
    ],
)
def test_weights_in_other_formats_are_named_for_what_they_are(file, what, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_UNTIED.config))
    (tmp_path / file).write_bytes(b"\x89")
    said = _said(tmp_path)
    assert f"{file} is " in said
    assert what in said


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"GGUF\3\0\0\0", "a GGUF file"),
        (b"PK\x03\x04", "a zip file"),
        (b"\x80\x02}", "before 1.6"),
        (b"\x89HDF\r\n", "HDF5"),
    ],
)
def test_a_file_of_another_format_under_the_name_of_weights_is_named(start, what, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_UNTIED.config))
    (tmp_path / "model.safetensors").write_bytes(start + bytes(64))
    assert what in _said(tmp_path)


# Tensors that are not those of the config


def _by_weights(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder), weights_only=WeightsOnly())


def test_tensors_of_another_model_under_a_known_name_are_read_by_their_weights(tmp_path):
    tensors = _UNTIED.tensors()
    extra = {f"model.layers.{i}.self_attn.x_norm.weight": np.ones(24, np.float32) for i in range(2)}
    fused = {name: value for name, value in tensors.items() if "self_attn" not in name}
    for i in range(2):
        qkv = [tensors[f"model.layers.{i}.self_attn.{name}_proj.weight"] for name in ("q", "k", "v", "o")]
        fused |= {f"model.layers.{i}.attention.W_pack.weight": np.concatenate([qkv[0], *qkv[1:3], qkv[3].T])}
    one_layer = {name: value for name, value in tensors.items() if "layers.1." not in name}
    vocab = {name: np.pad(value, ((0, 3), (0, 0))) if name in (_EMBEDDING, _HEAD) else value
             for name, value in tensors.items()}  # fmt: skip
    deeper = tensors | {
        name.replace("layers.1.", "layers.2."): tensors[name] + 1 for name in tensors if "layers.1" in name
    }
    cases = {"extra": tensors | extra, "fused": fused, "vocab": vocab, "deeper": deeper}
    for what, held in cases.items():
        folder = _write(tmp_path / what, _UNTIED, held)
        assert _said(folder)
        found = _by_weights(folder)
        assert found.notes[0].startswith(f"{WEIGHTS_ONLY}: "), what
        assert len(found.notes[0]) < 500, what
        up = found.layer(1)["mlp"]["up_proj"]["kernel"]
        np.testing.assert_array_equal(up, held["model.layers.1.mlp.up_proj.weight"].T, err_msg=what)
    assert "model.layers.2.* and all others of this layer" in found.notes[0]
    lost = {name: value for name, value in tensors.items() if "layers.1.mlp.up_proj" not in name}
    misshapen = tensors | {"model.norm.weight": np.ones(7, np.float32)}
    for held in (one_layer, lost, lost | extra, misshapen, misshapen | extra, vocab | {_HEAD: tensors[_HEAD]}):
        folder = _write(tmp_path / "lost", _UNTIED, held)
        with pytest.raises(CheckpointError, match=r"download the files again; if they are complete, .*--base_layout"):
            _by_weights(folder)
    with pytest.raises(
        CheckpointError, match=r"^\S*: missing tensor model.layers.1.\* and all others .* 2 layers; .*$"
    ):
        _by_weights(_write(tmp_path / "lost", _UNTIED, one_layer))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["model-00001-of-00002.safetensors"], r"is shard 1 of 2: model-00002-of-00002\.safetensors and the index"),
        (["pytorch_model-00002-of-00003.bin"], r"is shard 2 of 3: pytorch_model-00001-of-00003\.bin, .* and the index"),
        (["consolidated.safetensors"], r"consolidated\.safetensors is in its makers' original format, .*; download"),
        ([f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], r"several .* no model\.safetensors\.index\.json"),
    ],
)
def test_weights_that_are_incomplete_are_named_for_what_they_are(files, said, tmp_path):
    for file in files:
        tensors = {"layers.0.attention.wq.weight": np.ones((24, 24), np.float32)}
        folder = _write(tmp_path, _UNTIED, tensors, file)
    for options in (None, WeightsOnly()):
        with pytest.raises(CheckpointError, match=f"^[^\n]*{said}[^\n]*$"):
            open_checkpoint(str(folder), weights_only=options)


def test_the_only_shard_needs_no_index(tmp_path):
    _assert_same(
        _open(_write(tmp_path, _UNTIED, _UNTIED.tensors(), "pytorch_model-00001-of-00001.bin")), _UNTIED.source()
    )


def test_bfloat16_is_kept(tmp_path):
    opened = _open(_write(tmp_path, _UNTIED, _UNTIED.tensors(ml_dtypes.bfloat16)))
    assert opened.layer(0)["attn_norm"]["scale"].dtype == ml_dtypes.bfloat16
