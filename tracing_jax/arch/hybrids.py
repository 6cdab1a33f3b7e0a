"""The families with linear recurrences beside attention: what their config attributes mean for a decoder block."""

from typing import Any

from tracing_jax.arch.architecture import Arch, Router, UnsupportedModelError
from tracing_jax.arch.family import COMMON, NAMES, ArchFields, ConfigFamily
from tracing_jax.arch.mixers import DeltaNet, Mamba, mixer_kind
from tracing_jax.arch.mixtures import (
    LOSSES,
    QWEN_EXPERTS,
    SPARSE,
    expert_fields,
    noaux_router,
    qwen3_experts,
    qwen_layers,
)

_MIXERS = {"linear_attention": ("delta_net",), "full_attention": ("attn",)}


def _qwen_hybrid(config: Any) -> ArchFields:
    """Returns the fields of gated delta nets beside gated attention."""
    if set(config.layer_types) - set(_MIXERS) or len(config.layer_types) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"layer_types must name linear_attention or full_attention for each of {config.num_hidden_layers} layers, "
            f"found {config.layer_types}"
        )
    further = getattr(config, "mtp_num_hidden_layers", None) or 0
    fields = {"norm": "rms_unit_offset", "head_gate": True, "prediction_layers": further}
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


_PARTS = {"linear_attention": "mamba", "full_attention": "attn"}


def _nemotron_layers(config: Any) -> list[tuple[tuple[str, ...], str]]:
    """Returns what mixes tokens in each layer of ours, and the kind of MLP that follows it: `mlp` or `moe`.

    A layer there has one part; one of ours ends with the next MLP.
    """
    layers: list[tuple[tuple[str, ...], str]] = []
    mixers: list[str] = []
    for kind in config.layer_types:
        if kind in _PARTS:
            again = sum(mixer_kind(mixer) == _PARTS[kind] for mixer in mixers)
            mixers.append(_PARTS[kind] + (f"_{again + 1}" if again else ""))
        elif kind in ("mlp", "moe"):
            layers.append((tuple(mixers), kind))
            mixers = []
        else:
            raise UnsupportedModelError(f"layers_block_type names {kind!r}")
    if mixers:
        raise UnsupportedModelError(f"the last layers have no MLP behind them: {', '.join(mixers)}")
    if any("attn_2" in own for own, _ in layers):
        raise UnsupportedModelError("two layers of attention without an MLP between them are not supported")
    return layers


def _nemotron_h(config: Any) -> ArchFields:
    if config.mlp_bias and "moe" in config.layer_types:
        raise UnsupportedModelError("mlp_bias is set in a model with experts, which have none beside an MLP that has")
    if config.tie_word_embeddings:
        raise UnsupportedModelError("tie_word_embeddings is set, which transformers does not do in this family")
    if config.mamba_hidden_act != "silu":
        raise UnsupportedModelError(f"mamba_hidden_act {config.mamba_hidden_act!r} is not silu")
    if config.mamba_num_heads % config.n_groups:
        raise UnsupportedModelError(f"mamba_num_heads {config.mamba_num_heads} is no multiple of n_groups")
    layers = _nemotron_layers(config)
    sparse = [kind == "moe" for _, kind in layers]
    mamba = Mamba(
        config.n_groups, config.mamba_num_heads // config.n_groups, config.ssm_state_size, config.mamba_head_dim,
        config.conv_kernel, config.time_step_min, config.use_conv_bias, config.use_bias,
    )  # fmt: skip
    fields: ArchFields = {
        "num_layers": len(layers), "layer_windows": (None,) * len(layers), "norm_eps": config.layer_norm_epsilon,
        "gated": False, "mlp_bias": config.mlp_bias, "layer_mixers": tuple(mixers for mixers, _ in layers),
    }  # fmt: skip
    if "linear_attention" in config.layer_types:
        fields["mamba"] = mamba
    if any(sparse):
        fields |= expert_fields(
            config, noaux_router(config), count=config.n_routed_experts, units=config.moe_intermediate_size,
            dense=config.intermediate_size, layers=sparse,
        ) | {
            "shared_mlp_dim": config.moe_shared_expert_intermediate_size, "expert_latent_dim": config.moe_latent_size
        }  # fmt: skip
    return fields


def _nemotron_types(arch: Arch) -> dict[str, Any]:
    """Returns the attribute that says what each layer of a Nemotron-H is."""
    kinds = {mixer: kind for kind, mixer in _PARTS.items()}
    types = []
    for i in range(arch.num_layers):
        types += [kinds[mixer_kind(mixer)] for mixer in arch.mixers_of(i)] + ["moe" if arch.has_experts(i) else "mlp"]
    return {"layers_block_type": types, "num_hidden_layers": len(types)}


_DELTA = (
    "rms_norm_eps attention_bias layer_types linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim"
    " linear_num_key_heads linear_num_value_heads mtp_num_hidden_layers"
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
    "nemotron_h": ConfigFamily(
        _nemotron_h,
        "layer_norm_epsilon layers_block_type layer_types intermediate_size mlp_hidden_act mlp_bias ssm_state_size"
        " mamba_num_heads mamba_head_dim mamba_hidden_act n_groups conv_kernel time_step_min use_conv_bias use_bias"
        " n_routed_experts moe_intermediate_size moe_shared_expert_intermediate_size moe_latent_size"
        " num_experts_per_tok routed_scaling_factor n_group topk_group norm_topk_prob",
        thetas={},
        common=COMMON - {"rope_parameters", "hidden_act"},
        activation="mlp_hidden_act",
        # Its attention has no biases and no window; the limits of steps are not read, the kernels make no difference.
        neutral="attention_bias num_logits_to_keep use_mamba_kernels expand time_step_max time_step_limit"
        " time_step_floor chunk_size mamba_proj_bias mamba_ssm_cache_dtype n_shared_experts moe_shared_expert_overlap"
        " num_nextn_predict_layers mtp_layers_block_type rescale_prenorm_residual residual_in_fp32 hidden_dropout"
        " output_router_logits num_local_experts sliding_window hybrid_override_pattern mtp_hybrid_override_pattern",
        names={name: attribute for name, attribute in SPARSE.items() if name not in ("num_layers", "norm_eps")}
        | {"norm_eps": "layer_norm_epsilon", "shared_mlp_dim": "moe_shared_expert_intermediate_size"},
        per_layer=(),
        layer_fields=_nemotron_types,
    ),
}
