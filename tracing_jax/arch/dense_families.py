"""Dense families with fused tensors, partial ropes, parallel blocks or LayerNorms: one function and one row each."""

from collections.abc import Mapping
from typing import Any

from tracing_jax.arch.architecture import UnsupportedModelError
from tracing_jax.arch.family import COMMON, GPT_NAMES, NAMES, ArchFields, ConfigFamily, one_window, windows_by_type
from tracing_jax.arch.rope import NO_ROPE, Rope, alibi_slopes, fields_of, frequencies, mpt_slopes

_LAYER_NORM_NAMES = NAMES | {"norm_eps": "layer_norm_eps"}
_LAYER_NORM: ArchFields = {"norm": "layer_norm"}
_UNGATED_WITH_BIAS = _LAYER_NORM | {"gated": False, "qkv_bias": True, "o_bias": True, "mlp_bias": True}


def _without(names: Mapping[str, str], *fields: str) -> dict[str, str]:
    return {field: name for field, name in names.items() if field not in fields}


def _fixed_head_dim(config: Any) -> None:
    """Raises where a config sets a width of heads that its family reads for the rope alone."""
    width = config.hidden_size // config.num_attention_heads
    if (found := getattr(config, "head_dim", None)) not in (None, width):
        raise UnsupportedModelError(f"head_dim {found} is not hidden_size / num_attention_heads ({width})")


def _glm(config: Any) -> ArchFields:
    return {"qkv_bias": config.attention_bias, "rope_interleaved": True}


def _glm4(config: Any) -> ArchFields:
    return glm4_fields(config.attention_bias)


def glm4_fields(qkv_bias: bool) -> ArchFields:
    """Returns the fields of a GLM-4 whose queries, keys and values have a bias or not."""
    return {"qkv_bias": qkv_bias, "rope_interleaved": True, "post_norms": True}


def _smollm3(config: Any) -> ArchFields:
    bias = config.attention_bias
    windows = windows_by_type(config) if config.use_sliding_window else (None,) * config.num_hidden_layers
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": config.mlp_bias, "layer_windows": windows}


def _smollm3_ropes(config: Any) -> list[bool]:
    if len(found := config.no_rope_layers) != config.num_hidden_layers:
        raise UnsupportedModelError(f"no_rope_layers has {len(found)} entries for {config.num_hidden_layers} layers")
    return [bool(uses) for uses in found]


def _exaone4(config: Any) -> ArchFields:
    return {"pre_norms": False, "post_norms": True, "qk_norm": "head", "layer_windows": windows_by_type(config)}


def _sliding(config: Any) -> list[bool]:
    return [config.sliding_window is None or kind == "sliding_attention" for kind in config.layer_types]


def _cohere(config: Any) -> ArchFields:
    bias = config.attention_bias
    return {
        "norm": "layer_norm_gain",
        "norm_eps": config.layer_norm_eps,
        "parallel": True,
        "shared_norm": True,
        "rope_interleaved": True,
        "qkv_bias": bias,
        "o_bias": bias,
        "logit_scale": config.logit_scale,
        "qk_norm": "each" if getattr(config, "use_qk_norm", False) else None,
    }


def _cohere2(config: Any) -> ArchFields:
    return _cohere(config) | {"layer_windows": windows_by_type(config)}


def _gpt_neox(config: Any) -> ArchFields:
    _fixed_head_dim(config)
    bias = {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias}
    return _UNGATED_WITH_BIAS | bias | {"norm_eps": config.layer_norm_eps, "parallel": config.use_parallel_residual}


def _stablelm(config: Any) -> ArchFields:
    _fixed_head_dim(config)
    return _LAYER_NORM | {
        "norm_eps": config.layer_norm_eps,
        "qkv_bias": config.use_qkv_bias,
        "qk_norm": "each" if config.qk_layernorm else None,
        "parallel": config.use_parallel_residual,
        "shared_norm": config.use_parallel_residual,
    }


def _starcoder2(config: Any) -> ArchFields:
    bias = config.use_bias
    return _LAYER_NORM | {
        "norm_eps": config.norm_epsilon,
        "gated": False,
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
        "layer_windows": (config.sliding_window,) * config.num_hidden_layers,
    }


def _phi(config: Any) -> ArchFields:
    if config.qk_layernorm:
        _fixed_head_dim(config)
    return _UNGATED_WITH_BIAS | {
        "norm_eps": config.layer_norm_eps,
        "parallel": True,
        "shared_norm": True,
        "head_bias": True,
        "qk_norm": "head" if config.qk_layernorm else None,
        "qk_norm_bias": config.qk_layernorm,
    }


def _gptj(config: Any) -> ArchFields:
    width = config.n_embd // config.n_head
    if config.rotary_dim is None or config.rotary_dim % 2 or not 0 < config.rotary_dim <= width:
        raise UnsupportedModelError(f"rotary_dim {config.rotary_dim} is not an even number up to the width {width}")
    rope = Rope(frequencies(10000.0, config.rotary_dim), positions=config.n_positions)
    return (
        _UNGATED_WITH_BIAS
        | fields_of([rope], (0,) * config.n_layer)
        | {
            "mlp_dim": 4 * config.n_embd if config.n_inner is None else config.n_inner,
            "norm_eps": config.layer_norm_epsilon,
            "rope_interleaved": True,
            "parallel": True,
            "shared_norm": True,
            "qkv_bias": False,
            "o_bias": False,
            "head_bias": True,
        }
    )


def _opt(config: Any) -> ArchFields:
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        raise UnsupportedModelError("norms behind the residual stream (do_layer_norm_before false) are not supported")
    if config.word_embed_proj_dim != config.hidden_size:
        raise UnsupportedModelError(
            f"word_embed_proj_dim {config.word_embed_proj_dim} is not hidden_size {config.hidden_size}; projections "
            "of the embedding are not supported"
        )
    bias = config.enable_bias
    return _UNGATED_WITH_BIAS | {
        "qkv_bias": bias,
        "o_bias": bias,
        "mlp_bias": bias,
        "mlp_dim": config.ffn_dim,
        "norm_eps": 1e-5,  # a constant of the family, absent from its config
        "num_positions": config.max_position_embeddings,
        "position_offset": 2,
    }


def _falcon(config: Any) -> ArchFields:
    heads, grouped = config.num_attention_heads, config.new_decoder_architecture
    if grouped and not config.parallel_attn:
        raise UnsupportedModelError("new_decoder_architecture without parallel_attn is not supported")
    if not grouped and config.num_ln_in_parallel_attn == 2:
        raise UnsupportedModelError("num_ln_in_parallel_attn 2 without new_decoder_architecture is not supported")
    kv_heads = config.num_kv_heads if grouped else 1 if config.multi_query else heads
    if heads % kv_heads:
        raise UnsupportedModelError(f"num_attention_heads {heads} is not a multiple of num_kv_heads {kv_heads}")
    two_norms = grouped and config.num_ln_in_parallel_attn != 1
    positions = NO_ROPE | {"alibi_slopes": alibi_slopes(heads), "alibi_bfloat16": True} if config.alibi else {}
    return (
        _LAYER_NORM
        | positions
        | {
            "num_kv_heads": kv_heads,
            "q_group": heads // kv_heads,
            "mlp_dim": config.ffn_hidden_size,
            "norm_eps": config.layer_norm_epsilon,
            "parallel": config.parallel_attn,
            "shared_norm": config.parallel_attn and not two_norms,
            "gated": False,
            "qkv_bias": config.bias,
            "o_bias": config.bias,
            "mlp_bias": config.bias,
        }
    )


def _bloom(config: Any) -> ArchFields:
    if config.apply_residual_connection_post_layernorm:
        raise UnsupportedModelError("apply_residual_connection_post_layernorm is set, which is not supported")
    return _UNGATED_WITH_BIAS | {
        "mlp_dim": 4 * config.hidden_size,
        "norm_eps": config.layer_norm_epsilon,
        "activation": "gelu_tanh",
        "embed_norm": True,
        "alibi_slopes": alibi_slopes(config.n_head),
    }


def _mpt(config: Any) -> ArchFields:
    if not config.no_bias:
        raise UnsupportedModelError("no_bias is false, which is not supported")
    attention = config.attn_config
    expected = {
        "attn_type": "multihead_attention",
        "alibi": True,
        "alibi_bias_max": 8,  # transformers and the code released with MPT-7B differ in what they do with another
        "qk_ln": False,
        "prefix_lm": False,
    }
    for name, value in expected.items():
        if getattr(attention, name) != value:
            raise UnsupportedModelError(f"{name} is {getattr(attention, name)}; only {value} is supported")
    fields = {
        "norm": "layer_norm_gain",
        "norm_eps": config.layer_norm_epsilon,
        "gated": False,
        "activation": "gelu",
        "mlp_dim": 4 * config.d_model,
        "clip_qkv": attention.clip_qkv or None,
        "alibi_slopes": mpt_slopes(config.n_heads),
    }
    return fields | ({} if attention.softmax_scale is None else {"attention_scale": attention.softmax_scale})


def _olmo3(config: Any) -> ArchFields:
    bias = {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias}
    return {"pre_norms": False, "post_norms": True, "qk_norm": "all", "layer_windows": windows_by_type(config)} | bias


def _seed_oss(config: Any) -> ArchFields:
    return {"qkv_bias": config.attention_bias, "o_bias": config.attention_out_bias, "mlp_bias": config.mlp_bias}


def _ernie4_5(config: Any) -> ArchFields:
    bias = config.use_bias
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bias, "rope_interleaved": True}


def _ministral3(config: Any) -> ArchFields:
    # From the length that it was trained on, queries grow with their position.
    limit = config.rope_parameters.get("original_max_position_embeddings")
    return {"layer_windows": (config.sliding_window,) * config.num_hidden_layers, "rope_positions": limit}


def _gpt_bigcode(config: Any) -> ArchFields:
    heads = config.n_head
    return (
        _UNGATED_WITH_BIAS
        | {
            "num_kv_heads": 1 if config.multi_query else heads,
            "q_group": heads if config.multi_query else 1,
            "mlp_dim": 4 * config.n_embd if config.n_inner is None else config.n_inner,
            "num_positions": config.n_positions,
            "norm_eps": config.layer_norm_epsilon,
        }
        | ({} if config.scale_attn_weights else {"attention_scale": 1.0})
    )


def _gpt_neo(config: Any) -> ArchFields:
    kinds = {"global": None, "local": config.window_size}
    return _UNGATED_WITH_BIAS | {
        "qkv_bias": False,
        "attention_scale": 1.0,
        "mlp_dim": 4 * config.hidden_size if config.intermediate_size is None else config.intermediate_size,
        "num_positions": config.max_position_embeddings,
        "norm_eps": config.layer_norm_epsilon,
        "layer_windows": tuple(kinds[kind] for kind in config.attention_layers),
    }


_DROPOUTS = "resid_pdrop embd_pdrop attn_pdrop"

DENSE_FAMILIES: dict[str, ConfigFamily] = {
    "phi3": ConfigFamily(
        one_window,
        "rms_norm_eps sliding_window original_max_position_embeddings",
        neutral=_DROPOUTS,
        names=_without(NAMES, "head_dim"),
        partial_rotary=True,
    ),
    "glm": ConfigFamily(_glm, "rms_norm_eps attention_bias", partial_rotary=True),
    "glm4": ConfigFamily(_glm4, "rms_norm_eps attention_bias", partial_rotary=True),
    "smollm3": ConfigFamily(
        _smollm3,
        "rms_norm_eps attention_bias mlp_bias use_sliding_window sliding_window layer_types no_rope_layers",
        neutral="no_rope_layer_interval",
        rope_layers=_smollm3_ropes,
        per_layer=("layer_types", "no_rope_layers"),
    ),
    "exaone4": ConfigFamily(
        _exaone4, "rms_norm_eps sliding_window layer_types", neutral="sliding_window_pattern", rope_layers=_sliding
    ),
    "cohere": ConfigFamily(
        _cohere, "layer_norm_eps attention_bias logit_scale use_qk_norm", names=_LAYER_NORM_NAMES
    ),
    "cohere2": ConfigFamily(
        _cohere2,
        "layer_norm_eps attention_bias logit_scale sliding_window layer_types",
        names=_LAYER_NORM_NAMES,
        rope_layers=_sliding,
    ),
    "gpt_neox": ConfigFamily(
        _gpt_neox,
        "layer_norm_eps attention_bias use_parallel_residual",
        {None: "rotary_emb_base"},
        common=COMMON - {"num_key_value_heads"},
        neutral="classifier_dropout",
        names=_without(_LAYER_NORM_NAMES, "num_kv_heads", "head_dim"),
        partial_rotary=True,
    ),
    "stablelm": ConfigFamily(
        _stablelm,
        "layer_norm_eps use_qkv_bias qk_layernorm use_parallel_residual",
        names=_without(_LAYER_NORM_NAMES, "head_dim"),
        partial_rotary=True,
    ),
    "starcoder2": ConfigFamily(
        _starcoder2,
        "norm_epsilon use_bias sliding_window",
        neutral="residual_dropout embedding_dropout",
        names=NAMES | {"norm_eps": "norm_epsilon"},
    ),
    "phi": ConfigFamily(
        _phi,
        "layer_norm_eps qk_layernorm",
        neutral=_DROPOUTS,
        names=_without(_LAYER_NORM_NAMES, "head_dim"),
        partial_rotary=True,
    ),
    "gptj": ConfigFamily(
        _gptj,
        "n_embd n_layer n_head n_inner n_positions rotary_dim layer_norm_epsilon activation_function",
        thetas={},
        common=frozenset({"vocab_size", "tie_word_embeddings"}),
        activation="activation_function",
        neutral=_DROPOUTS + " gradient_checkpointing scale_attn_weights summary_activation summary_first_dropout"
        " summary_proj_to_labels summary_type summary_use_proj task_specific_params",
        names=GPT_NAMES,
    ),
    "opt": ConfigFamily(
        _opt,
        "ffn_dim activation_function max_position_embeddings do_layer_norm_before _remove_final_layer_norm"
        " word_embed_proj_dim enable_bias",
        thetas={},
        common=COMMON - {"num_key_value_heads", "head_dim", "rope_parameters", "hidden_act", "intermediate_size"},
        activation="activation_function",
        neutral="dropout layerdrop init_std",
        names=_without(NAMES, "num_kv_heads", "head_dim", "norm_eps") | {"mlp_dim": "ffn_dim"},
    ),
    "falcon": ConfigFamily(
        _falcon,
        "layer_norm_epsilon num_kv_heads new_decoder_architecture multi_query parallel_attn bias alibi ffn_hidden_size"
        " num_ln_in_parallel_attn activation",
        common=COMMON - {"num_key_value_heads", "head_dim", "hidden_act", "intermediate_size"},
        activation="activation",
        # The number of kv heads is a matter of several fields.
        names=_without(NAMES, "head_dim", "num_kv_heads")
        | {"mlp_dim": "ffn_hidden_size", "norm_eps": "layer_norm_epsilon"},
        optional_theta=True,
    ),
    "olmo3": ConfigFamily(
        _olmo3,
        "rms_norm_eps attention_bias sliding_window layer_types",
        {"full_attention": "rope_theta", "sliding_attention": "rope_theta"},
    ),
    "seed_oss": ConfigFamily(
        _seed_oss, "rms_norm_eps attention_bias attention_out_bias mlp_bias", neutral="residual_dropout"
    ),
    "ernie4_5": ConfigFamily(_ernie4_5, "rms_norm_eps use_bias"),
    "ministral3": ConfigFamily(_ministral3, "rms_norm_eps sliding_window"),
    "gpt_bigcode": ConfigFamily(
        _gpt_bigcode,
        "n_embd n_layer n_head n_inner n_positions layer_norm_epsilon activation_function scale_attn_weights"
        " multi_query num_key_value_heads",
        thetas={},
        common=frozenset({"vocab_size", "tie_word_embeddings"}),
        activation="activation_function",
        # In float32 it does not matter where scores are rounded.
        neutral=_DROPOUTS + " attention_softmax_in_fp32 scale_attention_softmax_in_fp32 gradient_checkpointing"
        " summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj",
        names=GPT_NAMES,
    ),
    "gpt_neo": ConfigFamily(
        _gpt_neo,
        "hidden_size num_layers num_heads intermediate_size max_position_embeddings window_size attention_types"
        " attention_layers layer_norm_epsilon activation_function",
        thetas={},
        common=frozenset({"vocab_size", "tie_word_embeddings"}),
        activation="activation_function",
        neutral="resid_dropout embed_dropout classifier_dropout gradient_checkpointing summary_activation"
        " summary_first_dropout summary_proj_to_labels summary_type summary_use_proj",
        names=_without(NAMES, "num_kv_heads", "head_dim")
        | {"num_layers": "num_layers", "num_heads": "num_heads", "norm_eps": "layer_norm_epsilon"},
    ),
    "mpt": ConfigFamily(
        _mpt,
        "d_model n_layers n_heads layer_norm_epsilon attn_config no_bias",
        thetas={},
        common=frozenset({"vocab_size", "tie_word_embeddings"}),
        activation="",
        # Heads have slopes, regardless of learned positions; the type of norm is that of its computation.
        neutral="max_seq_len learned_pos_emb emb_pdrop init_device embedding_fraction norm_type",
        names=_without(NAMES, "mlp_dim", "num_kv_heads", "head_dim")
        | {"embed_dim": "d_model", "num_layers": "n_layers", "num_heads": "n_heads", "norm_eps": "layer_norm_epsilon"},
    ),
    "bloom": ConfigFamily(
        _bloom,
        "hidden_size n_layer n_head layer_norm_epsilon apply_residual_connection_post_layernorm",
        thetas={},
        common=frozenset({"vocab_size", "tie_word_embeddings"}),
        activation="",
        # The exact sum over slices of tensor-parallel training differs in rounding alone.
        neutral="slow_but_exact",
        names=_without(NAMES, "mlp_dim", "num_kv_heads", "head_dim")
        | {"num_layers": "n_layer", "num_heads": "n_head", "norm_eps": "layer_norm_epsilon"},
    ),
}  # fmt: skip
"""Model type -> its row."""
