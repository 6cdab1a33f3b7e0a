"""Hugging Face tensor names and layouts <-> our leaves, in both directions and bit for bit.

A Hugging Face linear weight is `[out, in]` with heads flattened into `out`; ours is `[in, out]` with heads as axes.
Each leaf is the HF tensor reshaped (heads unfolded, query head `k * G + g` to `[k, g]`) and transposed.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Mapping

from tracing_jax.arch import Arch
from tracing_jax.checkpoint.layout_gpt2 import gpt2_layouts
from tracing_jax.checkpoint.tensor_layout import Entry, Piece, tensor_shapes

Layout = Mapping[str, Entry]
"""Leaf name -> how it lies in the tensors."""


def layout(arch: Arch, names: Collection[str] | None = None) -> Layout:
    """Returns the layout of every leaf of a model: the one that transformers writes, or that of files with these names.

    Backbones saved without their head lack a prefix, and experts are one tensor each or one for all.
    """
    spellings = _SPELLINGS.get(arch.family, _layouts)(arch)
    if names is None:
        return next(spellings)
    return min(spellings, key=lambda entries: len(tensor_shapes(entries.values()).keys() - set(names)))


_SPELLINGS = {"gpt2": gpt2_layouts}  # every other family names its tensors as Llama does


def _layouts(arch: Arch) -> Iterator[Layout]:
    """Yields the layouts in which files are found, first the one that transformers writes."""
    for prefix, fused in itertools.product(("model.", ""), (False,) if arch.num_experts is None else (False, True)):
        yield _layout(arch, prefix, fused)


def _layout(arch: Arch, prefix: str, fused: bool) -> Layout:
    D, V = arch.embed_dim, arch.vocab_size
    entries = {"embed/embedding": _whole(f"{prefix}embed_tokens.weight", V, D)}
    for i in range(arch.num_layers):
        at = f"{prefix}layers.{i}."
        block = _attention(arch, at + "self_attn.") | _mlp(arch, at, fused) | _norms(arch, at)
        entries |= {f"layers/{i}/{name}": entry for name, entry in block.items()}
    if arch.norm != "layer_norm_plain":
        entries["head/norm/scale"] = _whole(f"{prefix}norm.weight", D)
    if not arch.tied:
        entries["head/lm_head/kernel"] = _transposed("lm_head.weight", V, D)
    return entries


def _attention(arch: Arch, at: str) -> dict[str, Entry]:
    D, K, G, H = arch.embed_dim, arch.num_kv_heads, arch.q_group, arch.head_dim
    entries = {
        "attn/q_proj/kernel": _entry(at + "q_proj.weight", (K * G * H, D), (K, G, H, D), (3, 0, 1, 2)),
        "attn/k_proj/kernel": _entry(at + "k_proj.weight", (K * H, D), (K, H, D), (2, 0, 1)),
        "attn/v_proj/kernel": _entry(at + "v_proj.weight", (K * H, D), (K, H, D), (2, 0, 1)),
        "attn/o_proj/kernel": _entry(at + "o_proj.weight", (D, K * G * H), (D, K, G, H), (1, 2, 3, 0)),
    }
    if arch.qkv_bias:
        entries["attn/q_proj/bias"] = _unfolded(at + "q_proj.bias", K, G, H)
        entries["attn/k_proj/bias"] = _unfolded(at + "k_proj.bias", K, H)
        entries["attn/v_proj/bias"] = _unfolded(at + "v_proj.bias", K, H)
    if arch.o_bias:
        entries["attn/o_proj/bias"] = _whole(at + "o_proj.bias", D)
    if arch.qk_norm is not None:
        every_head = arch.qk_norm == "all"
        entries["attn/q_norm/scale"] = _unfolded(at + "q_norm.weight", *((K, G, H) if every_head else (H,)))
        entries["attn/k_norm/scale"] = _unfolded(at + "k_norm.weight", *((K, H) if every_head else (H,)))
    return entries


def _mlp(arch: Arch, at: str, fused: bool) -> dict[str, Entry]:
    D, F = arch.embed_dim, arch.mlp_dim
    if arch.num_experts is not None:
        return _fused_experts(arch, at + "mlp.") if fused else _experts(arch, at + "block_sparse_moe.")
    at += "mlp."
    entries = {
        "mlp/gate_proj/kernel": _transposed(at + "gate_proj.weight", F, D),
        "mlp/up_proj/kernel": _transposed(at + "up_proj.weight", F, D),
        "mlp/down_proj/kernel": _transposed(at + "down_proj.weight", D, F),
    }
    if arch.mlp_bias:
        entries["mlp/gate_proj/bias"] = _whole(at + "gate_proj.bias", F)
        entries["mlp/up_proj/bias"] = _whole(at + "up_proj.bias", F)
        entries["mlp/down_proj/bias"] = _whole(at + "down_proj.bias", D)
    return entries


def _experts(arch: Arch, at: str) -> dict[str, Entry]:
    """Returns the entries of a router and of experts with three tensors each."""
    assert arch.num_experts is not None
    D, F, E = arch.embed_dim, arch.mlp_dim, arch.num_experts

    def stacked(tensor: str, rows: int, columns: int) -> Entry:
        pieces = tuple(Piece(f"{at}experts.{e}.{tensor}.weight", (rows, columns)) for e in range(E))
        return Entry(pieces, (E, rows, columns), (0, 2, 1))

    return {
        "mlp/router/kernel": _transposed(at + "gate.weight", E, D),
        "mlp/gate_proj/kernel": stacked("w1", F, D),
        "mlp/up_proj/kernel": stacked("w3", F, D),
        "mlp/down_proj/kernel": stacked("w2", D, F),
    }


def _fused_experts(arch: Arch, at: str) -> dict[str, Entry]:
    """Returns the entries of a router and of experts in two tensors, as transformers 5 holds them in memory."""
    assert arch.num_experts is not None
    D, F, E = arch.embed_dim, arch.mlp_dim, arch.num_experts

    def half(start: int) -> Entry:
        piece = Piece(at + "experts.gate_up_proj", (E, 2 * F, D), axis=1, start=start, stop=start + F)
        return Entry((piece,), (E, F, D), (0, 2, 1))

    return {
        "mlp/router/kernel": _transposed(at + "gate.weight", E, D),
        "mlp/gate_proj/kernel": half(0),
        "mlp/up_proj/kernel": half(F),
        "mlp/down_proj/kernel": _entry(at + "experts.down_proj", (E, D, F), (E, D, F), (0, 2, 1)),
    }


def _norms(arch: Arch, at: str) -> dict[str, Entry]:
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


def _entry(tensor: str, shape: tuple[int, ...], unfolded: tuple[int, ...], order: tuple[int, ...]) -> Entry:
    return Entry((Piece(tensor, shape),), unfolded, order)


def _whole(tensor: str, *shape: int) -> Entry:
    return _entry(tensor, shape, shape, tuple(range(len(shape))))


def _unfolded(tensor: str, *shape: int) -> Entry:
    return _entry(tensor, (math.prod(shape),), shape, tuple(range(len(shape))))


def _transposed(tensor: str, rows: int, columns: int) -> Entry:
    return _entry(tensor, (rows, columns), (rows, columns), (1, 0))
