"""The metadata of a GGUF file as the config of a Hugging Face model.

A family of llama.cpp is a row: the model type in Hugging Face, and keys beyond those that all have. A key that is
absent has the default of the config class.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tracing_jax.checkpoint.errors import CheckpointError, UnsupportedMetadataError
from tracing_jax.checkpoint.gguf.header import GgufHeader
from tracing_jax.complaints import shortened

Config = dict[str, Any]

_COMMON = {
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
_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


class _Family(NamedTuple):
    model_type: str
    keys: Mapping[str, str] = {}
    common: Mapping[str, str] = _COMMON
    more: Callable[[Config], Config] = lambda config: {}
    defaults: Mapping[str, Any] = {}


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


_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_SHARED = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_GEMMA = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_FAMILIES = {
    "llama": _Family(
        "llama", {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}, more=_mixtral,
        defaults={"rope_theta": 10000.0},
    ),
    "qwen2": _Family("qwen2"),
    "qwen3": _Family("qwen3"),
    # How the weights of the selected experts are scaled is no metadata: llama.cpp knows it by the family.
    "qwen2moe": _Family("qwen2_moe", _EXPERTS | _SHARED, defaults={"norm_topk_prob": False, "decoder_sparse_step": 1}),
    "qwen3moe": _Family("qwen3_moe", _EXPERTS, defaults={"norm_topk_prob": True, "decoder_sparse_step": 1}),
    "olmoe": _Family("olmoe", _EXPERTS, defaults={"norm_topk_prob": False, "rope_theta": 10000.0}),
    "phi3": _Family(
        "phi3", {"attention.sliding_window": "sliding_window", "rope.dimension_count": "rope_dims",
                 "rope.scaling.original_context_length": "original_max_position_embeddings"}, more=_phi3,
        defaults={"rope_theta": 10000.0},
    ),
    "gemma": _Family("gemma", defaults={"rope_theta": 10000.0}),
    "gemma2": _Family("gemma2", _GEMMA, more=_gemma2, defaults={"rope_theta": 10000.0}),
    "gemma3": _Family(
        "gemma3_text", _GEMMA | {"rope.freq_base_swa": "rope_local_base_freq"}, more=_gemma2,
        defaults={"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
    ),
    "olmo": _Family("olmo", {"attention.clamp_kqv": "clip_qkv"}, defaults={"rope_theta": 10000.0}),
    "olmo2": _Family("olmo2"),
    "granite": _Family(
        "granite",
        {"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
         "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"},
    ),
    "gpt2": _Family(
        "gpt2",
        common={
            "block_count": "n_layer", "embedding_length": "n_embd", "feed_forward_length": "n_inner",
            "attention.head_count": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "context_length": "n_positions",
        },
    ),
}  # fmt: skip

GGUF_ARCHITECTURES = tuple(sorted(_FAMILIES))
"""Families as llama.cpp names them."""


def config_of(header: GgufHeader, factors: Callable[[str], np.ndarray]) -> Config:
    """Returns the content of the `config.json` of a model in a GGUF file.

    Args:
      header: of the file.
      factors: reads a small tensor of it.

    Raises:
      CheckpointError: a family that is not read, or metadata that is missing or has no counterpart.
    """
    name = header.metadata.get("general.architecture")
    if name not in _FAMILIES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise UnsupportedMetadataError(f"GGUF architecture {shortened(repr(name))} is not read; read are {known}")
    family = _FAMILIES[name]
    values = {key.removeprefix(f"{name}."): value for key, value in header.metadata.items()}
    keys = {**family.common, **family.keys}
    config: Config = {"model_type": family.model_type, **family.defaults}
    config |= {ours: _number(key, values[key]) for key, ours in keys.items() if key in values}
    if missing := [key for key in ("block_count", "embedding_length", "attention.head_count") if key not in values]:
        raise CheckpointError(f"its metadata lacks {', '.join(f'{name}.{key}' for key in missing)}; convert it again")
    config |= {ours: int(values[f"tokenizer.ggml.{key}"]) for key, ours in _IDS.items() if _has_id(values, key)}
    config |= _of_tensors(header) | family.more(config)
    if family.common is _COMMON:
        config |= _rope_scaling(header, values, config, factors)
    return config


def plain_config(metadata: Mapping[str, Any]) -> Config:
    """Returns the metadata of a family that is not supported as a config, without what is no number or text."""
    name = str(metadata.get("general.architecture"))
    values = {
        key.removeprefix(f"{name}."): value for key, value in metadata.items() if not key.startswith("tokenizer.")
    }
    return {"model_type": name} | {
        key: value for key, value in values.items() if isinstance(value, int | str) or _is_finite(value)
    }


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _has_id(values: Mapping[str, Any], key: str) -> bool:
    return isinstance(values.get(f"tokenizer.ggml.{key}"), int)


def _number(key: str, value: Any) -> Any:
    """Returns a number; of an array, one for each layer, the one that all layers have."""
    if isinstance(value, np.ndarray):
        if len(value) == 0 or (value != value[0]).any():
            raise UnsupportedMetadataError(f"{key} differs between layers, which is not read")
        value = value[0].item()
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{key} is {shortened(repr(value))}, expected a number")
    return value if isinstance(value, int) else float(np.float32(value))


def _of_tensors(header: GgufHeader) -> Config:
    """Returns what the tensors say: the size of the vocabulary, a head of its own, and biases."""
    tensors = header.tensors
    if "token_embd.weight" not in tensors:
        raise CheckpointError("no token_embd.weight in it; it holds no language model")
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _rope_scaling(
    header: GgufHeader, values: Mapping[str, Any], config: Config, factors: Callable[[str], np.ndarray]
) -> Config:
    kind = values.get("rope.scaling.type", "none")
    if "rope_factors_short.weight" in header.tensors:
        kinds = ("short", "long")
        found = {f"{name}_factor": factors(f"rope_factors_{name}.weight").tolist() for name in kinds}
        return {"rope_scaling": {"rope_type": "longrope"} | found}
    if "rope_freqs.weight" in header.tensors:
        return {"rope_scaling": _llama3(factors("rope_freqs.weight"), config)}
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": _number("rope.scaling.factor", values.get("rope.scaling.factor"))}
    if "rope.scaling.original_context_length" in values:
        scaling["original_max_position_embeddings"] = values["rope.scaling.original_context_length"]
    return {"rope_scaling": scaling}


def _llama3(factors: np.ndarray, config: Config) -> Config:
    """Returns the scaling of Llama 3.1 of which a file holds only what it divides each frequency by.

    Raises:
      CheckpointError: it is another scaling.
    """
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    scaling = {
        "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    inverse = config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    blend = np.clip((8192 * inverse / (2 * math.pi) - 1.0) / 3.0, 0, 1)
    expected = 1 / ((1 - blend) / scaling["factor"] + blend)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError("rope_freqs.weight is not Llama 3.1's scaling, the only one that is read from factors")
    return scaling
