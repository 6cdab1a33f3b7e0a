"""Configs become facts; what is not known to be computed here is refused by name."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from parity_cases import CASES, FAMILIES

from tracing_jax.arch import (
    SUPPORTED_FAMILIES,
    SUPPORTED_ROPES,
    Arch,
    UnsupportedModelError,
    arch_from_config,
    head_pairs,
    length_problem,
    read_arch,
    read_arch_and_notes,
)
from tracing_jax.arch.families import FAMILIES as FAMILY_ROWS

# The important keys of files as they are published, with the spellings of their time.
_LLAMA_1 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
_LLAMA_2 = _LLAMA_1 | {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "max_position_embeddings": 4096,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "transformers_version": "4.31.0.dev0",
}
_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "vocab_size": 128256,
}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "yahma/llama-7b-hf": _LLAMA_1,
    "meta-llama/Llama-2-7b-hf": _LLAMA_2,
    "lmsys/vicuna-7b-v1.5": _LLAMA_2 | {"_name_or_path": "vicuna-7b-v1.5", "transformers_version": "4.31.0"},
    "lmsys/vicuna-7b-v1.5-16k": _LLAMA_2
    | {
        "max_sequence_length": 16384,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "transformers_version": "4.31.0",
    },
    "meta-llama/Llama-3.1-8B": _LLAMA_3,
    "HuggingFaceTB/SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "vocab_size": 49152,
    },
    "mistralai/Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "vocab_size": 32000,
    },
    "Qwen/Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen/Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "google/gemma-2b": {
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.38.0.dev0",
        "vocab_size": 256000,
    },
    "google/gemma-2-9b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
        "torch_dtype": "float32",
        "transformers_version": "4.42.0.dev0",
        "vocab_size": 256000,
    },
    "google/gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vocab_size": 262144,
    },
    "allenai/OLMo-7B-hf": {
        "architectures": ["OlmoForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "model_type": "olmo",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.40.0.dev0",
        "vocab_size": 50304,
    },
    "allenai/OLMo-2-1124-7B": {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.47.0.dev0",
        "vocab_size": 100352,
    },
    "mistralai/Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "ibm-granite/granite-3.0-2b-base": {
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "granite",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0.dev0",
        "vocab_size": 49155,
    },
}

_GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
_DISTILGPT2 = _GPT2 | {"_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "n_layer": 6}


@pytest.fixture
def read(tmp_path):
    """Reads the facts of a config.json with this content."""

    def _read(config: dict[str, Any]) -> Arch:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_arch(tmp_path)

    return _read


def _has(arch: Arch, **facts: Any) -> bool:
    found = {name: getattr(arch, name) for name in facts}
    assert found == facts
    return True


@pytest.mark.parametrize("name", _PUBLISHED)
def test_published_config_is_accepted(name, read):
    config = _PUBLISHED[name]
    assert _has(
        read(config),
        family=config["model_type"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        tied=config.get("tie_word_embeddings", config["model_type"].startswith("gemma")),
        norm_eps=config.get("rms_norm_eps", 1e-5),
    )


def test_facts_of_each_family_are_those_of_its_papers(read):
    arch = {name: read(config) for name, config in _PUBLISHED.items()}
    llama = arch["meta-llama/Llama-3.1-8B"]
    assert _has(llama, q_group=4, head_dim=128, attention_scale=128**-0.5, qkv_bias=False, qk_norm=None, norm="rms")
    assert _has(arch["mistralai/Mistral-7B-v0.1"], q_group=4, layer_windows=(4096,) * 32)
    assert _has(arch["Qwen/Qwen2.5-7B"], qkv_bias=True, o_bias=False, q_group=7, layer_windows=(None,) * 28)
    assert _has(arch["Qwen/Qwen3-8B"], qkv_bias=False, qk_norm="head", head_dim=128)
    gemma = arch["google/gemma-2b"]
    assert _has(gemma, activation="gelu_tanh", norm="rms_unit_offset", embed_scale=math.sqrt(2048), q_group=8)
    assert _has(gemma, attention_softcap=None, logit_softcap=None, post_norms=False)
    gemma2 = arch["google/gemma-2-9b"]
    assert _has(gemma2, attention_softcap=50.0, logit_softcap=30.0, attention_scale=1 / 16, post_norms=True)
    assert _has(gemma2, layer_windows=(4096, None) * 21, pre_norms=True)
    gemma3 = arch["google/gemma-3-1b-it"]
    assert _has(gemma3, qk_norm="head", layer_windows=((512,) * 5 + (None,)) * 4 + (512,) * 2)
    assert [gemma3.rope_frequencies[rope][1] for rope in gemma3.layer_ropes[4:6]] == pytest.approx(
        [10000 ** (-2 / 256), 1e6 ** (-2 / 256)]
    )
    assert _has(arch["allenai/OLMo-7B-hf"], norm="layer_norm_plain", clip_qkv=None)
    assert _has(arch["allenai/OLMo-2-1124-7B"], pre_norms=False, post_norms=True, qk_norm="all")
    granite = arch["ibm-granite/granite-3.0-2b-base"]
    assert _has(granite, attention_scale=0.015625, embed_scale=12.0, residual_scale=0.22, logit_scale=1 / 8)


def test_facts_of_gpt2_and_mixtral_are_those_of_their_papers(read):
    gpt2 = read(_GPT2)
    assert _has(gpt2, embed_dim=768, mlp_dim=3072, num_layers=12, num_kv_heads=12, q_group=1, head_dim=64, tied=True)
    assert _has(gpt2, num_positions=1024, rope_frequencies=(), layer_ropes=(), norm="layer_norm", norm_eps=1e-5)
    assert _has(gpt2, gated=False, activation="gelu_tanh", qkv_bias=True, o_bias=True, mlp_bias=True, num_experts=None)
    assert _has(gpt2, attention_scale=1 / 8, pre_norms=True, post_norms=False, layer_windows=(None,) * 12)
    assert read(_GPT2 | {"scale_attn_by_inverse_layer_idx": True}).inverse_layer_scale is True
    assert read(_DISTILGPT2).num_layers == 6
    assert _has(read(_GPT2 | {"n_inner": 100, "scale_attn_weights": False}), mlp_dim=100, attention_scale=1.0)
    mixtral = read(_PUBLISHED["mistralai/Mixtral-8x7B-v0.1"])
    assert _has(mixtral, num_experts=8, experts_per_token=2, gated=True, q_group=4, layer_windows=(None,) * 32)
    assert read(_PUBLISHED["mistralai/Mixtral-8x7B-v0.1"] | {"sliding_window": 4096}).layer_windows == (4096,) * 32


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (_GPT2 | {"add_cross_attention": True}, "add_cross_attention"),
        (_GPT2 | {"activation_function": "tanh"}, "'tanh' is not one of"),
        (_GPT2 | {"n_head": 7}, "n_embd 768 is not a multiple of n_head 7"),
        (
            _PUBLISHED["mistralai/Mixtral-8x7B-v0.1"] | {"num_experts_per_tok": 9},
            "num_experts_per_tok 9 is not in 1",
        ),
    ],
)
def test_what_gpt2_and_mixtral_do_not_compute_is_refused(config, what, read):
    with pytest.raises(UnsupportedModelError, match=what):
        read(config)


@pytest.mark.parametrize("neutral", [{"reorder_and_upcast_attn": True}, {"resid_pdrop": 0.5, "summary_type": "last"}])
def test_neutral_attributes_of_gpt2_do_not_matter(neutral, read):
    assert read(_GPT2 | neutral) == read(_GPT2)


def test_old_llama_files_without_theta_mean_ten_thousand(read):
    expected = 10000.0 ** (-np.arange(0, 128, 2) / 128)
    for name in ("yahma/llama-7b-hf", "meta-llama/Llama-2-7b-hf", "lmsys/vicuna-7b-v1.5"):
        np.testing.assert_allclose(read(_PUBLISHED[name]).rope_frequencies[0], expected, rtol=1e-6)
    scaled = read(_PUBLISHED["lmsys/vicuna-7b-v1.5-16k"])
    np.testing.assert_allclose(scaled.rope_frequencies[0], expected / 4, rtol=1e-6)


def test_llama3_rope_equals_its_definition_in_double_precision(read):
    """Wavelengths below 8192/4 are kept, those above 8192 divided by 8; between, a blend linear in 1/wavelength."""
    expected = []
    for i in range(64):
        frequency = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * np.pi / frequency
        if wavelength > 8192:
            frequency /= 8
        elif wavelength > 8192 / 4:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(frequency)
    found = read(_PUBLISHED["meta-llama/Llama-3.1-8B"])
    np.testing.assert_allclose(found.rope_frequencies[0], expected, rtol=2e-6)
    assert found.layer_ropes == (0,) * 32


@pytest.mark.parametrize("name", CASES)
def test_file_and_object_give_the_same_facts(name, read):
    assert read(CASES[name].config) == CASES[name].arch()


def test_every_family_has_parity_cases():
    assert sorted(FAMILIES) == sorted(SUPPORTED_FAMILIES)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_trained_length_beside_the_rope_takes_the_place_of_the_one_inside(kind):
    """As in a model that transformers builds, whether the class of the config declares the attribute or not."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {key: value for key, value in rope.items() if kind == "llama3" or "freq" not in key}

    def arch(inside, **beside):
        rope_parameters = rope | {"original_max_position_embeddings": inside}
        return arch_from_config(transformers.LlamaConfig(rope_parameters=rope_parameters, **beside))

    assert arch(512, original_max_position_embeddings=64) == arch(64) != arch(512)


LACKING = {"deepseek_v2": {"num_experts_per_tok": 6}, "glm4_moe": {"head_dim": 128}}
"""Family -> what its config class must be given: no model can be built from its defaults alone."""


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_attribute_of_the_installed_transformers_is_known(family):
    config = transformers.AutoConfig.for_model(family, **LACKING.get(family, {}))
    assert arch_from_config(config).family == family


def test_negative_epsilon_of_norms_is_refused():
    """It can take features out of a norm."""
    with pytest.raises(UnsupportedModelError, match=r"epsilon of norms is -0\.4"):
        arch_from_config(transformers.LlamaConfig(rms_norm_eps=-0.4))


def test_number_of_experts_of_a_token_that_is_not_set_is_refused():
    with pytest.raises(UnsupportedModelError, match="num_experts_per_tok"):
        arch_from_config(transformers.AutoConfig.for_model("deepseek_v2"))


@pytest.mark.parametrize("family", ["mamba", "t5", "no_such_model", None])
def test_unknown_architecture_is_refused_with_the_list(family, read):
    with pytest.raises(UnsupportedModelError, match=rf"{family}.*supported: {', '.join(SUPPORTED_FAMILIES)}"):
        read({"model_type": family})


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_unreadable_config_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        read_arch(tmp_path)


def test_absent_config_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        read_arch(tmp_path)


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("meta-llama/Llama-3.1-8B", "is_causal", False),
        ("meta-llama/Llama-3.1-8B", "text_config", {"hidden_size": 8}),
        ("meta-llama/Llama-3.1-8B", "per_layer_config", {"1": {"intermediate_size": 8}}),
        ("mistralai/Mixtral-8x7B-v0.1", "is_causal", False),
        ("google/gemma-2-9b", "use_bidirectional_attention", True),
        ("gpt2", "add_cross_attention", True),
    ],
)
def test_attribute_that_changes_the_numbers_is_refused_by_name(name, attribute, value, read):
    published = _GPT2 if name == "gpt2" else _PUBLISHED[name]
    with pytest.raises(UnsupportedModelError, match=attribute):
        read(published | {attribute: value})


def test_declared_attribute_that_is_not_known_is_refused_unless_it_has_its_default(read, monkeypatch):
    without = dataclasses.replace(FAMILY_ROWS["gpt2"], neutral="summary_type summary_use_proj")
    monkeypatch.setitem(FAMILY_ROWS, "gpt2", without)
    assert read(_GPT2 | {"reorder_and_upcast_attn": False}) == read(_GPT2)
    with pytest.raises(UnsupportedModelError, match="reorder_and_upcast_attn of gpt2 are not at their defaults"):
        read(_GPT2 | {"reorder_and_upcast_attn": True})


def test_all_problems_are_named_at_once(read):
    with pytest.raises(UnsupportedModelError, match=r"is_causal is False.*not a multiple"):
        read(_LLAMA_3 | {"is_causal": False, "num_key_value_heads": 5})


_MISTRAL, _QWEN2, _MIXTRAL = (
    _PUBLISHED[name] for name in ("mistralai/Mistral-7B-v0.1", "Qwen/Qwen2.5-7B", "mistralai/Mixtral-8x7B-v0.1")
)


@pytest.mark.parametrize(
    ("config", "undeclared"),
    [
        (_LLAMA_3, {"mixture_of_depths": 0.5, "selective_checkpoint_enabled": True, "rope_interleaved": True}),
        (_LLAMA_3, {"max_steps": -1, "trainer": {"save_steps": -1, "steps_per_epoch": -1}}),
        (_LLAMA_3, {"torchscript": True, "pruned_heads": {}, "use_bfloat16": True, "transformers.js_config": {"a": 1}}),
        (_LLAMA_3, {"sliding_window": 4096, "attn_logit_softcapping": 30.0, "use_bidirectional_attention": True}),
        (_LLAMA_3, {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        (_MISTRAL, {"attention_bias": False, "mlp_bias": False}),
        (_QWEN2, {"attention_bias": False, "mlp_bias": False, "use_mrope": True}),
        (_MIXTRAL, {"attention_bias": False, "mlp_bias": False, "moe_frequency": 1, "use_flash_attention": True}),
        (_MIXTRAL, {"norm_topk_prob": False}),
        (_GPT2, {"n_special": 0, "predict_special_tokens": True}),
        (_GPT2, {"num_key_value_heads": 1, "intermediate_size": 12, "head_dim": 5, "rms_norm_eps": 0.5}),
    ],
)
def test_attributes_that_the_family_does_not_have_are_noted_and_change_nothing(config, undeclared, tmp_path):
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    for folder, content in ((plain, config), (changed, config | undeclared)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
    arch, notes = read_arch_and_notes(changed)
    assert arch == read_arch(plain)
    named = set(undeclared) - {"quantization_config"}  # a matter of the weights
    assert len(notes) == bool(named)
    assert all(name in notes[0] for name in named)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("num_hidden_layers", 2**31),
        ("num_hidden_layers", -1),
        ("hidden_size", 10**9),
        ("vocab_size", 10**400),
        ("num_attention_heads", 1e30),
        ("rope_scaling", {"head_dim": 10**12}),
        ("num_labels", 2**31),
        ("num_attention_heads", 2**16),
        ("head_dim", 2**24),
        ("n_head", 2**22),
        ("num_key_value_heads", 5000),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(attribute, value, read):
    with pytest.raises(UnsupportedModelError, match=r"expected at most \d+; no model has such a size") as caught:
        read(_LLAMA_3 | {attribute: value})
    assert len(str(caught.value)) < 400


def test_config_in_whose_place_transformers_reads_another_is_refused(read):
    with pytest.raises(UnsupportedModelError, match="configuration_files has transformers read another file"):
        read(_LLAMA_3 | {"configuration_files": ["config.4.0.0.json"]})


@pytest.mark.parametrize("model_type", [[], {}, 7, None, "x" * 10_000])
def test_model_type_may_be_anything(model_type, read):
    with pytest.raises(UnsupportedModelError, match="is not supported; supported: ") as caught:
        read(_LLAMA_3 | {"model_type": model_type})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    "neutral",
    [
        {"some_future_option": None},
        {"attention_dropout": 0.3, "use_cache": False, "torch_dtype": "float32", "pretraining_tp": 4},
        {"initializer_range": 0.5, "max_position_embeddings": 64000, "_name_or_path": "elsewhere"},
        {"temperature": 0.6, "do_sample": True, "max_length": 4096},
    ],
)
def test_neutral_attributes_do_not_matter(neutral, read):
    assert read(_LLAMA_3 | neutral) == read(_LLAMA_3)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_bidirectional_attention_is_refused(family):
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention"):
        arch_from_config(transformers.AutoConfig.for_model(family, use_bidirectional_attention=True))


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("meta-llama/Llama-3.1-8B", {"rope_theta": None, "rope_scaling": None}, "rope_theta not set"),
        ("Qwen/Qwen3-8B", {"rope_theta": None, "rope_parameters": {"rope_type": "default"}}, "rope_theta not set"),
        ("mistralai/Mistral-7B-v0.1", {"rope_theta": None, "transformers_version": "4.28.0"}, "rope_theta not set"),
        ("google/gemma-3-1b-it", {"rope_local_base_freq": None}, "rope_local_base_freq"),
        ("google/gemma-3-1b-it", {"rope_theta": None}, "rope_theta"),
        ("yahma/llama-7b-hf", {"transformers_version": "4.33.0"}, "rope_theta not set"),
        ("yahma/llama-7b-hf", {"transformers_version": None}, "rope_theta not set"),
    ],
)
def test_missing_rope_is_refused(name, changes, what, read):
    config = {key: value for key, value in (_PUBLISHED[name] | changes).items() if value is not None}
    with pytest.raises(UnsupportedModelError, match=what):
        read(config)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "no_such_rope", "factor": 4.0},
        {"type": "no_such_rope", "factor": 4.0},
    ],
)
def test_other_ropes_are_refused_with_the_list(scaling, read):
    with pytest.raises(UnsupportedModelError, match=rf"rope type.*supported: {', '.join(SUPPORTED_ROPES)}"):
        read(_LLAMA_2 | {"rope_theta": 10000.0, "rope_scaling": scaling})


@pytest.mark.parametrize("name", ["llama-dynamic", "phi3-longrope_partial", "gptj-tied"])
def test_texts_beyond_the_length_for_which_a_rope_holds_are_refused(name):
    arch = CASES[name].arch()
    assert (arch.rope_positions, arch.longest, length_problem(arch, 40)) == (40, 40, None)
    assert "its rope holds for 40 tokens" in str(length_problem(arch, 41))


def test_the_first_dims_of_a_head_are_paired_as_its_rope_rotates_them():
    assert head_pairs(CASES["llama-gqa-tied-default"].arch()) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert head_pairs(CASES["glm-gqa-tied-default"].arch()) == ((0, 2, 4, 5), (1, 3, 6, 7))
    assert head_pairs(CASES["phi3-longrope_partial"].arch()) == ((0, 1, 2, 3, 8, 9), (4, 5, 6, 7, 10, 11))
    assert head_pairs(CASES["gpt2-tied"].arch()) == ((0, 1, 2), (3, 4, 5))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ],
)
def test_a_share_of_rotated_dims_changes_nothing_in_a_family_that_does_not_read_it(rope, read, tmp_path):
    arch = read(_LLAMA_2 | rope)
    assert arch.rope_frequencies == read(_LLAMA_2 | {"rope_theta": 10000.0}).rope_frequencies
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA_2 | rope))
    assert read_arch_and_notes(tmp_path)[1] == [
        "llama rotates all dims of a head: partial_rotary_factor changes nothing"
    ]
    scaled = {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    }
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor"):
        read(_LLAMA_2 | scaled)


@pytest.mark.parametrize("share", [None, 0.25, 1.0])
def test_a_proportional_rope_leaves_the_slow_dims_as_they_are(share, read):
    rope = {"rope_type": "proportional", "rope_theta": 777.0, "factor": 2.0, "partial_rotary_factor": share}
    (found,) = read(_LLAMA_2 | {"rope_parameters": rope}).rope_frequencies
    rotated = int((share or 1.0) * 128 // 2)
    expected = [777.0 ** (-2 * i / 128) / 2 if i < rotated else 0.0 for i in range(64)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_windows_that_transformers_cannot_run_are_refused(read):
    types = {"layer_types": ["sliding_attention"] * 32}
    with pytest.raises(UnsupportedModelError, match="layer_types asks for sliding windows, sliding_window is not set"):
        read(_LLAMA_2 | types)
    assert read(_LLAMA_2 | types | {"sliding_window": 4}) == read(_LLAMA_2)


def test_sliding_layers_without_a_window_are_refused(read):
    with pytest.raises(UnsupportedModelError, match="sliding_window"):
        read(_PUBLISHED["google/gemma-2-9b"] | {"sliding_window": None})


def test_gemma_3_with_attention_softcap_is_refused(read):
    with pytest.raises(UnsupportedModelError, match="attn_logit_softcapping"):
        read(_PUBLISHED["google/gemma-3-1b-it"] | {"attn_logit_softcapping": 50.0})


def test_facts_are_hashable_and_end_in_plain_numbers(read):
    arch = read(_LLAMA_3)
    assert hash(arch) == hash(read(_LLAMA_3))
    assert all(type(frequency) is float for frequency in arch.rope_frequencies[0])


def test_reading_needs_only_config_json(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(_LLAMA_3))
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    (tmp_path / "modeling_llama.py").write_text("raise SystemExit")
    assert read_arch(tmp_path).family == "llama"
