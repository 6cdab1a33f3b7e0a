"""Tiny models of Gemma 4: configs of its options."""

from collections.abc import Iterator, Mapping
from typing import Any

_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA4: dict[str, Any] = {
    "rms_norm_eps": 3e-3,
    "num_hidden_layers": 4,
    "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
    "sliding_window": 5,
    "global_head_dim": 12,
    "rope_parameters": {
        _FULL: {"rope_type": "proportional", "rope_theta": 777.0, "partial_rotary_factor": 0.34},
        _SLIDING: {"rope_type": "default", "rope_theta": 43.2},
    },
    "final_logit_softcapping": 2.5,
    "hidden_size_per_layer_input": 0,
    "tie_word_embeddings": True,
}
_PER_LAYER = {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 31}
_ONE_KEY = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
_SHARED = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 5,
    "layer_types": [_SLIDING, _FULL, _SLIDING, _SLIDING, _FULL],
}
_EXPERTS = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 12}
_OPTIONS: dict[str, dict[str, Any]] = {
    "two_widths": {},
    "values_are_keys": _ONE_KEY,
    "per_layer": _PER_LAYER,
    "shared_keys": _PER_LAYER | _SHARED | {"use_double_wide_mlp": True},
    "shared_one_key": _PER_LAYER | _SHARED | _ONE_KEY,
    "experts": _EXPERTS | _ONE_KEY,
    "untied": {"tie_word_embeddings": False, "final_logit_softcapping": None},
    "bias": _PER_LAYER | _SHARED | {"attention_bias": True},
    "one_width": {"global_head_dim": 8, "num_key_value_heads": 1},
    "full_alone": {"layer_types": [_FULL] * 4},
}

WITH_GOLDEN = {
    "gemma4_text-values_are_keys", "gemma4_text-shared_keys", "gemma4_text-experts", "gemma4_unified_text-default",
}  # fmt: skip
"""The cases of which a golden file holds the numbers."""


def configs(common: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the name and the config of every case; `common` is what families share."""
    for option, changes in _OPTIONS.items():
        config = {"model_type": "gemma4_text"} | dict(common) | _GEMMA4 | changes
        yield f"gemma4_text-{option}", config
    config = {"model_type": "gemma4_unified_text"} | dict(common) | _GEMMA4 | _ONE_KEY
    yield "gemma4_unified_text-default", {key: v for key, v in config.items() if key != "hidden_size_per_layer_input"}
