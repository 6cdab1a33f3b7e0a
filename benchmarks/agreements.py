"""The comparisons of `match` for all pairs of a zoo's models: layers of equal index, and layers that do not correspond.

Each model reads the text once. A pair then costs one product of matrices and two assignments a layer.

Letters: S models, L layers, n tokens, F units, D embed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from tracing_jax.arch import Arch
from tracing_jax.matching import live_units, match_units
from tracing_jax.models import apply_block, apply_embed, apply_mlp, layer_inputs
from tracing_jax.statistics.calibration import control_pairs
from tracing_jax.statistics.comparison import Comparison, against_each_other
from tracing_jax.statistics.match import TAPS
from tracing_jax.tree import Tree

_FIELDS = 6  # of a Comparison


class Units(NamedTuple):
    """Gate and up activations of MLP units, centred over the tokens and of length 1: inner products correlate them."""

    gate: Float[Array, "S L n F"]
    up: Float[Array, "S L n F"]


@partial(jax.jit, static_argnames="arch")
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
            x, found, *_ = apply_block(arch, model["layers"][str(i)], x, layer_inputs(arch, i), taps=TAPS)
            layers.append(found)
        return _units(layers, at)

    return jax.lax.map(one, models)


@partial(jax.jit, static_argnames="arch")
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


@dataclass(frozen=True)
class Agreements:
    """What `match` compares for every pair of S models, i < j.

    Attributes:
      layers: the fields of the comparison of each layer with its counterpart, `[S, S, L, 6]`, symmetric.
      controls: those of layer pairs that do not correspond, `[S, S, C, 6]`.
    """

    layers: Float[np.ndarray, "S S L 6"]
    controls: Float[np.ndarray, "S S C 6"]

    def pair(self, i: int, j: int) -> tuple[list[Comparison], list[Comparison]]:
        """Returns the comparisons of a pair's layers and of its controls."""
        return [_comparison(row) for row in self.layers[i, j]], [_comparison(row) for row in self.controls[i, j]]

    @property
    def agreeing(self) -> Float[np.ndarray, "S S L"]:
        """Units that agree in each layer of each pair."""
        return self.layers[..., 3]

    @property
    def agreeing_controls(self) -> Float[np.ndarray, "S S"]:
        """Units that agree in layers that do not correspond, mean over these layer pairs."""
        return self.controls[..., 3].mean(-1)


def agreements(units: Units, description: str, *, seed: int) -> Agreements:
    """Returns the comparisons of all pairs of models."""
    S, L = units.gate.shape[:2]
    off = sorted(control_pairs(L, L, np.random.default_rng(seed)))
    places = [(i, i) for i in range(L)] + off
    found = {}
    with tqdm(total=S * (S - 1) // 2, desc=description, unit="pair", disable=None) as bar:
        for i in range(S):
            for j in range(i + 1, S):
                similarities = jax.device_get(_correlations(units, i, j, tuple(places)))
                rng = np.random.default_rng([seed, i, j])
                found[i, j] = [astuple(compare_units(gate, up, rng)) for gate, up in zip(*similarities)]
                bar.update()
    return comparison_table(found, L)


def comparison_table(found: Mapping[tuple[int, int], Sequence[tuple[float, ...]]], num_layers: int) -> Agreements:
    """Returns the comparisons of all pairs i < j, each given as fields: of its layers first, then of its controls."""
    S = 1 + max(j for _, j in found)
    table = np.zeros((S, S, len(next(iter(found.values()))), _FIELDS))
    for (i, j), rows in found.items():
        table[i, j] = table[j, i] = rows
    return Agreements(table[:, :, :num_layers], table[:, :, num_layers:])


@partial(jax.jit, static_argnames="places")
def _correlations(
    units: Units, i: int, j: int, places: tuple[tuple[int, int], ...]
) -> tuple[Float[Array, "P F F"], Float[Array, "P F F"]]:
    """Returns the correlations of i's units with j's at each pair of layers: of gates, and absolute ones of ups."""
    first, second = (jnp.array(layers) for layers in zip(*places))
    gate, up = (jnp.einsum("pnf,png->pfg", side[i][first], side[j][second], precision="highest") for side in units)
    return gate, jnp.abs(up)


def compare_units(gate: np.ndarray, up: np.ndarray, generator: np.random.Generator) -> Comparison:
    """Returns how far the matchings by these two similarities of units agree."""
    live = live_units(gate, up)
    streams = generator.spawn(2)
    return against_each_other(match_units(gate, streams[0], live), match_units(up, streams[1], live))


def _comparison(row: np.ndarray) -> Comparison:
    units, choices, r, agreeing, log_p_rank, log_p_agreement = row.tolist()
    return Comparison(int(units), int(choices), r, int(agreeing), log_p_rank, log_p_agreement)
