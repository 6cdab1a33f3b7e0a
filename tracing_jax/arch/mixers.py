"""What mixes the tokens of a layer: kinds of attention and linear recurrences, their sizes, the axes of recurrences.

A recurrence has groups, which share what plays the part of queries and keys, and heads in each group, each with values
and a state of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Axes = tuple[str, ...]
"""Kinds of the axes of a weight; all but `embed` belong to one mixer of one layer."""

_HEADS: Axes = ("state_groups", "state_heads")
_KEYS: Axes = ("state_groups", "state_keys")
_VALUES: Axes = (*_HEADS, "state_values")


def mixer_kind(name: str) -> str:
    """Returns the kind of a mixer: `mamba` for `mamba_2`, the second of a layer."""
    return re.sub(r"_\d+$", "", name)


def is_attention(name: str) -> bool:
    """Returns whether a mixer is attention.

    `attn` is that of most models, `global_attn` one with heads of another size, which sees the whole text, and
    `shared_attn` and `shared_global_attn` are such whose queries read keys and values of an earlier layer.
    """
    return name.endswith("attn")


def keys_of(name: str) -> str | None:
    """Returns the mixer whose keys and values a mixer reads instead of its own; None if it has its own."""
    return name.removeprefix("shared_") if name.startswith("shared_") else None


@dataclass(frozen=True)
class Heads:
    """The sizes of the heads of attention.

    Attributes:
      kv_heads: K.
      q_group: G, the queries of a kv head.
      head_dim: H.
      values_are_keys: values are what the projection of keys gives, before it is normalised and rotated.
    """

    kv_heads: int
    q_group: int
    head_dim: int
    values_are_keys: bool = False


@dataclass(frozen=True)
class _Recurrence:
    """The sizes that every recurrence has; what they count is said at each kind."""

    groups: int
    heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def sizes(self) -> Mapping[str, int]:
        """Kind of axis -> its size."""
        return {
            "state_groups": self.groups, "state_heads": self.heads, "state_keys": self.key_dim,
            "state_values": self.value_dim, "tap": self.taps,
        }  # fmt: skip


@dataclass(frozen=True)
class DeltaNet(_Recurrence):
    """A gated delta net: a linear recurrence per head whose state, a matrix from keys to values, forgets and corrects.

    Attributes:
      groups: the number of heads of queries and keys.
      heads: how many heads of values share each of them; each has a state.
      key_dim, value_dim: the widths of a head's keys and of its values.
      taps: how many tokens, its own included, the convolution before the recurrence reads.

    Source: Yang et al. 2024, Gated Delta Networks (arXiv 2412.06464).
    """

    @property
    def leaves(self) -> Mapping[str, Axes]:
        """Weight -> its axes. All heads share the gain of the norm behind the recurrence."""
        return {
            "query_proj/kernel": ("embed", *_KEYS),
            "key_proj/kernel": ("embed", *_KEYS),
            "value_proj/kernel": ("embed", *_VALUES),
            "z_proj/kernel": ("embed", *_VALUES),
            "beta_proj/kernel": ("embed", *_HEADS),
            "decay_proj/kernel": ("embed", *_HEADS),
            "query_conv/taps": (*_KEYS, "tap"),
            "key_conv/taps": (*_KEYS, "tap"),
            "value_conv/taps": (*_VALUES, "tap"),
            "A_log": _HEADS,
            "dt_bias": _HEADS,
            "norm/gain": ("state_values",),
            "out_proj/kernel": (*_VALUES, "embed"),
        }


@dataclass(frozen=True)
class Mamba(_Recurrence):
    """Mamba-2: a linear recurrence per head whose state forgets at a rate that each token sets.

    Attributes:
      groups: how many times there are what plays the parts of keys and queries ("B" and "C").
      heads: how many heads share each of them.
      key_dim, value_dim: the dims of a state and of a head.
      taps: how many tokens, its own included, the convolution before the recurrence reads.
      least_step: the smallest step that a token makes; transformers 5.24 leaves it out when it generates.
      conv_bias, bias: whether convolutions have biases, and whether projections have.

    Source: Dao and Gu 2024 (arXiv 2405.21060).
    """

    least_step: float = 0.0
    conv_bias: bool = True
    bias: bool = False

    @property
    def leaves(self) -> Mapping[str, Axes]:
        """Weight -> its axes."""
        units = {"z": _VALUES, "value": _VALUES, "key": _KEYS, "query": _KEYS, "decay": _HEADS}
        convolved = {name: units[name] for name in ("value", "key", "query")}
        found: dict[str, Axes] = {f"{name}_proj/kernel": ("embed", *axes) for name, axes in units.items()}
        found |= {f"{name}_conv/taps": (*axes, "tap") for name, axes in convolved.items()}
        if self.conv_bias:
            found |= {f"{name}_conv/bias": axes for name, axes in convolved.items()}
        if self.bias:
            found |= {f"{name}_proj/bias": axes for name, axes in units.items()} | {"out_proj/bias": ("embed",)}
        return found | {
            "A_log": _HEADS, "dt_bias": _HEADS, "skip": _HEADS, "norm/gain": _VALUES,
            "out_proj/kernel": (*_VALUES, "embed"),
        }  # fmt: skip


StateMixer = DeltaNet | Mamba
"""The sizes of one kind of recurrence."""
