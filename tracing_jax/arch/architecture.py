"""The architecture of one model, which determines its forward pass and its axis table."""

from dataclasses import dataclass
from typing import Literal

from tracing_jax.complaints import joined


class UnsupportedModelError(ValueError):
    """A config that this package does not support."""

    def __str__(self) -> str:
        return joined([str(argument) for argument in self.args])


@dataclass(frozen=True)
class Arch:
    """The architecture of one model.

    Letters: D embed, K kv heads, G queries per kv head, H head dim, F mlp, V vocab, L layers, P positions, E experts.

    Attributes:
      rope_frequencies: one tuple of H/2 inverse frequencies (radians per position) per rope; none: no rotary positions.
      layer_ropes: for each layer the index into `rope_frequencies`; empty without a rope.
      layer_windows: for each layer how many positions back, itself included, a token sees; None sees all.
      norm: `rms` has gain g, `rms_unit_offset` has gain 1 + g (Gemma), `layer_norm` has gain and bias (GPT-2),
        `layer_norm_plain` has neither (OLMo).
      qk_norm: `head` normalises over H (Qwen3, Gemma 3), `all` over all heads together (OLMo 2).
      inverse_layer_scale: layer i divides its attention scale by i + 1 as well.
      num_positions: how many learned positions are added to the embedding; no block may be longer. None: no such limit.
      gated: the MLP is down(act(gate(x)) * up(x)); otherwise it has no gate and is down(act(up(x))).
      num_experts: MLPs per layer, of F units each, among which a router chooses; None: one MLP that every token passes.
      experts_per_token: how many of them a token passes.
      has_head: whether the model predicts tokens; a backbone, or a model for another task, does not. It counts as tied.
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
    norm: Literal["rms", "rms_unit_offset", "layer_norm", "layer_norm_plain"] = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    qk_norm: Literal["head", "all"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 1.0
    inverse_layer_scale: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    clip_qkv: float | None = None
    num_positions: int | None = None  # P
    gated: bool = True
    num_experts: int | None = None  # E
    experts_per_token: int | None = None
    has_head: bool = True


def head_problem(arch: Arch) -> str | None:
    """Returns why a model cannot predict tokens, or None."""
    return None if arch.has_head else "its checkpoint has no head, so that it predicts no tokens"


def length_problem(arch: Arch, length: int) -> str | None:
    """Returns why a model cannot read blocks of this many tokens, or None."""
    if arch.num_positions is None or length <= arch.num_positions:
        return None
    return f"blocks of {length} tokens, the model has learned {arch.num_positions} positions; use shorter blocks"
