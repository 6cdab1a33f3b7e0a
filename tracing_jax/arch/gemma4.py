"""Gemma 4: what its config attributes mean for a decoder block."""

from dataclasses import replace
from typing import Any

from tracing_jax.arch.architecture import Arch, Router, UnsupportedModelError
from tracing_jax.arch.family import NAMES, ArchFields, ConfigFamily, windows_by_type
from tracing_jax.arch.mixers import Heads
from tracing_jax.arch.mixtures import expert_fields
from tracing_jax.arch.rope import fields_of, rope_of

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _heads(config: Any, kind: str) -> Heads:
    """Returns the sizes of the heads of layers of one type, of which there must be some."""
    found = []
    for layer, other in enumerate(config.layer_types):
        own = config.layer_overrides.get(layer, {})
        if unknown := sorted(set(own) - {"num_key_value_heads", "head_dim"}):
            raise UnsupportedModelError(f"per_layer_config sets {', '.join(unknown)} of layer {layer}")
        sizes = (own.get("num_key_value_heads", config.num_key_value_heads), own.get("head_dim", config.head_dim))
        found += [sizes] if other == kind else []
    if len(set(found)) > 1:
        raise UnsupportedModelError(f"per_layer_config gives layers of type {kind} heads of different sizes")
    kv_heads, head_dim = found[0]
    if config.num_attention_heads % kv_heads:
        raise UnsupportedModelError(f"num_attention_heads {config.num_attention_heads} is no multiple of {kv_heads}")
    keys_alone = kind == _FULL and bool(config.attention_k_eq_v)
    return Heads(kv_heads, config.num_attention_heads // kv_heads, head_dim, keys_alone)


def _attention(config: Any) -> ArchFields:
    """Returns the fields of attention, with heads of two sizes, and of keys and values that layers share."""
    windows, types, layers = windows_by_type(config), config.layer_types, config.num_hidden_layers
    sizes = {kind: _heads(config, kind) for kind in (_SLIDING, _FULL) if kind in types}
    if not 0 <= config.num_kv_shared_layers < layers:
        raise UnsupportedModelError(f"num_kv_shared_layers is {config.num_kv_shared_layers}, of {layers} layers")
    own = sizes.get(_SLIDING) or sizes[_FULL]
    has_two = sizes[_FULL] != own or own.values_are_keys if _FULL in sizes else False
    names = {_SLIDING: "attn", _FULL: "global_attn" if has_two else "attn"}
    first = layers - config.num_kv_shared_layers
    if lacking := sorted(set(types[first:]) - set(types[:first])):
        raise UnsupportedModelError(f"num_kv_shared_layers leaves no layer of type {', '.join(lacking)} with keys")
    mixers = tuple((f"shared_{names[kind]}" if i >= first else names[kind],) for i, kind in enumerate(types))
    ropes = {kind: rope_of(config, kind, heads.head_dim) for kind, heads in sizes.items()}
    kinds = list(ropes)
    return fields_of([ropes[kind] for kind in kinds], tuple(kinds.index(kind) for kind in types)) | {
        "layer_windows": windows,
        "num_kv_heads": own.kv_heads,
        "q_group": own.q_group,
        "head_dim": own.head_dim,
        "layer_mixers": mixers if set(mixers) != {("attn",)} else (),
        "global_attn": sizes[_FULL] if has_two else None,
    }


def _per_layer(config: Any) -> ArchFields:
    """Returns the fields of per-layer embeddings."""
    if not getattr(config, "hidden_size_per_layer_input", None):
        return {}
    if config.vocab_size_per_layer_input != config.vocab_size:
        raise UnsupportedModelError(
            f"vocab_size_per_layer_input {config.vocab_size_per_layer_input} is not vocab_size {config.vocab_size}"
        )
    layers = config.num_hidden_layers
    return {
        "per_layer_dim": config.hidden_size_per_layer_input,
        "per_layer_count": layers,
        "per_layer_index": tuple(range(layers)),
    }


def _mlps(config: Any) -> ArchFields:
    """Returns the fields of MLPs: twice as wide in layers that share keys, or beside experts."""
    doubled = config.num_kv_shared_layers if getattr(config, "use_double_wide_mlp", False) else 0
    units, plain = config.intermediate_size, config.num_hidden_layers - doubled
    widths = (units,) * plain + (2 * units,) * doubled
    if not getattr(config, "enable_moe_block", False):
        return {"layer_mlp_dims": widths} if doubled else {}
    if doubled:
        raise UnsupportedModelError(
            "use_double_wide_mlp and enable_moe_block are set, which are not supported together"
        )
    if None in (config.num_experts, config.moe_intermediate_size):
        raise UnsupportedModelError("enable_moe_block is set, num_experts or moe_intermediate_size is not")
    experts = expert_fields(
        config, Router(expert_scale=True), count=config.num_experts, units=config.moe_intermediate_size,
        per_token="top_k_experts",
    )  # fmt: skip
    return experts | {"shared_mlp_dim": units, "branch_norms": True}


def _gemma4(config: Any) -> ArchFields:
    bias = config.attention_bias
    return (
        {
            "attention_scale": 1.0,
            "embed_scale": config.hidden_size**0.5,
            "post_norms": True,
            "qk_norm": "head",
            "value_norm": True,
            "qkv_bias": bias,
            "o_bias": bias,
            "layer_scale": True,
            "logit_softcap": config.final_logit_softcapping,
        }
        | _attention(config)
        | _per_layer(config)
        | _mlps(config)
    )


def _layers(arch: Arch) -> dict[str, Any]:
    """Returns the attribute that says which layers have heads of another size."""
    if (heads := arch.global_attn) is None:
        return {}
    own = {"head_dim": heads.head_dim, "num_key_value_heads": heads.kv_heads}
    return {"per_layer_config": {str(i): own for i in range(arch.num_layers) if "attn" not in arch.mixers_of(i)}}


_USES = (
    "rms_norm_eps attention_bias hidden_activation final_logit_softcapping sliding_window layer_types per_layer_config"
    " attention_k_eq_v num_kv_shared_layers use_double_wide_mlp"
)

_TEXT = ConfigFamily(
    _gemma4,
    _USES + " enable_moe_block num_experts top_k_experts moe_intermediate_size hidden_size_per_layer_input"
    " vocab_size_per_layer_input",
    {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    activation="hidden_activation",
    # Between tokens of images alone, but for the value `all`, which sets is_causal.
    neutral="use_bidirectional_attention",
    names=NAMES | {"mlp_dim": "moe_intermediate_size", "dense_mlp_dim": "intermediate_size"},
    layer_fields=_layers,
)

GEMMA4: dict[str, ConfigFamily] = {
    "gemma4_text": _TEXT,
    "gemma4_unified_text": replace(_TEXT, uses=_USES),
}
