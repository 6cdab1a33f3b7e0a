"""What the tensors of each family are called in the files that transformers writes: one row of names per family."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tracing_jax.arch import Arch

_SUFFIXES = {
    "kernel": ".weight", "scale": ".weight", "gain": ".weight", "taps": ".weight", "bias": ".bias",
    "embedding": ".weight", "positions": ".weight",
}  # fmt: skip


@dataclass(frozen=True)
class TensorNames:
    """The names of a family's tensors, and how its fused ones are ordered.

    A leaf `attn/q_proj/kernel` is the tensor `self_attn.q_proj.weight` of its layer. Modules with the same name share a
    tensor: queries, keys and values, or gate and up.

    Attributes:
      modules: module of ours -> that of the files, with `{e}` for the number of an expert or `{h}` of a head where each
        has a tensor of its own. The names of a layer's modules follow its own. A leaf that is here itself, such as
        `attn/sinks`, is the tensor of that name.
      prefix: of all names but the head's.
      layers: the prefix of the number of a layer.
      head: the module that predicts tokens.
      experts: as `modules`, for those that each expert has.
      suffixes: leaf -> what follows the name of its module; of modules in `experts` those in `expert_suffixes`.
      qkv_order: how queries, keys and values share a tensor: one after the other, or within each kv head, or whatever
        holds the heads of all.
      in_order: modules that share a tensor one after the other, whatever the order of others.
      two_axes: modules whose gains are stored `[heads, head_dim]`, where others are flat.
      in_out: whether kernels, that of the head excepted, are stored `[in, out]`, as ours are.
      experts_in_out: whether those of experts are.
      gate_up_order: how gate and up of experts share a tensor: one after the other, or in turn.
      part_layers: part of a layer of ours, such as `3/mlp`, -> the number of the layer that it is in the files; empty:
        layers are those of the files.
      with_row_axis: leaves of a layer whose tensors have an axis of size one in front.
    """

    modules: Mapping[str, str]
    prefix: str = "model."
    layers: str = "layers."
    head: str = "lm_head"
    experts: Mapping[str, str] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=lambda: _SUFFIXES)
    expert_suffixes: Mapping[str, str] = field(default_factory=lambda: _SUFFIXES)
    qkv_order: Literal["concatenated", "by head"] = "concatenated"
    in_order: frozenset[str] = frozenset()
    in_out: bool = False
    two_axes: tuple[str, ...] = ()
    experts_in_out: bool = False
    gate_up_order: Literal["concatenated", "in turn"] = "concatenated"
    part_layers: Mapping[str, int] = field(default_factory=dict)
    with_row_axis: frozenset[str] = frozenset({"mlp/output_gate/kernel"})

    def tensor(self, leaf: str, of_expert: bool) -> str:
        """Returns the name of the tensor of a leaf, with `{e}` or `{h}` in it where each expert or head has its own."""
        path, _, part = leaf.rpartition("/")
        own = leaf if part in ("embedding", "positions") else path
        if own == "head/lm_head":
            return self.head + self.suffixes[part]
        layer, module = "", own
        if own.startswith("layers/"):
            _, number, module = own.split("/", 2)
            part_of_layer = f"{number}/{module.split('/')[0].removesuffix('_norm')}"
            layer = f"{self.layers}{self.part_layers.get(part_of_layer, number)}."
            module = re.sub(r"_\d+(?=/|_norm$|$)", "", module)  # a second mixer of a layer is called as the first
            if (whole := f"{module}/{part}") in self.modules:
                return self.prefix + layer + self.modules[whole]
        if of_expert:
            return self.prefix + layer + self.experts[module] + self.expert_suffixes[part]
        return self.prefix + layer + self.modules[module] + self.suffixes[part]

    def is_in_out(self, leaf: str, of_expert: bool) -> bool:
        """Returns whether the kernel of a module is stored `[in, out]`."""
        return self.experts_in_out if of_expert else self.in_out and not leaf.startswith("head/")

    def has_row_axis(self, leaf: str) -> bool:
        """Returns whether the tensor of a leaf has an axis of size one in front."""
        return leaf.startswith("layers/") and leaf.split("/", 2)[2] in self.with_row_axis

    def but(self, modules: Mapping[str, str], **fields: object) -> "TensorNames":
        """Returns the names of a family that differs in these modules, and in other fields of this class."""
        return replace(self, modules={**self.modules, **modules}, **fields)  # type: ignore[arg-type]


_QKV = ("attn/q_proj", "attn/k_proj", "attn/v_proj")
_LLAMA = TensorNames(
    {
        "embed/embedding": "embed_tokens",
        "attn/q_proj": "self_attn.q_proj",
        "attn/k_proj": "self_attn.k_proj",
        "attn/v_proj": "self_attn.v_proj",
        "attn/o_proj": "self_attn.o_proj",
        "attn/q_norm": "self_attn.q_norm",
        "attn/k_norm": "self_attn.k_norm",
        "mlp/gate_proj": "mlp.gate_proj",
        "mlp/up_proj": "mlp.up_proj",
        "mlp/down_proj": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "head/norm": "norm",
    }
)
_POST_NORMS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_FOUR_NORMS = _LLAMA.but(_POST_NORMS | {"mlp_norm": "pre_feedforward_layernorm"})
_MIXTRAL = _LLAMA.but(
    {"mlp/router": "block_sparse_moe.gate"},
    experts={
        "mlp/gate_proj": "block_sparse_moe.experts.{e}.w1",
        "mlp/up_proj": "block_sparse_moe.experts.{e}.w3",
        "mlp/down_proj": "block_sparse_moe.experts.{e}.w2",
    },
)
_EXPERTS = {f"mlp/{name}": f"mlp.experts.{{e}}.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


def _shared(module: str) -> dict[str, str]:
    """Returns the names of an MLP beside the experts."""
    return {f"mlp/shared/{name}": f"{module}.{name}" for name in ("gate_proj", "up_proj", "down_proj")}


_CORRECTION = {"mlp/router/correction_bias": "mlp.gate.e_score_correction_bias"}
_QWEN_MOE = _LLAMA.but(
    {"mlp/router": "mlp.gate", "mlp/output_gate": "mlp.shared_expert_gate"} | _shared("mlp.shared_expert"),
    experts=_EXPERTS,
)
_DEEPSEEK_MOE = _QWEN_MOE.but(_CORRECTION | _shared("mlp.shared_experts"))
_DEEPSEEK = _DEEPSEEK_MOE.but(
    {
        "attn/q_a_proj": "self_attn.q_a_proj",
        "attn/q_a_norm": "self_attn.q_a_layernorm",
        "attn/q_proj": "self_attn.q_b_proj",
        "attn/q_rope_proj": "self_attn.q_b_proj",
        "attn/kv_a_proj": "self_attn.kv_a_proj_with_mqa",
        "attn/k_rope_proj": "self_attn.kv_a_proj_with_mqa",
        "attn/kv_a_norm": "self_attn.kv_a_layernorm",
        "attn/k_proj": "self_attn.kv_b_proj",
        "attn/v_proj": "self_attn.kv_b_proj",
    },
    qkv_order="by head",
)
_GPT_OSS = _LLAMA.but(
    {"attn/sinks": "self_attn.sinks", "mlp/router": "mlp.router"},
    experts={
        "mlp/gate_proj": "mlp.experts.gate_up_proj",
        "mlp/up_proj": "mlp.experts.gate_up_proj",
        "mlp/down_proj": "mlp.experts.down_proj",
    },
    expert_suffixes={"kernel": "", "bias": "_bias"},
    experts_in_out=True,
    gate_up_order="in turn",
)
_LLAMA4 = _LLAMA.but(
    {f"mlp/{name}": f"feed_forward.{name}" for name in ("router", "gate_proj", "up_proj", "down_proj")}
    | _shared("feed_forward.shared_expert"),
    experts={
        "mlp/gate_proj": "feed_forward.experts.gate_up_proj",
        "mlp/up_proj": "feed_forward.experts.gate_up_proj",
        "mlp/down_proj": "feed_forward.experts.down_proj",
    },
    expert_suffixes={"kernel": ""},
    experts_in_out=True,
)
_CONVOLUTIONS = {f"delta_net/{name}_conv": "linear_attn.conv1d" for name in ("query", "key", "value")}
_QWEN_HYBRID = _QWEN_MOE.but(
    {
        "attn/head_gate": "self_attn.q_proj",
        "delta_net_norm": "input_layernorm",
        "delta_net/A_log": "linear_attn.A_log",
        "delta_net/dt_bias": "linear_attn.dt_bias",
        "delta_net/norm": "linear_attn.norm",
        "delta_net/out_proj": "linear_attn.out_proj",
    }
    | _CONVOLUTIONS,
    qkv_order="by head",
    in_order=frozenset(_CONVOLUTIONS),
)
_QWEN3_NEXT = _QWEN_HYBRID.but(
    {f"delta_net/{name}_proj": "linear_attn.in_proj_qkvz" for name in ("query", "key", "value", "z")}
    | {f"delta_net/{name}_proj": "linear_attn.in_proj_ba" for name in ("beta", "decay")}
)
_DELTA_QKV = {f"delta_net/{name}_proj": "linear_attn.in_proj_qkv" for name in ("query", "key", "value")}
_QWEN3_5 = _QWEN_HYBRID.but(
    _DELTA_QKV
    | {
        "delta_net/z_proj": "linear_attn.in_proj_z",
        "delta_net/beta_proj": "linear_attn.in_proj_b",
        "delta_net/decay_proj": "linear_attn.in_proj_a",
    },
    in_order=frozenset({**_CONVOLUTIONS, **_DELTA_QKV}),
)
_NEMOTRON_H = _LLAMA.but(
    {f"attn/{name}": f"mixer.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    | {f"mlp/{name}": f"mixer.{name}" for name in ("up_proj", "down_proj")}
    | {f"mamba/{name}_proj": "mixer.in_proj" for name in ("z", "value", "key", "query", "decay")}
    | {f"mamba/{name}_conv": "mixer.conv1d" for name in ("value", "key", "query")}
    | dict.fromkeys(("attn_norm", "mamba_norm", "mlp_norm"), "norm")
    | _shared("mixer.shared_experts")
    | {
        "embed/embedding": "embeddings",
        "head/norm": "norm_f",
        "mamba/A_log": "mixer.A_log",
        "mamba/dt_bias": "mixer.dt_bias",
        "mamba/skip": "mixer.D",
        "mamba/norm": "mixer.norm",
        "mamba/out_proj": "mixer.out_proj",
        "mlp/latent_in": "mixer.fc1_latent_proj",
        "mlp/latent_out": "mixer.fc2_latent_proj",
        "mlp/router": "mixer.gate",
        "mlp/router/correction_bias": "mixer.gate.e_score_correction_bias",
    },
    prefix="backbone.",
    experts={f"mlp/{name}": f"mixer.experts.{{e}}.{name}" for name in ("up_proj", "down_proj")},
)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_KINDS = ("global_attn", "shared_attn", "shared_global_attn")
_GEMMA4 = _FOUR_NORMS.but(
    {f"{kind}/{name}": f"self_attn.{name}" for kind in _KINDS for name in _PROJECTIONS}
    | {f"{kind}_norm": "input_layernorm" for kind in _KINDS}
    | {
        "embed/per_layer/embedding": "embed_tokens_per_layer",
        "embed/per_layer_proj": "per_layer_model_projection",
        "embed/per_layer_norm": "per_layer_projection_norm",
        "per_layer/gate_proj": "per_layer_input_gate",
        "per_layer/out_proj": "per_layer_projection",
        "per_layer_post_norm": "post_per_layer_input_norm",
        "output/multiplier": "layer_scalar",
    }
)
_GEMMA4_MOE = {
    "mlp/router": "router.proj",
    "mlp/router/expert_scale": "router.per_expert_scale",
    "router_norm/scale": "router.scale",
    "mlp_norm": "pre_feedforward_layernorm_2",
    "shared_mlp_norm": "pre_feedforward_layernorm",
    "shared_mlp_post_norm": "post_feedforward_layernorm_1",
    "expert_post_norm": "post_feedforward_layernorm_2",
} | _shared("mlp")
_GPT2 = TensorNames(
    dict.fromkeys(_QKV, "attn.c_attn")
    | {
        "embed/embedding": "wte",
        "embed/positions": "wpe",
        "attn/o_proj": "attn.c_proj",
        "mlp/up_proj": "mlp.c_fc",
        "mlp/down_proj": "mlp.c_proj",
        "attn_norm": "ln_1",
        "mlp_norm": "ln_2",
        "head/norm": "ln_f",
    },
    prefix="transformer.",
    layers="h.",
    in_out=True,
)

_GATE_UP = dict.fromkeys(("mlp/gate_proj", "mlp/up_proj"), "mlp.gate_up_proj")
_GLM4 = {
    "attn_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}
_NEOX_MLP = {"mlp/up_proj": "mlp.dense_h_to_4h", "mlp/down_proj": "mlp.dense_4h_to_h"}
_NORM_PER_HEAD = {
    "attn/q_norm": "self_attn.q_layernorm.norms.{h}",
    "attn/k_norm": "self_attn.k_layernorm.norms.{h}",
}
_NEOX = _LLAMA.but(
    dict.fromkeys(_QKV, "attention.query_key_value")
    | _NEOX_MLP
    | {"embed/embedding": "embed_in", "attn/o_proj": "attention.dense", "head/norm": "final_layer_norm"},
    prefix="gpt_neox.",
    head="embed_out",
    qkv_order="by head",
)
_PHI = _LLAMA.but(
    {
        "attn/o_proj": "self_attn.dense",
        "attn/q_norm": "self_attn.q_layernorm",
        "attn/k_norm": "self_attn.k_layernorm",
        "mlp/up_proj": "mlp.fc1",
        "mlp/down_proj": "mlp.fc2",
        "head/norm": "final_layernorm",
    }
)
_GPTJ = _GPT2.but(
    {
        "attn/q_proj": "attn.q_proj",
        "attn/k_proj": "attn.k_proj",
        "attn/v_proj": "attn.v_proj",
        "attn/o_proj": "attn.out_proj",
        "mlp/up_proj": "mlp.fc_in",
        "mlp/down_proj": "mlp.fc_out",
    },
    in_out=False,
)
_OPT = _LLAMA.but(
    {
        "embed/positions": "embed_positions",
        "attn/o_proj": "self_attn.out_proj",
        "mlp/up_proj": "fc1",
        "mlp/down_proj": "fc2",
        "attn_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
        "head/norm": "final_layer_norm",
    },
    prefix="model.decoder.",
)
_FALCON = _LLAMA.but(
    dict.fromkeys(_QKV, "self_attention.query_key_value")
    | _NEOX_MLP
    | {"embed/embedding": "word_embeddings", "attn/o_proj": "self_attention.dense", "head/norm": "ln_f"},
    prefix="transformer.",
    layers="h.",
    qkv_order="by head",
)

TENSOR_NAMES: Mapping[str, TensorNames] = {
    "gemma2": _FOUR_NORMS,
    "gemma3_text": _FOUR_NORMS,
    "gemma4_unified_text": _GEMMA4,
    "gemma4_text": replace(
        _GEMMA4,
        experts={
            "mlp/gate_proj": "experts.gate_up_proj",
            "mlp/up_proj": "experts.gate_up_proj",
            "mlp/down_proj": "experts.down_proj",
        },
        expert_suffixes={"kernel": ""},
    ),
    "olmo2": _LLAMA.but(_POST_NORMS),
    "mixtral": _MIXTRAL,
    "minimax_m2": _MIXTRAL.but({"mlp/router/correction_bias": "block_sparse_moe.e_score_correction_bias"}),
    "phimoe": _MIXTRAL,
    "qwen2_moe": _QWEN_MOE,
    "qwen3_moe": _QWEN_MOE,
    "olmoe": _QWEN_MOE,
    "gpt_oss": _GPT_OSS,
    "nemotron_h": _NEMOTRON_H,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5,
    "llama4_text": _LLAMA4,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK_MOE,
    "solar_open": _DEEPSEEK_MOE,
    "ernie4_5_moe": _DEEPSEEK_MOE.but(
        {"mlp/router/correction_bias": "mlp.moe_statics.e_score_correction_bias"},
        with_row_axis=frozenset({"mlp/router/correction_bias"}),
    ),
    "granitemoe": _LLAMA.but(
        {"mlp/router": "block_sparse_moe.router.layer"},
        experts={
            "mlp/gate_proj": "block_sparse_moe.input_linear",
            "mlp/up_proj": "block_sparse_moe.input_linear",
            "mlp/down_proj": "block_sparse_moe.output_linear",
        },
    ),
    "gpt2": _GPT2,
    "phi3": _LLAMA.but(dict.fromkeys(_QKV, "self_attn.qkv_proj") | _GATE_UP),
    "glm": _LLAMA.but(_GATE_UP),
    "glm4": _LLAMA.but(_GATE_UP | _GLM4),
    "exaone4": _LLAMA.but(_POST_NORMS),
    "cohere": _LLAMA.but({}, two_axes=("attn/q_norm", "attn/k_norm")),
    "gpt_neox": _NEOX,
    "stablelm": _LLAMA.but(_NORM_PER_HEAD),
    "starcoder2": _LLAMA.but({"mlp/up_proj": "mlp.c_fc", "mlp/down_proj": "mlp.c_proj"}),
    "phi": _PHI,
    "gptj": _GPTJ,
    "opt": _OPT,
    "falcon": _FALCON,
    "olmo3": _LLAMA.but(_POST_NORMS),
    "gpt_bigcode": _GPT2.but({}, in_out=False, qkv_order="by head"),
    "gpt_neo": _GPT2.but(
        {
            "attn/q_proj": "attn.attention.q_proj",
            "attn/k_proj": "attn.attention.k_proj",
            "attn/v_proj": "attn.attention.v_proj",
            "attn/o_proj": "attn.attention.out_proj",
        },
        in_out=False,
    ),
    "mpt": _GPT2.but(
        dict.fromkeys(_QKV, "attn.Wqkv")
        | {
            "attn/o_proj": "attn.out_proj",
            "mlp/up_proj": "ffn.up_proj",
            "mlp/down_proj": "ffn.down_proj",
            "attn_norm": "norm_1",
            "mlp_norm": "norm_2",
            "head/norm": "norm_f",
        },
        layers="blocks.",
        in_out=False,
    ),
    "bloom": _FALCON.but({"embed/norm": "word_embeddings_layernorm"}),
}
"""Family -> the names that transformers writes; a family that is not here has those of Llama."""


_TWO_NORMS = {"falcon": {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"}}
"""Family -> names in a parallel block with two norms, where other blocks have others."""


_ONE_PART_A_LAYER = ("nemotron_h",)
"""Families whose layers are attention, a recurrence or an MLP; a layer of ours is all up to the next MLP."""


def _in_memory(names: TensorNames, mlp: str = "mlp", router: str = "gate") -> TensorNames:
    """Returns the names of experts in two tensors, as transformers 5 holds them in memory."""
    both = f"{mlp}.experts.gate_up_proj"
    return names.but(
        {"mlp/router": f"{mlp}.{router}"},
        experts={"mlp/gate_proj": both, "mlp/up_proj": both, "mlp/down_proj": f"{mlp}.experts.down_proj"},
        expert_suffixes={"kernel": "", "bias": "_bias"},
    )


IN_MEMORY: Mapping[str, TensorNames] = {
    **{family: _in_memory(names) for family, names in TENSOR_NAMES.items() if "{e}" in "".join(names.experts.values())},
    "nemotron_h": _NEMOTRON_H.but(
        {},
        prefix="model.",
        experts={f"mlp/{name}": f"mixer.experts.{name}" for name in ("up_proj", "down_proj")},
        expert_suffixes={"kernel": ""},
    ),
    "minimax_m2": _in_memory(_LLAMA.but({"mlp/router/correction_bias": "mlp.e_score_correction_bias"})),
    "phimoe": _in_memory(_LLAMA, router="router"),
    "granitemoe": _in_memory(_LLAMA, "block_sparse_moe", "router"),
    "ernie4_5_moe": _in_memory(
        _DEEPSEEK_MOE.but(
            {"mlp/router/correction_bias": "mlp.gate.moe_statics.e_score_correction_bias"},
            with_row_axis=frozenset({"mlp/router/correction_bias"}),
        )
    ),
}
"""Family -> the names of models that were saved as transformers 5 holds them in memory, where these differ."""


def names_of(arch: Arch) -> TensorNames:
    """Returns the names that transformers writes for a model."""
    names = TENSOR_NAMES.get(arch.family, _LLAMA)
    if arch.family in _ONE_PART_A_LAYER:
        parts = [f"{i}/{part}" for i in range(arch.num_layers) for part in (*arch.mixers_of(i), "mlp")]
        names = replace(names, part_layers={part: number for number, part in enumerate(parts)})
    if arch.branch_norms:
        names = names.but(_GEMMA4_MOE)
    both = arch.parallel and not arch.shared_norm
    return names.but(_TWO_NORMS[arch.family]) if both and arch.family in _TWO_NORMS else names


def names_found(arch: Arch) -> list[TensorNames]:
    """Returns the names in which files of a model are found, first those that transformers writes.

    Backbones saved without their head lack a prefix, experts are one tensor each or one for all, and transformers 5
    calls every head `lm_head`.
    """
    written = names_of(arch)
    forms = [written]
    if arch.family in IN_MEMORY:
        forms.append(replace(IN_MEMORY[arch.family], part_layers=written.part_layers))
    if arch.latent is not None and arch.latent.q_rank is None:
        forms = [names.but(dict.fromkeys(("attn/q_proj", "attn/q_rope_proj"), "self_attn.q_proj")) for names in forms]
    prefixes, heads = dict.fromkeys((*(form.prefix for form in forms), "")), dict.fromkeys((written.head, "lm_head"))
    return [replace(f, prefix=prefix, head=head) for prefix in prefixes for head in heads for f in forms]
