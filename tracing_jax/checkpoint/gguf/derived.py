"""Attributes that follow from others, family by family: from the metadata of llama.cpp to a Hugging Face config.

A name that begins with `_` is of metadata or tensors, and no attribute.
"""

from collections.abc import Callable
from typing import Any

from tracing_jax.checkpoint.errors import UnsupportedMetadataError

HfConfig = dict[str, Any]

_EXPERTS_WITHOUT_GROUPS = 64  # of DeepSeek-V2-Lite and Moonlight; larger ones have groups or say that they have not
_SOFTMAX, _SIGMOID = 1, 2  # of llama.cpp's functions of scores


def mixtral(config: HfConfig) -> HfConfig:
    """With experts, a Llama is a Mixtral without a window."""
    return {"model_type": "mixtral", "sliding_window": None} if config.get("num_local_experts") else {}


def gemma2(config: HfConfig) -> HfConfig:
    """Queries are scaled by the width of a head; in the largest Gemma 2 and 3 by that of the embedding per head."""
    per_head = config["hidden_size"] // config["num_attention_heads"]
    largest = config["num_hidden_layers"] in (46, 62)
    return {"query_pre_attn_scalar": per_head if largest else config.get("head_dim", per_head)}


def gemma4(config: HfConfig) -> HfConfig:
    """Layers with a window and those without have heads of their own size; the last layers may share keys.

    The factors of the rope of layers without a window are 1 where dims turn, and huge where they do not.
    """
    layers, types = config["num_hidden_layers"], config.get("layer_types")
    if types is None or "full_attention" not in types:
        raise UnsupportedMetadataError(
            "attention.sliding_window_pattern is missing, or names no layer without a window"
        )
    if config.get("_factor") not in (None, 0, 1):
        raise UnsupportedMetadataError(f"rope.scaling.factor is {config['_factor']}, which is not read for this family")
    each = {name: _of_each(config, name, layers) for name in ("units", "kv_heads")}
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    window = [i for i in range(layers) if i not in full] or full
    own = layers - config.get("num_kv_shared_layers", 0)
    doubled = each["units"][-1] == 2 * each["units"][0]
    widths = [each["units"][0] * (2 if doubled and i >= own else 1) for i in range(layers)]
    kv_heads = [each["kv_heads"][(full if i in full else window)[0]] for i in range(layers)]
    for name, expected in (("units", widths), ("kv_heads", kv_heads)):
        if each[name] != expected:
            raise UnsupportedMetadataError(f"numbers of {name} that differ between layers of one type are not read")
    factors = config["_rope_factors"]
    turned = 1.0 if factors is None else float((factors < _STILL).mean())
    if factors is not None and not ((factors == 1) | (factors > _STILL)).all():
        raise UnsupportedMetadataError("rope_freqs.weight divides frequencies, which is not read for this family")
    heads = {"head_dim": config["_width"], "num_key_value_heads": kv_heads[full[0]]}
    return {
        "intermediate_size": widths[0],
        "use_double_wide_mlp": doubled,
        "head_dim": config.get("_window_width", config["_width"]),
        "num_key_value_heads": kv_heads[window[0]],
        "per_layer_config": {str(i): heads for i in full},
        "attention_k_eq_v": str(full[0]) not in config["_with_values"],
        "hidden_size_per_layer_input": config.get("hidden_size_per_layer_input", 0),
        "vocab_size_per_layer_input": config["vocab_size"],
        "enable_moe_block": bool(config.get("num_experts")),
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional", "rope_theta": config["_theta"], "partial_rotary_factor": turned,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": config["_window_theta"]},
        },
    }  # fmt: skip


_STILL = 1e20  # a frequency that is divided by more turns nothing


def _of_each(config: HfConfig, name: str, layers: int) -> list[int]:
    """Returns a number for each layer, of which there is one for each or one for all."""
    found: list[int] = config[f"_each_{name}"]
    if len(found) not in (1, layers):
        raise UnsupportedMetadataError(f"{len(found)} numbers of {name} for {layers} layers")
    return found * layers if len(found) == 1 else found


def phi3(config: HfConfig) -> HfConfig:
    """A window of 0 is none; the ropes of a head may be on its first dims alone."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    rope_dims = config.pop("rope_dims", head_dim)
    length = config.get("original_max_position_embeddings", config["max_position_embeddings"])
    lengths = {"sliding_window": config.get("sliding_window") or None, "original_max_position_embeddings": length}
    return lengths | {"partial_rotary_factor": rope_dims / head_dim}


def _head_dim(config: HfConfig) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def partial(config: HfConfig) -> HfConfig:
    """The ropes of a head may be on its first dims alone."""
    width = _head_dim(config)
    return {"partial_rotary_factor": config.get("_rope_dims", width) / width}


def qwen_hybrid(config: HfConfig) -> HfConfig:
    """Every `_interval`-th layer has attention; layers that predict further tokens come behind the others."""
    layers = config["num_hidden_layers"] - config.get("mtp_num_hidden_layers", 0)
    interval = config.get("_interval", 4)
    if not layers > 0 < interval:
        raise UnsupportedMetadataError(f"full_attention_interval is {interval}, of {layers} layers")
    heads = config["linear_num_value_heads"]
    if not heads or config["_inner"] % heads:
        raise UnsupportedMetadataError(
            f"ssm.inner_size {config['_inner']} is no multiple of ssm.time_step_rank {heads}"
        )
    kinds = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
    return partial(config) | {
        "num_hidden_layers": layers, "layer_types": kinds, "linear_value_head_dim": config["_inner"] // heads,
    }  # fmt: skip


def nemotron_h(config: HfConfig) -> HfConfig:
    """A layer has attention if it has kv heads, an MLP or experts if it has units, and else a recurrence.

    The least step of the recurrence is no metadata, and llama.cpp has none.
    """
    blocks = config["_blocks"]
    each = {name: _of_each(config, name, blocks) for name in ("units", "kv_heads")}
    mlp = "moe" if config.get("n_routed_experts") else "mlp"
    kinds = [
        "full_attention" if kv_heads else mlp if units else "linear_attention"
        for units, kv_heads in zip(each["units"], each["kv_heads"])
    ]
    for name, numbers in each.items():
        if len(found := set(numbers) - {0}) > 1:
            raise UnsupportedMetadataError(f"{name} are {sorted(found)} in layers of one type, which is not read")
    heads = config["mamba_num_heads"]
    if not heads or config["_inner"] % heads:
        raise UnsupportedMetadataError(
            f"ssm.inner_size {config['_inner']} is no multiple of ssm.time_step_rank {heads}"
        )
    if config.get("_scores", _SIGMOID) != _SIGMOID:
        raise UnsupportedMetadataError(f"expert_gating_func is {config['_scores']}; of this family {_SIGMOID} is read")
    ends = config["_ends"]
    return {
        "layers_block_type": kinds,
        "num_key_value_heads": max(each["kv_heads"]) or config["num_attention_heads"],
        "intermediate_size": max(each["units"]) or 1,
        "mamba_head_dim": config["_inner"] // heads,
        "time_step_min": 0.0,
        "use_conv_bias": "ssm_conv1d.bias" in ends,
        "use_bias": "ssm_in.bias" in ends,
        "mlp_bias": "ffn_up.bias" in ends,
        "n_group": 1,
        "topk_group": 1,
    }


def glm4(config: HfConfig) -> HfConfig:
    """The width of a head is that of the embedding per head where the metadata have none."""
    return partial(config) | {"head_dim": _head_dim(config)}


def biases(*names: str) -> Callable[[HfConfig], HfConfig]:
    """Returns what sets attributes by whether queries, or a tensor of queries, keys and values, have a bias."""
    return lambda config: dict.fromkeys(names, config["attention_bias"] or config["_fused_bias"])


def gpt_neox(config: HfConfig) -> HfConfig:
    """The ropes of a head may be on its first dims alone, and attention may have biases."""
    return {"rotary_pct": partial(config)["partial_rotary_factor"]} | biases("attention_bias")(config)


def stablelm(config: HfConfig) -> HfConfig:
    """As in GPT-NeoX; queries and keys may have norms."""
    return partial(config) | biases("use_qkv_bias")(config) | {"qk_layernorm": config["_qk_norm"]}


def olmo(config: HfConfig) -> HfConfig:
    """Clipping at 0 is none."""
    return {"clip_qkv": config.get("clip_qkv") or None}


def olmo2(config: HfConfig) -> HfConfig:
    """OLMo 3 is OLMo 2 with windows, and layers with one have a rope of their own, which is not scaled."""
    return {"model_type": "olmo3", "_scaled": "full_attention"} if config.get("sliding_window") else {}


def exaone4(config: HfConfig) -> HfConfig:
    """Without a window, all layers have a rope; with one, every fourth has neither where no pattern is given.

    Of a model with 64 layers llama.cpp has the window as a constant.
    """
    window = config.get("sliding_window", 4096 if config["num_hidden_layers"] == 64 else None) or None
    return {"sliding_window": window} | (
        {} if window else {"layer_types": ["full_attention"] * config["num_hidden_layers"]}
    )


def cohere(config: HfConfig) -> HfConfig:
    """Queries and keys may have norms."""
    return {"use_qk_norm": config["_qk_norm"]}


def seed_oss(config: HfConfig) -> HfConfig:
    """The outputs of attention may have a bias."""
    return {"attention_out_bias": config["_o_bias"]}


def falcon(config: HfConfig) -> HfConfig:
    """Of the names of norms, the order of fused rows and the number of kv heads, one follows from another.

    Raises:
      UnsupportedMetadataError: a model with biases; those have ALiBi, of which the metadata say nothing.
    """
    if config["_fused_bias"]:
        raise UnsupportedMetadataError("a Falcon with biases, whose positions are not in the metadata")
    grouped = config["num_kv_heads"] > 1
    found = {"new_decoder_architecture": grouped, "multi_query": not grouped, "parallel_attn": True, "bias": False}
    return found | ({"num_ln_in_parallel_attn": 2 if config["_second_norm"] else 1} if grouped else {})


def mpt(config: HfConfig) -> HfConfig:
    """Its positions are those of ALiBi, with slopes that go to 2^-8.

    Raises:
      UnsupportedMetadataError: they are not.
    """
    if config["_slope"] != 8:
        raise UnsupportedMetadataError(f"max_alibi_bias is {config['_slope']}; only 8 is read")
    attention = {
        "clip_qkv": config.get("_clip") or None,
        "alibi": True,
        "alibi_bias_max": 8,
        "qk_ln": config["_qk_norm"],
    }
    return {"attn_config": attention, "no_bias": not config["_fused_bias"]}


def sigmoid(config: HfConfig) -> HfConfig:
    """Routers of this family score experts by a sigmoid, whether the metadata say so or not.

    Raises:
      UnsupportedMetadataError: they say otherwise.
    """
    if (found := config.get("_scores", _SIGMOID)) != _SIGMOID:
        raise UnsupportedMetadataError(f"expert_gating_func is {found}; of this family {_SIGMOID}, sigmoid, is read")
    return {}


def starcoder(config: HfConfig) -> HfConfig:
    """Raises UnsupportedMetadataError for more than one kv head, of which there is none in llama.cpp."""
    if (found := config.get("_kv_heads", 1)) != 1:
        raise UnsupportedMetadataError(f"attention.head_count_kv is {found}; of this family 1 is read")
    return {"multi_query": True}


def gpt_oss(config: HfConfig) -> HfConfig:
    """The ends of the blend of its yarn are not whole numbers, which is no metadata."""
    rope = {"rope_type": "default"}  # where the file has no other
    return {"intermediate_size": config["_units"], "_scaling": {"truncate": False}, "rope_scaling": rope}


def granite(config: HfConfig) -> HfConfig:
    """A scale of 0 is none, as is a missing one; attention then has that of nearly all families.

    Raises:
      UnsupportedMetadataError: a model without ropes, which is another family.
    """
    if not config.get("_has_rope", True):
        raise UnsupportedMetadataError("rope.scaling.finetuned is False: a Granite without ropes")
    scales = {name: config.get(name) or 1.0 for name in ("embedding_multiplier", "residual_multiplier")}
    return scales | {"attention_multiplier": config.get("attention_multiplier") or _head_dim(config) ** -0.5}


def granitemoe(config: HfConfig) -> HfConfig:
    """Raises UnsupportedMetadataError for a model with an MLP beside the experts, which is another family."""
    if config["_shared_experts"]:
        raise UnsupportedMetadataError("a Granite with an MLP beside its experts")
    return granite(config)


def deepseek2(config: HfConfig) -> HfConfig:
    """DeepSeek-V2, whose router has a softmax, or V3; widths of heads are under other keys where keys are absorbed.

    A factor of the weights of experts that is 0 is none.

    Raises:
      UnsupportedMetadataError: an old file of a model that may have groups of experts, of which it says nothing; layers
        that predict further tokens, which only other models under this name have in their files.
    """
    if config.get("num_nextn_predict_layers"):
        raise UnsupportedMetadataError("layers that predict further tokens, in a model under the name of DeepSeek-V2")
    rope, experts = config["qk_rope_head_dim"], config.get("n_routed_experts", 0)
    if "n_group" not in config and experts > _EXPERTS_WITHOUT_GROUPS:
        raise UnsupportedMetadataError(f"expert_group_count is missing, and {experts} experts may be in groups")
    # Of old files without the key, llama.cpp recognises GLM-4.7 Lite by its sizes.
    is_glm = config["num_hidden_layers"] in (47, 48) and config["vocab_size"] == 154880
    scores = config.get("_scores") or (_SIGMOID if is_glm else _SOFTMAX)
    if scores not in (_SOFTMAX, _SIGMOID):
        raise UnsupportedMetadataError(f"expert_gating_func is {scores}; of this family 1 and 2 are read")
    is_third = scores == _SIGMOID
    groups = {name: config.get(name) or 1 for name in ("n_group", "topk_group")}
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
        "routed_scaling_factor": config["routed_scaling_factor"] or 1.0,
    } | (groups if is_third else {"topk_method": "group_limited_greedy" if grouped else "greedy"})


def glm4_moe(config: HfConfig) -> HfConfig:
    """The layers that predict further tokens are counted among the others."""
    later = config.get("num_nextn_predict_layers", 0)
    layers = {"num_hidden_layers": config["num_hidden_layers"] - later}
    layers |= {"routed_scaling_factor": config["routed_scaling_factor"] or 1.0}
    return sigmoid(config) | glm4(config) | layers | {"use_qk_norm": config["_qk_norm"]}
