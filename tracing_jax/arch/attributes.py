"""Which attributes of a config matter: each is used, leaves the numbers unchanged, or is refused.

An attribute that the config class of a family does not declare is not read by its forward pass, with the exceptions in
`_READ_ANYWAY`. `tests/test_undeclared.py` checks this against every attribute that any config class of transformers
declares. A declared attribute that is not known here may change the numbers, unless it has its default.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from tracing_jax.arch.family import ConfigFamily
from tracing_jax.error_messages import listed, shortened

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
_NEUTRAL_AT = {"add_cross_attention": False}

_READ_ANYWAY = {"is_causal": True, "text_config": None, "decoder": None, "generator": None, "per_layer_config": None}
"""Attributes that transformers reads from a config of any class -> the value at which they change nothing."""

_TRAINED_LENGTH = "original_max_position_embeddings"  # read from a config of any class: see `as_built`

# How weights are stored does not change what the model computes; the reader of the weights handles it.
_OF_THE_WEIGHTS = frozenset({"quantization_config", "compression_config"})


def attribute_problems(config: Any, family: ConfigFamily) -> list[str]:
    """Returns why a config is refused: attributes that ask, or may ask, for what is not computed here."""
    attributes = config.to_dict()
    lines = [
        f"{name} is {shortened(attributes[name])}; only models without it, or with {name} {value}, are supported"
        for name, value in _READ_ANYWAY.items()
        if name in attributes and attributes[name] not in (None, value) and name not in family.used
    ]
    if not _is_declared(config, "layer_types") and _asks_for_windows(attributes):
        lines.append(
            "layer_types asks for sliding windows, sliding_window is not set, and transformers cannot run such a "
            f"{config.model_type}; remove layer_types if all layers attend to all tokens"
        )
    if unknown := _unknown(config, family, attributes):
        lines.append(
            f"config attributes {listed(unknown, 20)} of {config.model_type} are not at their defaults, and it is not "
            "known what they change; used are: "
            f"{', '.join(sorted(family.used))}; remove from config.json what does not matter"
        )
    return lines


def _asks_for_windows(attributes: Mapping[str, Any]) -> bool:
    types = attributes.get("layer_types")
    return isinstance(types, list) and "sliding_attention" in types and attributes.get("sliding_window") is None


def attribute_notes(config: Any, family: ConfigFamily) -> list[str]:
    """Returns a note on attributes that the config class of the family does not have, so that they change nothing."""
    attributes = config.to_dict()
    known = _known(family) | set(_READ_ANYWAY) | set(_NEUTRAL_AT) | _OF_THE_WEIGHTS | {_TRAINED_LENGTH}
    ignored = sorted(
        name
        for name, value in attributes.items()
        if name not in known and value is not None and not _is_declared(config, name)
    )
    if not ignored:
        return []
    return [f"config attributes that {config.model_type} does not have change nothing: {listed(ignored, 20)}"]


def as_built(config: Any) -> Any:
    """Returns the config with the parameters of its rope that a model built from it has.

    Where it has an attribute for the length that the rope was trained for, beside the parameters of the rope,
    transformers puts that in their place when it builds the model, whether the class declares the attribute or not.
    """
    if getattr(config, _TRAINED_LENGTH, None) is None:
        return config
    found = copy.deepcopy(config)
    found.standardize_rope_params()
    return found


def with_layer_overrides(config: Any) -> Any:
    """Returns the config with what it says of single layers in `layer_overrides`: layer -> attribute -> value.

    transformers raises an error where such an attribute is read of the whole config.
    """
    found = copy.copy(config)
    per_layer = vars(found).pop("_heterogeneity_spec", None)
    found.layer_overrides = {} if per_layer is None else per_layer.per_layer_overrides
    return found


def without_undeclared(config: Any, family: ConfigFamily) -> Any:
    """Returns the config without attributes that its class does not have, so that none is taken for a fact."""
    found = copy.copy(config)
    kept = {*family.used, "layer_overrides"}
    for name in [name for name in vars(found) if not (name in kept or _is_declared(found, name))]:
        delattr(found, name)
    return found


def _known(family: ConfigFamily) -> set[str]:
    return {*_NEUTRAL, *family.used, *family.neutral.split()}


def _unknown(config: Any, family: ConfigFamily, attributes: Mapping[str, Any]) -> list[str]:
    """Returns the attributes that the config's class declares, that are not known here and not at their defaults."""
    known = _known(family)
    found = [
        name
        for name, value in attributes.items()
        if name not in known and value not in (None, _NEUTRAL_AT.get(name)) and _is_declared(config, name)
    ]
    if not found:
        return []
    defaults = type(config)().to_dict()
    return sorted(name for name in found if attributes[name] != defaults.get(name))


def _is_declared(config: Any, name: str) -> bool:
    renamed = config.attribute_map
    return name in {field.name for field in dataclasses.fields(config)} or name in renamed or name in renamed.values()
