"""Hugging Face tensor names and layouts <-> our leaves, in both directions and bit for bit.

A Hugging Face linear weight is `[out, in]` with heads flattened into `out`; ours is `[in, out]` with heads as axes.
Each leaf is the HF tensor reshaped (heads unfolded, query head `k * G + g` to `[k, g]`) and transposed.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping

from tracing_jax.arch import Arch
from tracing_jax.checkpoint.tensor_layout import LeafLayout, TensorSlice, tensor_shapes

LeafLayouts = Mapping[str, LeafLayout]
"""Leaf name -> its layout in the tensors of a checkpoint."""


def leaf_layouts(arch: Arch, names: Collection[str] | None = None) -> LeafLayouts:
    """Returns the layout of every leaf of a model: the one that transformers writes, or that of files with these names.

    Backbones saved without their head lack a prefix, and experts are one tensor each or one for all.
    """
    candidates = _gpt2_layouts(arch) if arch.family == "gpt2" else _llama_layouts(arch)
    if names is None:
        return next(candidates)
    return min(candidates, key=lambda layouts: len(tensor_shapes(layouts.values()).keys() - set(names)))


def _llama_layouts(arch: Arch) -> Iterator[LeafLayouts]:
    """Yields the layouts in which files of all families but GPT-2 are found, first the one that transformers writes."""
    for prefix, fused in itertools.product(("model.", ""), (False,) if arch.num_experts is None else (False, True)):
        yield _llama_layout(arch, prefix, fused)


def _llama_layout(arch: Arch, prefix: str, fused: bool) -> LeafLayouts:
    D, V = arch.embed_dim, arch.vocab_size
    layouts = {"embed/embedding": _whole(f"{prefix}embed_tokens.weight", V, D)}
    for i in range(arch.num_layers):
        at = f"{prefix}layers.{i}."
        block = _attention(arch, at + "self_attn.") | _mlp(arch, at, fused) | _norms(arch, at)
        layouts |= {f"layers/{i}/{name}": layout for name, layout in block.items()}
    if arch.norm != "layer_norm_plain":
        layouts["head/norm/scale"] = _whole(f"{prefix}norm.weight", D)
    if not arch.tied:
        layouts["head/lm_head/kernel"] = _transposed("lm_head.weight", V, D)
    return layouts


def _attention(arch: Arch, at: str) -> dict[str, LeafLayout]:
    D, K, G, H = arch.embed_dim, arch.num_kv_heads, arch.q_group, arch.head_dim
    layouts = {
        "attn/q_proj/kernel": _layout(at + "q_proj.weight", (K * G * H, D), (K, G, H, D), (3, 0, 1, 2)),
        "attn/k_proj/kernel": _layout(at + "k_proj.weight", (K * H, D), (K, H, D), (2, 0, 1)),
        "attn/v_proj/kernel": _layout(at + "v_proj.weight", (K * H, D), (K, H, D), (2, 0, 1)),
        "attn/o_proj/kernel": _layout(at + "o_proj.weight", (D, K * G * H), (D, K, G, H), (1, 2, 3, 0)),
    }
    if arch.qkv_bias:
        layouts["attn/q_proj/bias"] = _unfolded(at + "q_proj.bias", K, G, H)
        layouts["attn/k_proj/bias"] = _unfolded(at + "k_proj.bias", K, H)
        layouts["attn/v_proj/bias"] = _unfolded(at + "v_proj.bias", K, H)
    if arch.o_bias:
        layouts["attn/o_proj/bias"] = _whole(at + "o_proj.bias", D)
    if arch.qk_norm is not None:
        every_head = arch.qk_norm == "all"
        layouts["attn/q_norm/scale"] = _unfolded(at + "q_norm.weight", *((K, G, H) if every_head else (H,)))
        layouts["attn/k_norm/scale"] = _unfolded(at + "k_norm.weight", *((K, H) if every_head else (H,)))
    return layouts


def _mlp(arch: Arch, at: str, fused: bool) -> dict[str, LeafLayout]:
    D, F = arch.embed_dim, arch.mlp_dim
    if arch.num_experts is not None:
        return _fused_experts(arch, at + "mlp.") if fused else _experts(arch, at + "block_sparse_moe.")
    at += "mlp."
    layouts = {
        "mlp/gate_proj/kernel": _transposed(at + "gate_proj.weight", F, D),
        "mlp/up_proj/kernel": _transposed(at + "up_proj.weight", F, D),
        "mlp/down_proj/kernel": _transposed(at + "down_proj.weight", D, F),
    }
    if arch.mlp_bias:
        layouts["mlp/gate_proj/bias"] = _whole(at + "gate_proj.bias", F)
        layouts["mlp/up_proj/bias"] = _whole(at + "up_proj.bias", F)
        layouts["mlp/down_proj/bias"] = _whole(at + "down_proj.bias", D)
    return layouts


def _experts(arch: Arch, at: str) -> dict[str, LeafLayout]:
    """Returns the layouts of a router and of experts with three tensors each."""
    assert arch.num_experts is not None
    D, F, E = arch.embed_dim, arch.mlp_dim, arch.num_experts

    def stacked(tensor: str, rows: int, columns: int) -> LeafLayout:
        slices = tuple(TensorSlice(f"{at}experts.{e}.{tensor}.weight", (rows, columns)) for e in range(E))
        return LeafLayout(slices, (E, rows, columns), (0, 2, 1))

    return {
        "mlp/router/kernel": _transposed(at + "gate.weight", E, D),
        "mlp/gate_proj/kernel": stacked("w1", F, D),
        "mlp/up_proj/kernel": stacked("w3", F, D),
        "mlp/down_proj/kernel": stacked("w2", D, F),
    }


def _fused_experts(arch: Arch, at: str) -> dict[str, LeafLayout]:
    """Returns the layouts of a router and of experts in two tensors, as transformers 5 holds them in memory."""
    assert arch.num_experts is not None
    D, F, E = arch.embed_dim, arch.mlp_dim, arch.num_experts

    def half(start: int) -> LeafLayout:
        tensor_slice = TensorSlice(at + "experts.gate_up_proj", (E, 2 * F, D), axis=1, start=start, stop=start + F)
        return LeafLayout((tensor_slice,), (E, F, D), (0, 2, 1))

    return {
        "mlp/router/kernel": _transposed(at + "gate.weight", E, D),
        "mlp/gate_proj/kernel": half(0),
        "mlp/up_proj/kernel": half(F),
        "mlp/down_proj/kernel": _layout(at + "experts.down_proj", (E, D, F), (E, D, F), (0, 2, 1)),
    }


def _norms(arch: Arch, at: str) -> dict[str, LeafLayout]:
    """Returns the gains of a block; `post_attention_layernorm` means another place where blocks have post-norms."""
    if arch.norm == "layer_norm_plain":
        return {}
    names = {}
    if arch.pre_norms:
        names["attn_norm"] = "input_layernorm"
        names["mlp_norm"] = "pre_feedforward_layernorm" if arch.post_norms else "post_attention_layernorm"
    if arch.post_norms:
        names["attn_post_norm"] = "post_attention_layernorm"
        names["mlp_post_norm"] = "post_feedforward_layernorm"
    return {f"{ours}/scale": _whole(f"{at}{theirs}.weight", arch.embed_dim) for ours, theirs in names.items()}


def _gpt2_layouts(arch: Arch) -> Iterator[LeafLayouts]:
    """Yields the layouts in which files of GPT-2 are found: as transformers writes them, and as a bare backbone.

    Its linear weights are `[in, out]`, and queries, keys and values share one tensor.
    """
    for prefix in ("transformer.", ""):
        yield _gpt2_layout(arch, prefix)


def _gpt2_layout(arch: Arch, prefix: str) -> LeafLayouts:
    D, V = arch.embed_dim, arch.vocab_size
    assert arch.num_positions is not None
    layouts = {
        "embed/embedding": _whole(f"{prefix}wte.weight", V, D),
        "embed/positions": _whole(f"{prefix}wpe.weight", arch.num_positions, D),
    }
    for i in range(arch.num_layers):
        block = _gpt2_attention(arch, f"{prefix}h.{i}.") | _gpt2_mlp(arch, f"{prefix}h.{i}.")
        layouts |= {f"layers/{i}/{name}": layout for name, layout in block.items()}
    layouts |= _gpt2_norm("head/norm", f"{prefix}ln_f", D)
    if not arch.tied:
        layouts["head/lm_head/kernel"] = _transposed("lm_head.weight", V, D)
    return layouts


def _gpt2_attention(arch: Arch, at: str) -> dict[str, LeafLayout]:
    D, K, G, H = arch.embed_dim, arch.num_kv_heads, arch.q_group, arch.head_dim
    layouts = {}
    for i, (name, heads) in enumerate({"q_proj": (K, G, H), "k_proj": (K, H), "v_proj": (K, H)}.items()):
        weight = TensorSlice(f"{at}attn.c_attn.weight", (D, 3 * D), axis=1, start=i * D, stop=(i + 1) * D)
        bias = TensorSlice(f"{at}attn.c_attn.bias", (3 * D,), start=i * D, stop=(i + 1) * D)
        layouts[f"attn/{name}/kernel"] = LeafLayout((weight,), (D, *heads), tuple(range(1 + len(heads))))
        layouts[f"attn/{name}/bias"] = LeafLayout((bias,), heads, tuple(range(len(heads))))
    layouts["attn/o_proj/kernel"] = _layout(f"{at}attn.c_proj.weight", (D, D), (K, G, H, D), (0, 1, 2, 3))
    layouts["attn/o_proj/bias"] = _whole(f"{at}attn.c_proj.bias", D)
    return layouts | _gpt2_norm("attn_norm", f"{at}ln_1", D)


def _gpt2_mlp(arch: Arch, at: str) -> dict[str, LeafLayout]:
    D, F = arch.embed_dim, arch.mlp_dim
    return {
        "mlp/up_proj/kernel": _whole(f"{at}mlp.c_fc.weight", D, F),
        "mlp/up_proj/bias": _whole(f"{at}mlp.c_fc.bias", F),
        "mlp/down_proj/kernel": _whole(f"{at}mlp.c_proj.weight", F, D),
        "mlp/down_proj/bias": _whole(f"{at}mlp.c_proj.bias", D),
    } | _gpt2_norm("mlp_norm", f"{at}ln_2", D)


def _gpt2_norm(ours: str, theirs: str, size: int) -> dict[str, LeafLayout]:
    return {f"{ours}/scale": _whole(f"{theirs}.weight", size), f"{ours}/bias": _whole(f"{theirs}.bias", size)}


def _layout(tensor: str, shape: tuple[int, ...], unfolded: tuple[int, ...], order: tuple[int, ...]) -> LeafLayout:
    return LeafLayout((TensorSlice(tensor, shape),), unfolded, order)


def _whole(tensor: str, *shape: int) -> LeafLayout:
    return _layout(tensor, shape, shape, tuple(range(len(shape))))


def _unfolded(tensor: str, *shape: int) -> LeafLayout:
    return _layout(tensor, (math.prod(shape),), shape, tuple(range(len(shape))))


def _transposed(tensor: str, rows: int, columns: int) -> LeafLayout:
    return _layout(tensor, (rows, columns), (rows, columns), (1, 0))
