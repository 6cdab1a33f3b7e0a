"""Tiny models with linear recurrences beside attention: configs of each family and of its options."""

from collections.abc import Iterator, Mapping
from typing import Any

_ABSENT = object()
_EPS = {"rms_norm_eps": 3e-3}
_LINEAR, _FULL = "linear_attention", "full_attention"
_THIRD = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}
_DELTA: dict[str, Any] = _EPS | {
    "num_hidden_layers": 3,
    "layer_types": [_LINEAR, _FULL, _LINEAR],
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": _THIRD,
}
_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 18,
}
_DELTA_OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"attention_bias": True},
    "one_group": {"linear_num_key_heads": 1, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "one_head_a_group": {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 4, "num_key_value_heads": 1},
    "interval": {"layer_types": _ABSENT, "num_hidden_layers": 4},
    "attention_alone": {"layer_types": [_FULL] * 3},
    "relu": {"hidden_act": "relu"},
}

_NEMOTRON: dict[str, Any] = {
    "layer_norm_epsilon": 3e-3,
    "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "mlp"],
    "num_hidden_layers": _ABSENT,
    "rope_parameters": _ABSENT,
    "ssm_state_size": 6,
    "mamba_num_heads": 4,
    "mamba_head_dim": 5,
    "n_groups": 2,
    "conv_kernel": 3,
    "time_step_min": 0.3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 18,
    "routed_scaling_factor": 1.7,
}

_HYBRIDS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "qwen3_next": (
        _DELTA | _EXPERTS,
        _DELTA_OPTIONS | {"not_normalized": {"norm_topk_prob": False}, "dense_first": {"mlp_only_layers": [0]}},
    ),
    "qwen3_5_text": (_DELTA, _DELTA_OPTIONS),
    "qwen3_5_moe_text": (_DELTA | _EXPERTS | {"intermediate_size": _ABSENT}, {"bias": {"attention_bias": True}}),
    "nemotron_h": (
        _NEMOTRON,
        {
            "two_in_a_row": {"layers_block_type": ["linear_attention"] * 2 + ["mlp", "full_attention", "moe"]},
            "biases": {
                "use_bias": True,
                "mlp_bias": True,
                "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
            },
            "no_biases": {"use_conv_bias": False, "norm_topk_prob": False},
            "expert_groups": {"n_group": 4, "topk_group": 2},
            "latent": {"moe_latent_size": 8},
            "dense": {"layers_block_type": ["linear_attention", "mlp"] * 2 + ["full_attention", "mlp"]},
        },
    ),
}
"""Family -> its config, and what each of its options changes there."""

WITH_GOLDEN = {
    "qwen3_next-default", "qwen3_next-dense_first", "qwen3_5_text-one_group", "qwen3_5_text-interval",
    "qwen3_5_moe_text-bias", "nemotron_h-default", "nemotron_h-two_in_a_row",
    "nemotron_h-latent",
}  # fmt: skip
"""The cases of which a golden file holds the numbers."""


def configs(common: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the config of every case; `common` is what families share."""
    for family, (own, options) in _HYBRIDS.items():
        for option, changes in ({"default": {}} | options).items():
            config = {"model_type": family} | dict(common) | own | changes
            yield f"{family}-{option}", {key: value for key, value in config.items() if value is not _ABSENT}
