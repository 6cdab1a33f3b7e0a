"""What the tensors of each family are called in the files that transformers writes: one row of names per family."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

_SUFFIXES = {"kernel": ".weight", "scale": ".weight", "bias": ".bias", "embedding": ".weight", "positions": ".weight"}


@dataclass(frozen=True)
class TensorNames:
    """The names of a family's tensors, and how its fused ones are ordered.

    A leaf `attn/q_proj/kernel` is the tensor `self_attn.q_proj.weight` of its layer. Modules with the same name share a
    tensor: queries, keys and values, or gate and up.

    Attributes:
      modules: module of ours -> that of the files, with `{e}` for the number of an expert or `{h}` of a head where each
        has a tensor of its own. The names of a layer's modules follow its own.
      prefix: what stands in front of all but the head.
      layers: what stands in front of the number of a layer.
      head: the module that predicts tokens.
      experts: as `modules`, for those that each expert has.
      suffixes: leaf -> what follows the name of its module; of modules in `experts` those in `expert_suffixes`.
      qkv_order: how queries, keys and values share a tensor: one after the other, or within each kv head.
      in_out: whether kernels, that of the head excepted, are stored `[in, out]`, as ours are.
    """

    modules: Mapping[str, str]
    prefix: str = "model."
    layers: str = "layers."
    head: str = "lm_head"
    experts: Mapping[str, str] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=lambda: _SUFFIXES)
    expert_suffixes: Mapping[str, str] = field(default_factory=lambda: _SUFFIXES)
    qkv_order: Literal["concatenated", "by head"] = "concatenated"
    in_out: bool = False

    def tensor(self, leaf: str, of_expert: bool) -> str:
        """Returns the name of the tensor of a leaf, with `{e}` or `{h}` in it where each expert or head has its own."""
        path, _, part = leaf.rpartition("/")
        own = leaf if part in ("embedding", "positions") else path
        if own == "head/lm_head":
            return self.head + self.suffixes[part]
        layer, module = "", own
        if own.startswith("layers/"):
            _, number, module = own.split("/", 2)
            layer = f"{self.layers}{number}."
        if of_expert:
            return self.prefix + layer + self.experts[module] + self.expert_suffixes[part]
        return self.prefix + layer + self.modules[module] + self.suffixes[part]

    def is_in_out(self, leaf: str) -> bool:
        """Returns whether the kernel of a module is stored `[in, out]`."""
        return self.in_out and not leaf.startswith("head/")

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

TENSOR_NAMES: Mapping[str, TensorNames] = {
    "gemma2": _FOUR_NORMS,
    "gemma3_text": _FOUR_NORMS,
    "olmo2": _LLAMA.but(_POST_NORMS),
    "mixtral": _MIXTRAL,
    "gpt2": _GPT2,
}
"""Family -> the names that transformers writes; a family that is not here has those of Llama."""


def fused_experts(names: TensorNames, mlp: str = "mlp") -> TensorNames:
    """Returns the names of experts in two tensors, as transformers 5 holds them in memory."""
    both = f"{mlp}.experts.gate_up_proj"
    return names.but(
        {"mlp/router": f"{mlp}.gate"},
        experts={"mlp/gate_proj": both, "mlp/up_proj": both, "mlp/down_proj": f"{mlp}.experts.down_proj"},
        expert_suffixes={"kernel": "", "bias": "_bias"},
    )


def names_of(family: str) -> TensorNames:
    """Returns the names that transformers writes for a family."""
    return TENSOR_NAMES.get(family, _LLAMA)


def names_found(family: str) -> list[TensorNames]:
    """Returns the names in which files of a family are found, first those that transformers writes.

    Backbones saved without their head lack a prefix, and experts are one tensor each or one for all.
    """
    written = names_of(family)
    forms = [written, *([fused_experts(written)] if written.experts else [])]
    return [replace(names, prefix=prefix) for prefix in dict.fromkeys((written.prefix, "")) for names in forms]
