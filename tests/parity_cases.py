"""The models on which our numbers are compared with transformers: configs as data, weights drawn from names.

Every family in every head layout with every rope, tied and untied in turn; and one case per option of a family.
Constants are odd on purpose: a value dropped in silence (rope theta, eps, scale, window, cap) then shows in the logits.
"""

import copy
import itertools
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import gemma4_cases
import hybrid_cases
import jax.numpy as jnp
import mixture_cases
import numpy as np

from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.tensor_layout import LeafLayout, tensor_shapes
from tracing_jax.sources import InMemory
from tracing_jax.tree import unflatten

BLOCKS, LENGTH, VOCAB = 2, 12, 31
WEIGHT_STD = 0.3
_GAIN = re.compile(r"(norm|layernorm_\d|ln_1|ln_2|ln_f|ln_attn|ln_mlp|layer_norm|norms\.\d+)\.weight$")

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

_LN_EPS = {"layer_norm_eps": 3e-3}
_FIXED_WIDTH = {"head_dim": 6, "num_key_value_heads": _ABSENT}  # of hidden_size / num_attention_heads
_HALF = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.5}
_THIRD = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.34}  # of 6 dims 2
_WHOLE = {"partial_rotary_factor": 1.0}
_YARN = {"rope_type": "yarn", "rope_theta": 777.0, "factor": 5.0, "original_max_position_embeddings": 24}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 777.0,
    "original_max_position_embeddings": 40,
    "short_factor": [1.1, 1.3, 1.7, 2.9],
    "long_factor": [1.0, 3.0, 9.0, 27.0],
}
_GPTJ = {"model_type": "gptj", "n_positions": 40, "rotary_dim": 4, "layer_norm_epsilon": 3e-3}
_GPTJ |= {name: _GPT2[name] for name in ("vocab_size", "n_embd", "n_head", "n_layer", "bos_token_id", "eos_token_id")}
_OPT = {
    "model_type": "opt",
    "ffn_dim": 40,
    "max_position_embeddings": 40,
    **{name: _COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id")},
    "num_attention_heads": 4,
    "word_embed_proj_dim": 24,
    "pad_token_id": 1,
    "bos_token_id": 2,
}
_FALCON = {
    "model_type": "falcon",
    **{name: _COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id")},
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
    "layer_norm_epsilon": 3e-3,
    "rope_parameters": _ROPES["default"],
    "bos_token_id": None,
}

_DENSE: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "phi3": (
        _EPS | {"original_max_position_embeddings": 40},
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "longrope": {"rope_parameters": _LONG, "head_dim": _ABSENT, "hidden_size": 32},
            "partial": {"rope_parameters": _HALF, "sliding_window": 5, "num_key_value_heads": 4},
            "longrope_partial": {
                "rope_parameters": _LONG | {"partial_rotary_factor": 0.67},
                "hidden_size": 48,
                "head_dim": _ABSENT,
                "num_key_value_heads": 1,
            },
        },
    ),
    "glm": (
        _EPS | {"rope_parameters": _HALF},
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "no_bias": {"attention_bias": False},
            "whole": {"rope_parameters": _ROPES["default"], "num_key_value_heads": 1},
        },
    ),
    "glm4": (
        _EPS | {"rope_parameters": _HALF},
        {
            "gqa-tied-default": {"tie_word_embeddings": True, "attention_bias": False},
            "bias": {"attention_bias": True, "num_key_value_heads": 4},
        },
    ),
    "smollm3": (
        _EPS | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "biases": {"attention_bias": True, "mlp_bias": True},
            "windows": {"use_sliding_window": True, "sliding_window": 4},
            "every_layer": {"no_rope_layers": [1, 1, 1], "rope_parameters": _YARN},
            "interval": {"no_rope_layers": _ABSENT, "no_rope_layer_interval": 2, "head_dim": _ABSENT},
        },
    ),
    "exaone4": (
        _EPS | {"num_hidden_layers": 3, "sliding_window": 4, "layer_types": [_SLIDING, _FULL, _SLIDING]},
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "no_window": {"sliding_window": None, "layer_types": [_FULL] * 3, "head_dim": _ABSENT},
            "pattern": {"layer_types": _ABSENT, "sliding_window_pattern": 2, "rope_parameters": _ROPES["llama3"]},
        },
    ),
    "cohere": (
        _LN_EPS | {"logit_scale": 0.37},
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "qk_norm": {"use_qk_norm": True},
            "bias": {"attention_bias": True, "use_qk_norm": True, "num_key_value_heads": 4, "head_dim": _ABSENT},
        },
    ),
    "cohere2": (
        _LN_EPS
        | {
            "logit_scale": 0.37,
            "sliding_window": 4,
            "num_hidden_layers": 3,
            "layer_types": [_SLIDING, _FULL, _SLIDING],
        },
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "bias": {"attention_bias": True, "head_dim": _ABSENT},
            "pattern": {"layer_types": _ABSENT, "sliding_window_pattern": 2},
        },
    ),
    "gpt_neox": (
        _LN_EPS | _FIXED_WIDTH | {"rope_parameters": _THIRD},
        {
            "tied": {"tie_word_embeddings": True},
            "sequential": {"use_parallel_residual": False},
            "no_bias": {"attention_bias": False, "hidden_act": "gelu_new"},
            "whole": {"rope_parameters": _ROPES["linear"] | _WHOLE},
        },
    ),
    "stablelm": (
        _LN_EPS | {"head_dim": 6, "rope_parameters": _THIRD},
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "parallel": {"use_parallel_residual": True, "qk_layernorm": True},
            "biases": {"use_qkv_bias": True, "head_dim": _ABSENT, "rope_parameters": _ROPES["default"] | _WHOLE},
            "qk_norms": {"use_qkv_bias": True, "qk_layernorm": True},
        },
    ),
    "starcoder2": (
        {"norm_epsilon": 3e-3},
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "no_bias": {"use_bias": False, "sliding_window": 4, "head_dim": _ABSENT},
            "gelu": {"hidden_act": "gelu", "num_key_value_heads": 1, "rope_parameters": _YARN},
        },
    ),
    "phi": (
        _LN_EPS | {"rope_parameters": _HALF},
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "qk_norms": {"qk_layernorm": True, "head_dim": 6, "rope_parameters": _THIRD},
            "mha": {"num_key_value_heads": 4, "head_dim": _ABSENT, "rope_parameters": _ROPES["default"] | _WHOLE},
        },
    ),
    "llama": (
        _EPS,
        {
            "yarn": {"rope_parameters": _YARN},
            "yarn_options": {
                "rope_parameters": _YARN
                | {"beta_fast": 3.0, "beta_slow": 0.4, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}
            },
            "yarn_factor": {"rope_parameters": _YARN | {"attention_factor": 1.3}},
            "dynamic": {"rope_parameters": _ROPES["linear"] | {"rope_type": "dynamic"}, "max_position_embeddings": 40},
            "longrope": {"rope_parameters": _LONG},
            "longrope_factor": {"rope_parameters": _LONG | {"factor": 7.0}},
        },
    ),
}
_OWN_NAMES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "gptj": (
        _GPTJ,
        {
            "untied": {"tie_word_embeddings": False},
            "tied": {"tie_word_embeddings": True, "n_inner": 20},
            "whole": {"rotary_dim": 6, "activation_function": "relu"},
        },
    ),
    "opt": (
        _OPT,
        {
            "tied": {"tie_word_embeddings": True},
            "no_bias": {"enable_bias": False, "tie_word_embeddings": False},
            "gelu": {"activation_function": "gelu"},
        },
    ),
    "falcon": (
        _FALCON,
        {
            "multi_query": {},
            "grouped": {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
            "one_norm": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
            "many_heads": {"multi_query": False, "bias": True},
            "sequential": {"parallel_attn": False, "bias": True, "activation": "relu"},
            "alibi": {"alibi": True, "num_attention_heads": 6, "multi_query": False, "parallel_attn": False},
        },
    ),
}
_DENSE |= {
    "olmo3": (
        _EPS | {"sliding_window": 5, "layer_types": [_SLIDING, _FULL]},
        {
            "gqa-tied-default": {
                "tie_word_embeddings": True,
                "rope_parameters": {_FULL: _YARN, _SLIDING: _ROPES["default"]},
            },
            "bias": {
                "attention_bias": True,
                "head_dim": _ABSENT,
                "rope_parameters": {_FULL: _ROPES["llama3"], _SLIDING: _LOCAL_ROPE},
            },
        },
    ),
    "seed_oss": (
        _EPS,
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "biases": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
        },
    ),
    "ernie4_5": (_EPS, {"gqa-tied-default": {"tie_word_embeddings": True}, "biases": {"use_bias": True}}),
    "ministral3": (
        _EPS | {"rope_parameters": _YARN | {"original_max_position_embeddings": 40, "llama_4_scaling_beta": 0.3}},
        {
            "gqa-tied-default": {"tie_word_embeddings": True},
            "window": {"sliding_window": 5, "num_key_value_heads": 4},
        },
    ),
}
_OWN_NAMES["gpt_bigcode"] = (
    _GPT2 | {"model_type": "gpt_bigcode", "n_positions": 40},
    {
        "multi_query": {},
        "many_heads": {"multi_query": False, "n_inner": 20, "tie_word_embeddings": False},
        "unscaled": {"scale_attn_weights": False, "activation_function": "gelu"},
    },
)
_OWN_NAMES["gpt_neo"] = (
    {
        "model_type": "gpt_neo",
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_heads": 4,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 5,
        "max_position_embeddings": 40,
        "layer_norm_epsilon": 3e-3,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    {"tied": {}, "inner": {"intermediate_size": 20, "tie_word_embeddings": False}},
)
_OWN_NAMES["mpt"] = (
    {
        "model_type": "mpt",
        "vocab_size": VOCAB,
        "d_model": 24,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 40,
        "layer_norm_epsilon": 3e-3,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    {
        "tied": {},
        "clip": {"attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.3}},
        "odd_heads": {"n_heads": 6, "tie_word_embeddings": False},
    },
)
_OWN_NAMES["bloom"] = (
    {
        "model_type": "bloom",
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "n_head": 4,
        "n_layer": 2,
        "layer_norm_epsilon": 3e-3,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    {"tied": {}, "odd_heads": {"n_head": 6, "tie_word_embeddings": False}, "one_head": {"n_head": 1}},
)
_WITH_GOLDEN = {
    "phi3-gqa-tied-default", "phi3-longrope_partial", "glm-gqa-tied-default", "glm4-bias", "smollm3-windows",
    "exaone4-gqa-tied-default", "cohere-qk_norm", "cohere2-gqa-tied-default", "gpt_neox-tied", "gpt_neox-sequential",
    "stablelm-parallel", "starcoder2-gqa-tied-default", "phi-qk_norms", "gptj-tied", "opt-tied",
    "falcon-multi_query", "falcon-grouped", "falcon-alibi", "bloom-odd_heads", "mpt-odd_heads",
    "olmo3-gqa-tied-default", "seed_oss-biases", "ernie4_5-biases", "ministral3-window", "gpt_bigcode-multi_query",
    "gpt_neo-tied", "llama-yarn_options", "llama-dynamic",
}  # fmt: skip


_GAINS_MINUS_ONE = {"gemma", "gemma2", "gemma3_text"}


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

    def tensors(self, dtype: Any = np.float32) -> dict[str, np.ndarray]:
        """Returns all tensors of the files of the model."""
        shapes = tensor_shapes(leaf_layouts(self.arch()).values())
        return {name: self.weight(name, shape).astype(dtype) for name, shape in shapes.items()}

    def weight(self, tensor: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the float32 tensor of this name: uniform with standard deviation WEIGHT_STD, about one for gains."""
        size = int(np.prod(shape))
        unit = (_raw(f"{self.name}/{tensor}", size) >> np.uint64(40)).astype(np.float64) / 2**24
        is_gain = bool(_GAIN.search(tensor))
        centre = 1.0 if is_gain and self.family not in _GAINS_MINUS_ONE else 0.0
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


def _dense_cases() -> Iterator[Case]:
    shared = _COMMON | _HEADS["gqa"] | {"rope_parameters": _ROPES["default"], "tie_word_embeddings": False}
    for rows, common in ((_DENSE, shared), (_OWN_NAMES, {})):
        for family, (own, options) in rows.items():
            for option, changes in options.items():
                config = {"model_type": family} | common | own | changes
                yield Case(f"{family}-{option}", {key: value for key, value in config.items() if value is not _ABSENT})


def _listed_cases(rows: ModuleType) -> Iterator[Case]:
    shared = _COMMON | _HEADS["gqa"] | {"rope_parameters": _ROPES["default"], "tie_word_embeddings": False}
    yield from itertools.starmap(Case, rows.configs(shared))


def _length_cases() -> Iterator[Case]:
    """Yields models whose config has the length that the rope was trained for beside the parameters of the rope."""
    shared = {"model_type": "llama"} | _COMMON | _HEADS["gqa"] | _EPS | {"tie_word_embeddings": False}
    for rope in (_ROPES["llama3"], _LONG):
        config = shared | {"rope_parameters": rope, "original_max_position_embeddings": 20}
        yield Case(f"llama-{rope['rope_type']}_length_outside", config)


GOLDEN = {
    "parity": tuple(_cases()),
    "parity_dense": tuple(case for case in _dense_cases() if case.name in _WITH_GOLDEN),
    "parity_mixtures": tuple(case for case in _listed_cases(mixture_cases) if case.name in mixture_cases.WITH_GOLDEN),
    "parity_gemma4": tuple(case for case in _listed_cases(gemma4_cases) if case.name in gemma4_cases.WITH_GOLDEN),
    "parity_hybrids": tuple(case for case in _listed_cases(hybrid_cases) if case.name in hybrid_cases.WITH_GOLDEN),
}
"""Golden file -> the cases of which it holds the numbers."""

CASES = {case.name: case for cases in GOLDEN.values() for case in cases}
"""The cases of which golden files hold the numbers."""

LIVE_CASES = {
    case.name: case
    for case in (
        *_dense_cases(),
        *_listed_cases(mixture_cases),
        *_listed_cases(gemma4_cases),
        *_listed_cases(hybrid_cases),
        *_length_cases(),
    )
    if case.name not in CASES
}
"""Further ones, which are compared where torch is installed."""

FAMILIES = tuple(dict.fromkeys(case.family for case in CASES.values()))
