"""The facts of one model that its forward pass and its axis table follow from."""

from dataclasses import dataclass
from typing import Literal


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
