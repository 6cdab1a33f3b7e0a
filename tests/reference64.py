"""A decoder's forward pass in numpy and float64, written from the families' definitions: no part of it is ours.

Letters: T position, D embed, K kv heads, G queries per kv head, H head dim, F mlp, V vocab.
"""

import math

import numpy as np
from scipy.special import erf, expit, softmax

from tracing_jax.arch import Arch
from tracing_jax.tree import Tree

_ACTIVATIONS = {
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: x * (1 + erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def logits64(arch: Arch, params: Tree, tokens: np.ndarray) -> np.ndarray:
    """Returns float64[B, T, V]."""
    return np.stack([_logits(arch, params, row) for row in tokens])


def _logits(arch: Arch, params: Tree, tokens: np.ndarray) -> np.ndarray:
    table = _leaf(params["embed"]["embedding"])
    x = table[tokens] * arch.embed_scale
    if arch.num_positions is not None:
        x = x + _leaf(params["embed"]["positions"])[: len(tokens)]
    for i in range(arch.num_layers):
        x = _block(arch, params["layers"][str(i)], i, x)
    x = _norm(arch, params["head"].get("norm"), x)
    scores = x @ (table.T if arch.tied else _leaf(params["head"]["lm_head"]["kernel"])) * arch.logit_scale
    return _capped(scores, arch.logit_softcap)


def _block(arch: Arch, layer: Tree, index: int, x: np.ndarray) -> np.ndarray:
    y = _norm(arch, layer.get("attn_norm"), x) if arch.pre_norms else x
    y = _attention(arch, layer["attn"], index, y)
    y = _norm(arch, layer.get("attn_post_norm"), y) if arch.post_norms else y
    x = x + arch.residual_scale * y
    y = _norm(arch, layer.get("mlp_norm"), x) if arch.pre_norms else x
    y = _mlp(arch, layer["mlp"], y) if arch.num_experts is None else _experts(arch, layer["mlp"], y)
    y = _norm(arch, layer.get("mlp_post_norm"), y) if arch.post_norms else y
    return x + arch.residual_scale * y


def _mlp(arch: Arch, mlp: Tree, x: np.ndarray) -> np.ndarray:
    up, act = _linear(mlp["up_proj"], "td,df->tf", x), _ACTIVATIONS[arch.activation]
    units = act(_linear(mlp["gate_proj"], "td,df->tf", x)) * up if arch.gated else act(up)
    return _linear(mlp["down_proj"], "tf,fd->td", units)


def _experts(arch: Arch, mlp: Tree, x: np.ndarray) -> np.ndarray:
    scores, y = _linear(mlp["router"], "td,de->te", x), np.zeros_like(x)
    for t in range(len(x)):
        chosen = np.argsort(scores[t])[-arch.experts_per_token :]
        for expert, share in zip(chosen, softmax(scores[t, chosen]), strict=True):
            own = {name: {"kernel": leaf["kernel"][expert]} for name, leaf in mlp.items() if name != "router"}
            y[t] += share * _mlp(arch, own, x[t : t + 1])[0]
    return y


def _attention(arch: Arch, attn: Tree, index: int, x: np.ndarray) -> np.ndarray:
    q = _linear(attn["q_proj"], "td,dkgh->tkgh", x)
    k, v = (_linear(attn[name], "td,dkh->tkh", x) for name in ("k_proj", "v_proj"))
    if arch.qk_norm is not None:
        over = 1 if arch.qk_norm == "head" else None
        q, k = _norm(arch, attn["q_norm"], q, over), _norm(arch, attn["k_norm"], k, over)
    if arch.clip_qkv is not None:
        q, k, v = (np.clip(y, -arch.clip_qkv, arch.clip_qkv) for y in (q, k, v))
    if arch.rope_frequencies:
        angles = np.arange(len(x))[:, None] * np.asarray(arch.rope_frequencies[arch.layer_ropes[index]])
        turn = np.exp(1j * angles)
        q, k = _turned(q, turn[:, None, None]), _turned(k, turn[:, None])
    scale = arch.attention_scale / (index + 1 if arch.inverse_layer_scale else 1)
    scores = _capped(np.einsum("tkgh,skh->kgts", q, k) * scale, arch.attention_softcap)
    back = np.arange(len(x))[:, None] - np.arange(len(x))
    window = arch.layer_windows[index] or len(x)
    scores = np.where((back >= 0) & (back < window), scores, -np.inf)
    return _linear(attn["o_proj"], "tkgh,kghd->td", np.einsum("kgts,skh->tkgh", softmax(scores, axis=-1), v))


def _turned(x: np.ndarray, turn: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    z = (first + 1j * second) * turn
    return np.concatenate([z.real, z.imag], axis=-1)


def _norm(arch: Arch, params: Tree | None, x: np.ndarray, trailing: int | None = 1) -> np.ndarray:
    axes = tuple(range(1, x.ndim)) if trailing is None else (-1,)
    if arch.norm.startswith("layer_norm"):
        x = x - x.mean(axes, keepdims=True)
    y = x / np.sqrt((x**2).mean(axes, keepdims=True) + arch.norm_eps)
    if params is None:
        return y
    y = y * (_leaf(params["scale"]) + (arch.norm == "rms_unit_offset"))
    return y + _leaf(params["bias"]) if "bias" in params else y


def _linear(params: Tree, equation: str, x: np.ndarray) -> np.ndarray:
    y = np.einsum(equation, x, _leaf(params["kernel"]))
    return y + _leaf(params["bias"]) if "bias" in params else y


def _capped(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def _leaf(leaf: np.ndarray) -> np.ndarray:
    return np.asarray(leaf, np.float64)
