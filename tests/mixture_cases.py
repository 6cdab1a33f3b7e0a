"""Tiny models with experts, or with attention by latents: configs of each family and of its options."""

from collections.abc import Iterator, Mapping
from typing import Any

_ABSENT = object()
_EPS = {"rms_norm_eps": 3e-3}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 777.0,
    "factor": 6.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}

_QWEN: dict[str, Any] = _EPS | {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
}
_QWEN_OPTIONS: dict[str, dict[str, Any]] = {
    "normalized": {"norm_topk_prob": True},
    "every_other": {"decoder_sparse_step": 2},
    "dense_first": {"mlp_only_layers": [0]},
    "all_dense": {"mlp_only_layers": [0, 1, 2]},
    "one_per_token": {"num_experts_per_tok": 1},
}
_ROUTED: dict[str, Any] = _EPS | {
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 12,
    "routed_scaling_factor": 1.7,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": _ABSENT,
    "kv_lora_rank": 10,
    "q_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
_MSCALE = {"rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}}
_GROUPS = {"n_group": 4, "topk_group": 2}
_LATENT_OPTIONS: dict[str, dict[str, Any]] = {
    "no_q_latent": {"q_lora_rank": None},
    "bias": {"attention_bias": True},
    "bias_no_q_latent": {"attention_bias": True, "q_lora_rank": None},
    "yarn": {"rope_parameters": _YARN},
    "mscale": _MSCALE,
    "one_shared": {"n_shared_experts": 1},
    "all_sparse": {"first_k_dense_replace": 0},
}

_MIXTURES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "qwen2_moe": (
        _QWEN | {"shared_expert_intermediate_size": 18},
        _QWEN_OPTIONS
        | {
            "no_bias": {"qkv_bias": False},
            "windows": {
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 2,
                "layer_types": [_SLIDING, _FULL, _SLIDING],
            },
        },
    ),
    "qwen3_moe": (
        _QWEN,
        _QWEN_OPTIONS | {"bias": {"attention_bias": True}, "window": {"use_sliding_window": True, "sliding_window": 4}},
    ),
    "olmoe": (
        _EPS | {"num_experts": 5, "num_experts_per_tok": 2, "head_dim": 6},
        {
            "normalized": {"norm_topk_prob": True},
            "clip": {"clip_qkv": 0.8},
            "bias": {"attention_bias": True},
            "grouped": {"num_key_value_heads": 4},
        },
    ),
    "gpt_oss": (
        _EPS
        | {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "num_hidden_layers": 2,
            "swiglu_limit": 1.1,
            "swiglu_alpha": 1.9,
        },
        {
            "yarn": {"rope_parameters": _YARN | {"truncate": False}},
            "no_bias": {"attention_bias": False},
            "all_full": {"layer_types": [_FULL, _FULL]},
        },
    ),
    "deepseek_v2": (
        _ROUTED | _LATENT | {"topk_method": "greedy", "norm_topk_prob": False},
        _LATENT_OPTIONS | {"groups": _GROUPS | {"topk_method": "group_limited_greedy"}},
    ),
    "deepseek_v3": (
        _ROUTED | _LATENT,
        _LATENT_OPTIONS
        | {
            "groups": _GROUPS,
            "not_normalized": {"norm_topk_prob": False},
            "half_split": {"rope_interleave": False},
        },
    ),
    "glm4_moe": (
        _ROUTED,
        {
            "qk_norm": {"use_qk_norm": True},
            "bias": {"attention_bias": True},
            "groups": _GROUPS,
            "whole_rope": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 1.0}
            },
        },
    ),
    "solar_open": (
        {name: value for name, value in _ROUTED.items() if name != "first_k_dense_replace"},
        {"bias": {"attention_bias": True}, "groups": _GROUPS, "not_normalized": {"norm_topk_prob": False}},
    ),
    "minimax_m2": (
        _EPS | {"num_local_experts": 5, "num_experts_per_tok": 2},
        {"partial": {"rotary_dim": 4}},
    ),
    "phimoe": (
        _EPS | {"num_local_experts": 5, "num_experts_per_tok": 2, "router_jitter_noise": 0.21},
        {
            "biases": {"attention_bias": True, "lm_head_bias": True},
            "window": {"sliding_window": 4},
            "no_jitter": {"router_jitter_noise": 0.0},
        },
    ),
    "granitemoe": (
        _EPS
        | {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "attention_multiplier": 0.21,
            "embedding_multiplier": 3.3,
            "residual_multiplier": 0.43,
            "logits_scaling": 1.7,
        },
        {"bias": {"attention_bias": True}},
    ),
    "llama4_text": (
        _EPS
        | {
            "num_hidden_layers": 4,
            "num_local_experts": 5,
            "intermediate_size": 12,
            "intermediate_size_mlp": 20,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 5,
            "floor_scale": 3,
            "attn_scale": 0.3,
        },
        {
            "two_per_token": {"num_experts_per_tok": 2},
            "no_qk_norm": {"use_qk_norm": False},
            "no_temperature": {"attn_temperature_tuning": False},
            "no_chunks": {"attention_chunk_size": None},
            "all_sparse": {"interleave_moe_layer_step": 1},
            "bias": {"attention_bias": True},
        },
    ),
    "ernie4_5_moe": (
        _EPS
        | {
            "num_hidden_layers": 3,
            "moe_intermediate_size": 12,
            "moe_num_experts": 5,
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
        },
        {
            "no_shared": {"moe_num_shared_experts": 0},
            "interval": {"moe_layer_interval": 2},
            "end": {"moe_layer_end_index": 1},
            "tied": {"tie_word_embeddings": True},
        },
    ),
}
"""Family -> its config, and what each of its options changes there."""

WITH_GOLDEN = {
    "qwen2_moe-every_other", "qwen3_moe-normalized", "olmoe-clip", "gpt_oss-default", "deepseek_v2-groups",
    "deepseek_v3-groups", "deepseek_v3-no_q_latent", "glm4_moe-qk_norm", "solar_open-default", "minimax_m2-partial",
    "phimoe-biases", "granitemoe-bias", "llama4_text-default", "ernie4_5_moe-interval",
}  # fmt: skip
"""The cases of which a golden file holds the numbers."""


def configs(common: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the config of every case; `common` is what families share."""
    for family, (own, options) in _MIXTURES.items():
        for option, changes in ({"default": {}} | options).items():
            config = {"model_type": family} | dict(common) | own | changes
            yield f"{family}-{option}", {key: value for key, value in config.items() if value is not _ABSENT}
