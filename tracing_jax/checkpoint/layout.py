"""Hugging Face tensor names and layouts <-> our leaves, in both directions and bit for bit.

A Hugging Face linear weight is `[out, in]` with heads flattened into `out`; ours is `[in, out]` with heads as axes.
Each leaf is the HF tensor reshaped (heads unfolded, query head `k * G + g` to `[k, g]`) and transposed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tracing_jax.arch import Arch


@dataclass(frozen=True)
class Entry:
    """How one leaf lies in a checkpoint: `leaf = tensor.reshape(unfolded).transpose(order)`."""

    tensor: str
    unfolded: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    """The shape of the tensor in the checkpoint."""

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the leaf, a view where numpy can make one."""
        return tensor.reshape(self.unfolded).transpose(self.order)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        """Returns the contiguous tensor: the inverse of `to_leaf`."""
        return np.ascontiguousarray(leaf.transpose(np.argsort(self.order))).reshape(self.shape)


def layout(arch: Arch, prefix: str = "model.") -> Mapping[str, Entry]:
    """Returns leaf name -> entry for every leaf of a model; `prefix` is what stands before its tensor names."""
    D, V = arch.embed_dim, arch.vocab_size
    entries = {"embed/embedding": _whole(f"{prefix}embed_tokens.weight", V, D)}
    for i in range(arch.num_layers):
        block = _block(arch, f"{prefix}layers.{i}.")
        entries |= {f"layers/{i}/{name}": entry for name, entry in block.items()}
    if arch.norm != "layer_norm_plain":
        entries["head/norm/scale"] = _whole(f"{prefix}norm.weight", D)
    if not arch.tied:
        entries["head/lm_head/kernel"] = _transposed("lm_head.weight", V, D)
    return entries


def _block(arch: Arch, at: str) -> dict[str, Entry]:
    D, F, K, G, H = arch.embed_dim, arch.mlp_dim, arch.num_kv_heads, arch.q_group, arch.head_dim
    attn, mlp = at + "self_attn.", at + "mlp."
    entries = {
        "attn/q_proj/kernel": Entry(attn + "q_proj.weight", (K, G, H, D), (3, 0, 1, 2), (K * G * H, D)),
        "attn/k_proj/kernel": Entry(attn + "k_proj.weight", (K, H, D), (2, 0, 1), (K * H, D)),
        "attn/v_proj/kernel": Entry(attn + "v_proj.weight", (K, H, D), (2, 0, 1), (K * H, D)),
        "attn/o_proj/kernel": Entry(attn + "o_proj.weight", (D, K, G, H), (1, 2, 3, 0), (D, K * G * H)),
        "mlp/gate_proj/kernel": _transposed(mlp + "gate_proj.weight", F, D),
        "mlp/up_proj/kernel": _transposed(mlp + "up_proj.weight", F, D),
        "mlp/down_proj/kernel": _transposed(mlp + "down_proj.weight", D, F),
    }
    if arch.qkv_bias:
        entries["attn/q_proj/bias"] = _unfolded(attn + "q_proj.bias", K, G, H)
        entries["attn/k_proj/bias"] = _unfolded(attn + "k_proj.bias", K, H)
        entries["attn/v_proj/bias"] = _unfolded(attn + "v_proj.bias", K, H)
    if arch.o_bias:
        entries["attn/o_proj/bias"] = _whole(attn + "o_proj.bias", D)
    if arch.mlp_bias:
        entries["mlp/gate_proj/bias"] = _whole(mlp + "gate_proj.bias", F)
        entries["mlp/up_proj/bias"] = _whole(mlp + "up_proj.bias", F)
        entries["mlp/down_proj/bias"] = _whole(mlp + "down_proj.bias", D)
    if arch.qk_norm is not None:
        every_head = arch.qk_norm == "all"
        entries["attn/q_norm/scale"] = _unfolded(attn + "q_norm.weight", *((K, G, H) if every_head else (H,)))
        entries["attn/k_norm/scale"] = _unfolded(attn + "k_norm.weight", *((K, H) if every_head else (H,)))
    return entries | {f"{ours}/scale": _whole(f"{at}{theirs}.weight", D) for ours, theirs in _norm_names(arch).items()}


def _norm_names(arch: Arch) -> dict[str, str]:
    """Returns our name -> theirs; `post_attention_layernorm` means another place where blocks have post-norms."""
    if arch.norm == "layer_norm_plain":
        return {}
    names = {}
    if arch.pre_norms:
        names["attn_norm"] = "input_layernorm"
        names["mlp_norm"] = "pre_feedforward_layernorm" if arch.post_norms else "post_attention_layernorm"
    if arch.post_norms:
        names["attn_post_norm"] = "post_attention_layernorm"
        names["mlp_post_norm"] = "post_feedforward_layernorm"
    return names


def _whole(tensor: str, *shape: int) -> Entry:
    return Entry(tensor, shape, tuple(range(len(shape))), shape)


def _unfolded(tensor: str, *shape: int) -> Entry:
    return Entry(tensor, shape, tuple(range(len(shape))), (int(np.prod(shape)),))


def _transposed(tensor: str, rows: int, columns: int) -> Entry:
    return Entry(tensor, (rows, columns), (1, 0), (rows, columns))
