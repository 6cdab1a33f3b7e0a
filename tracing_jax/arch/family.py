"""What a family is to the reader of configs: a row of facts about its attributes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracing_jax.arch.architecture import Arch, UnsupportedModelError

ArchFields = dict[str, Any]
"""Fields of `Arch` by name."""

COMMON = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rope_parameters tie_word_embeddings hidden_act""".split()
)
"""Attributes that the configs of nearly every family have, and that are used."""

NAMES: dict[str, str] = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
"""Field of `Arch` (or the number of query heads) -> the config attribute for it in nearly every family."""

GPT_NAMES = {
    "vocab_size": "vocab_size",
    "embed_dim": "n_embd",
    "num_layers": "n_layer",
    "mlp_dim": "n_inner",
    "num_heads": "n_head",
    "norm_eps": "layer_norm_epsilon",
    "tied": "tie_word_embeddings",
}
"""The same in families whose config follows that of GPT-2."""


@dataclass(frozen=True)
class ConfigFamily:
    """How the configs of a family are read.

    Attributes:
      read: config -> the fields of `Arch` in which the family differs from Llama without options.
      uses: config attributes, beyond the common ones, that are used.
      thetas: for each layer type with a rope of its own (None: one for all) the attribute older files name it by; empty
        for a family without ropes.
      common: the attributes that are used here under the names that nearly all families share.
      activation: the attribute that names the activation; empty where it is a constant.
      neutral: attributes of this family alone that leave a forward pass without dropout unchanged.
      names: field of `Arch` -> its config attribute; a field without one follows from others, or
        cannot be changed apart from them.
      partial_rotary: whether only the first dims of a head may be rotated.
      optional_theta: whether its theta was a constant before it became a setting, so that files may lack it.
      rope_layers: config -> for each layer whether its queries and keys are rotated; None: all are.
      per_layer: attributes with a value for each layer, which follows from its window and rope.
      same_as: another family with the same blocks and names, as which a model of this one counts.
      constants: attributes that the config of that family has and this one's lacks, with their values here.
      layer_fields: model -> the attributes that say which of its layers have experts; None: all have, or none.
    """

    read: Callable[[Any], ArchFields]
    uses: str
    thetas: Mapping[str | None, str] = field(default_factory=lambda: {None: "rope_theta"})
    common: frozenset[str] = COMMON
    activation: str = "hidden_act"
    neutral: str = ""
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)
    partial_rotary: bool = False
    optional_theta: bool = False
    rope_layers: Callable[[Any], Sequence[bool]] | None = None
    per_layer: tuple[str, ...] = ("layer_types",)
    same_as: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    layer_fields: Callable[[Arch], dict[str, Any]] | None = None

    @property
    def used(self) -> frozenset[str]:
        """The config attributes that are used."""
        return self.common | set(self.uses.split())


def one_window(config: Any) -> ArchFields:
    """Returns the field for layers that all have the window of the config."""
    return {"layer_windows": (config.sliding_window,) * config.num_hidden_layers}


def windows_by_type(config: Any) -> tuple[int | None, ...]:
    """Returns the window of each layer, by its type.

    Raises:
      UnsupportedModelError: types of another number than layers, unknown ones, or a window that is not set.
    """
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
