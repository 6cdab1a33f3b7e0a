"""Which of two relatives came first? An estimate with its grounds, or none."""

from collections.abc import Sequence
from dataclasses import dataclass

from tracing_jax.zoo.report.lineage import Edge, kin_in_place
from tracing_jax.zoo.report.rows import PairRow
from tracing_jax.zoo.report.trained import Facts, further_trained, look_like_siblings


@dataclass(frozen=True)
class Direction:
    """An estimate of which model of an edge was made from the other.

    Attributes:
      parent, child: the estimate; None where it is left open.
      grounds: what speaks for it, or why it is open.
    """

    parent: str | None
    child: str | None
    grounds: tuple[str, ...]


def directions(edges: Sequence[Edge], rows: Sequence[PairRow], facts: Facts) -> list[Direction]:
    """Returns the direction of every edge of a family's tree; a model gets one parent at most.

    Args:
      edges: of the tree.
      rows: the related pairs of the family.
      facts: model -> what its weights look like, where that was measured.
    """
    return _one_parent_each(edges, [direction(edge, rows, facts) for edge in edges])


def direction(edge: Edge, rows: Sequence[PairRow], facts: Facts) -> Direction:
    """Returns the direction of one edge, by the grounds that tell most: copies, shapes, then weights.

    Where grounds of one rank contradict each other, the direction is open.
    """
    row = edge.row
    if edge.same_function:
        return _of_copies(row, rows)
    for grounds in (_from_shapes(row), [] if look_like_siblings(edge, facts) else further_trained(edge, facts)):
        children = {child for child, _ in grounds}
        texts = tuple(text for _, text in grounds)
        if len(children) == 1:
            (child,) = children
            return Direction(row.other(child), child, texts)
        if children:
            return Direction(None, None, ("the grounds contradict each other", *texts))
    missing = [name for name in row.models if facts.get(name) is None]
    if missing:
        return Direction(None, None, (f"no facts on the weights of {' and '.join(missing)} were measured",))
    return Direction(None, None, ("equally far from initialisation, for how far they are apart; they may be siblings",))


def _of_copies(row: PairRow, rows: Sequence[PairRow]) -> Direction:
    """The copy is the one whose units do not stand where the relatives of both have theirs."""
    kin = {name: kin_in_place(name, rows, {*row.models}) for name in row.models}
    with_kin = [name for name in row.models if kin[name]]
    if len(with_kin) != 1:
        return Direction(None, None, ("both compute the same function, and nothing tells original from copy",))
    (parent,) = with_kin
    child = row.other(parent)
    text = f"same function; the units of {parent} stand where those of {', '.join(kin[parent])} do, {child}'s do not"
    return Direction(parent, child, (text,))


def _from_shapes(row: PairRow) -> list[tuple[str, str]]:
    """Returns (child, ground) for each sign in the shapes: pruned or copied layers, pruned units, added tokens."""
    base, ft = row.shapes
    if not base or not ft:
        return []
    found = []
    if base["num_layers"] != ft["num_layers"]:
        found += _from_depths(row)
    elif base["mlp_dim"] != ft["mlp_dim"]:
        small, large = sorted(zip((base["mlp_dim"], ft["mlp_dim"]), row.models, strict=True))
        found.append((small[1], f"{small[1]} has {small[0]:,} of {large[1]}'s {large[0]:,} MLP units: pruned"))
    if not found and base["vocab_size"] != ft["vocab_size"]:
        small, large = sorted(zip((base["vocab_size"], ft["vocab_size"]), row.models, strict=True))
        found.append((large[1], f"{large[1]} has {large[0] - small[0]:,} tokens more: added"))
    return found


def _from_depths(row: PairRow) -> list[tuple[str, str]]:
    layer_map = row.layer_map
    if layer_map is None:
        return []
    depths = [shape["num_layers"] for shape in row.shapes]
    shallow, deep = sorted(zip(depths, row.models, strict=True))
    if len(layer_map["pairs"]) < shallow[0]:
        return []
    if layer_map.get("copies"):
        return [(deep[1], f"{deep[1]} has layers of {shallow[1]} more than once")]
    text = f"all {shallow[0]} layers of {shallow[1]} are among the {deep[0]} of {deep[1]}: pruned"
    return [(shallow[1], text)]


def _one_parent_each(edges: Sequence[Edge], found: Sequence[Direction]) -> list[Direction]:
    """Keeps of several parents of one model the closest; the other edges are open, and say so."""
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
