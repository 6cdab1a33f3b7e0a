"""The families with experts, or with attention by latents: what their config attributes mean for a decoder block."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tracing_jax.arch.architecture import Arch, LatentAttention, Router, UnsupportedModelError
from tracing_jax.arch.family import NAMES, ArchFields, ConfigFamily, windows_by_type

_NORMALIZED = Router(normalized=True)


def expert_fields(
    config: Any,
    router: Router,
    *,
    count: int,
    units: int,
    dense: int | None = None,
    layers: Sequence[bool] = (),
    per_token: str = "num_experts_per_tok",
) -> ArchFields:
    """Returns the fields of a mixture of experts.

    Args:
      config: has the number of experts of a token.
      router: how they are selected.
      count: the number of experts of a layer.
      units: of each of them.
      dense: the units of layers without experts.
      layers: for each layer whether it has experts; empty: all have.
      per_token: the attribute that says how many experts a token has.
    """
    chosen = getattr(config, per_token)
    if chosen is None:
        raise UnsupportedModelError(f"{per_token} is not set")
    if not 1 <= chosen <= count:
        raise UnsupportedModelError(f"{chosen} experts for each token, of {count}")
    if not 1 <= router.groups_per_token <= router.groups or count % router.groups:
        raise UnsupportedModelError(f"{router.groups_per_token} of {router.groups} groups of {count} experts")
    if router.groups > 1 and chosen > router.groups_per_token * count // router.groups:
        raise UnsupportedModelError(f"{chosen} experts for each token, of {router.groups_per_token} groups")
    if layers and not any(layers):
        return {"mlp_dim": dense}
    found: ArchFields = {"num_experts": count, "experts_per_token": chosen, "router": router, "mlp_dim": units}
    if layers and not all(layers):
        assert dense is not None
        found["layer_experts"] = tuple(layers)
        found["layer_mlp_dims"] = tuple(units if has else dense for has in layers)
    return found


def _is_sparse(config: Any) -> list[bool]:
    """Returns for each layer of a Qwen mixture whether it has experts."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers
    return [i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers)]


def _qwen2_moe(config: Any) -> ArchFields:
    shared: ArchFields = {"shared_mlp_dim": config.shared_expert_intermediate_size, "shared_gate": True}
    experts = expert_fields(
        config, Router(normalized=config.norm_topk_prob), count=config.num_experts,
        units=config.moe_intermediate_size, dense=config.intermediate_size, layers=_is_sparse(config),
    )  # fmt: skip
    windows = {"layer_windows": windows_by_type(config)}
    return {"qkv_bias": config.qkv_bias} | windows | experts | (shared if "num_experts" in experts else {})


def _qwen3_moe(config: Any) -> ArchFields:
    windows = {"layer_windows": (config.sliding_window,) * config.num_hidden_layers}
    return qwen3_experts(config, config.norm_topk_prob) | windows


def qwen3_vl_moe(config: Any) -> ArchFields:
    """Returns the fields of the language model of Qwen3-VL, whose router always normalises its weights."""
    return qwen3_experts(config, True)


def qwen3_experts(config: Any, normalized: bool) -> ArchFields:
    """Returns the fields of attention and experts as Qwen3 has them."""
    bias = config.attention_bias
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head"} | expert_fields(
        config, Router(normalized=normalized), count=config.num_experts,
        units=config.moe_intermediate_size, dense=config.intermediate_size, layers=_is_sparse(config),
    )  # fmt: skip


def qwen_layers(arch: Arch) -> dict[str, Any]:
    """Returns the attributes that say which layers of a Qwen mixture have experts."""
    dense = [i for i in range(arch.num_layers) if not arch.has_experts(i)]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def _olmoe(config: Any) -> ArchFields:
    bias = config.attention_bias
    return {"qk_norm": "all", "clip_qkv": config.clip_qkv, "qkv_bias": bias, "o_bias": bias} | expert_fields(
        config, Router(normalized=config.norm_topk_prob), count=config.num_experts, units=config.intermediate_size
    )


def _gpt_oss(config: Any) -> ArchFields:
    bias = config.attention_bias
    return {
        "qkv_bias": bias, "o_bias": bias, "mlp_bias": True, "sinks": True,
        "clamped_glu": (float(config.swiglu_limit), float(config.swiglu_alpha)),
        "layer_windows": windows_by_type(config),
    } | expert_fields(
        config, Router(bias=True), count=config.num_local_experts, units=config.intermediate_size
    )  # fmt: skip


def _latent(config: Any) -> ArchFields:
    """Returns the fields of attention by latents, whose scale may grow with that of a yarn rope."""
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    if config.num_key_value_heads != config.num_attention_heads:
        raise UnsupportedModelError(
            f"num_key_value_heads {config.num_key_value_heads} is not num_attention_heads {config.num_attention_heads}"
        )
    parameters, scale = config.rope_parameters, (nope + rope) ** -0.5
    if parameters["rope_type"] != "default" and (of_all := parameters.get("mscale_all_dim")):
        scale *= (0.1 * of_all * math.log(max(1.0, parameters["factor"])) + 1.0) ** 2
    return {
        "head_dim": nope + rope, "qkv_bias": config.attention_bias, "o_bias": config.attention_bias,
        "attention_scale": scale,
        "latent": LatentAttention(config.kv_lora_rank, config.q_lora_rank, nope, rope, config.v_head_dim),
    }  # fmt: skip


def _deepseek_layers(config: Any) -> list[bool]:
    return [i >= config.first_k_dense_replace for i in range(config.num_hidden_layers)]


def _routed(config: Any, router: Router, layers: Sequence[bool] = (), dense: int | None = None) -> ArchFields:
    """Returns the fields of a mixture of experts as DeepSeek has it, with an MLP beside the experts."""
    units, shared = config.moe_intermediate_size, config.n_shared_experts
    found = expert_fields(config, router, count=config.n_routed_experts, units=units, dense=dense, layers=layers)
    found["prediction_layers"] = getattr(config, "num_nextn_predict_layers", None) or 0
    return found | ({"shared_mlp_dim": units * shared} if "num_experts" in found and shared else {})


def _deepseek_v2(config: Any) -> ArchFields:
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModelError(f"topk_method {config.topk_method!r} is not greedy or group_limited_greedy")
    if config.norm_topk_prob:
        # The original code divides the weights by their sum and leaves out the factor; transformers does neither.
        raise UnsupportedModelError("norm_topk_prob is set, which transformers does not compute for this family")
    router = Router(normalized=False, scale=config.routed_scaling_factor)
    if config.topk_method == "group_limited_greedy":
        router = _with_groups(router, config)
    return (
        _latent(config)
        | {"rope_interleaved": True}
        | _routed(config, router, _deepseek_layers(config), config.intermediate_size)
    )


def _with_groups(router: Router, config: Any) -> Router:
    if config.n_group == config.topk_group:
        return router
    return replace(router, groups=config.n_group, groups_per_token=config.topk_group)


def noaux_router(config: Any) -> Router:
    """Returns the router of DeepSeek-V3, whose selection is balanced by a learned bias."""
    router = Router(
        "sigmoid", config.norm_topk_prob, 1e-20, config.routed_scaling_factor, selects_with_bias=True,
        group_score="top2",
    )  # fmt: skip
    return _with_groups(router, config)


def _deepseek_v3(config: Any) -> ArchFields:
    return (
        _latent(config)
        | {"rope_interleaved": bool(config.rope_interleave)}
        | _routed(config, noaux_router(config), _deepseek_layers(config), config.intermediate_size)
    )


def _leading_dense(arch: Arch) -> dict[str, Any]:
    layers = range(arch.num_layers)
    return {"first_k_dense_replace": next((i for i in layers if arch.has_experts(i)), arch.num_layers)}


def _glm4_moe(config: Any) -> ArchFields:
    return glm4v_moe(config) | {"qk_norm": "head" if config.use_qk_norm else None}


def glm4v_moe(config: Any) -> ArchFields:
    """Returns the fields of the language model of GLM-4.5V, which has no norms of queries and keys."""
    return {"qkv_bias": config.attention_bias} | _routed(
        config, noaux_router(config), _deepseek_layers(config), config.intermediate_size
    )


def _solar_open(config: Any) -> ArchFields:
    return {"qkv_bias": config.attention_bias} | _routed(config, noaux_router(config))


def _minimax_m2(config: Any) -> ArchFields:
    router = Router("sigmoid", selects_with_bias=True)
    return {"qk_norm": "all"} | expert_fields(
        config, router, count=config.num_local_experts, units=config.intermediate_size
    )


def _phimoe(config: Any) -> ArchFields:
    if config.num_experts_per_tok != 2:
        raise UnsupportedModelError(f"num_experts_per_tok {config.num_experts_per_tok}: its router always selects 2")
    bias = config.attention_bias
    return {
        "norm": "layer_norm", "qkv_bias": bias, "o_bias": bias, "head_bias": config.lm_head_bias,
        "layer_windows": (config.sliding_window,) * config.num_hidden_layers,
    } | expert_fields(
        config, Router("sparsemixer", tolerance=config.router_jitter_noise), count=config.num_local_experts,
        units=config.intermediate_size,
    )  # fmt: skip


def _granitemoe(config: Any) -> ArchFields:
    bias = config.attention_bias
    return {
        "qkv_bias": bias,
        "o_bias": bias,
        "attention_scale": config.attention_multiplier,
        "embed_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1.0 / config.logits_scaling,
    } | expert_fields(config, _NORMALIZED, count=config.num_local_experts, units=config.intermediate_size)


def _ernie4_5_moe(config: Any) -> ArchFields:
    first, last, interval = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
    layers = [(i + 1) % interval == 0 and first <= i <= last for i in range(config.num_hidden_layers)]
    found = expert_fields(
        config, Router(floor=config.moe_norm_min, selects_with_bias=True), count=config.moe_num_experts,
        units=config.moe_intermediate_size, dense=config.intermediate_size, layers=layers,
    )  # fmt: skip
    if "num_experts" in found and config.moe_num_shared_experts:
        found["shared_mlp_dim"] = config.moe_intermediate_size * config.moe_num_shared_experts
    return {"rope_interleaved": True} | found


def _ernie_layers(arch: Arch) -> dict[str, Any]:
    sparse = [i for i in range(arch.num_layers) if arch.has_experts(i)]
    return {
        "moe_layer_start_index": min(sparse, default=arch.num_layers),
        "moe_layer_end_index": max(sparse, default=-1),
        "moe_layer_interval": 1,
    }


def _llama4(config: Any) -> ArchFields:
    kinds = {"chunked_attention": config.attention_chunk_size, "full_attention": None}
    if set(config.layer_types) - set(kinds) or len(config.layer_types) != config.num_hidden_layers:
        raise UnsupportedModelError(f"layer_types must name chunked_attention or full_attention for each layer, "
                                    f"found {config.layer_types}")  # fmt: skip
    tuned = (float(config.floor_scale), float(config.attn_scale)) if config.attn_temperature_tuning else None
    bias, chunks = config.attention_bias, tuple(kinds[kind] for kind in config.layer_types)
    layers = [i in config.moe_layers for i in range(config.num_hidden_layers)]
    found = expert_fields(
        config, Router("sigmoid", normalized=False, weights_input=True), count=config.num_local_experts,
        units=config.intermediate_size, dense=config.intermediate_size_mlp, layers=layers,
    )  # fmt: skip
    if "num_experts" in found:
        found["shared_mlp_dim"] = config.intermediate_size
    return {
        "qkv_bias": bias, "o_bias": bias, "rope_interleaved": True, "rotated_norm": config.use_qk_norm,
        "temperature": tuned,
        "layer_chunks": chunks if any(chunks) else (),
    } | found  # fmt: skip


def _has_positions(config: Any) -> list[bool]:
    return [bool(layer) for layer in config.no_rope_layers]


def _llama4_layers(arch: Arch) -> dict[str, Any]:
    sparse = [i for i in range(arch.num_layers) if arch.has_experts(i)]
    chunk = next((size for size in arch.layer_chunks if size is not None), None)
    kinds = ["full_attention" if size is None else "chunked_attention" for size in arch.layer_chunks]
    return {
        "moe_layers": sparse,
        "no_rope_layers": [int(any(arch.rope_frequencies[rope])) for rope in arch.layer_ropes],
    } | ({"layer_types": kinds, "attention_chunk_size": chunk} if arch.layer_chunks else {})


_NAMES = {name: attribute for name, attribute in NAMES.items() if name != "mlp_dim"}
SPARSE = _NAMES | {"mlp_dim": "moe_intermediate_size", "dense_mlp_dim": "intermediate_size"}
_ALL_SPARSE = _NAMES | {"mlp_dim": "intermediate_size"}
# The width of a head of attention by latents follows from that of its parts.
_LATENT = {name: attribute for name, attribute in SPARSE.items() if name != "head_dim"}

LOSSES = "output_router_logits router_aux_loss_coef router_jitter_noise num_experts num_local_experts"
_ROUTED = (
    "rms_norm_eps attention_bias moe_intermediate_size num_experts_per_tok n_shared_experts n_routed_experts"
    " routed_scaling_factor n_group topk_group norm_topk_prob"
)
GLM4V_EXPERTS = _ROUTED + " first_k_dense_replace"
_MLA = _ROUTED + " first_k_dense_replace kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim"
QWEN_EXPERTS = "rms_norm_eps decoder_sparse_step moe_intermediate_size num_experts_per_tok num_experts mlp_only_layers"
# What only training or layers behind the last read.
_DEEPSEEK_NEUTRAL = (
    "qk_head_dim num_nextn_predict_layers num_mtp_layers aux_loss_alpha seq_aux ep_size moe_layer_freq scoring_func"
    " topk_method pretraining_tp num_local_experts num_experts max_window_layers"
)

MIXTURES: dict[str, ConfigFamily] = {
    "qwen2_moe": ConfigFamily(
        _qwen2_moe,
        QWEN_EXPERTS + " norm_topk_prob qkv_bias shared_expert_intermediate_size sliding_window layer_types",
        names=SPARSE | {"shared_mlp_dim": "shared_expert_intermediate_size"},
        neutral=LOSSES,
        layer_fields=qwen_layers,
    ),
    "qwen3_moe": ConfigFamily(
        _qwen3_moe,
        QWEN_EXPERTS + " norm_topk_prob attention_bias sliding_window",
        names=SPARSE,
        neutral=LOSSES,
        layer_fields=qwen_layers,
    ),
    "olmoe": ConfigFamily(
        _olmoe,
        "rms_norm_eps attention_bias clip_qkv num_experts num_experts_per_tok norm_topk_prob",
        names=_ALL_SPARSE,
        neutral=LOSSES,
    ),
    "gpt_oss": ConfigFamily(
        _gpt_oss,
        "rms_norm_eps attention_bias num_local_experts num_experts_per_tok swiglu_alpha swiglu_limit sliding_window"
        " layer_types",
        names=_ALL_SPARSE,
        activation="",
        neutral=LOSSES + " hidden_act initial_context_length experts_per_token",
    ),
    "deepseek_v2": ConfigFamily(
        _deepseek_v2, _MLA + " topk_method", names=_LATENT, neutral=_DEEPSEEK_NEUTRAL, layer_fields=_leading_dense
    ),
    "deepseek_v3": ConfigFamily(
        _deepseek_v3, _MLA + " rope_interleave", names=_LATENT, neutral=_DEEPSEEK_NEUTRAL, layer_fields=_leading_dense
    ),
    "glm4_moe": ConfigFamily(
        _glm4_moe,
        GLM4V_EXPERTS + " use_qk_norm",
        names=SPARSE,
        neutral=_DEEPSEEK_NEUTRAL,
        partial_rotary=True,
        layer_fields=_leading_dense,
    ),
    "solar_open": ConfigFamily(
        _solar_open, _ROUTED, names=_NAMES | {"mlp_dim": "moe_intermediate_size"}, neutral=_DEEPSEEK_NEUTRAL
    ),
    "minimax_m2": ConfigFamily(
        _minimax_m2,
        "rms_norm_eps num_local_experts num_experts_per_tok rotary_dim",
        names=_ALL_SPARSE,
        neutral=LOSSES,
        partial_rotary=True,
    ),
    "phimoe": ConfigFamily(
        _phimoe,
        "rms_norm_eps attention_bias lm_head_bias sliding_window num_local_experts num_experts_per_tok"
        " router_jitter_noise",
        names=_ALL_SPARSE,
        neutral="output_router_logits router_aux_loss_coef input_jitter_noise",
    ),
    "granitemoe": ConfigFamily(
        _granitemoe,
        "rms_norm_eps attention_bias num_local_experts num_experts_per_tok attention_multiplier embedding_multiplier"
        " residual_multiplier logits_scaling",
        names=_ALL_SPARSE,
        neutral=LOSSES,
    ),
    "llama4_text": ConfigFamily(
        _llama4,
        "rms_norm_eps attention_bias intermediate_size_mlp num_experts_per_tok num_local_experts moe_layers"
        " interleave_moe_layer_step use_qk_norm no_rope_layers no_rope_layer_interval attention_chunk_size layer_types"
        " attn_temperature_tuning floor_scale attn_scale",
        names=_NAMES | {"mlp_dim": "intermediate_size", "dense_mlp_dim": "intermediate_size_mlp"},
        neutral="output_router_logits router_aux_loss_coef router_jitter_noise for_llm_compressor",
        rope_layers=_has_positions,
        per_layer=(),
        layer_fields=_llama4_layers,
    ),
    "ernie4_5_moe": ConfigFamily(
        _ernie4_5_moe,
        "rms_norm_eps moe_intermediate_size moe_k num_experts_per_tok moe_num_experts moe_num_shared_experts"
        " moe_layer_start_index moe_layer_end_index moe_layer_interval moe_norm_min",
        names=SPARSE,
        neutral=LOSSES + " num_experts",
        layer_fields=_ernie_layers,
    ),
}
