"""The architecture of one model, which determines its forward pass and its axis table."""

import functools
from dataclasses import dataclass
from typing import Literal

from tracing_jax.complaints import joined


class UnsupportedModelError(ValueError):
    """A config that this package does not support."""

    def __str__(self) -> str:
        return joined([str(argument) for argument in self.args])


@dataclass(frozen=True)
class Reading:
    """What was found in a model of which only the weights are understood, by the names and shapes of its tensors.

    Attributes:
      leaves: every leaf that was found with its axes, such as `("layers/0/mlp/up_proj/kernel", ("embed", ...))`.
      sizes: axis -> number of units.
      unknown: what could not be found out, and why: `heads`, `norm`, `features`, or `units`.
    """

    leaves: tuple[tuple[str, tuple[str | None, ...]], ...]
    sizes: tuple[tuple[str, int], ...]
    unknown: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The names of the leaves."""
        return frozenset(name for name, _ in self.leaves)


@dataclass(frozen=True)
class Arch:
    """The architecture of one model.

    Letters: D embed, K kv heads, G queries per kv head, H head dim, F mlp, V vocab, L layers, P positions, E experts.

    Attributes:
      rope_frequencies: one tuple of inverse frequencies (radians per position) per rope, of equal lengths: H/2, or
        fewer where only the first dims of a head are rotated; zeros for layers without positions; none: no rope at all.
      layer_ropes: for each layer the index into `rope_frequencies`; empty without a rope.
      layer_windows: for each layer how many positions back, itself included, a token sees; None sees all.
      rope_amplitudes: for each rope a factor of rotated queries and keys; empty: 1.
      rope_interleaved: pairs are (2i, 2i + 1) and not (i, i + R/2), of R rotated dims.
      rope_positions: the longest text for which the frequencies hold, where they depend on its length; None: any.
      norm: `rms` has gain g, `rms_unit_offset` has gain 1 + g (Gemma), `layer_norm` has gain and bias (GPT-2),
        `layer_norm_gain` has no bias (Cohere), `layer_norm_plain` has neither (OLMo).
      parallel: attention and MLP read the same hidden state, and both outputs are added to it.
      shared_norm: the MLP of a parallel block reads the output of the norm before attention and has none of its own.
      embed_norm: the embeddings are normalised before the first layer (BLOOM).
      qk_norm: `head` normalises over H (Qwen3, Gemma 3), `each` likewise with a gain for each head (Cohere), `all` over
        all heads together (OLMo 2).
      qk_norm_bias: the norms of queries and keys have a bias, as the other norms have (Phi-2).
      head_bias: the logits have a bias, also where the head is tied.
      inverse_layer_scale: layer i divides its attention scale by i + 1 as well.
      num_positions: how many learned positions are added to the embedding; no block may be longer. None: no such limit.
      alibi_slopes: the slope of each query head, times which a score falls with distance (BLOOM); none: no ALiBi.
      position_offset: how many rows of the table of positions stand before that of the first position (OPT).
      gated: the MLP is down(act(gate(x)) * up(x)); otherwise it has no gate and is down(act(up(x))).
      num_experts: MLPs per layer, of F units each, among which a router chooses; None: one MLP that every token passes.
      experts_per_token: how many of them a token passes.
      has_head: whether the model predicts tokens; a backbone, or a model for another task, does not. It counts as tied.
      reading: of a model that is read by its weights alone: what was found in it. Its forward pass is not known, and of
        the other fields only sizes, `tied`, `gated`, `norm`, `pre_norms`, `post_norms` and `has_head` mean anything.
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
    rope_amplitudes: tuple[float, ...] = ()
    rope_interleaved: bool = False
    rope_positions: int | None = None
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    norm: Literal["rms", "rms_unit_offset", "layer_norm", "layer_norm_gain", "layer_norm_plain"] = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    shared_norm: bool = False
    embed_norm: bool = False
    qk_norm: Literal["head", "each", "all"] | None = None
    qk_norm_bias: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    attention_scale: float = 1.0
    inverse_layer_scale: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    clip_qkv: float | None = None
    num_positions: int | None = None  # P
    position_offset: int = 0
    alibi_slopes: tuple[float, ...] = ()
    gated: bool = True
    num_experts: int | None = None  # E
    experts_per_token: int | None = None
    has_head: bool = True
    reading: Reading | None = None

    def has(self, part: str) -> bool:
        """Returns whether the model has a leaf of this name or under it, such as `head/lm_head` or `mlp/up_proj`.

        A name that begins in a layer stands for this part of every layer: all have the same parts.
        """
        if self.reading is None:
            return {"mlp/gate_proj": self.gated, "head/lm_head": not self.tied}.get(part, True)
        start = part if part.startswith(("embed/", "head/")) else f"layers/0/{part}"
        return any(name == start or name.startswith(f"{start}/") for name in self.reading.names)

    def unknown(self, fact: str) -> str | None:
        """Returns why a fact about a model that is read by its weights alone is not known; None if it is known."""
        return None if self.reading is None else dict(self.reading.unknown).get(fact)

    @property
    def mlp_norm(self) -> str:
        """The norm in a layer whose output the MLP reads, where blocks have pre-norms."""
        return "attn_norm" if self.shared_norm else "mlp_norm"

    @property
    def rotary_dim(self) -> int:
        """How many dims of a head are rotated."""
        return 2 * len(self.rope_frequencies[0]) if self.rope_frequencies else 0

    @property
    def longest(self) -> int | None:
        """The longest text that the model can read; None if there is no limit."""
        return min((n for n in (self.num_positions, self.rope_positions) if n is not None), default=None)


WEIGHTS_ONLY = "it is read by its weights alone, without a forward pass"


def head_problem(arch: Arch) -> str | None:
    """Returns why a model cannot predict tokens, or None."""
    if arch.reading is not None:
        return WEIGHTS_ONLY
    return None if arch.has_head else "its checkpoint has no head, so that it predicts no tokens"


def length_problem(arch: Arch, length: int) -> str | None:
    """Returns why a model cannot read blocks of this many tokens, or None."""
    if arch.longest is None or length <= arch.longest:
        return None
    if arch.num_positions is not None:
        return f"blocks of {length} tokens, the model has learned {arch.num_positions} positions; use shorter blocks"
    return f"blocks of {length} tokens, its rope holds for {arch.longest} tokens; use shorter blocks"
