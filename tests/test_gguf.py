"""A GGUF file is read as llama.cpp wrote it: the same weights as the checkpoint that it was made from."""

import contextlib
import dataclasses
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from parity_cases import CASES, LIVE_CASES, Case

from tracing_jax.arch import SUPPORTED_FAMILIES, SUPPORTED_MULTIMODAL, Arch, LatentAttention, UnsupportedModelError
from tracing_jax.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from tracing_jax.checkpoint.errors import UnsupportedMetadataError
from tracing_jax.checkpoint.gguf import GGUF_ARCHITECTURES
from tracing_jax.checkpoint.gguf.config import config_of
from tracing_jax.checkpoint.gguf.families import GGUF_FAMILIES
from tracing_jax.checkpoint.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from tracing_jax.checkpoint.gguf.needed import needed_keys
from tracing_jax.checkpoint.gguf.tensors import GgufFile
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.data import load_tokenizer
from tracing_jax.sources import in_memory
from tracing_jax.tree import flatten

_KINDS = gguf.GGMLQuantizationType


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to the rows of queries and keys."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _as_llama_cpp(name: str, architecture: str, arch: Arch, weight: np.ndarray) -> np.ndarray:
    if architecture in ("gptneox", "falcon", "bloom") and "query_key_value" in name:
        by_head = weight.reshape(arch.num_kv_heads, arch.q_group + 2, arch.head_dim, *weight.shape[1:])
        parts = by_head[:, :-2], by_head[:, -2:-1], by_head[:, -1:]
        return np.concatenate([part.reshape(-1, *weight.shape[1:]) for part in parts])
    if ".mixer." in name and "q_proj" not in name and "k_proj" not in name:
        forms = {"A_log": (-1, 1), "D": (-1, 1), "mixer.norm.weight": (arch.mamba and arch.mamba.groups, -1)}
        weight = -np.exp(weight) if name.endswith("A_log") else weight.squeeze() if "conv1d" in name else weight
        return weight.reshape(next((form for end, form in forms.items() if name.endswith(end)), weight.shape))
    if architecture in ("llama", "granite", "granitemoe", "nemotron_h", "nemotron_h_moe", "olmo", "smollm3"):
        heads = {".q_proj.": arch.num_kv_heads * arch.q_group, ".k_proj.": arch.num_kv_heads}
        weight = next((_in_pairs(weight, count) for part, count in heads.items() if part in name), weight)
    if architecture.startswith("qwen3") and arch.delta_net is not None:
        return _of_delta_net(name, architecture, arch, weight)
    if architecture in ("gemma", "gemma2", "gemma3") and name.endswith("norm.weight"):
        weight = weight + 1
    is_linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return weight.T if architecture == "gpt2" and is_linear else weight


def _of_delta_net(name: str, architecture: str, arch: Arch, weight: np.ndarray) -> np.ndarray:
    """What llama.cpp does to a Qwen with gated delta nets: heads of values by their number in a group, in Qwen3.5."""
    net = arch.delta_net
    assert net is not None
    if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return weight + 1
    weight = weight.squeeze() if name.endswith("conv1d.weight") else weight
    before = 2 * net.groups * net.key_dim if name.endswith(("in_proj_qkv.weight", "conv1d.weight")) else 0
    ends = (
        "in_proj_qkv.weight",
        "conv1d.weight",
        "in_proj_z.weight",
        "in_proj_a.weight",
        "in_proj_b.weight",
        "A_log",
        "dt_bias",
    )
    if architecture != "qwen3next" and name.endswith((*ends, "linear_attn.out_proj.weight")):
        turned = weight if name.endswith(ends) else weight.T
        groups = turned[before:].reshape(net.groups, net.heads, -1, *turned.shape[1:])
        tiled = np.concatenate([groups[k, g] for g in range(net.heads) for k in range(net.groups)])
        weight = np.concatenate([turned[:before], tiled])
        weight = weight if name.endswith(ends) else weight.T
    return -np.exp(weight) if name.endswith("A_log") else weight


def _written(
    path: Path, case: Case, architecture: str, kind: _KINDS = _KINDS.F32, squeezed: bool = False, **metadata: Any
) -> Path:
    """Writes a case's weights as llama.cpp does, matrices of a suitable size in `kind`, `squeezed` as it once did."""
    arch = case.arch()
    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, case, arch)
    for key, value in metadata.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
                 list: writer.add_array}  # fmt: skip
        add = kinds[type(value)]
        add(key.replace("__", "."), value)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[architecture], 2 * arch.num_layers + 2)
    stacks: dict[str, list[np.ndarray]] = {}
    for name, shape in tensor_shapes(leaf_layouts(arch).values()).items():
        weight = _as_llama_cpp(name, architecture, arch, case.weight(name, shape).astype(np.float32))
        for part, piece in _apart(name, arch, weight):
            plain = re.sub(r"\.(experts|norms)\.\d+\.", lambda m: ".experts." if m[1] == "experts" else ".", part)
            plain = plain.replace("e_score_correction_bias", "e_score_correction.bias")
            forms = (plain, plain.removeprefix("transformer."))
            theirs = next(filter(None, (table.get_name(form, try_suffixes=(".weight", ".bias")) for form in forms)), "")
            for end, scale in ((".router.scale", "ffn_gate_inp"), (".router.per_expert_scale", "ffn_down_exps")):
                theirs = f"blk.{plain.split('.')[2]}.{scale}.scale" if plain.endswith(end) else theirs
            assert theirs, name
            stacks.setdefault(theirs, []).append(piece)
    for theirs, weights in stacks.items():
        weight = np.ascontiguousarray(weights[0] if len(weights) == 1 else np.stack(weights))
        weight = weight.squeeze() if squeezed else weight
        fits = weight.ndim > 1 and weight.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        kind_of = kind if fits else _KINDS.F32
        writer.add_tensor(theirs, gguf.quants.quantize(weight, kind_of), raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _apart(name: str, arch: Arch, weight: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Returns the tensors that llama.cpp makes of one: of experts of gpt-oss gate and up apart, units before inputs."""
    if name.endswith(".block_sparse_moe.input_linear.weight"):
        halves, before = np.split(weight, 2, axis=1), name.partition(".block_sparse_moe")[0]
        return [(f"{before}.mlp.experts.{part}_proj.weight", half) for part, half in zip(("gate", "up"), halves)]
    if name.endswith(".kv_b_proj.weight"):
        assert arch.latent is not None
        by_head = weight.reshape(arch.num_kv_heads * arch.q_group, -1, weight.shape[1])
        keys, values = np.split(by_head, [arch.latent.nope_dim], axis=1)
        return [(name.replace("kv_b", "k_b"), keys.swapaxes(1, 2)), (name.replace("kv_b", "v_b"), values)]
    if name.endswith(".in_proj_qkvz.weight"):
        net, before = arch.delta_net, name.partition("in_proj")[0]
        assert net is not None
        values = net.heads * net.value_dim
        by_group = weight.reshape(net.groups, -1, weight.shape[1])
        q, k, v, z = np.split(by_group, np.cumsum([net.key_dim, net.key_dim, values]), axis=1)
        qkv = np.concatenate([part.reshape(-1, weight.shape[1]) for part in (q, k, v)])
        return [(f"{before}in_proj_qkv.weight", qkv), (f"{before}in_proj_z.weight", z.reshape(-1, weight.shape[1]))]
    if ".mixer." in name:
        name = name.replace("mixer.dt_bias", "mixer.dt.bias").replace("correction_bias", "correction.bias")
        layer = name.split(".")[2]
        return [(name.replace(f"backbone.layers.{layer}.mixer.experts", f"model.layers.{layer}.mlp.experts"), weight)]
    if name.endswith(".linear_attn.dt_bias"):
        return [(name.replace("dt_bias", "dt_proj.bias"), weight)]
    if name.endswith((".sinks", ".layer_scalar")) or (".experts." in name and arch.branch_norms):
        return [(f"{name}.weight", weight)]
    if "gate_up_proj" in name and ".experts." in name:
        end = "bias" if name.endswith("_bias") else "weight"
        turned = weight if end == "bias" else weight.swapaxes(1, 2)
        before = name.partition(".gate_up_proj")[0]
        return [(f"{before}.{part}_proj.{end}", turned[:, i::2]) for i, part in enumerate(("gate", "up"))]
    if name.endswith(".experts.down_proj_bias"):
        return [(name.replace("_bias", ".bias"), weight)]
    if name.endswith(".experts.down_proj"):
        return [(f"{name}.weight", weight.swapaxes(1, 2))]
    return [(name, weight)]


def _add_gemma4(writer: gguf.GGUFWriter, case: Case, arch: Arch) -> None:
    """Adds what llama.cpp writes of a Gemma 4, whose layers without a window have heads of another size."""
    full, config = arch.global_attn, case.config
    assert full is not None
    is_sliding = [window is not None for window in arch.layer_windows]
    writer.add_block_count(arch.num_layers)
    writer.add_embedding_length(arch.embed_dim)
    units = [config["intermediate_size"] if arch.num_experts else arch.mlp_dim_of(i) for i in range(arch.num_layers)]
    writer.add_feed_forward_length(units if len(set(units)) > 1 else units[0])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([arch.num_kv_heads if sliding else full.kv_heads for sliding in is_sliding])
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    writer.add_context_length(128)
    writer.add_key_length(full.head_dim)
    writer.add_key_length_swa(arch.head_dim)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(is_sliding)
    writer.add_shared_kv_layers(config.get("num_kv_shared_layers", 0))
    writer.add_embedding_length_per_layer_input(arch.per_layer_dim or 0)
    writer.add_final_logit_softcapping(arch.logit_softcap)
    ropes = config["rope_parameters"]
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    turned = int(full.head_dim * ropes["full_attention"]["partial_rotary_factor"] / 2)
    factors = [1.0] * turned + [1e30] * (full.head_dim // 2 - turned)
    writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    if arch.num_experts is not None:
        writer.add_expert_count(arch.num_experts)
        writer.add_expert_used_count(arch.experts_per_token)
        writer.add_expert_feed_forward_length(arch.mlp_dim)


def _add_nemotron_h(writer: gguf.GGUFWriter, case: Case, arch: Arch) -> None:
    """Adds what llama.cpp writes of a Nemotron-H, of which each block has one part."""
    config, kinds = case.config, case.config["layers_block_type"]
    writer.add_block_count(len(kinds))
    writer.add_embedding_length(arch.embed_dim)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv([arch.num_kv_heads if kind == "full_attention" else 0 for kind in kinds])
    units = config["moe_intermediate_size"] if "moe" in kinds else config["intermediate_size"]
    writer.add_feed_forward_length([units if kind in ("mlp", "moe") else 0 for kind in kinds])
    writer.add_key_length(arch.head_dim)
    writer.add_layer_norm_rms_eps(arch.norm_eps)
    writer.add_ssm_conv_kernel(config["conv_kernel"])
    writer.add_ssm_state_size(config["ssm_state_size"])
    writer.add_ssm_group_count(config["n_groups"])
    writer.add_ssm_time_step_rank(config["mamba_num_heads"])
    writer.add_ssm_inner_size(config["mamba_num_heads"] * config["mamba_head_dim"])
    if arch.num_experts is not None:
        writer.add_expert_count(arch.num_experts)
        writer.add_expert_used_count(arch.experts_per_token)
        writer.add_expert_feed_forward_length(arch.mlp_dim)
        writer.add_expert_shared_feed_forward_length(arch.shared_mlp_dim)
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(True)
        writer.add_expert_group_count(1)
        if arch.expert_latent_dim is not None:
            writer.add_moe_latent_size(arch.expert_latent_dim)


def _add_sizes(writer: gguf.GGUFWriter, case: Case, arch: Arch) -> None:
    if writer.arch.startswith("nemotron"):
        _add_nemotron_h(writer, case, arch)
        return
    if writer.arch == "gemma4":
        _add_gemma4(writer, case, arch)
        return
    writer.add_block_count(arch.num_layers)
    writer.add_embedding_length(arch.embed_dim)
    dense = case.config.get("intermediate_size") or arch.mlp_dim
    writer.add_feed_forward_length(dense)
    writer.add_head_count(arch.num_kv_heads * arch.q_group)
    writer.add_context_length(arch.num_positions or 128)
    if arch.norm.startswith("layer_norm"):
        writer.add_layer_norm_eps(arch.norm_eps)
    if arch.num_positions is not None:
        return
    if (
        arch.latent is None and "gpt_neox" not in case.name and "mpt" not in case.name
    ):  # of which the converter writes no such number
        writer.add_head_count_kv(arch.num_kv_heads)
    if "head_dim" in case.config and arch.latent is None:
        writer.add_key_length(arch.head_dim)
    if not arch.norm.startswith("layer_norm"):
        writer.add_layer_norm_rms_eps(arch.norm_eps)
    if arch.num_experts is not None:
        writer.add_expert_count(arch.num_experts)
        writer.add_expert_used_count(arch.experts_per_token)
        writer.add_expert_feed_forward_length(case.config.get("moe_intermediate_size") or arch.mlp_dim)
        if "shared_expert_intermediate_size" in case.config:
            writer.add_expert_shared_feed_forward_length(case.config["shared_expert_intermediate_size"])
    if case.config["model_type"] == "phi3":
        _add_phi3(writer, case)
    elif 0 < arch.rotary_dim < arch.head_dim and arch.latent is None:
        writer.add_rope_dimension_count(arch.rotary_dim)
    for key, attribute in _ROUTED.items():
        if attribute in case.config and case.config["model_type"] in ("glm4_moe", "deepseek_v2", "deepseek_v3"):
            value = case.config[attribute]
            add = writer.add_bool if isinstance(value, bool) else writer.add_float32 if "scale" in key else None
            (add or writer.add_uint32)(f"{writer.arch}.{key}", value)
    if arch.latent is not None:
        _add_latent(writer, arch.latent)
    rope = case.config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            if key in rope:
                writer.add_float32(f"{writer.arch}.rope.scaling.yarn_{key}", rope[key])
    windows = [window for window in arch.layer_windows if window is not None]
    if windows and case.config["model_type"] in ("olmo3", "exaone4", "cohere2", "gpt_oss"):
        writer.add_sliding_window(windows[0])
        writer.add_sliding_window_pattern([window is not None for window in arch.layer_windows])
    if windows and case.config["model_type"] == "gemma3_text":
        writer.add_sliding_window(windows[0])
    if case.config["model_type"] == "granite":
        writer.add_logit_scale(case.config["logits_scaling"])


_ROUTED = {
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}


def _add_latent(writer: gguf.GGUFWriter, latent: LatentAttention) -> None:
    """Adds the widths of attention by latents, whose keys and values llama.cpp takes for one kv head of the latent."""
    if latent.q_rank is not None:
        writer.add_q_lora_rank(latent.q_rank)
    writer.add_kv_lora_rank(latent.kv_rank)
    writer.add_rope_dimension_count(latent.rope_dim)
    writer.add_key_length(latent.kv_rank + latent.rope_dim)
    writer.add_value_length(latent.kv_rank)
    writer.add_key_length_mla(latent.nope_dim + latent.rope_dim)
    writer.add_value_length_mla(latent.v_dim)


def _add_phi3(writer: gguf.GGUFWriter, case: Case) -> None:
    """Adds what llama.cpp writes of a Phi-3 alone: no window is one of 0, and longrope's factors are tensors."""
    rope = case.config["rope_parameters"]
    head_dim = case.config["hidden_size"] // case.config["num_attention_heads"]
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim))
    writer.add_sliding_window(case.config.get("sliding_window") or 0)
    writer.add_rope_scaling_orig_ctx_len(case.config["original_max_position_embeddings"])
    for length in ("short", "long"):
        if f"{length}_factor" in rope:
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))


def _assert_same(found: Checkpoint, case: Case) -> None:
    ours, theirs = (flatten(in_memory(source).params) for source in (found, case.source()))
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        rounded = "norm" in name or name.endswith("A_log")
        np.testing.assert_allclose(ours[name], leaf, rtol=0, atol=2e-7 if rounded else 0, err_msg=name)


def _theta(case: Case, architecture: str) -> dict[str, float]:
    theta = case.config.get("rope_theta") or (case.config.get("rope_parameters") or {}).get("rope_theta")
    return {f"{architecture}__rope__freq_base": float(theta)} if isinstance(theta, int | float) else {}


_ONE_OF_EACH = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "granite": "granite",
    "gpt2": "gpt2",
}


@pytest.mark.parametrize("model_type", _ONE_OF_EACH)
def test_weights_are_those_that_llama_cpp_was_given(model_type, tmp_path):
    case = next(case for case in CASES.values() if case.config["model_type"] == model_type and "bias" not in case.name)
    architecture = _ONE_OF_EACH[model_type]
    path = _written(tmp_path / "model.gguf", case, architecture, **_theta(case, architecture))
    opened = open_checkpoint(str(path))
    expected = case.arch()
    for fact in ("embed_dim", "num_layers", "mlp_dim", "num_kv_heads", "q_group", "head_dim", "tied", "num_experts"):
        assert getattr(opened.arch, fact) == getattr(expected, fact), fact
    _assert_same(opened, case)


_SIGMOID = {"expert_gating_func": 2}
_STATES = {
    "ssm.conv_kernel": 3, "ssm.state_size": 6, "ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 20,
    "full_attention_interval": 4,
}  # fmt: skip
_GEMMA4_ROPES = {  # float32 holds these
    "full_attention": {"rope_type": "proportional", "rope_theta": 777.0, "partial_rotary_factor": 1 / 3},
    "sliding_attention": {"rope_type": "default", "rope_theta": 43.25},
}  # fmt: skip
_CHANGES: dict[str, dict[str, Any]] = {
    "nemotron_h-dense": {"time_step_min": 0.0},  # llama.cpp has none
    "nemotron_h-latent": {
        "time_step_min": 0.0,
        "routed_scaling_factor": 1.75,
        "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
    },
    **{
        f"gemma4_text-{name}": {"rope_parameters": _GEMMA4_ROPES}
        for name in ("values_are_keys", "shared_keys", "experts")
    },
    "cohere-qk_norm": {"tie_word_embeddings": True},  # as all heads of this family are in llama.cpp
    "gpt_oss-default": {"swiglu_limit": 7.0, "swiglu_alpha": 1.702},  # constants in llama.cpp
    "gpt_oss-yarn": {"swiglu_limit": 7.0, "swiglu_alpha": 1.702},
    "qwen3_5_moe_text-default": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "glm4_moe-default": {"routed_scaling_factor": 1.75},  # which float32 holds
}
_CHANGES |= {
    f"deepseek_{name}": {"routed_scaling_factor": 1.75} for name in ("v2-default", "v3-groups", "v3-no_q_latent")
}
_CHANGES["deepseek_v2-mscale"] = {  # which llama.cpp has only where both are one number
    "routed_scaling_factor": 1.75,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 777.0, "factor": 5.0, "original_max_position_embeddings": 24, "mscale": 0.75,
        "mscale_all_dim": 0.75,
    },
}  # fmt: skip
_MORE_FACTS: dict[str, tuple[str, dict[str, Any]]] = {
    "seed_oss-biases": ("seed_oss", {}),
    "ernie4_5-biases": ("ernie4_5", {}),
    "smollm3-every_layer": ("smollm3", {}),
    "exaone4-gqa-tied-default": ("exaone4", {}),
    "exaone4-no_window": ("exaone4", {}),
    "glm4-bias": ("glm4", {}),
    "cohere-gqa-tied-default": ("command-r", {"logit_scale": 0.37}),
    "cohere-qk_norm": ("command-r", {"logit_scale": 0.37}),
    "cohere2-gqa-tied-default": ("cohere2", {"logit_scale": 0.37}),
    "stablelm-qk_norms": ("stablelm", {"use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "starcoder2-gqa-tied-default": ("starcoder2", {}),
    "phi-mha": ("phi2", {}),
    "gpt_neox-tied": ("gptneox", {"use_parallel_residual": True}),
    "gpt_neox-sequential": ("gptneox", {"use_parallel_residual": False}),
    "falcon-multi_query": ("falcon", {}),
    "falcon-grouped": ("falcon", {}),
    "falcon-one_norm": ("falcon", {}),
    "bloom-odd_heads": ("bloom", {}),
    "mpt-odd_heads": ("mpt", {"attention.max_alibi_bias": 8.0}),
    "gpt_bigcode-multi_query": ("starcoder", {"attention.head_count_kv": 1}),
    "olmo3-gqa-tied-default": ("olmo2", {"rope.freq_base": 777.0}),
    "gpt_oss-default": ("gpt-oss", {}),
    "gpt_oss-yarn": ("gpt-oss", {}),
    "minimax_m2-default": ("minimax-m2", _SIGMOID),
    "glm4_moe-default": ("glm4moe", _SIGMOID),
    "qwen2-gqa-untied-default": ("qwen2vl", {"rope.dimension_sections": [1, 2, 1, 0]}),
    "qwen3-gqa-untied-default": ("qwen3vl", {"rope.dimension_sections": [1, 2, 1, 0], "n_deepstack_layers": 3}),
    "qwen3_moe-normalized": ("qwen3vlmoe", {"rope.dimension_sections": [1, 2, 1, 0]}),
    "gemma4_text-values_are_keys": ("gemma4", {}),
    "gemma4_text-shared_keys": ("gemma4", {}),
    "gemma4_text-experts": ("gemma4", {}),
    "nemotron_h-dense": ("nemotron_h", {}),
    "nemotron_h-latent": ("nemotron_h_moe", {}),
    "qwen3_next-interval": ("qwen3next", _STATES),
    "qwen3_5_text-interval": ("qwen35", _STATES | {"rope.dimension_sections": [1, 1, 0, 0]}),
    "qwen3_5_moe_text-default": ("qwen35moe", _STATES | {"full_attention_interval": 3}),
    "granitemoe-default": (
        "granitemoe",
        {"attention.scale": 0.21, "embedding_scale": 3.3, "residual_scale": 0.43, "logit_scale": 1.7},
    ),
    "ernie4_5_moe-default": (
        "ernie4_5-moe",
        {"interleave_moe_layer_step": 1, "leading_dense_block_count": 1, "expert_shared_count": 2},
    ),
    "ernie4_5_moe-interval": (
        "ernie4_5-moe",
        {"interleave_moe_layer_step": 2, "leading_dense_block_count": 1, "expert_shared_count": 2},
    ),
    "deepseek_v2-default": ("deepseek2", {}),
    "deepseek_v2-mscale": ("deepseek2", {"rope.scaling.yarn_log_multiplier": 0.075}),
    "deepseek_v3-groups": ("deepseek2", _SIGMOID),
    "deepseek_v3-no_q_latent": ("deepseek2", _SIGMOID),
}


@pytest.mark.parametrize("name", _MORE_FACTS)
def test_facts_and_weights_of_further_families_are_those_that_llama_cpp_was_given(name, tmp_path):
    architecture, metadata = _MORE_FACTS[name]
    case = (CASES | LIVE_CASES)[name]
    case = dataclasses.replace(case, config=case.config | _CHANGES.get(name, {}))
    keys = {f"{architecture}__{key.replace('.', '__')}": value for key, value in metadata.items()}
    path = _written(tmp_path / "model.gguf", case, architecture, **keys, **_theta(case, architecture))
    opened, expected = open_checkpoint(str(path)), case.arch()
    _assert_same_facts(opened.arch, expected)
    _assert_same(opened, case)


def _assert_same_facts(found: Arch, expected: Arch) -> None:
    floats = (
        "norm_eps", "rope_amplitudes", "logit_scale", "clip_qkv", "attention_scale", "embed_scale",
        "residual_scale",
    )  # fmt: skip
    for ours, theirs in zip(found.rope_frequencies, expected.rope_frequencies, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    found = dataclasses.replace(found, rope_frequencies=expected.rope_frequencies)
    for fact in floats:
        ours, theirs = getattr(found, fact), getattr(expected, fact)
        assert (ours is None) == (theirs is None), fact
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=fact)
    same = {fact: getattr(found, fact) for fact in floats}
    assert found == dataclasses.replace(expected, **same)


_WITH_ALL_FACTS = {
    "qwen2_moe-default": "qwen2moe",
    "qwen3_moe-normalized": "qwen3moe",
    "olmoe-default": "olmoe",
    "phi3-longrope": "phi3",
    "phi3-longrope_partial": "phi3",
}


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize("name", _WITH_ALL_FACTS)
def test_facts_and_weights_are_those_that_llama_cpp_was_given(name, squeezed, tmp_path):
    """The arch as a whole: how experts are weighed, which dims turn, the factors of longrope."""
    case, architecture = (CASES | LIVE_CASES)[name], _WITH_ALL_FACTS[name]
    path = _written(tmp_path / "model.gguf", case, architecture, squeezed=squeezed, **_theta(case, architecture))
    opened, expected = open_checkpoint(str(path)), case.arch()
    _assert_same_facts(opened.arch, expected)
    _assert_same(opened, case)


def test_families_of_llama_cpp_are_of_model_types_that_are_read():
    known = {*SUPPORTED_FAMILIES, *SUPPORTED_MULTIMODAL}
    assert {name for family in GGUF_FAMILIES.values() for name in (family.model_type, *family.also)} <= known


_LLAMA = next(case for case in CASES.values() if case.config["model_type"] == "llama" and not case.arch().tied)


def test_slices_are_those_of_the_whole(tmp_path):
    opened = open_checkpoint(str(_written(tmp_path / "model.gguf", _LLAMA, "llama", **_theta(_LLAMA, "llama"))))
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = opened.tensors.read(name)
    for index in [(slice(3, 11),), (slice(0, 0),), (slice(None), slice(2, 7)), (slice(5, 6), slice(1, 2))]:
        np.testing.assert_array_equal(opened.tensors.read(name, index), whole[index])


_DEQUANTISED = [
    kind for kind in _KINDS if kind.name.startswith(("Q", "IQ", "TQ", "MX", "NV")) and kind in gguf.quants._type_traits
]


@pytest.mark.parametrize("kind", _DEQUANTISED, ids=lambda kind: kind.name)
def test_every_type_is_dequantised_as_gguf_does_slice_by_slice(kind, tmp_path):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = np.random.default_rng(0).integers(0, 100, size=(5, 3 * size)).astype(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("w", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    store = GgufFile(tmp_path / "model.gguf", read_gguf_header(tmp_path / "model.gguf"))
    expected = gguf.quants.dequantize(stored, kind)
    assert store.shape("w") == (5, 3 * block) == expected.shape
    assert store.dtype("w") == np.float32
    for index in [(), (slice(1, 4),), (slice(None), slice(1, block)), (slice(2, 3), slice(block - 1, 2 * block + 1))]:
        np.testing.assert_array_equal(store.read("w", index), expected[index])


def test_quantised_model_is_near_the_original(tmp_path):
    case = _LLAMA
    path = _written(tmp_path / "model.gguf", case, "llama", _KINDS.F16, **_theta(case, "llama"))
    opened = open_checkpoint(str(path))
    original = flatten(in_memory(case.source()).params)
    for name, leaf in flatten(in_memory(opened).params).items():
        np.testing.assert_allclose(leaf.astype(np.float32), original[name], atol=1e-3)


def test_scaling_of_llama_3_is_recognised_by_its_factors(tmp_path):
    inverse = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    wavelength = 2 * np.pi / inverse
    smooth = (8192 / wavelength - 1) / 3
    factors = np.where(wavelength < 8192 / 4, 1.0, np.where(wavelength > 8192, 8.0, 1 / ((1 - smooth) / 8 + smooth)))
    sizes = {"block_count": 1, "embedding_length": 256, "attention.head_count": 2, "rope.freq_base": 500000.0,
             "context_length": 131072, "attention.layer_norm_rms_epsilon": 1e-5}  # fmt: skip
    metadata = {"general.architecture": "llama", **{f"llama.{name}": value for name, value in sizes.items()}}
    tensor = GgufTensor((64,), _KINDS.F32, 0)
    header = GgufHeader(
        metadata, {"token_embd.weight": GgufTensor((8, 256), _KINDS.F32, 0), "rope_freqs.weight": tensor}
    )
    scaling = config_of(header, lambda name: factors.astype(np.float32))["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 8.0)
    with pytest.raises(UnsupportedMetadataError, match="only one that is read from factors"):
        config_of(header, lambda name: np.full(64, 2, np.float32))


def test_tokenizer_comes_from_the_metadata(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _add_sizes(writer, _LLAMA, _LLAMA.arch())
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 5)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from tracing_jax.checkpoint.gguf import GgufModel

    folder, _ = GgufModel([path]).description()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tokens)}
    assert tokenizer("ab")["input_ids"] == [1, tokens.index("▁ab")]
    assert GgufModel([path]).description()[0] == folder


def test_a_folder_with_one_model_is_that_model_and_one_with_two_is_not(tmp_path):
    theta = _theta(_LLAMA, "llama")
    (tmp_path / "only").mkdir()
    path = _written(tmp_path / "only" / "model.gguf", _LLAMA, "llama", **theta)
    _assert_same(open_checkpoint(str(path.parent)), _LLAMA)
    (path.parent / "other.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF models, model\.gguf, other\.gguf; name one"):
        open_checkpoint(str(path.parent))
    path.rename(path.with_name("model-00001-of-00002.gguf"))
    with pytest.raises(CheckpointError, match=r"of its 2 shards model-00002-of-00002\.gguf are missing"):
        open_checkpoint(str(path.parent / "model-00001-of-00002.gguf"))


def test_unknown_families_and_types_are_refused_by_name(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="GGUF architecture 'rwkv7' is not read; read are bloom"):
        open_checkpoint(str(tmp_path / "a.gguf"))
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    data[at : at + 4] = struct.pack("<I", 999)
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="is of GGUF type 999"):
        open_checkpoint(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize(("key", "asks", "asks_nothing"), [
    ("final_logit_softcapping", 30.0, 0.0), ("attention__sliding_window", 8, 0), ("logit_scale", 0.5, 0.0),
    ("expert_gating_func", 2, 1),
])  # fmt: skip
def test_metadata_that_change_what_is_computed_are_read_or_refused(key, asks, asks_nothing, tmp_path):
    def opened(value: float) -> Checkpoint:
        path = tmp_path / f"{value}.gguf"
        return open_checkpoint(
            str(_written(path, _LLAMA, "llama", **_theta(_LLAMA, "llama"), **{f"llama__{key}": value}))
        )

    _assert_same(opened(asks_nothing), _LLAMA)
    with pytest.raises(UnsupportedModelError, match=f"{key.replace('__', '.')} is {asks}, which is not read"):
        opened(asks)


def _of(architecture: str, path: Path) -> Path:
    """Writes the first case of an architecture in `_MORE_FACTS`."""
    name, metadata = next((name, more) for name, (found, more) in _MORE_FACTS.items() if found == architecture)
    case = (CASES | LIVE_CASES)[name]
    keys = {f"{architecture}__{key.replace('.', '__')}": value for key, value in metadata.items()}
    return _written(path, case, architecture, **keys, **_theta(case, architecture))


def _read_factors(name: str) -> np.ndarray:
    raise CheckpointError(f"{name} is not read here")


@pytest.mark.parametrize(("architecture", "times"), [("llama", 300), ("deepseek2", 150), ("gpt-oss", 150)])
def test_no_damage_surfaces_as_another_error(architecture, times, tmp_path):
    path = tmp_path / "model.gguf"
    if architecture == "llama":
        _written(path, _LLAMA, "llama", **_theta(_LLAMA, "llama"))
    else:
        _of(architecture, path)
    whole = path.read_bytes()
    header_bytes = min(tensor.start for tensor in read_gguf_header(path).tensors.values())
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    for _ in range(times):
        damaged = bytearray(whole[: rng.integers(len(whole))] if rng.integers(5) == 0 else whole)
        for place in rng.integers(min(header_bytes, max(1, len(damaged))), size=3):
            damaged[place : place + 1] = bytes([rng.integers(256)])
        path.write_bytes(damaged)
        try:
            header = read_gguf_header(path)
            config_of(header, _read_factors)
            store = GgufFile(path, header)
            [store.read(name) for name in store.names()]
            outcomes["read"] += 1
        except CheckpointError as error:
            outcomes["refused"] += len(str(error)) < 4000
    assert sum(outcomes.values()) == times
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize("architecture", ["deepseek2", "gpt-oss", "cohere2", "granitemoe", "ernie4_5-moe"])
def test_a_missing_key_is_named(architecture, tmp_path):
    header = read_gguf_header(_of(architecture, tmp_path / "model.gguf"))
    family = GGUF_FAMILIES[architecture]
    for keys in needed_keys(architecture, {**family.common, **family.keys}.keys(), {}):
        lost = [f"{architecture}.{key}" for key in keys.split("|")]
        with pytest.raises(CheckpointError, match=rf"^its metadata lacks {re.escape(lost[0])}; convert it again$"):
            config_of(_without(header, *lost), _read_factors)
    for key in header.metadata:  # whatever else is missing is no other error
        with contextlib.suppress(CheckpointError):
            config_of(_without(header, key), _read_factors)


def _without(header: GgufHeader, *keys: str) -> GgufHeader:
    return GgufHeader({key: value for key, value in header.metadata.items() if key not in keys}, header.tensors)


def test_a_key_that_may_be_missing_is_what_llama_cpp_takes_in_its_place(tmp_path):
    """And not the default of the config class, which is that of one model of the family."""

    def config(architecture: str, *keys: str, **more: Any) -> dict[str, Any]:
        path = _of(architecture, tmp_path / f"{architecture}.gguf")
        header = _without(read_gguf_header(path), *(f"{architecture}.{key}" for key in keys))
        changed = header.metadata | {f"{architecture}.{key.replace('__', '.')}": more[key] for key in more}
        return config_of(GgufHeader(changed, header.tensors), _read_factors)

    granite = config("granitemoe", "attention.scale", "embedding_scale", "residual_scale")
    assert granite["attention_multiplier"] == granite["head_dim"] ** -0.5
    assert granite["embedding_multiplier"] == granite["residual_multiplier"] == 1.0
    with pytest.raises(UnsupportedModelError, match="without ropes"):
        config("granitemoe", rope__scaling__finetuned=False)
    for architecture in ("deepseek2", "glm4moe"):
        routed = config(architecture, "expert_weights_scale", "expert_weights_norm", "leading_dense_block_count")
        found = [routed[name] for name in ("routed_scaling_factor", "norm_topk_prob", "first_k_dense_replace")]
        assert found == [1.0, False, 0]
    assert config("deepseek2", "expert_gating_func")["model_type"] == "deepseek_v2"
    with pytest.raises(UnsupportedModelError, match="expert_gating_func is 3"):
        config("deepseek2", expert_gating_func=3)
    header = read_gguf_header(tmp_path / "deepseek2.gguf")  # GLM-4.7 Lite, which llama.cpp knows by its sizes
    sizes = {"deepseek2.block_count": 47, "deepseek2.expert_gating_func": 0}
    wide = header.tensors | {"token_embd.weight": GgufTensor((154880, 24), _KINDS.F32, 0)}
    assert config_of(GgufHeader(header.metadata | sizes, wide), _read_factors)["model_type"] == "deepseek_v3"
    without = ("attention.sliding_window", "attention.sliding_window_pattern")
    with pytest.raises(CheckpointError, match=r"lacks smollm3\.rope\.scaling\.original_context_length"):
        config("smollm3", "rope.scaling.original_context_length", "context_length")
    assert config("exaone4", *without, block_count=32)["sliding_window"] is None
    exaone = config("exaone4", *without, block_count=64)
    assert exaone["sliding_window"] == 4096
    assert "layer_types" not in exaone  # every fourth is full, by the config class as by llama.cpp
    for key in ("rope__scaling__factor", "rope__scale_linear"):
        assert config("seed_oss", **{key: 4.0})["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
        assert "rope_scaling" not in config("seed_oss", **{key: 0.0})


def test_experts_of_an_old_file_without_groups_are_in_none(tmp_path):
    """As those of Moonlight are, which were converted before the metadata had keys for groups."""
    case = (CASES | LIVE_CASES)["deepseek_v3-default"]
    case = dataclasses.replace(case, config=case.config | {"routed_scaling_factor": 1.5})
    assert case.config["n_group"] == case.config["topk_group"] == 1
    old = {key: value for key, value in case.config.items() if key not in ("n_group", "topk_group")}
    metadata = {"deepseek2__expert_gating_func": 2} | _theta(case, "deepseek2")
    path = _written(tmp_path / "model.gguf", dataclasses.replace(case, config=old), "deepseek2", **metadata)
    _assert_same_facts(open_checkpoint(str(path)).arch, case.arch())


def test_the_page_names_every_architecture():
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text("utf-8")
    assert all(f"`{name}`" in page for name in GGUF_ARCHITECTURES)
