"""Multimodal models: the language model inside, which computes a text without images as it would alone."""

import copy
from dataclasses import fields, replace
from typing import Any

from tracing_jax.arch.dense_families import glm4_fields
from tracing_jax.arch.families import FAMILIES
from tracing_jax.arch.family import ArchFields, ConfigFamily
from tracing_jax.arch.mixtures import GLM4V_EXPERTS, QWEN_EXPERTS, glm4v_moe, qwen3_vl_moe

SUPPORTED_MULTIMODAL = (
    "gemma3", "gemma4", "gemma4_unified", "glm4v", "glm4v_moe", "got_ocr2", "idefics3", "internvl", "kimi_k25",
    "llama4", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3", "ovis2", "qwen2_5_vl",
    "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "video_llava", "vipllava",
)  # fmt: skip
"""Model types of which the language model is read."""

CAPPED = ("gemma4", "gemma4_unified")
"""Those whose heads cap their logits as the language model in them does."""


def _glm4v(config: Any) -> ArchFields:
    return glm4_fields(qkv_bias=True)


def _qwen3_vl(config: Any) -> ArchFields:
    bias = config.attention_bias
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": "head"}


_INSIDE: dict[str, ConfigFamily] = {
    # The sections of their ropes get equal positions in a text, and are one rope then.
    "qwen2_vl_text": replace(FAMILIES["qwen2"], same_as="qwen2"),
    "qwen2_5_vl_text": replace(FAMILIES["qwen2"], same_as="qwen2"),
    "glm4v_text": replace(
        FAMILIES["glm4"], read=_glm4v, uses="rms_norm_eps", same_as="glm4", constants={"attention_bias": True}
    ),
    "glm4v_moe_text": replace(
        FAMILIES["glm4_moe"],
        read=glm4v_moe,
        uses=GLM4V_EXPERTS,
        same_as="glm4_moe",
        constants={"use_qk_norm": False, "num_nextn_predict_layers": 0},
    ),
    "qwen3_vl_text": replace(FAMILIES["qwen3"], read=_qwen3_vl, uses="rms_norm_eps attention_bias", same_as="qwen3"),
    "qwen3_vl_moe_text": replace(
        FAMILIES["qwen3_moe"],
        read=qwen3_vl_moe,
        uses=QWEN_EXPERTS + " attention_bias",
        same_as="qwen3_moe",
        constants={"norm_topk_prob": True},
    ),
}
"""Types of language models that exist inside of others only."""


def is_multimodal(model_type: Any) -> bool:
    """Returns whether a config of this type has that of a language model in it."""
    return model_type in SUPPORTED_MULTIMODAL


def language_model(config: Any) -> Any:
    """Returns the config of the language model: of a multimodal model the one in it, else the config itself."""
    if not is_multimodal(config.model_type):
        return config
    found = copy.deepcopy(config.text_config)
    found.tie_word_embeddings = config.tie_word_embeddings  # its head belongs to the whole
    return found


def family_of(model_type: str) -> ConfigFamily | None:
    """Returns the family of a language model; None if it is not supported."""
    return FAMILIES.get(model_type) or _INSIDE.get(model_type)


def language_model_alone(config: Any) -> dict[str, Any]:
    """Returns the content of the config.json of a multimodal model's language model as a model of its own."""
    text = language_model(config)
    family = family_of(text.model_type)
    declared = {field.name for field in fields(text)}
    raw = {
        name: value
        for name, value in text.to_dict().items()
        if not name.startswith("_") and (value is not None or name in declared)
    }
    if family is not None:
        raw |= {"model_type": family.same_as or text.model_type, **family.constants}
    for name in ("architectures", "base_config_key"):
        raw.pop(name, None)
    if isinstance(rope := raw.get("rope_parameters"), dict):
        raw["rope_parameters"] = {name: value for name, value in rope.items() if not name.startswith("mrope")}
    return raw
