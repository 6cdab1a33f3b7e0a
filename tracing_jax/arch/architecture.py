"""The architecture of one model, which determines its forward pass and its axis table."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tracing_jax.arch.mixers import DeltaNet, Heads, Mamba, StateMixer, is_attention, keys_of, mixer_kind
from tracing_jax.error_messages import joined


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
class Router:
    """How the router of a mixture of experts scores the experts, selects some, and weights what they return.

    Attributes:
      scores: `softmax` over all experts or `sigmoid` of each score; `sparsemixer` weights the first by a softmax over
        the experts whose scores are close to its, and the second by one over those that are left (Phi-3.5-MoE).
      normalized: the weights of a token's experts are divided by their sum, which is not taken smaller than `floor`.
      scale: multiplies the weights at the end.
      selects_with_bias: a learned number is added to each expert's score when experts are selected, not to its weight.
      bias: the scores have a bias.
      groups, groups_per_token: experts with consecutive numbers form so many groups of one size, and a token's experts
        come from the best `groups_per_token` of them.
      group_score: a group counts as much as its best expert, or as the sum of its best two.
      weights_input: the weight multiplies what an expert reads instead of what it returns (Llama 4).
      tolerance: of `sparsemixer`: scores that differ by more, in proportion, are not close.
      expert_scale: at the end an expert's weight is multiplied by a learned number of its own (Gemma 4).
    """

    scores: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    normalized: bool = True
    floor: float = 0.0
    scale: float = 1.0
    selects_with_bias: bool = False
    bias: bool = False
    groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "top2"] = "max"
    weights_input: bool = False
    tolerance: float = 0.0
    expert_scale: bool = False


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values are computed from one narrow vector per token (MLA).

    Attributes:
      kv_rank: the width of that latent.
      q_rank: the width of the latent of the queries; None: they are computed from the hidden state.
      nope_dim, rope_dim: how many dims of a head have no positions, and how many are rotated. The rotated part of the
        keys is one for all heads, and comes from the hidden state.
      v_dim: the width of a head's values.
      norm_eps: of the norms of the latents, which do not follow the one of the model.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """

    kv_rank: int
    q_rank: int | None
    nope_dim: int
    rope_dim: int
    v_dim: int
    norm_eps: float = 1e-6


@dataclass(frozen=True)
class Arch:
    """The architecture of one model.

    Letters: D embed, K kv heads, G queries per kv head, H head dim, F mlp, V vocab, L layers, P positions, E experts.

    Attributes:
      rope_frequencies: one tuple of inverse frequencies (radians per position) per rope, the first that of a layer with
        `attn`: H/2, or fewer where only the first dims of a head are rotated; zeros for layers without positions; none:
        no rope at all.
      layer_ropes: for each layer the index into `rope_frequencies`; empty without a rope.
      layer_windows: for each layer how many positions back, itself included, a token attends to; None for all.
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
      alibi_bfloat16: its slopes, and their products with the positions of keys, are rounded to bfloat16 and, like the
        scores, multiplied by the attention scale (Falcon).
      position_offset: how many rows of the table of positions precede that of the first position (OPT).
      gated: the MLP is down(act(gate(x)) * up(x)); otherwise it has no gate and is down(act(up(x))).
      num_experts: MLPs per layer, of F units each, among which a router chooses; None: one MLP that every token passes.
      experts_per_token: how many of them a token passes.
      router: how they are chosen and weighted.
      layer_experts: for each layer whether its MLP is a mixture; empty: all are if `num_experts` is set, else none.
      layer_mlp_dims: for each layer the units of its MLP, or of each of its experts; empty: `mlp_dim` in all.
      shared_mlp_dim: the units of an MLP beside the experts that every token passes; None: there is none.
      expert_latent_dim: experts read a projection of the features, so wide, and another one takes what they return
        together to the features (Nemotron 3). None: they read and return features.
      shared_gate: its output is multiplied by the sigmoid of a learned projection of what it reads (Qwen2-MoE).
      clamped_glu: (limit, slope): units are clip(up, -limit, limit) + 1 times g sigmoid(slope g), where g is the gate,
        at most `limit` (gpt-oss); the activation is not used.
      sinks: every query head has a learned score that takes part in the softmax and has no value (gpt-oss).
      layer_chunks: for each layer the size of the chunks of a text inside which tokens see one another, None for the
        whole; empty: none has chunks.
      rotated_norm: in layers with positions, queries and keys are divided by their root mean square after they are
        rotated, without a gain (Llama 4).
      temperature: (length, slope): in layers without positions, queries at position p are multiplied by
        1 + slope log(1 + floor((p + 1) / length)).
      latent: how keys and values are computed from a latent; None: from the hidden state.
      head_gate: what a head returns is multiplied, dim by dim, by the sigmoid of a learned projection of what attention
        reads (Qwen3-Next).
      value_norm: values are divided by their root mean square over a head, without a gain (Gemma 4).
      layer_mixers: for each layer the names of what mixes its tokens, in order, each with a norm before it; empty: all
        have `attn` alone. A name such as `delta_net` is that of the subtree of a layer that holds its weights; see
        `is_attention` for the kinds of attention.
      global_attn: the sizes of the heads of `global_attn`, if there is any.
      delta_net, mamba: the sizes of gated delta nets and of Mamba-2 layers, if there are any.
      branch_norms: the experts and the MLP beside them have norms of their own before and after them, and so has the
        router before it, whose input is divided by sqrt(D) as well (Gemma 4).
      layer_scale: the hidden state is multiplied by a learned number at the end of each layer (Gemma 4).
      per_layer_dim: the width of the per-layer embeddings: what each layer receives of a token beside the hidden state,
        its row in a table plus a normalised projection of its embedding, which multiplies a gate. None: there are none.
      per_layer_count: how many of them the table holds.
      per_layer_index: for each layer the number of the one that it receives; empty without them.
      prediction_layers: how many layers behind the last a checkpoint may have that predict further tokens; they are not
        read.
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
    activation: Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"] = "silu"
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
    alibi_bfloat16: bool = False
    gated: bool = True
    num_experts: int | None = None  # E
    experts_per_token: int | None = None
    router: Router = Router()
    layer_experts: tuple[bool, ...] = ()
    layer_mlp_dims: tuple[int, ...] = ()
    shared_mlp_dim: int | None = None  # F of the shared expert
    shared_gate: bool = False
    expert_latent_dim: int | None = None
    clamped_glu: tuple[float, float] | None = None
    sinks: bool = False
    layer_chunks: tuple[int | None, ...] = ()
    rotated_norm: bool = False
    temperature: tuple[float, float] | None = None
    latent: LatentAttention | None = None
    head_gate: bool = False
    value_norm: bool = False
    layer_mixers: tuple[tuple[str, ...], ...] = ()
    global_attn: Heads | None = None
    delta_net: DeltaNet | None = None
    mamba: Mamba | None = None
    branch_norms: bool = False
    layer_scale: bool = False
    per_layer_dim: int | None = None
    per_layer_count: int = 0
    per_layer_index: tuple[int, ...] = ()
    prediction_layers: int = 0
    has_head: bool = True
    reading: Reading | None = None

    def has(self, part: str) -> bool:
        """Returns whether the model has a leaf of this name or under it, such as `head/lm_head` or `mlp/up_proj`.

        A name that begins in a layer means this part of every layer: all have the same parts.
        """
        if self.reading is None:
            return {"mlp/gate_proj": self.gated, "head/lm_head": not self.tied}.get(part, True)
        start = part if part.startswith(("embed/", "head/")) else f"layers/0/{part}"
        return any(name == start or name.startswith(f"{start}/") for name in self.reading.names)

    def unknown(self, fact: str) -> str | None:
        """Returns why a fact about a model that is read by its weights alone is not known; None if it is known."""
        return None if self.reading is None else dict(self.reading.unknown).get(fact)

    @property
    def norm_subtracts_mean(self) -> bool:
        """Whether its norms subtract the mean over the features, as a LayerNorm does."""
        return self.norm.startswith("layer_norm")

    @property
    def mlp_norm(self) -> str:
        """The norm in a layer whose output the MLP reads, where blocks have pre-norms."""
        return "attn_norm" if self.shared_norm else "mlp_norm"

    @property
    def router_norm(self) -> str:
        """The norm in a layer whose output its router reads."""
        return "router_norm" if self.branch_norms else self.mlp_norm

    @property
    def shares_keys(self) -> bool:
        """Whether there are layers whose queries read keys and values of earlier ones."""
        return any(keys_of(mixer) for mixers in self.layer_mixers for mixer in mixers)

    @property
    def rotary_dim(self) -> int:
        """How many dims of a head are rotated."""
        return 2 * len(self.rope_frequencies[0]) if self.rope_frequencies else 0

    @property
    def longest(self) -> int | None:
        """The longest text that the model can read; None if there is no limit."""
        return min((n for n in (self.num_positions, self.rope_positions) if n is not None), default=None)

    def has_experts(self, layer: int) -> bool:
        """Returns whether the MLP of a layer is a mixture of experts."""
        return self.layer_experts[layer] if self.layer_experts else self.num_experts is not None

    def mixers_of(self, layer: int) -> tuple[str, ...]:
        """Returns the names of what mixes the tokens of a layer, in order."""
        return self.layer_mixers[layer] if self.layer_mixers else ("attn",)

    def has_attention(self, layer: int) -> bool:
        """Returns whether a layer has attention with keys and values of its own, as most models have it.

        Others may mix its tokens beside it. Layers with heads of another size, or keys of other layers, have none.
        """
        return "attn" in self.mixers_of(layer)

    def state_mixer(self, name: str) -> StateMixer | None:
        """Returns the sizes of a mixer of a layer, such as `delta_net`; None for attention."""
        return None if is_attention(name) else getattr(self, mixer_kind(name))

    def heads_of(self, mixer: str) -> Heads:
        """Returns the sizes of the heads of attention of this name."""
        if (keys_of(mixer) or mixer) == "attn":
            return Heads(self.num_kv_heads, self.q_group, self.head_dim)
        assert self.global_attn is not None
        return self.global_attn

    def keys_from(self, layer: int, mixer: str) -> int:
        """Returns the layer whose keys and values attention of a layer reads: its own, or the last one that has such.

        Where there is none before it, as in a model of some layers of another, it is its own.
        """
        if (wanted := keys_of(mixer)) is None:
            return layer
        return next((i for i in range(layer - 1, -1, -1) if wanted in self.mixers_of(i)), layer)

    def mlp_dim_of(self, layer: int) -> int:
        """Returns the units of the MLP of a layer, or of each of its experts."""
        return self.layer_mlp_dims[layer] if self.layer_mlp_dims else self.mlp_dim

    def with_layers(self, layers: Sequence[int]) -> "Arch":
        """Returns the facts of a model of these layers of this one, in this order; a layer may be there twice."""
        facts: dict[str, Any] = {
            name: tuple(getattr(self, name)[i] for i in layers) for name in OF_LAYERS if getattr(self, name)
        }
        return replace(self, num_layers=len(layers), **facts)

    @property
    def v_dim(self) -> int:
        """The width of a head's values."""
        return self.head_dim if self.latent is None else self.latent.v_dim


OF_LAYERS = (
    "layer_ropes", "layer_windows", "layer_chunks", "layer_mixers", "layer_experts", "layer_mlp_dims",
    "per_layer_index",
)  # fmt: skip
"""Fields of `Arch` with a fact of each layer."""


OTHERS = "; supported: "
"""Separator in messages about families that are not supported: the long list of those that are follows."""

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
