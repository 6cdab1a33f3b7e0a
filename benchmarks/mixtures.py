"""What may be done to models with experts, or to make one: upcycled, experts dropped, one kept, all moved.

Letters: S models, E experts, D features.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.descendants import Descendant, disguise
from tracing_jax.arch import Arch
from tracing_jax.sources import InMemory
from tracing_jax.tree import Tree, map_named


def upcycled_arch(dense: Arch, like: Arch) -> Arch:
    """Returns the architecture of a dense model whose MLPs became experts, as many as another model has."""
    return replace(
        dense, family=like.family, num_experts=like.num_experts, experts_per_token=like.experts_per_token
    )  # fmt: skip


def upcycled(models: Tree, arch: Arch, seed: int) -> Tree:
    """Returns stacked dense models as mixtures: every expert a copy of the dense MLP, and a router drawn at random.

    Source: Komatsuzaki et al. 2023, Sparse Upcycling (arXiv 2212.05055).
    """
    D, E = arch.embed_dim, arch.num_experts
    assert E is not None

    def layer(own: Tree, key: jax.Array) -> Tree:
        experts = jax.tree.map(lambda kernel: np.repeat(np.asarray(kernel)[:, None], E, axis=1), own["mlp"])
        count = len(jax.tree.leaves(experts)[0])
        router = np.asarray(jax.random.normal(key, (count, D, E))) * np.float32(D**-0.5)
        return own | {"mlp": experts | {"router": {"kernel": router}}}

    keys = jax.random.split(jax.random.key(seed), arch.num_layers)
    return models | {"layers": {name: layer(own, keys[int(name)]) for name, own in models["layers"].items()}}


def experts_dropped(model: InMemory, index: int) -> Descendant:
    """Returns the model with every second expert of each layer, and the columns of the router that belong to them."""
    E = model.arch.num_experts
    assert E is not None
    kept = np.arange(index % 2, E, 2)

    def leaf(name: str, weights: jax.Array) -> jax.Array:
        if "/mlp/" not in name:
            return weights
        return weights[:, kept] if "/router/" in name else weights[kept]

    arch = replace(model.arch, num_experts=len(kept), experts_per_token=1)
    return Descendant(InMemory(arch, map_named(leaf, model.params)))


def expert_as_mlp(model: InMemory, index: int) -> Descendant:
    """Returns the dense model whose MLPs are one expert of each layer."""
    E = model.arch.num_experts
    assert E is not None
    arch = replace(model.arch, family="mistral", num_experts=None, experts_per_token=None)

    def layer(own: Tree) -> Tree:
        experts = {name: leaves for name, leaves in own["mlp"].items() if name != "router"}
        return own | {"mlp": jax.tree.map(lambda weights: weights[index % E], experts)}

    layers = {name: layer(own) for name, own in model.params["layers"].items()}
    return Descendant(InMemory(arch, model.params | {"layers": layers}))


def experts_permuted(model: InMemory, index: int) -> Descendant:
    """Returns the model permuted, experts too, with one vector added to all columns of each router: same function."""

    def leaf(name: str, weights: jax.Array) -> jax.Array:
        if "/router/" not in name:
            return weights
        key = jax.random.fold_in(jax.random.key(index), int(name.split("/")[1]))
        return weights + jnp.std(weights) * jax.random.normal(key, (weights.shape[0], 1))

    after = disguise("permute")(model, index)
    return replace(after, model=InMemory(after.model.arch, map_named(leaf, after.model.params)))
