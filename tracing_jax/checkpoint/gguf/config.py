"""The metadata of a GGUF file as the config of a Hugging Face model.

A key that is absent has the default of llama.cpp, which is that of the config class where no module says otherwise, and
one that llama.cpp needs is asked for. A key that changes what a model computes, and that its family does not read, is
refused.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tracing_jax.checkpoint.errors import CheckpointError, UnsupportedMetadataError
from tracing_jax.checkpoint.gguf.derived import HfConfig
from tracing_jax.checkpoint.gguf.families import GGUF_ARCHITECTURES, GGUF_FAMILIES
from tracing_jax.checkpoint.gguf.header import GgufHeader
from tracing_jax.checkpoint.gguf.needed import missing_keys
from tracing_jax.error_messages import shortened

_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_ASKS = re.compile(
    r"attention\.(sliding_window(_pattern)?|scale|clamp_kqv|max_alibi_bias|causal|temperature_\w+|key_length_mla)"
    r"|(attn|final|router)_logit_softcapping|(logit|embedding|residual)_scale|rope\.(dimension_sections|freq_base_swa)"
    r"|expert_(gating_func|weights_norm|weights_scale|group_count)|use_parallel_residual|nextn_predict_layers"
    r"|rope\.scaling\.(yarn_(ext_factor|log_multiplier)|attn_factor)"
)
"""Keys that change what a model computes: one that a family does not read must ask for nothing."""

_MOST_LAYERS = 10_000  # no model has as many

_PATTERN = "attention.sliding_window_pattern"
_LISTS = (_PATTERN, "rope.dimension_sections")
_ASKS_NOTHING = {"expert_gating_func": 1, "expert_group_count": 1, "rope.scaling.attn_factor": 1, "attention.causal": 1}
"""Of such keys, values that ask for nothing; of any, 0 does."""

_YARN = {
    "rope.scaling.yarn_beta_fast": "beta_fast", "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_attn_factor": "attention_factor",
}  # fmt: skip


def config_of(header: GgufHeader, factors: Callable[[str], np.ndarray]) -> HfConfig:
    """Returns the content of the `config.json` of a model in a GGUF file.

    Args:
      header: of the file.
      factors: reads a small tensor of it.

    Raises:
      CheckpointError: a family that is not read, or metadata that is missing or has no counterpart.
    """
    name = header.metadata.get("general.architecture")
    if name not in GGUF_FAMILIES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise UnsupportedMetadataError(f"GGUF architecture {shortened(repr(name))} is not read; read are {known}")
    family = GGUF_FAMILIES[name]
    values = {key.removeprefix(f"{name}."): value for key, value in header.metadata.items()}
    keys = {**family.common, **family.keys}
    config: HfConfig = {"model_type": family.model_type, **family.defaults}
    if asked := [key for key in values if key not in keys and _ASKS.fullmatch(key) and not _asks_nothing(key, values)]:
        raise UnsupportedMetadataError(
            f"{asked[0]} is {shortened(values[asked[0]])}, which is not read for models of the architecture {name}"
        )
    for key, ours in keys.items():
        if key in values and key not in _LISTS:
            config[ours] = (_numbers if ours.startswith("_each_") else _number)(key, values[key])
    layers = _number("block_count", values.get("block_count", 1))
    if not (isinstance(layers, int) and 1 <= layers <= _MOST_LAYERS):
        raise CheckpointError(f"block_count is {shortened(repr(layers))}, expected from 1 to {_MOST_LAYERS}")
    if missing := missing_keys(name, keys.keys(), values):
        raise CheckpointError(f"its metadata lacks {', '.join(f'{name}.{key}' for key in missing)}; convert it again")
    config |= {ours: int(values[f"tokenizer.ggml.{key}"]) for key, ours in _IDS.items() if _has_id(values, key)}
    if _PATTERN in keys and _PATTERN in values:
        config["layer_types"] = _layer_types(values[_PATTERN], config["num_hidden_layers"])
    config |= _of_tensors(header, factors)
    config |= family.more(config)
    if "rope.freq_base" in family.common:
        scaling = _rope_scaling(header, values, config, factors)
        config |= _ropes_by_type(config, scaling) if "_scaled" in config else scaling
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _asks_nothing(key: str, values: Mapping[str, Any]) -> bool:
    value = values[key]
    return not np.any(value) or (key in _ASKS_NOTHING and value == _ASKS_NOTHING[key])


def _layer_types(pattern: Any, layers: int) -> list[str]:
    """Returns the type of each layer: whether each has a window, or after how many layers one has none."""
    if isinstance(pattern, np.ndarray | list):
        if len(pattern) != layers:
            raise UnsupportedMetadataError(f"{_PATTERN} has {len(pattern)} entries for {layers} layers")
        windows = [bool(entry) for entry in pattern]
    else:
        windows = [bool(pattern) and (i + 1) % int(pattern) != 0 for i in range(layers)]
    return ["sliding_attention" if has else "full_attention" for has in windows]


def plain_config(metadata: Mapping[str, Any]) -> HfConfig:
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


def _numbers(key: str, value: Any) -> list[Any]:
    """Returns the numbers of all layers, or one for all of them."""
    return [_number(key, one) for one in (value.tolist() if isinstance(value, np.ndarray) else [value])]


def _of_tensors(header: GgufHeader, factors: Callable[[str], np.ndarray]) -> HfConfig:
    """Returns what the tensors say: the size of the vocabulary, a head of its own, biases, norms, factors of a rope."""
    tensors = header.tensors
    if "token_embd.weight" not in tensors:
        raise CheckpointError("no token_embd.weight in it; it holds no language model")
    return {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "_o_bias": "blk.0.attn_output.bias" in tensors,
        "_fused_bias": "blk.0.attn_qkv.bias" in tensors,
        "_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "_shared_experts": "blk.0.ffn_gate_shexp.weight" in tensors,
        "_second_norm": "blk.0.attn_norm_2.weight" in tensors,
        "_ends": {name.split(".", 2)[2] for name in tensors if name.startswith("blk.") and name.count(".") > 1},
        "_with_values": {name.split(".")[1] for name in tensors if name.endswith(".attn_v.weight")},
        "_rope_factors": factors("rope_freqs.weight") if "rope_freqs.weight" in tensors else None,
    }


def _rope_scaling(
    header: GgufHeader, values: Mapping[str, Any], config: HfConfig, factors: Callable[[str], np.ndarray]
) -> HfConfig:
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear"))
    kind = values.get("rope.scaling.type", "none" if factor in (None, 0, 1) else "linear")  # as llama.cpp takes it
    if "rope_factors_short.weight" in header.tensors:
        kinds = ("short", "long")
        found = {f"{name}_factor": factors(f"rope_factors_{name}.weight").tolist() for name in kinds}
        return {"rope_scaling": {"rope_type": "longrope"} | found}
    if "rope_freqs.weight" in header.tensors:
        return {"rope_scaling": _llama3(factors("rope_freqs.weight"), config)}
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": _number("rope.scaling.factor", factor)}
    if "rope.scaling.original_context_length" in values:
        scaling["original_max_position_embeddings"] = values["rope.scaling.original_context_length"]
    for key, name in _YARN.items():
        if key in values:
            scaling[name] = _number(key, values[key])
    scaling |= config.pop("_scaling", {})
    return {"rope_scaling": scaling}


def _ropes_by_type(config: HfConfig, scaling: HfConfig) -> HfConfig:
    """Returns the ropes of layers with a window and of those without, of which one kind has the scaling."""
    plain = {"rope_type": "default", "rope_theta": config.get("rope_theta")}
    kinds = dict.fromkeys(("full_attention", "sliding_attention"), plain)
    return {"rope_parameters": kinds | {config["_scaled"]: plain | scaling.get("rope_scaling", {})}}


def _llama3(factors: np.ndarray, config: HfConfig) -> HfConfig:
    """Returns the scaling of Llama 3.1 of which a file holds only what it divides each frequency by.

    Raises:
      UnsupportedMetadataError: it is another scaling.
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
        raise UnsupportedMetadataError(
            "rope_freqs.weight is not Llama 3.1's scaling, the only one that is read from factors"
        )
    return scaling
