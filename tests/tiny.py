"""Tiny models of several families, with weights large enough for a wrong permutation to show."""

import dataclasses
import functools

import jax
import numpy as np
import transformers

from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.models import init_params
from tracing_jax.sources import InMemory
from tracing_jax.tree import Tree, map_named

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "head_dim": 4,
}


def llama_mha(**changes: object) -> Arch:
    """Multi-head attention with biases everywhere, embeddings not tied."""
    config = transformers.LlamaConfig(
        **_SIZES | {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    )
    return dataclasses.replace(arch_from_config(config), **changes)


def qwen3_gqa(**changes: object) -> Arch:
    """Grouped queries, head-wise query and key norms, tied embeddings."""
    config = transformers.Qwen3Config(**_SIZES | {"num_key_value_heads": 3, "tie_word_embeddings": True})
    return dataclasses.replace(arch_from_config(config), **changes)


def olmo2_gqa(**changes: object) -> Arch:
    """Grouped queries, norms over all queries together, norms after the layers, embeddings not tied."""
    config = transformers.Olmo2Config(**_SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": False})
    return dataclasses.replace(arch_from_config(config), head_dim=4, **changes)


def gemma_mqa(**changes: object) -> Arch:
    """One key and value head for all queries, gains stored minus one, tied embeddings."""
    config = transformers.GemmaConfig(**_SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": True})
    return dataclasses.replace(arch_from_config(config), **changes)


def gpt2(**changes: object) -> Arch:
    """Learned positions, layer norms with biases, an MLP without gate, tied embeddings."""
    config = transformers.GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=6, n_inner=20, n_positions=24)
    return dataclasses.replace(arch_from_config(config), **changes)


def mixtral(**changes: object) -> Arch:
    """Three experts of which two serve a token, grouped queries, embeddings not tied."""
    sizes = _SIZES | {"num_key_value_heads": 3, "num_local_experts": 3, "num_experts_per_tok": 2}
    return dataclasses.replace(arch_from_config(transformers.MixtralConfig(**sizes)), **changes)


def deepseek(**changes: object) -> Arch:
    """Attention by latents; a layer without experts, then two with four experts in two groups and a shared one."""
    sizes = _SIZES | {"num_hidden_layers": 3, "moe_intermediate_size": 12, "n_routed_experts": 4, "n_group": 2}
    heads = {"kv_lora_rank": 10, "q_lora_rank": 14, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3}
    experts = {"topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "num_key_value_heads": 6}
    return dataclasses.replace(
        arch_from_config(transformers.DeepseekV3Config(**sizes | heads | experts)), **changes
    )  # fmt: skip


def params_of(arch: Arch, seed: int = 0, dtype: object = np.float32) -> Tree:
    """Returns random weights of std 0.3, gains around their neutral value."""
    rng = np.random.default_rng(seed)

    def leaf(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        center = 1.0 if name.endswith("scale") and arch.norm in ("rms", "layer_norm") else 0.0
        return jax.numpy.asarray(rng.normal(center, 0.3, shape.shape), dtype)

    return map_named(leaf, _shapes(arch))


@functools.cache
def _shapes(arch: Arch) -> Tree:
    return jax.eval_shape(lambda key: init_params(arch, key), jax.random.key(0))


def model(arch: Arch, seed: int = 0, dtype: object = np.float32) -> InMemory:
    """Returns a model with such weights."""
    return InMemory(arch, params_of(arch, seed, dtype))


def with_leaf(params: Tree, name: str, leaf: np.ndarray) -> Tree:
    """Returns a tree in which one leaf is another."""
    return map_named(lambda other, old: jax.numpy.asarray(leaf, old.dtype) if other == name else old, params)


def noisy(params: Tree, share: float, seed: int = 1) -> Tree:
    """Returns "fine-tuned" weights: each leaf plus noise of `share` times its own standard deviation."""
    rng = np.random.default_rng(seed)

    def leaf(_: str, weights: jax.Array) -> jax.Array:
        weights = np.asarray(weights)
        return jax.numpy.asarray(weights + share * weights.std() * rng.normal(size=weights.shape), weights.dtype)

    return map_named(leaf, params)
