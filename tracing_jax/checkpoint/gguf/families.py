"""The families of llama.cpp, one row each: the model type in Hugging Face, and where its attributes are in metadata."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tracing_jax.checkpoint.errors import UnsupportedMetadataError

Config = dict[str, Any]

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
      keys: metadata beyond the common ones -> attribute; one that begins with `_` is for `more`.
      common: the keys that are read under the names that nearly all families share.
      more: config -> further attributes, which follow from others.
      defaults: attributes that the metadata may lack.
      required: keys without which llama.cpp opens no such model; of names with `|` between them, one.
    """

    model_type: str
    keys: Mapping[str, str] = {}
    common: Mapping[str, str] = COMMON
    more: Callable[[Config], Config] = lambda config: {}
    defaults: Mapping[str, Any] = {}
    required: tuple[str, ...] = ()


def _mixtral(config: Config) -> Config:
    return {"model_type": "mixtral", "sliding_window": None} if config.get("num_local_experts") else {}


def _gemma2(config: Config) -> Config:
    """Queries are scaled by the width of a head; in the largest Gemma 2 and 3 by that of the embedding per head."""
    per_head = config["hidden_size"] // config["num_attention_heads"]
    largest = config["num_hidden_layers"] in (46, 62)
    return {"query_pre_attn_scalar": per_head if largest else config.get("head_dim", per_head)}


def _phi3(config: Config) -> Config:
    """A window of 0 is none; the ropes of a head may be on its first dims alone."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rope_dims = config.pop("rope_dims", head_dim)
    return {"sliding_window": config.get("sliding_window") or None, "partial_rotary_factor": rope_dims / head_dim}


def _head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _partial(config: Config) -> Config:
    """The ropes of a head may be on its first dims alone."""
    width = _head_dim(config)
    return {"partial_rotary_factor": config.get("_rope_dims", width) / width}


def _glm4(config: Config) -> Config:
    return _partial(config) | {"head_dim": _head_dim(config)}


def _biases(*names: str) -> Callable[[Config], Config]:
    """Returns what sets attributes by whether queries, or a tensor of queries, keys and values, have a bias."""
    return lambda config: dict.fromkeys(names, config["attention_bias"] or config["_fused_bias"])


def _gpt_neox(config: Config) -> Config:
    return {"rotary_pct": _partial(config)["partial_rotary_factor"]} | _biases("attention_bias")(config)


def _stablelm(config: Config) -> Config:
    return _partial(config) | _biases("use_qkv_bias")(config) | {"qk_layernorm": config["_qk_norm"]}


def _olmo2(config: Config) -> Config:
    """OLMo 3 is OLMo 2 with windows, and layers with one have a rope of their own, which is not scaled."""
    return {"model_type": "olmo3", "_scaled": "full_attention"} if config.get("sliding_window") else {}


def _exaone4(config: Config) -> Config:
    """Without a window, all layers have a rope; with one, every fourth has neither where no pattern is given."""
    window = config.get("sliding_window") or None
    return {"sliding_window": window} | (
        {} if window else {"layer_types": ["full_attention"] * config["num_hidden_layers"]}
    )


def _cohere(config: Config) -> Config:
    return {"use_qk_norm": config["_qk_norm"]}


def _seed_oss(config: Config) -> Config:
    return {"attention_out_bias": config["_o_bias"]}


def _falcon(config: Config) -> Config:
    """Of the names of norms, the order of fused rows and the number of kv heads, one follows from another.

    Raises:
      UnsupportedMetadataError: a model with biases; those have ALiBi, of which the metadata say nothing.
    """
    if config["_fused_bias"]:
        raise UnsupportedMetadataError("a Falcon with biases, whose positions are not in the metadata")
    grouped = config["num_kv_heads"] > 1
    found = {"new_decoder_architecture": grouped, "multi_query": not grouped, "parallel_attn": True, "bias": False}
    return found | ({"num_ln_in_parallel_attn": 2 if config["_second_norm"] else 1} if grouped else {})


def _mpt(config: Config) -> Config:
    """Its positions are those of ALiBi, with slopes that go to 2^-8.

    Raises:
      UnsupportedMetadataError: they are not.
    """
    if config["_slope"] != 8:
        raise UnsupportedMetadataError(f"max_alibi_bias is {config['_slope']}; only 8 is read")
    attention = {"clip_qkv": config.get("_clip"), "alibi": True, "alibi_bias_max": 8, "qk_ln": config["_qk_norm"]}
    return {"attn_config": attention, "no_bias": not config["_fused_bias"]}


def _sigmoid(config: Config) -> Config:
    """Routers of this family score experts by a sigmoid, whether the metadata say so or not.

    Raises:
      UnsupportedMetadataError: they say otherwise.
    """
    if (found := config.get("_scores", _SIGMOID)) != _SIGMOID:
        raise UnsupportedMetadataError(f"expert_gating_func is {found}; of this family {_SIGMOID}, sigmoid, is read")
    return {}


def _starcoder(config: Config) -> Config:
    """Raises UnsupportedMetadataError for more than one kv head, of which there is none in llama.cpp."""
    if (found := config.get("_kv_heads", 1)) != 1:
        raise UnsupportedMetadataError(f"attention.head_count_kv is {found}; of this family 1 is read")
    return {"multi_query": True}


def _gpt_oss(config: Config) -> Config:
    """The ends of the blend of its yarn are not whole numbers, which is no metadata."""
    rope = {"rope_type": "default"}  # where the file has no other
    return {"intermediate_size": config["_units"], "_scaling": {"truncate": False}, "rope_scaling": rope}


def _granitemoe(config: Config) -> Config:
    """Raises UnsupportedMetadataError for a model with an MLP beside the experts, which is another family."""
    if config["_shared_experts"]:
        raise UnsupportedMetadataError("a Granite with an MLP beside its experts")
    return {}


def _deepseek2(config: Config) -> Config:
    """DeepSeek-V2, whose router has a softmax, or V3; widths of heads are under other keys where keys are absorbed.

    Raises:
      UnsupportedMetadataError: an old file of a model that may have groups of experts, of which it says nothing; layers
        that predict further tokens, which only other models under this name have in their files.
    """
    if config.get("num_nextn_predict_layers"):
        raise UnsupportedMetadataError("layers that predict further tokens, in a model under the name of DeepSeek-V2")
    rope, experts = config["qk_rope_head_dim"], config.get("n_routed_experts", 0)
    if "n_group" not in config and experts > _EXPERTS_WITHOUT_GROUPS:
        raise UnsupportedMetadataError(f"expert_group_count is missing, and {experts} experts may be in groups")
    if (scores := config.get("_scores", 0)) not in (0, _SOFTMAX, _SIGMOID):
        raise UnsupportedMetadataError(f"expert_gating_func is {scores}; of this family 1 and 2 are read")
    is_third = scores == _SIGMOID
    groups = {"n_group": config.get("n_group", 1), "topk_group": config.get("topk_group", 1)}
    grouped = groups["n_group"] > groups["topk_group"]
    scale = {
        name: 10 * config["_log_multiplier"] for name in ("mscale", "mscale_all_dim") if "_log_multiplier" in config
    }
    return {
        "model_type": "deepseek_v3" if is_third else "deepseek_v2",
        "num_key_value_heads": config["num_attention_heads"],
        "qk_nope_head_dim": config.get("_key_mla", config.get("_key")) - rope,
        "v_head_dim": config.get("_value_mla", config.get("_value")),
        "_scaling": scale,
    } | (groups if is_third else {"topk_method": "group_limited_greedy" if grouped else "greedy"})


def _glm4_moe(config: Config) -> Config:
    """The layers that predict further tokens are counted among the others."""
    later = config.get("num_nextn_predict_layers", 0)
    layers = {"num_hidden_layers": config["num_hidden_layers"] - later}
    return _sigmoid(config) | _glm4(config) | layers | {"use_qk_norm": config["_qk_norm"]}


_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_LAYER_NORM = COMMON | {"attention.layer_norm_epsilon": "layer_norm_eps"}
_OLD = {"rope_theta": 10000.0}  # of files whose ropes have no base in the metadata
_EXPERTS_WITHOUT_GROUPS = 64  # of DeepSeek-V2-Lite and Moonlight; larger ones have groups or say that they have not
_SOFTMAX, _SIGMOID = 1, 2  # of llama.cpp's functions of scores
_ROUTER = ("expert_count", "expert_used_count")
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
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
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
_PLAIN_ROUTER = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0}
GGUF_FAMILIES = {
    "llama": GgufFamily(
        "llama", {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}, more=_mixtral,
        defaults={"rope_theta": 10000.0},
    ),
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    # How the weights of the selected experts are scaled is no metadata: llama.cpp knows it by the family.
    "qwen2moe": GgufFamily(
        "qwen2_moe", _EXPERTS | _SHARED | _NORM, defaults={"norm_topk_prob": False, "decoder_sparse_step": 1}
    ),
    "qwen3moe": GgufFamily("qwen3_moe", _EXPERTS | _NORM, defaults={"norm_topk_prob": True, "decoder_sparse_step": 1}),
    # The language models inside of others; sections of a rope get equal positions in a text.
    "qwen2vl": GgufFamily("qwen2", _SECTIONS),
    "qwen3vl": GgufFamily("qwen3", _SECTIONS),
    "qwen3vlmoe": GgufFamily(
        "qwen3_moe", _EXPERTS | _NORM | _SECTIONS, defaults={"norm_topk_prob": True, "decoder_sparse_step": 1}
    ),
    "olmoe": GgufFamily("olmoe", _EXPERTS | _NORM, defaults={"norm_topk_prob": False, "rope_theta": 10000.0}),
    "phi3": GgufFamily(
        "phi3", {"attention.sliding_window": "sliding_window", "rope.dimension_count": "rope_dims",
                 "rope.scaling.original_context_length": "original_max_position_embeddings",
                 "rope.scaling.attn_factor": "_amplitude"}, more=_phi3,
        defaults={"rope_theta": 10000.0},
    ),
    "gemma": GgufFamily("gemma", defaults={"rope_theta": 10000.0}),
    "gemma2": GgufFamily("gemma2", _GEMMA, more=_gemma2, defaults={"rope_theta": 10000.0}),
    "gemma3": GgufFamily(
        "gemma3_text", _GEMMA | {"rope.freq_base_swa": "rope_local_base_freq"}, more=_gemma2,
        defaults={"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
    ),
    "olmo": GgufFamily("olmo", {"attention.clamp_kqv": "clip_qkv"}, defaults={"rope_theta": 10000.0}),
    "olmo2": GgufFamily("olmo2", _WINDOWS, more=_olmo2),
    "seed_oss": GgufFamily("seed_oss", more=_seed_oss),
    "ernie4_5": GgufFamily("ernie4_5", more=_biases("use_bias")),
    "ernie4_5-moe": GgufFamily("ernie4_5_moe", _ERNIE, more=_biases("use_bias")),
    "smollm3": GgufFamily("smollm3"),
    "exaone4": GgufFamily("exaone4", _WINDOWS, more=_exaone4),
    "glm4": GgufFamily("glm4", _DIMS, more=_glm4),
    "command-r": GgufFamily("cohere", {"logit_scale": "logit_scale"}, _LAYER_NORM, _cohere),
    "cohere2": GgufFamily("cohere2", {"logit_scale": "logit_scale"} | _WINDOWS, _LAYER_NORM),
    "stablelm": GgufFamily(
        "stablelm", _DIMS | {"use_parallel_residual": "use_parallel_residual"}, _LAYER_NORM, _stablelm, _OLD
    ),
    "starcoder2": GgufFamily(
        "starcoder2", common=COMMON | {"attention.layer_norm_epsilon": "norm_epsilon"}, more=_biases("use_bias"),
        defaults=_OLD,
    ),
    "phi2": GgufFamily("phi", _DIMS, _LAYER_NORM, _partial, _OLD),
    "gptneox": GgufFamily(
        "gpt_neox", _DIMS | {"use_parallel_residual": "use_parallel_residual", "rope.freq_base": "rotary_emb_base"},
        _LAYER_NORM, _gpt_neox, {"rotary_emb_base": 10000.0},
    ),
    "falcon": GgufFamily(
        "falcon", {"attention.head_count_kv": "num_kv_heads", "feed_forward_length": "ffn_hidden_size"},
        COMMON | {"attention.layer_norm_epsilon": "layer_norm_epsilon"}, _falcon, _OLD | {"num_kv_heads": 1},
    ),
    "bloom": GgufFamily("bloom", common=_BLOOM),
    "mpt": GgufFamily("mpt", _MPT, {}, _mpt, {"_slope": 0}),
    "gpt-oss": GgufFamily(
        "gpt_oss", _LOCAL | _WINDOWS | {"expert_feed_forward_length": "_units"}, more=_gpt_oss,
        required=(*_ROUTER, "expert_feed_forward_length", "attention.sliding_window"),
    ),
    "deepseek2": GgufFamily(
        "deepseek_v2", _LATENT | _ROUTED, more=_deepseek2, defaults={"q_lora_rank": None} | _PLAIN_ROUTER, required=(
            *_ROUTER, "expert_feed_forward_length", "expert_shared_count", "attention.kv_lora_rank",
            "rope.dimension_count", "attention.key_length_mla|attention.key_length",
            "attention.value_length_mla|attention.value_length",
        ),
    ),
    "glm4moe": GgufFamily(
        "glm4_moe", _ROUTED | _DIMS, more=_glm4_moe, defaults=_PLAIN_ROUTER,
        required=(*_ROUTER, "expert_feed_forward_length", "expert_shared_count"),
    ),
    "minimax-m2": GgufFamily(
        "minimax_m2", more=_sigmoid, keys=
        _LOCAL | {"expert_feed_forward_length": "intermediate_size", "rope.dimension_count": "rotary_dim",
                  "expert_gating_func": "_scores"},
    ),
    "starcoder": GgufFamily(
        "gpt_bigcode", {"attention.head_count_kv": "_kv_heads"}, _GPT2, _starcoder,
    ),
    "granite": GgufFamily("granite", _GRANITE),
    "granitemoe": GgufFamily("granitemoe", _GRANITE | _LOCAL, more=_granitemoe),
    "gpt2": GgufFamily("gpt2", common=_GPT2),
}  # fmt: skip

GGUF_ARCHITECTURES = tuple(sorted(GGUF_FAMILIES))
"""Families as llama.cpp names them."""
