"""The families, one function and one row each: what their config attributes mean for a decoder block."""

import math
from typing import Any

from tracing_jax.arch.architecture import UnsupportedModelError
from tracing_jax.arch.dense_families import DENSE_FAMILIES
from tracing_jax.arch.family import GPT_NAMES, ArchFields, ConfigFamily, one_window, windows_by_type
from tracing_jax.arch.gemma4 import GEMMA4
from tracing_jax.arch.hybrids import HYBRIDS
from tracing_jax.arch.mixtures import MIXTURES

_GEMMA_USES = "rms_norm_eps attention_bias hidden_activation use_bidirectional_attention"
_GEMMA2_USES = (
    _GEMMA_USES + " query_pre_attn_scalar sliding_window layer_types final_logit_softcapping attn_logit_softcapping"
)


def _llama(config: Any) -> ArchFields:
    return {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _qwen2(config: Any) -> ArchFields:
    return {"qkv_bias": True, "layer_windows": windows_by_type(config)}


def _qwen3(config: Any) -> ArchFields:
    bias = config.attention_bias
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head", "layer_windows": windows_by_type(config)}


def _gemma(config: Any) -> ArchFields:
    return {
        "norm": "rms_unit_offset",
        "embed_scale": math.sqrt(config.hidden_size),
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
    }


def _gemma2(config: Any) -> ArchFields:
    return _gemma(config) | {
        "post_norms": True,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
        "layer_windows": windows_by_type(config),
    }


def _gemma3(config: Any) -> ArchFields:
    # transformers has attn_logit_softcapping in Gemma 3's config and never applies it; a set value is ambiguous.
    if config.attn_logit_softcapping is not None:
        raise UnsupportedModelError("attn_logit_softcapping is set, but Gemma 3 has no attention soft-capping")
    return _gemma2(config) | {"qk_norm": "head"}


def _olmo(config: Any) -> ArchFields:
    return {
        "norm": "layer_norm_plain",
        "norm_eps": 1e-5,  # a constant of the family, absent from its config
        "clip_qkv": config.clip_qkv,
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
    }


def _olmo2(config: Any) -> ArchFields:
    bias = config.attention_bias
    return {"pre_norms": False, "post_norms": True, "qk_norm": "all", "qkv_bias": bias, "o_bias": bias}


def _granite(config: Any) -> ArchFields:
    return _llama(config) | {
        "attention_scale": config.attention_multiplier,
        "embed_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1.0 / config.logits_scaling,
    }


def _mixtral(config: Any) -> ArchFields:
    experts, per_token = config.num_local_experts, config.num_experts_per_tok
    if not 1 <= per_token <= experts:
        raise UnsupportedModelError(f"num_experts_per_tok {per_token} is not in 1..num_local_experts ({experts})")
    return one_window(config) | {"num_experts": experts, "experts_per_token": per_token}


def _gpt2(config: Any) -> ArchFields:
    if config.n_embd % config.n_head:
        raise UnsupportedModelError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    return {
        "mlp_dim": 4 * config.n_embd if config.n_inner is None else config.n_inner,
        "num_positions": config.n_positions,
        "norm": "layer_norm",
        "norm_eps": config.layer_norm_epsilon,
        "inverse_layer_scale": config.scale_attn_by_inverse_layer_idx,
        "gated": False,
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
    } | ({} if config.scale_attn_weights else {"attention_scale": 1.0})


FAMILIES: dict[str, ConfigFamily] = {
    "llama": ConfigFamily(_llama, "rms_norm_eps attention_bias mlp_bias"),
    "mistral": ConfigFamily(one_window, "rms_norm_eps sliding_window"),
    "qwen2": ConfigFamily(_qwen2, "rms_norm_eps sliding_window layer_types"),
    "qwen3": ConfigFamily(_qwen3, "rms_norm_eps attention_bias sliding_window layer_types"),
    "gemma": ConfigFamily(_gemma, _GEMMA_USES),
    "gemma2": ConfigFamily(_gemma2, _GEMMA2_USES, activation="hidden_activation"),
    "gemma3_text": ConfigFamily(
        _gemma3,
        _GEMMA2_USES + " sliding_window_pattern _sliding_window_pattern",
        {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
        activation="hidden_activation",
    ),
    "olmo": ConfigFamily(_olmo, "attention_bias clip_qkv"),
    "olmo2": ConfigFamily(_olmo2, "rms_norm_eps attention_bias"),
    "granite": ConfigFamily(
        _granite,
        "rms_norm_eps attention_bias mlp_bias attention_multiplier embedding_multiplier residual_multiplier"
        " logits_scaling",
    ),
    "mixtral": ConfigFamily(
        _mixtral,
        "rms_norm_eps sliding_window num_local_experts num_experts_per_tok",
        neutral="output_router_logits router_aux_loss_coef router_jitter_noise",
    ),
    "gpt2": ConfigFamily(
        _gpt2,
        "n_embd n_layer n_head n_inner n_positions layer_norm_epsilon activation_function scale_attn_weights"
        " scale_attn_by_inverse_layer_idx",
        thetas={},
        common=frozenset({"vocab_size", "tie_word_embeddings"}),
        names=GPT_NAMES,
        activation="activation_function",
        # n_ctx only sized the mask of old files; upcasting attention changes nothing in float32.
        neutral="attn_pdrop embd_pdrop gradient_checkpointing n_ctx output_past reorder_and_upcast_attn"
        " summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj"
        " task_specific_params _num_labels",
    ),
}

FAMILIES |= DENSE_FAMILIES | MIXTURES | HYBRIDS | GEMMA4

SUPPORTED_FAMILIES = tuple(sorted(FAMILIES))
