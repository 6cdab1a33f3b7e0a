"""Keys that llama.cpp needs: in place of a missing one, the default of a config class would be another model's."""

from collections.abc import Collection, Mapping
from typing import Any

_EVERY = ("block_count", "embedding_length", "attention.head_count")
_ROUTER = ("expert_count", "expert_used_count")
_EXPERTS = (*_ROUTER, "expert_feed_forward_length")
_EPSILONS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")
_WINDOW = "attention.sliding_window"
_RECURRENCE = (
    "ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size",
    "attention.key_length",
)  # fmt: skip

_OF_FAMILY: Mapping[str, tuple[str, ...]] = {
    "qwen2moe": _ROUTER,
    "qwen3moe": _ROUTER,
    "qwen3vlmoe": _ROUTER,
    "nemotron_h": (*_RECURRENCE, "feed_forward_length", "attention.head_count_kv"),
    "nemotron_h_moe": (
        *_RECURRENCE, *_EXPERTS, "feed_forward_length", "attention.head_count_kv", "expert_shared_feed_forward_length",
        "expert_weights_scale", "expert_weights_norm",
    ),
    "olmoe": _ROUTER,
    "qwen3next": (*_EXPERTS, *_RECURRENCE),
    "qwen35": _RECURRENCE,
    "qwen35moe": (*_EXPERTS, *_RECURRENCE),
    "phi3": ("context_length",),
    "gemma3": (_WINDOW,),
    "gemma4": (
        _WINDOW, "attention.sliding_window_pattern", "attention.key_length", "feed_forward_length",
        "attention.head_count_kv",
    ),
    "command-r": ("logit_scale",),
    "cohere2": ("logit_scale", _WINDOW),
    "granite": ("logit_scale",),
    "granitemoe": (*_ROUTER, "logit_scale"),
    "gptneox": ("use_parallel_residual",),
    "stablelm": ("use_parallel_residual",),
    "ernie4_5-moe": (*_EXPERTS, "interleave_moe_layer_step", "leading_dense_block_count"),
    "gpt-oss": (*_EXPERTS, _WINDOW),
    "minimax-m2": _EXPERTS,
    "glm4moe": (*_EXPERTS, "expert_shared_count"),
    "deepseek2": (
        *_EXPERTS, "expert_shared_count", "attention.kv_lora_rank", "rope.dimension_count",
        "attention.key_length_mla|attention.key_length", "attention.value_length_mla|attention.value_length",
    ),
}  # fmt: skip
"""Family -> the keys that it needs beyond those of every family; of names with `|` between them, one."""

_WITH = (("expert_count", 0, "expert_used_count"), ("expert_group_count", 1, "expert_group_used_count"))
"""Key, a number, and the key that is needed where the first is above the number."""


def needed_keys(family: str, read: Collection[str], values: Mapping[str, Any]) -> list[str]:
    """Returns the keys without which no model of a family is opened; of names with `|` between them, one is needed.

    Args:
      family: as llama.cpp names it.
      read: the keys that are read for it.
      values: the metadata of a file.
    """
    with_others = [key for other, least, key in _WITH if other in read and _is_above(values.get(other), least)]
    epsilon = [key for key in _EPSILONS if key in read][:1]
    is_yarn = values.get("rope.scaling.type") == "yarn"
    length = ["rope.scaling.original_context_length|context_length"] if is_yarn else []
    return list(dict.fromkeys([*_EVERY, *length, *epsilon, *_OF_FAMILY.get(family, ()), *with_others]))


def missing_keys(family: str, read: Collection[str], values: Mapping[str, Any]) -> list[str]:
    """Returns those of the needed keys that the metadata lack; of several that would do, the first."""
    needed = [keys.split("|") for keys in needed_keys(family, read, values)]
    return [keys[0] for keys in needed if not any(key in values for key in keys)]


def _is_above(value: Any, least: int) -> bool:
    return isinstance(value, int | float) and value > least
