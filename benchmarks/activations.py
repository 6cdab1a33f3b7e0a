"""What the MLP units of every model of a zoo compute on one text, ready to be correlated with those of any other.

Letters: S models, L layers, n tokens, F units, D embed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.models import apply_block, apply_embed, apply_mlp, layer_inputs
from tracing_jax.statistics.match import TAPS
from tracing_jax.tree import Tree


class Units(NamedTuple):
    """Gate and up activations of MLP units, centred over the tokens and of length 1: inner products correlate them."""

    gate: Float[Array, "S L n F"]
    up: Float[Array, "S L n F"]


@functools.partial(jax.jit, static_argnames="arch")
def forward_units(arch: Arch, models: Tree, tokens: Int[Array, "N T"], at: Int[Array, " n"]) -> Units:
    """Returns the units of all models, stacked, on their own forward inputs at these positions of the text.

    Args:
      arch: the facts of all models.
      models: params with a leading axis S.
      tokens: blocks of text.
      at: the positions to keep, counted through all blocks.
    """

    def one(model: Tree) -> Units:
        x, layers = apply_embed(arch, model["embed"], tokens, jnp.float32), []
        for i in range(arch.num_layers):
            x, found, _ = apply_block(arch, model["layers"][str(i)], x, layer_inputs(arch, i), taps=TAPS)
            layers.append(found)
        return _units(layers, at)

    return jax.lax.map(one, models)


@functools.partial(jax.jit, static_argnames="arch")
def weight_units(arch: Arch, models: Tree) -> Units:
    """Returns the units of all models when each MLP is handed the embeddings of all tokens: no forward pass."""

    def one(model: Tree) -> Units:
        x = apply_embed(arch, model["embed"], jnp.arange(arch.vocab_size)[None], jnp.float32)
        layers = [model["layers"][str(i)] for i in range(arch.num_layers)]
        return _units([apply_mlp(arch, layer, x, TAPS) for layer in layers], jnp.arange(arch.vocab_size))

    return jax.lax.map(one, models)


def _units(layers: list[dict[str, Array]], at: Int[Array, " n"]) -> Units:
    return Units(*(jnp.stack([_standard(found[tap], at) for found in layers]) for tap in TAPS))


def _standard(activations: Float[Array, "B T F"], at: Int[Array, " n"]) -> Float[Array, "n F"]:
    """Returns the units centred and scaled; one that never varies stays zero."""
    units = activations.reshape(-1, activations.shape[-1])[at]
    centred = units - units.mean(0)
    norms = jnp.linalg.norm(centred, axis=0)
    return centred / jnp.where(norms > 0, norms, 1)
