"""The families of llama.cpp, one row each: the model type in Hugging Face, and where its attributes are in metadata."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tracing_jax.checkpoint.gguf import derived
from tracing_jax.checkpoint.gguf.derived import HfConfig

COMMON = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}


class GgufFamily(NamedTuple):
    """How the metadata of a family become a config.

    Attributes:
      model_type: in Hugging Face.
      keys: metadata beyond the common ones -> attribute; one that begins with `_` is for `more`, one with `_each_` may
        have a value for each layer.
      common: the keys that are read under the names that nearly all families share.
      more: config -> further attributes, which follow from others.
      defaults: attributes that the metadata may lack.
      also: other model types of which files have this architecture, by what `more` gives or because they compute alike.
    """

    model_type: str
    keys: Mapping[str, str] = {}
    common: Mapping[str, str] = COMMON
    more: Callable[[HfConfig], HfConfig] = lambda config: {}
    defaults: Mapping[str, Any] = {}
    also: tuple[str, ...] = ()


_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_LAYER_NORM = COMMON | {"attention.layer_norm_epsilon": "layer_norm_eps"}
_OLD = {"rope_theta": 10000.0}  # of files whose ropes have no base in the metadata
_DIMS = {"rope.dimension_count": "_rope_dims"}
_WINDOWS = {"attention.sliding_window": "sliding_window", "attention.sliding_window_pattern": "layer_types"}
_LOCAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_NORM = {"expert_weights_norm": "norm_topk_prob"}
_SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_GEMMA = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_GPT2 = {
    "block_count": "n_layer", "embedding_length": "n_embd", "feed_forward_length": "n_inner",
    "attention.head_count": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "context_length": "n_positions",
}  # fmt: skip
_BLOOM = {
    "block_count": "n_layer", "embedding_length": "hidden_size", "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
_MPT = {
    "block_count": "n_layers", "embedding_length": "d_model", "attention.head_count": "n_heads",
    "attention.layer_norm_epsilon": "layer_norm_epsilon", "context_length": "max_seq_len",
    "attention.clamp_kqv": "_clip", "attention.max_alibi_bias": "_slope",
}  # fmt: skip
_SECTIONS = {"rope.dimension_sections": "_sections"}
_ERNIE = {
    "expert_count": "moe_num_experts", "expert_used_count": "moe_k", "interleave_moe_layer_step": "moe_layer_interval",
    "leading_dense_block_count": "moe_layer_start_index", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "moe_num_shared_experts",
}  # fmt: skip
_GRANITE = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling", "rope.scaling.finetuned": "_has_rope",
}  # fmt: skip
_LATENT = {
    "attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim", "attention.head_count_kv": "_kv_heads",
    "attention.key_length": "_key", "attention.value_length": "_value",
    "attention.key_length_mla": "_key_mla", "attention.value_length_mla": "_value_mla",
    "rope.scaling.yarn_log_multiplier": "_log_multiplier",
}  # fmt: skip
_ROUTED = {
    "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size", "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace", "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob", "expert_gating_func": "_scores", "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group", "nextn_predict_layers": "num_nextn_predict_layers",
}  # fmt: skip
_GEMMA4 = {
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings", "feed_forward_length": "_each_units",
    "attention.head_count_kv": "_each_kv_heads",
    "attention.key_length": "_width", "attention.key_length_swa": "_window_width",
    "attention.shared_kv_layers": "num_kv_shared_layers",
    "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_experts", "expert_used_count": "top_k_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}  # fmt: skip
_GEMMA4_ROPES = {
    "rope.freq_base": "_theta", "rope.freq_base_swa": "_window_theta", "rope.scaling.factor": "_factor"
}  # fmt: skip
_NEMOTRON_H = {
    "block_count": "_blocks", "embedding_length": "hidden_size", "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon", "context_length": "max_position_embeddings",
    "attention.key_length": "head_dim", "attention.head_count_kv": "_each_kv_heads",
    "feed_forward_length": "_each_units", "ssm.conv_kernel": "conv_kernel", "ssm.state_size": "ssm_state_size",
    "ssm.group_count": "n_groups", "ssm.time_step_rank": "mamba_num_heads", "ssm.inner_size": "_inner",
}  # fmt: skip
_NEMOTRON_EXPERTS = {
    "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size", "moe_latent_size": "moe_latent_size",
    "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor", "expert_weights_norm": "norm_topk_prob",
    "expert_gating_func": "_scores",
}  # fmt: skip
_DELTA = _DIMS | {
    "ssm.conv_kernel": "linear_conv_kernel_dim", "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads", "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.inner_size": "_inner", "full_attention_interval": "_interval",
    "nextn_predict_layers": "mtp_num_hidden_layers",
}  # fmt: skip
_SHARED_EXPERTS = _EXPERTS | _SHARED
_PLAIN_ROUTER = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0}
GGUF_FAMILIES = {
    "llama": GgufFamily(
        "llama", {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        more=derived.mixtral, defaults={"rope_theta": 10000.0},
        also=("mixtral", "mistral"),
    ),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    # How the weights of the selected experts are scaled is no metadata: llama.cpp derives it from the family.
    "qwen2moe": GgufFamily(
        "qwen2_moe", _EXPERTS | _SHARED | _NORM, defaults={"norm_topk_prob": False, "decoder_sparse_step": 1}
    ),
    "qwen3moe": GgufFamily("qwen3_moe", _EXPERTS | _NORM, defaults={"norm_topk_prob": True, "decoder_sparse_step": 1}),
    # The language models inside of others; sections of a rope get equal positions in a text.
    "qwen2vl": GgufFamily("qwen2", _SECTIONS, also=("qwen2_vl", "qwen2_5_vl")),
    "qwen3vl": GgufFamily("qwen3", _SECTIONS, also=("qwen3_vl",)),
    "qwen3vlmoe": GgufFamily(
        "qwen3_moe", _EXPERTS | _NORM | _SECTIONS, defaults={"norm_topk_prob": True, "decoder_sparse_step": 1},
        also=("qwen3_vl_moe",),
    ),
    "qwen3next": GgufFamily(
        "qwen3_next", _SHARED_EXPERTS | _NORM | _DELTA, more=derived.qwen_hybrid,
        defaults={"norm_topk_prob": True, "decoder_sparse_step": 1},
    ),
    "qwen35": GgufFamily("qwen3_5_text", _DELTA | _SECTIONS, more=derived.qwen_hybrid, also=("qwen3_5",)),
    "qwen35moe": GgufFamily(
        "qwen3_5_moe_text", _SHARED_EXPERTS | _DELTA | _SECTIONS, more=derived.qwen_hybrid, also=("qwen3_5_moe",)
    ),
    "olmoe": GgufFamily("olmoe", _EXPERTS | _NORM, defaults={"norm_topk_prob": False, "rope_theta": 10000.0}),
    "phi3": GgufFamily(
        "phi3", {"attention.sliding_window": "sliding_window", "rope.dimension_count": "rope_dims",
                 "rope.scaling.original_context_length": "original_max_position_embeddings",
                 "rope.scaling.attn_factor": "_amplitude"}, more=derived.phi3,
        defaults={"rope_theta": 10000.0},
    ),
    "gemma": GgufFamily("gemma", defaults={"rope_theta": 10000.0}),
    "gemma2": GgufFamily("gemma2", _GEMMA, more=derived.gemma2, defaults={"rope_theta": 10000.0}),
    "gemma3": GgufFamily(
        "gemma3_text", _GEMMA | {"rope.freq_base_swa": "rope_local_base_freq"}, more=derived.gemma2,
        defaults={"rope_theta": 1e6, "rope_local_base_freq": 10000.0}, also=("gemma3",),
    ),
    "gemma4": GgufFamily(
        "gemma4_text", _WINDOWS | _GEMMA4_ROPES, _GEMMA4, derived.gemma4, {"_theta": 1e6, "_window_theta": 10000.0},
        also=("gemma4", "gemma4_unified", "gemma4_unified_text"),
    ),
    "olmo": GgufFamily(
        "olmo", {"attention.clamp_kqv": "clip_qkv", "attention.layer_norm_epsilon": "_eps"}, more=derived.olmo,
        defaults=_OLD,
    ),
    "olmo2": GgufFamily("olmo2", _WINDOWS, more=derived.olmo2, also=("olmo3",)),
    "seed_oss": GgufFamily("seed_oss", more=derived.seed_oss),
    "ernie4_5": GgufFamily("ernie4_5", more=derived.biases("use_bias")),
    "ernie4_5-moe": GgufFamily("ernie4_5_moe", _ERNIE, more=derived.biases("use_bias")),
    "smollm3": GgufFamily("smollm3"),
    "exaone4": GgufFamily("exaone4", _WINDOWS, more=derived.exaone4),
    "glm4": GgufFamily("glm4", _DIMS, more=derived.glm4),
    "command-r": GgufFamily("cohere", {"logit_scale": "logit_scale"}, _LAYER_NORM, derived.cohere),
    "cohere2": GgufFamily("cohere2", {"logit_scale": "logit_scale"} | _WINDOWS, _LAYER_NORM),
    "stablelm": GgufFamily(
        "stablelm", _DIMS | {"use_parallel_residual": "use_parallel_residual"}, _LAYER_NORM, derived.stablelm, _OLD
    ),
    "starcoder2": GgufFamily(
        "starcoder2", common=COMMON | {"attention.layer_norm_epsilon": "norm_epsilon"}, more=derived.biases("use_bias"),
        defaults=_OLD,
    ),
    "phi2": GgufFamily("phi", _DIMS, _LAYER_NORM, derived.partial, _OLD),
    "gptneox": GgufFamily(
        "gpt_neox", _DIMS | {"use_parallel_residual": "use_parallel_residual", "rope.freq_base": "rotary_emb_base"},
        _LAYER_NORM, derived.gpt_neox, {"rotary_emb_base": 10000.0},
    ),
    "falcon": GgufFamily(
        "falcon", {"attention.head_count_kv": "num_kv_heads", "feed_forward_length": "ffn_hidden_size"},
        COMMON | {"attention.layer_norm_epsilon": "layer_norm_epsilon"}, derived.falcon, _OLD | {"num_kv_heads": 1},
    ),
    "bloom": GgufFamily("bloom", common=_BLOOM),
    "mpt": GgufFamily("mpt", _MPT, {}, derived.mpt, {"_slope": 0}),
    "gpt-oss": GgufFamily(
        "gpt_oss", _LOCAL | _WINDOWS | {"expert_feed_forward_length": "_units"}, more=derived.gpt_oss
    ),
    "deepseek2": GgufFamily(
        "deepseek_v2", _LATENT | _ROUTED, more=derived.deepseek2, defaults={"q_lora_rank": None} | _PLAIN_ROUTER,
        also=("deepseek_v3", "kimi_k25"),
    ),
    "glm4moe": GgufFamily("glm4_moe", _ROUTED | _DIMS, more=derived.glm4_moe, defaults=_PLAIN_ROUTER),
    "minimax-m2": GgufFamily(
        "minimax_m2", more=derived.sigmoid, keys=
        _LOCAL | {"expert_feed_forward_length": "intermediate_size", "rope.dimension_count": "rotary_dim",
                  "expert_gating_func": "_scores"},
    ),
    "nemotron_h": GgufFamily("nemotron_h", {}, _NEMOTRON_H, derived.nemotron_h),
    "nemotron_h_moe": GgufFamily("nemotron_h", _NEMOTRON_EXPERTS, _NEMOTRON_H, derived.nemotron_h),
    "starcoder": GgufFamily(
        "gpt_bigcode", {"attention.head_count_kv": "_kv_heads"}, _GPT2, derived.starcoder,
    ),
    "granite": GgufFamily("granite", _GRANITE, more=derived.granite),
    "granitemoe": GgufFamily("granitemoe", _GRANITE | _LOCAL, more=derived.granitemoe),
    "gpt2": GgufFamily("gpt2", common=_GPT2),
}  # fmt: skip

GGUF_ARCHITECTURES = tuple(sorted(GGUF_FAMILIES))
"""Families as llama.cpp names them."""
