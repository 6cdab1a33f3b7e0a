"""`Arch`: the frozen facts of one model, read from its Hugging Face config; what is not known is refused.

A llama-like block with flags covers every family here. Each attribute of a config is either used, known to leave the
numbers alone, or an error: a setting that is skipped in silence gives wrong numbers.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np


class UnsupportedModelError(ValueError):
    """A config asks for something that this package does not compute."""


@dataclass(frozen=True)
class Arch:
    """The facts of one model.

    Letters: D embed, K kv heads, G queries per kv head, H head dim, F mlp, V vocab, L layers.

    Attributes:
      rope_frequencies: one tuple of H/2 inverse frequencies (radians per position) per rope of the model.
      layer_ropes: for each layer the index into `rope_frequencies`.
      layer_windows: for each layer how many positions back, itself included, a token sees; None sees all.
      norm: `rms` has gain g, `rms_unit_offset` has gain 1 + g (Gemma), `layer_norm_plain` has none (OLMo).
      qk_norm: `head` normalises over H (Qwen3, Gemma 3), `all` over all heads together (OLMo 2).
    """

    family: str
    vocab_size: int  # V
    embed_dim: int  # D
    num_layers: int  # L
    mlp_dim: int  # F
    num_kv_heads: int  # K
    q_group: int  # G
    head_dim: int  # H
    tied: bool
    norm_eps: float
    rope_frequencies: tuple[tuple[float, ...], ...]
    layer_ropes: tuple[int, ...]
    layer_windows: tuple[int | None, ...]
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    norm: Literal["rms", "rms_unit_offset", "layer_norm_plain"] = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: Literal["head", "all"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 1.0
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    clip_qkv: float | None = None


# Attributes that leave a forward pass without dropout and cache unchanged; Gemma 2's sliding_window_size only repeats
# its sliding_window.
_NEUTRAL = frozenset(
    """_attn_implementation_autoset _name_or_path architectures attention_dropout auto_map bos_token_id
    cache_implementation chunk_size_feed_forward dtype eos_token_id hidden_dropout id2label initializer_range is_decoder
    is_encoder_decoder label2id max_position_embeddings max_sequence_length max_window_layers model_max_length
    model_type num_labels output_attentions output_hidden_states pad_token_id pretraining_tp problem_type resid_pdrop
    return_dict sep_token_id sliding_window_size tokenizer_class torch_dtype transformers_version unsloth_fixed
    unsloth_version use_cache use_sliding_window""".split()
)

# Attributes in published configs that ask for nothing at this value, and at any other for what is not computed here.
_NEUTRAL_AT = {"is_llama_config": True, "rope_interleaved": False, "use_mrope": False}

# Attributes that every family's reader uses.
_COMMON = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rope_parameters tie_word_embeddings hidden_act""".split()
)

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

_Facts = dict[str, Any]
_GEMMA_USES = "rms_norm_eps attention_bias hidden_activation use_bidirectional_attention"
_GEMMA2_USES = (
    _GEMMA_USES + " query_pre_attn_scalar sliding_window layer_types final_logit_softcapping attn_logit_softcapping"
)


def _llama(config: Any) -> _Facts:
    return {"qkv_bias": config.attention_bias, "o_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _mistral(config: Any) -> _Facts:
    return {"layer_windows": (config.sliding_window,) * config.num_hidden_layers}


def _qwen2(config: Any) -> _Facts:
    return {"qkv_bias": True, "layer_windows": _windows_by_type(config)}


def _qwen3(config: Any) -> _Facts:
    bias = config.attention_bias
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head", "layer_windows": _windows_by_type(config)}


def _gemma(config: Any) -> _Facts:
    return {
        "norm": "rms_unit_offset",
        "embed_scale": math.sqrt(config.hidden_size),
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
    }


def _gemma2(config: Any) -> _Facts:
    return _gemma(config) | {
        "post_norms": True,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
        "layer_windows": _windows_by_type(config),
    }


def _gemma3(config: Any) -> _Facts:
    # transformers carries attn_logit_softcapping in Gemma 3's config and never applies it; a set value is ambiguous.
    if config.attn_logit_softcapping is not None:
        raise UnsupportedModelError("attn_logit_softcapping is set, but Gemma 3 has no attention soft-capping")
    return _gemma2(config) | {"qk_norm": "head"}


def _olmo(config: Any) -> _Facts:
    return {
        "norm": "layer_norm_plain",
        "norm_eps": 1e-5,  # a constant of the family, absent from its config
        "clip_qkv": config.clip_qkv,
        "qkv_bias": config.attention_bias,
        "o_bias": config.attention_bias,
    }


def _olmo2(config: Any) -> _Facts:
    bias = config.attention_bias
    return {"pre_norms": False, "post_norms": True, "qk_norm": "all", "qkv_bias": bias, "o_bias": bias}


def _granite(config: Any) -> _Facts:
    return _llama(config) | {
        "attention_scale": config.attention_multiplier,
        "embed_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": 1.0 / config.logits_scaling,
    }


@dataclass(frozen=True)
class _Family:
    read: Callable[[Any], _Facts]
    uses: str
    """Config attributes, beyond the common ones, that `read` or the common reader uses."""
    thetas: Mapping[str | None, str] = field(default_factory=lambda: {None: "rope_theta"})
    """For each layer type with a rope of its own (None: one rope for all) the attribute that older files name it by."""


_FAMILIES: dict[str, _Family] = {
    "llama": _Family(_llama, "rms_norm_eps attention_bias mlp_bias"),
    "mistral": _Family(_mistral, "rms_norm_eps sliding_window"),
    "qwen2": _Family(_qwen2, "rms_norm_eps sliding_window layer_types"),
    "qwen3": _Family(_qwen3, "rms_norm_eps attention_bias sliding_window layer_types"),
    "gemma": _Family(_gemma, _GEMMA_USES),
    "gemma2": _Family(_gemma2, _GEMMA2_USES),
    "gemma3_text": _Family(
        _gemma3,
        _GEMMA2_USES + " sliding_window_pattern _sliding_window_pattern",
        {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    ),
    "olmo": _Family(_olmo, "attention_bias clip_qkv"),
    "olmo2": _Family(_olmo2, "rms_norm_eps attention_bias"),
    "granite": _Family(
        _granite,
        "rms_norm_eps attention_bias mlp_bias attention_multiplier embedding_multiplier residual_multiplier"
        " logits_scaling",
    ),
}

SUPPORTED_FAMILIES = tuple(sorted(_FAMILIES))
SUPPORTED_ROPES = ("default", "linear", "llama3")


def read_arch(folder: Path) -> Arch:
    """Returns the facts of the model whose `config.json` lies in `folder`; no weight is read.

    Raises:
      UnsupportedModelError: the file is absent or not JSON, the architecture is unknown, or an attribute that may
        change numbers is; all findings are named at once, with what is supported.
    """
    from transformers import AutoConfig  # slow to import, and not needed by those who build an Arch themselves

    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{file}: not a readable config ({error})") from error
    if not isinstance(raw, dict) or raw.get("model_type") not in _FAMILIES:
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise UnsupportedModelError(
            f"{file}: architecture {found!r} is not supported; supported: {', '.join(SUPPORTED_FAMILIES)}"
        )
    if problem := _rope_is_absent(raw):
        raise UnsupportedModelError(f"{file}: {problem}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return arch_from_config(config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file}: {error}") from error
    except Exception as error:  # transformers reports a bad field by whatever its validators raise
        raise UnsupportedModelError(f"{file}: transformers refuses this config: {error}") from error


def arch_from_config(config: Any) -> Arch:
    """Returns the facts of a model from its `transformers` config object.

    Raises:
      UnsupportedModelError: names every attribute that is unknown or asks for something not computed here.
    """
    family = _FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"architecture {config.model_type!r} is not supported; supported: {', '.join(SUPPORTED_FAMILIES)}"
        )
    if problems := _problems(config, family):
        raise UnsupportedModelError("; ".join(problems))
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    frequencies, layer_ropes = _ropes(config, head_dim)
    facts: _Facts = {
        "norm_eps": getattr(config, "rms_norm_eps", None),
        "attention_scale": head_dim**-0.5,
        "layer_windows": (None,) * layers,
    }
    return Arch(
        family=config.model_type,
        vocab_size=config.vocab_size,
        embed_dim=config.hidden_size,
        num_layers=layers,
        mlp_dim=config.intermediate_size,
        num_kv_heads=kv_heads,
        q_group=heads // kv_heads,
        head_dim=head_dim,
        tied=bool(config.tie_word_embeddings),
        activation=_ACTIVATIONS[_activation_name(config)],  # type: ignore[arg-type]
        rope_frequencies=frequencies,
        layer_ropes=layer_ropes,
        **(facts | family.read(config)),
    )


def _problems(config: Any, family: _Family) -> list[str]:
    attributes = config.to_dict()
    known = _NEUTRAL | _COMMON | set(family.uses.split())
    # An unknown attribute that is null asks for nothing.
    unknown = sorted(
        name for name, value in attributes.items() if name not in known and value not in (None, _NEUTRAL_AT.get(name))
    )
    lines = []
    if unknown:
        lines.append(
            f"unknown config attributes {', '.join(unknown)}: they may change the numbers, so they are refused; "
            f"supported for {config.model_type}: {', '.join(sorted(_COMMON | set(family.uses.split())))}; "
            "remove from config.json what does not matter"
        )
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if kv_heads and heads % kv_heads:
        lines.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if _activation_name(config) not in _ACTIVATIONS:
        lines.append(f"activation {_activation_name(config)!r} is not one of {', '.join(_ACTIVATIONS)}")
    if attributes.get("use_bidirectional_attention"):
        lines.append("use_bidirectional_attention is set; only causal models are supported")
    return lines


def _activation_name(config: Any) -> str:
    # Gemma 1 files name it twice; transformers computes with hidden_act there, with hidden_activation in 2 and 3.
    if config.model_type in ("gemma2", "gemma3_text"):
        return config.hidden_activation
    return config.hidden_act


def _windows_by_type(config: Any) -> tuple[int | None, ...]:
    sliding = {"sliding_attention": config.sliding_window, "full_attention": None}
    unknown = set(config.layer_types) - set(sliding)
    if unknown or len(config.layer_types) != config.num_hidden_layers:
        raise UnsupportedModelError(
            f"layer_types must name sliding_attention or full_attention for each of {config.num_hidden_layers} layers, "
            f"found {config.layer_types}"
        )
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise UnsupportedModelError("layer_types names sliding_attention, but sliding_window is not set")
    return tuple(sliding[kind] for kind in config.layer_types)


def _rope_is_absent(raw: dict[str, Any]) -> str | None:
    """Returns why a rope cannot be known, or None: only old Llama files may leave theta out, where it was 10000."""
    parameters = raw.get("rope_parameters") or {}
    absent = []
    for layer_type, old_name in _FAMILIES[raw["model_type"]].thetas.items():
        rope = parameters if layer_type is None else parameters.get(layer_type) or {}
        if raw.get(old_name) is None and rope.get("rope_theta") is None:
            absent.append(old_name if layer_type is None else f"{old_name} (of {layer_type} layers)")
    if not absent or (absent == ["rope_theta"] and _predates_rope_theta(raw)):
        return None
    return (
        f"no rope in this config: {' and '.join(absent)} not set, nor in rope_parameters; a default would change the "
        'numbers in silence; add the model\'s own, e.g. "rope_theta": 10000.0'
    )


def _predates_rope_theta(raw: dict[str, Any]) -> bool:
    # Llama's theta was the constant 10000 before transformers 4.33 made it a setting.
    version = re.match(r"(\d+)\.(\d+)", str(raw.get("transformers_version")))
    if raw["model_type"] != "llama" or "rope_theta" in raw or "rope_parameters" in raw or version is None:
        return False
    return (int(version[1]), int(version[2])) < (4, 33)


def _ropes(config: Any, head_dim: int) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]]:
    """Returns the distinct ropes of a model and, for each layer, which one it uses."""
    parameters = config.rope_parameters or {}
    layers = config.num_hidden_layers
    if "rope_type" in parameters:
        return (_frequencies(parameters, head_dim),), (0,) * layers
    kinds = sorted(set(config.layer_types))
    if missing := [kind for kind in kinds if not parameters.get(kind)]:
        raise UnsupportedModelError(f"rope_parameters lack an entry for {', '.join(missing)}: found {parameters}")
    ropes = tuple(_frequencies(parameters[kind], head_dim) for kind in kinds)
    return ropes, tuple(kinds.index(kind) for kind in config.layer_types)


def _frequencies(parameters: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Returns the H/2 inverse frequencies of a rope, rounded to float32 as transformers does.

    Source: RoFormer (arXiv 2104.09864) eq. 15; `linear` divides them by a factor (arXiv 2306.15595); `llama3` divides
    only the slow ones, with a linear blend between (The Llama 3 Herd of Models, and the code released with 3.1).
    """
    kind, theta = parameters["rope_type"], parameters.get("rope_theta")
    if kind not in SUPPORTED_ROPES:
        raise UnsupportedModelError(f"rope type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPES)}")
    if theta is None:
        raise UnsupportedModelError(f"rope_theta is not set in {parameters}")
    if parameters.get("partial_rotary_factor", 1.0) not in (1, 1.0, None):
        raise UnsupportedModelError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported")
    base = np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    inverse = np.float32(1.0) / base
    if kind == "linear":
        inverse = inverse / np.float32(parameters["factor"])
    if kind == "llama3":
        inverse = _llama3(inverse, parameters)
    return tuple(float(f) for f in inverse.astype(np.float32))


def _llama3(inverse: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * inverse / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast, kept; 0: slow, divided
    return (1 - blend) * inverse / factor + blend * inverse
