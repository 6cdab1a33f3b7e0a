"""The families with linear recurrences beside attention: what their config attributes mean for a decoder block."""

from typing import Any

from tracing_jax.arch.architecture import Router, UnsupportedModelError
from tracing_jax.arch.family import NAMES, ArchFields, ConfigFamily
from tracing_jax.arch.mixers import DeltaNet
from tracing_jax.arch.mixtures import LOSSES, QWEN_EXPERTS, SPARSE, expert_fields, qwen3_experts, qwen_layers

_MIXERS = {"linear_attention": ("delta_net",), "full_attention": ("attn",)}


def _qwen_hybrid(config: Any) -> ArchFields:
    """Returns the fields of gated delta nets beside gated attention."""
    if set(config.layer_types) - set(_MIXERS) or len(config.layer_types) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"layer_types must name linear_attention or full_attention for each of {config.num_hidden_layers} layers, "
            f"found {config.layer_types}"
        )
    fields = {"norm": "rms_unit_offset", "head_gate": True}
    if "linear_attention" not in config.layer_types:
        return fields
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if values % keys:
        raise UnsupportedModelError(f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}")
    net = DeltaNet(
        keys, values // keys, config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim
    )
    return fields | {"delta_net": net, "layer_mixers": tuple(_MIXERS[kind] for kind in config.layer_types)}


def _qwen3_next(config: Any) -> ArchFields:
    shared = {"shared_mlp_dim": config.shared_expert_intermediate_size, "shared_gate": True}
    experts = qwen3_experts(config, config.norm_topk_prob)
    return _qwen_hybrid(config) | experts | (shared if "num_experts" in experts else {})


def _qwen3_5(config: Any) -> ArchFields:
    bias = config.attention_bias
    return _qwen_hybrid(config) | {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head"}


def _qwen3_5_moe(config: Any) -> ArchFields:
    shared = {"shared_mlp_dim": config.shared_expert_intermediate_size, "shared_gate": True}
    experts = expert_fields(config, Router(), count=config.num_experts, units=config.moe_intermediate_size)
    return _qwen3_5(config) | experts | shared


_DELTA = (
    "rms_norm_eps attention_bias layer_types linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim"
    " linear_num_key_heads linear_num_value_heads"
)
_SHARED = {"shared_mlp_dim": "shared_expert_intermediate_size"}
_EXPERTS = " moe_intermediate_size num_experts_per_tok num_experts shared_expert_intermediate_size"

HYBRIDS: dict[str, ConfigFamily] = {
    "qwen3_next": ConfigFamily(
        _qwen3_next,
        f"{_DELTA} {QWEN_EXPERTS} norm_topk_prob shared_expert_intermediate_size",
        names=SPARSE | _SHARED,
        neutral=LOSSES,
        partial_rotary=True,
        layer_fields=qwen_layers,
    ),
    "qwen3_5_text": ConfigFamily(_qwen3_5, _DELTA, partial_rotary=True),
    "qwen3_5_moe_text": ConfigFamily(
        _qwen3_5_moe,
        _DELTA + _EXPERTS,
        names=NAMES | {"mlp_dim": "moe_intermediate_size"} | _SHARED,
        neutral=LOSSES,
        partial_rotary=True,
    ),
}
