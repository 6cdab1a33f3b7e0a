"""The models on which our numbers are compared with transformers: configs as data, weights drawn from names.

Every family in every head layout with every rope, tied and untied in turn; and one case per option of a family.
Constants are odd on purpose: a value dropped in silence (rope theta, eps, scale, window, cap) then shows in the logits.
"""

import copy
import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.tensor_layout import LeafLayout, tensor_shapes
from tracing_jax.sources import InMemory
from tracing_jax.tree import unflatten

BLOCKS, LENGTH, VOCAB = 2, 12, 31
WEIGHT_STD = 0.3

_HEADS = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mqa": {"num_attention_heads": 4, "num_key_value_heads": 1},
}
_ROPES = {
    "default": {"rope_type": "default", "rope_theta": 777.0},
    "linear": {"rope_type": "linear", "rope_theta": 12345.6, "factor": 3.0},
    # With these numbers one frequency is kept, one is blended and the rest are divided.
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 777.0,
        "factor": 5.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
_LOCAL_ROPE = {"rope_type": "default", "rope_theta": 43.2}

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,  # other than hidden_size / num_attention_heads; every family honours it, named in its class or not
    "pad_token_id": None,
    "eos_token_id": None,
}
_EPS = {"rms_norm_eps": 3e-3}
_ABSENT = object()
_NARROW_HEADS = {"narrow_heads": {"head_dim": _ABSENT}}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_GEMMA2 = _EPS | {"query_pre_attn_scalar": 7, "sliding_window": 5}

_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _EPS,
    "mistral": _EPS | {"sliding_window": 5},
    "qwen2": _EPS,
    "qwen3": _EPS,
    "gemma": _EPS,
    "gemma2": _GEMMA2 | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5},
    "gemma3_text": _GEMMA2 | {"num_hidden_layers": 3, "layer_types": [_SLIDING, _FULL, _SLIDING]},
    "olmo": {"clip_qkv": 0.8},
    "olmo2": _EPS,
    "mixtral": _EPS | {"sliding_window": 5, "num_local_experts": 3, "num_experts_per_tok": 2},
    "granite": _EPS
    | {
        "attention_multiplier": 0.21,
        "embedding_multiplier": 3.3,
        "residual_multiplier": 0.43,
        "logits_scaling": 1.7,
    },
}

_QWEN_WINDOWS = {
    "window_from_layer_1": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "layer_types": {"use_sliding_window": True, "sliding_window": 4, "layer_types": [_SLIDING, _FULL]},
    "window_unused": {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1},
}
_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": _NARROW_HEADS
    | {
        "attention_bias": {"attention_bias": True},
        "mlp_bias": {"mlp_bias": True},
        "both_biases": {"attention_bias": True, "mlp_bias": True},
        "gelu": {"hidden_act": "gelu"},
        "relu": {"hidden_act": "relu"},
    },
    "mistral": {
        "no_window": {"sliding_window": None},
        "window_2": {"sliding_window": 2},
        "window_1": {"sliding_window": 1},
        "window_over_all": {"sliding_window": 64},
    },
    "mixtral": _NARROW_HEADS
    | {
        "no_window": {"sliding_window": None},
        "one_per_token": {"num_experts_per_tok": 1},
        "all_per_token": {"num_experts_per_tok": 3},
        "one_expert": {"num_local_experts": 1, "num_experts_per_tok": 1},
    },
    "qwen2": _QWEN_WINDOWS | _NARROW_HEADS,
    "qwen3": _QWEN_WINDOWS | {"attention_bias": {"attention_bias": True}},
    "gemma": {
        "attention_bias": {"attention_bias": True},
        "legacy_gelu": {"hidden_act": "gelu"},
        "silu": {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
    },
    "gemma2": {
        "no_caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "attention_cap": {"final_logit_softcapping": None},
        "attention_bias": {"attention_bias": True},
        "layer_types": {"layer_types": [_FULL, _SLIDING]},
        "gelu": {"hidden_activation": "gelu", "hidden_act": "silu"},
    },
    "gemma3_text": {
        "logit_cap": {"final_logit_softcapping": 2.5},
        "attention_bias": {"attention_bias": True},
        "pattern_2": {"layer_types": None, "sliding_window_pattern": 2},
        "scaled_local_rope": {"rope_parameters": {_FULL: _ROPES["llama3"], _SLIDING: _ROPES["linear"]}},
    },
    "olmo": _NARROW_HEADS
    | {
        "no_clip": {"clip_qkv": None},
        "attention_bias": {"attention_bias": True},
    },
    "olmo2": _NARROW_HEADS | {"attention_bias": {"attention_bias": True}},
    "granite": _NARROW_HEADS
    | {
        "biases": {"attention_bias": True, "mlp_bias": True},
        "unit_multipliers": {
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    },
}

# GPT-2 has its own names for everything, no rope and one head layout.
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 24,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 16,
    "layer_norm_epsilon": 3e-3,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2_OPTIONS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "inner": {"n_inner": 20},
    "one_head": {"n_head": 1},
    "odd_heads": {"n_head": 8},
    "unscaled": {"scale_attn_weights": False},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "gelu": {"activation_function": "gelu"},
    "relu": {"activation_function": "relu"},
    "full_length": {"n_positions": LENGTH},
}


@dataclass(frozen=True)
class Case:
    """One tiny model: a name such as `gemma2-gqa-tied-linear`, and the content of its config.json."""

    name: str
    config: dict[str, Any]

    @property
    def family(self) -> str:
        return self.config["model_type"]

    def hf_config(self) -> Any:
        """Returns the config as transformers reads it."""
        from transformers import AutoConfig

        fields = copy.deepcopy(self.config)  # transformers writes into the nested rope dicts
        return AutoConfig.for_model(fields.pop("model_type"), **fields)

    def arch(self) -> Arch:
        """Returns the facts of the model."""
        return arch_from_config(self.hf_config())

    def source(self) -> InMemory:
        """Returns our model, its leaves made from the tensors of a checkpoint."""
        arch = self.arch()
        layouts = leaf_layouts(arch)
        tensors = {name: self.weight(name, shape) for name, shape in tensor_shapes(layouts.values()).items()}
        leaves = {name: jnp.asarray(leaf_of(layout, tensors)) for name, layout in layouts.items()}
        return InMemory(arch, {"head": {}} | unflatten(leaves))

    def tokens(self) -> np.ndarray:
        """Returns int32[BLOCKS, LENGTH]."""
        numbers = _raw(f"{self.name}/tokens", BLOCKS * LENGTH) % VOCAB
        return numbers.astype(np.int32).reshape(BLOCKS, LENGTH)

    def weight(self, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the float32 tensor of this name: uniform with standard deviation WEIGHT_STD, about one for gains."""
        size = int(np.prod(shape))
        unit = (_raw(f"{self.name}/{tensor}", size) >> np.uint64(40)).astype(np.float64) / 2**24
        is_gain = tensor.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight"))
        centre = 1.0 if is_gain and not self.family.startswith("gemma") else 0.0
        return (centre + WEIGHT_STD * np.sqrt(12) * (unit - 0.5)).astype(np.float32).reshape(shape)


def leaf_of(layout: LeafLayout, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns a leaf of the tensors of a checkpoint."""
    return layout.to_leaf([tensors[part.tensor][part.index] for part in layout.slices])


def _raw(name: str, count: int) -> np.ndarray:
    # Raw bits, because numpy may change how its distributions are drawn, and golden files must not depend on that.
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)


def _rope(family: str, rope: str) -> dict[str, Any]:
    if family == "gemma3_text":
        return {"rope_parameters": {_FULL: _ROPES[rope], _SLIDING: _LOCAL_ROPE}}
    return {"rope_parameters": _ROPES[rope]}


def _cases() -> Iterator[Case]:
    for family, own in _FAMILIES.items():
        base = {"model_type": family} | _COMMON | own
        for heads, rope, tied in itertools.product(_HEADS, _ROPES, (True, False)):
            config = base | _HEADS[heads] | _rope(family, rope) | {"tie_word_embeddings": tied}
            yield Case(f"{family}-{heads}-{'tied' if tied else 'untied'}-{rope}", config)
        for option, changes in _OPTIONS[family].items():
            config = base | _HEADS["gqa"] | _rope(family, "default") | {"tie_word_embeddings": False} | changes
            yield Case(f"{family}-{option}", {key: value for key, value in config.items() if value is not _ABSENT})
    for option, changes in _GPT2_OPTIONS.items():
        yield Case(f"gpt2-{option}", _GPT2 | changes)


CASES = {case.name: case for case in _cases()}
FAMILIES = (*_FAMILIES, "gpt2")
