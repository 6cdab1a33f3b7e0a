"""Which of two relatives came first: an estimate from copies and how far each was trained, or none."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracing_jax.zoo.report.families import WEIGHTS, Edge, relatives_in_place
from tracing_jax.zoo.report.pair_rows import PairRow

FARTHEST = 0.4
"""Distance of two models' weights, in units of their own length, beyond which training determines no direction:
fine-tunes that were trained as long and as hard as their base are beyond, and arrows between such models were wrong."""

MEASURED = (
    "By training, 24 of 24 arrows were right (error at most 14 %, 95 %) between small models and their light and long "
    "fine-tunes; farther from the base than those, or at a distance that is not known, no arrow is drawn, nor by the "
    "shapes of models. Models whose ancestor is missing can be taken for parent and child."
)
"""How good the arrows are; `python -m benchmarks.directions`."""

ModelMeasures = Mapping[str, Mapping[str, Any] | None]
"""Model -> its `weight_measures`; None where that was not measured."""

_MATRICES = {"embed/embedding": "embedding", "head/lm_head": "head"}
_LEAST_PER_DISTANCE = 0.16
"""A fine-tune's directions shrink by at least so much, as a logarithm, per distance from its parent in its own length.

Siblings that were trained equally far differ by less. Measured: see docs/zoo.md.
"""
_LEAST = 1e-4
"""Where the distance is not known; rewriting and rounding move them by less."""


def trained_order(measures: ModelMeasures) -> dict[str, float]:
    """Returns how far each model's embedding and head are from initialisation, for the models where it was measured.

    Random matrices have all principal directions alike, and training concentrates them, in these two matrices without
    exception. Matrices of the layers, kurtosis and the gains of norms change either way, and are not used.
    """
    counted = {
        name: [d for kind in _MATRICES if (d := _effective_rank(found, kind))] for name, found in measures.items()
    }
    return {name: -sum(map(math.log, found)) / len(found) for name, found in counted.items() if found}


def further_trained(edge: Edge, measures: ModelMeasures) -> list[tuple[str, str]]:
    """Returns (model, ground) for the embedding and for the head: whose effective rank is lower."""
    found = []
    for kind, word in _MATRICES.items():
        one, other = (_effective_rank(measures.get(name), kind) for name in edge.row.models)
        if one and other and abs(math.log(one / other)) > _LEAST:
            (fewer, model), more = min(zip((one, other), edge.row.models, strict=True)), max(one, other)
            text = f"{word} of {model} is further from initialisation (effective rank {fewer:.4g}, not {more:.4g})"
            found.append((model, text))
    return found


def look_like_siblings(edge: Edge, measures: ModelMeasures) -> bool:
    """Returns whether two models are too equally far trained, for how far they are apart, to be parent and child."""
    lengths = [float(found["length"]) for name in edge.row.models if (found := measures.get(name))]
    moved = trained_order({name: measures.get(name) for name in edge.row.models})
    if edge.measure is not WEIGHTS or len(moved) < 2:
        return False
    distance = edge.value / (sum(lengths) / len(lengths))
    return abs(moved[edge.row.base] - moved[edge.row.ft]) < _LEAST_PER_DISTANCE * distance


def is_within_measured(edge: Edge, measures: ModelMeasures) -> bool:
    """Returns whether two models are as close, by their weights, as pairs on which directions were measured."""
    lengths = [float(found["length"]) for name in edge.row.models if (found := measures.get(name))]
    return bool(lengths) and edge.value <= FARTHEST * sum(lengths) / len(lengths)


def _effective_rank(measures: Mapping[str, Any] | None, kind: str) -> float | None:
    values = (measures or {}).get("matrices", {}).get(kind, {}).get("effective_rank")
    return float(values[0]) if values else None


@dataclass(frozen=True)
class Direction:
    """An estimate of which model of an edge was made from the other.

    Attributes:
      parent, child: the estimate; None where it is left open.
      grounds: the evidence for it, or why it is open.
    """

    parent: str | None
    child: str | None
    grounds: tuple[str, ...]


def directions(edges: Sequence[Edge], rows: Sequence[PairRow], measures: ModelMeasures) -> list[Direction]:
    """Returns the direction of every edge of a family's tree; a model gets one parent at most.

    Args:
      edges: of the tree.
      rows: the related pairs of the family.
      measures: model -> what its weights look like, where that was measured.
    """
    return _one_parent_each(edges, [direction(edge, rows, measures) for edge in edges])


def direction(edge: Edge, rows: Sequence[PairRow], measures: ModelMeasures) -> Direction:
    """Returns the direction of one edge, by copies of one function, else by training where that was measured.

    Shapes give none: a model with fewer layers, units or tokens may be pruned, or the other grown. They are said.
    """
    row = edge.row
    if edge.same_function:
        return _of_copies(row, rows)
    shapes = _shapes(row)
    if shapes:
        return Direction(None, None, shapes)
    missing = [name for name in row.models if measures.get(name) is None]
    if missing:
        return Direction(None, None, (f"the weights of {' and '.join(missing)} were not measured",))
    if edge.measure is not WEIGHTS:
        return Direction(None, None, ("the distance of their weights is not known; without it training gives none",))
    if not is_within_measured(edge, measures):
        return Direction(None, None, ("so far apart that their training does not determine the direction",))
    grounds = [] if look_like_siblings(edge, measures) else further_trained(edge, measures)
    children, texts = {child for child, _ in grounds}, tuple(text for _, text in grounds)
    if len(children) == 1:
        (child,) = children
        return Direction(row.other(child), child, texts)
    if children:
        return Direction(None, None, ("the grounds contradict each other", *texts))
    return Direction(None, None, ("equally far from initialisation, for how far they are apart; they may be siblings",))


def _of_copies(row: PairRow, rows: Sequence[PairRow]) -> Direction:
    """The copy is the one whose units are not in the order that the relatives of both have."""
    related = {name: relatives_in_place(name, rows, {*row.models}) for name in row.models}
    with_related = [name for name in row.models if related[name]]
    if len(with_related) != 1:
        return Direction(None, None, ("both compute the same function, and original and copy cannot be distinguished",))
    (parent,) = with_related
    child = row.other(parent)
    text = f"same function; {parent} has its units in the order of {', '.join(related[parent])}, {child} has not"
    return Direction(parent, child, (text,))


def _shapes(row: PairRow) -> tuple[str, ...]:
    """Returns how the shapes of two models differ: in layers, else MLP units, and tokens."""
    base, ft = row.shapes
    if not base or not ft:
        return ()
    found = []
    if base["num_layers"] != ft["num_layers"]:
        found.append(_depths(row))
    elif base["mlp_dim"] != ft["mlp_dim"]:
        found.append(_fewer(row, "mlp_dim", "MLP units", "pruned, or the other widened"))
    if base["vocab_size"] != ft["vocab_size"]:
        found.append(_fewer(row, "vocab_size", "tokens", "trimmed, or tokens were added to the other"))
    return tuple(found)


def _fewer(row: PairRow, size: str, what: str, meaning: str) -> str:
    few, many = sorted(zip((shape[size] for shape in row.shapes), row.models, strict=True))
    return f"{few[1]} has {few[0]:,} of {many[1]}'s {many[0]:,} {what}: {meaning}"


def _depths(row: PairRow) -> str:
    shallow, deep = sorted(zip((shape["num_layers"] for shape in row.shapes), row.models, strict=True))
    layer_map = row.layer_map
    if layer_map and layer_map.get("copies"):
        return f"{deep[1]} has layers of {shallow[1]} more than once"
    if layer_map and len(layer_map["pairs"]) == shallow[0]:
        return (
            f"all {shallow[0]} layers of {shallow[1]} are among the {deep[0]} of {deep[1]}: pruned, or the other grown"
        )
    return f"{shallow[1]} has {shallow[0]} layers, {deep[1]} has {deep[0]}"


def _one_parent_each(edges: Sequence[Edge], found: Sequence[Direction]) -> list[Direction]:
    """Keeps of several parents of one model the closest; the other edges are open, with that reason."""
    closest: dict[str, int] = {}
    for i in sorted(
        range(len(edges)), key=lambda i: (not edges[i].same_function, edges[i].row.jsd or 0.0, edges[i].row.pair)
    ):
        if (child := found[i].child) is not None:
            closest.setdefault(child, i)
    return [
        d
        if d.child is None or closest[d.child] == i
        else Direction(None, None, (*d.grounds, f"but {d.child} has a closer parent, {found[closest[d.child]].parent}"))
        for i, d in enumerate(found)
    ]
