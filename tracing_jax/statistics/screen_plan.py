"""What `screen` looks at: as much as is useful, within a share of the weights of each model."""

import math
from dataclasses import dataclass

import numpy as np

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.statistics.constrained import row_problems
from tracing_jax.statistics.match import gate_problems
from tracing_jax.statistics.statistic import Vocabularies

_IN_PLACE = 0.25
"""Of what may be looked at, the share that the units in place get; sampled layers take the rest."""
_FEWEST_UNITS, _MOST_UNITS = 8, 512
_MATCH_UNITS, _LAYERS, _TOKENS = 512, 3, 2048
"""Of base's units in a layer, of layers (three give six pairs that do not correspond), and of shared tokens."""
_FEWEST_LAYERS = 2


@dataclass(frozen=True)
class Plan:
    """What is looked at.

    Attributes:
      units: so many MLP units of every layer, in a run; 0 for none.
      layers: the layers that are matched whole on ft's side, empty for none.
      match_units: so many units of base's are looked for in each of them.
      tokens: so many shared tokens.
      left_out: why a part is left out.
    """

    units: int
    layers: tuple[int, ...]
    match_units: int
    tokens: int
    left_out: tuple[str, ...]


def plan_within(share: float, base: Arch, ft: Arch, vocabularies: Vocabularies) -> Plan:
    """Returns what is looked at: at most `share` of the weights of either model."""
    room = min(share * parameters(arch) for arch in (base, ft))
    depth, embed = min(base.num_layers, ft.num_layers), max(base.embed_dim, ft.embed_dim)
    units, left_out = _units_in_place(share, room, base, ft)
    room -= units * depth * embed
    tokens, match_units = min(_TOKENS, len(vocabularies.ids_base)), min(_MATCH_UNITS, base.mlp_dim)
    lines = _match_problems(base, ft, tokens)
    count = 0
    if not lines:
        layer = max(_layer(base, match_units), _layer(ft, ft.mlp_dim))
        count = min(_LAYERS, depth, int((room - tokens * embed) / layer))
        if count < _FEWEST_LAYERS:
            lines, count = [f"{share:g} of the weights holds fewer than {_FEWEST_LAYERS} layers' MLPs"], 0
    layers = tuple(np.linspace(0, depth - 1, count).round().astype(int).tolist())
    left_out = [f"units in place: {line}" for line in left_out] + [f"sampled layers: {line}" for line in lines]
    return Plan(units, layers, match_units, tokens, tuple(left_out))


def parameters(arch: Arch) -> int:
    """Returns the number of weights of a model."""
    table = axis_table(arch)
    return sum(math.prod(table.sizes[axis or ""] for axis in row.axes) for row in table.leaves.values())


def _units_in_place(share: float, room: float, base: Arch, ft: Arch) -> tuple[int, list[str]]:
    """Returns how many units of each layer there is room for; 0, and why, if they are too few or do not compare."""
    if lines := row_problems(base, ft):
        return 0, lines
    depth, width = min(base.num_layers, ft.num_layers), min(base.mlp_dim, ft.mlp_dim)
    units = min(_MOST_UNITS, width, int(_IN_PLACE * room / (depth * base.embed_dim)))
    if units < _FEWEST_UNITS:
        return 0, [f"{share:g} of the weights holds fewer than {_FEWEST_UNITS} units a layer"]
    return units, []


def _layer(arch: Arch, units: int) -> int:
    """Returns the weights that gate and up activations of so many units of a layer take, with biases and the norm's."""
    return 2 * units * (arch.embed_dim + 1) + 2 * arch.embed_dim


def _match_problems(base: Arch, ft: Arch, tokens: int) -> list[str]:
    lines = gate_problems(base, ft)
    if base.num_layers != ft.num_layers:
        lines.append(f"different depth ({base.num_layers} and {ft.num_layers} layers): see match_all")
    if tokens < 2:
        lines.append("the vocabularies share no tokens whose embeddings could be compared")
    return lines
