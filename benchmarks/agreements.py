"""The comparisons of `match` for all pairs of a zoo's models: layers of equal index, and layers that do not correspond.

Each model reads the text once. A pair then costs one product of matrices and two assignments a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from benchmarks.activations import Units
from tracing_jax.matching import live_units, match_units
from tracing_jax.statistics.calibration import control_pairs
from tracing_jax.statistics.comparison import Comparison, against_each_other

_FIELDS = 6  # of a Comparison


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
