"""What the MLP units of every model of a zoo compute on one text, ready to be correlated with those of any other.

Letters: S models, L layers, n tokens, F units.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.models import apply_block_with_taps, apply_embed, layer_inputs
from tracing_jax.tree import Tree


class Units(NamedTuple):
    """Gate and up activations of MLP units, centred over the tokens and of length 1: inner products correlate them."""

    gate: Float[np.ndarray, "S L n F"]
    up: Float[np.ndarray, "S L n F"]


def forward_units(arch: Arch, models: Tree, tokens: Int[np.ndarray, "N T"]) -> Units:
    """Returns the units of all models, stacked on the leading axis, on their own forward inputs for this text."""
    return Units(*(np.asarray(side) for side in _forward(arch, models, tokens)))


def weight_units(arch: Arch, models: Tree) -> Units:
    """Returns the units on the embedding rows, normalised and scaled by each layer's own gains: no forward pass."""
    return Units(*(np.asarray(side) for side in _from_embedding(arch, models)))


@functools.partial(jax.jit, static_argnames="arch")
def _forward(arch: Arch, models: Tree, tokens: Int[Array, "N T"]) -> tuple[jax.Array, jax.Array]:
    def one(model: Tree) -> tuple[jax.Array, jax.Array]:
        x, sides = apply_embed(arch, model["embed"], tokens, jnp.float32), []
        for i in range(arch.num_layers):
            layer = model["layers"][str(i)]
            x, found = apply_block_with_taps(arch, layer, x, *layer_inputs(arch, i), ("gate", "up"))
            sides.append([_standard(found[side].reshape(tokens.size, -1)) for side in ("gate", "up")])
        gate, up = zip(*sides)
        return jnp.stack(gate), jnp.stack(up)

    return jax.lax.map(one, models)


@functools.partial(jax.jit, static_argnames="arch")
def _from_embedding(arch: Arch, models: Tree) -> tuple[jax.Array, jax.Array]:
    def one(model: Tree) -> tuple[jax.Array, jax.Array]:
        rows = model["embed"]["embedding"]
        rows = rows * jax.lax.rsqrt(jnp.square(rows).mean(1, keepdims=True) + arch.norm_eps)
        layers = [model["layers"][str(i)] for i in range(arch.num_layers)]
        gate, up = (
            jnp.stack([
                _standard((rows * layer["mlp_norm"]["scale"]) @ layer["mlp"][side]["kernel"]) for layer in layers
            ])
            for side in ("gate_proj", "up_proj")
        )
        return gate, up

    return jax.lax.map(one, models)


def _standard(units: Float[Array, "n F"]) -> Float[Array, "n F"]:
    """Returns the units centred and scaled; one that never varies stays zero."""
    centred = units - units.mean(0)
    norms = jnp.linalg.norm(centred, axis=0)
    return centred / jnp.where(norms > 0, norms, 1)
