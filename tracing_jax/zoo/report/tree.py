"""The tree of a family as the page shows it: nested branches, from a root that most estimates point away from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracing_jax.report.formatting import cell
from tracing_jax.zoo.report.contents import Contents
from tracing_jax.zoo.report.direction import Direction
from tracing_jax.zoo.report.heatmap import link
from tracing_jax.zoo.report.lineage import Edge, Lineage

_Joined = Mapping[str, list[tuple[str, Edge, Direction]]]


@dataclass
class Branch:
    """A model below the one it hangs on, with the edge between them; the root has none."""

    name: str
    edge: Mapping[str, str] | None = None
    children: list["Branch"] = field(default_factory=list)


def family_part(i: int, contents: Contents) -> dict[str, Any]:
    """Returns what the template needs of a family: its title, how close its edges are measured, and its tree."""
    tree, ways = contents.lineages[i], contents.directions[i]
    joined: dict[str, list[tuple[str, Edge, Direction]]] = {name: [] for name in tree.models}
    for edge, way in zip(tree.edges, ways, strict=True):
        joined[edge.row.base].append((edge.row.ft, edge, way))
        joined[edge.row.ft].append((edge.row.base, edge, way))
    estimated = sum(way.child is not None for way in ways)
    text = f"Direction estimated for {estimated} of {len(ways)} edges."
    title = f"Family {i + 1}: {len(tree.models)} models"
    return {"title": title, "text": text, "root": branches(root(tree, ways), joined)}


def root(tree: Lineage, ways: Sequence[Direction]) -> str:
    """Returns the model from which most estimates point away; of several, the one with most edges, then by name."""
    below = {way.child for way in ways if way.child is not None}
    edges = {name: sum(name in edge.row.models for edge in tree.edges) for name in tree.models}
    parents = {name: sum(way.parent == name for way in ways) for name in tree.models}
    return min(tree.models, key=lambda name: (name in below, parents[name] == 0, -edges[name], name))


def branches(name: str, joined: _Joined, above: str | None = None) -> Branch:
    """Returns the branch of a model with everything that hangs on it; the largest number of relatives first."""
    found = Branch(name)
    for other, edge, way in sorted(joined[name], key=lambda item: item[0]):
        if other != above:
            child = branches(other, joined, name)
            child.edge = _edge(edge, way, other)
            found.children.append(child)
    return found


def _edge(edge: Edge, way: Direction, lower: str) -> dict[str, str]:
    grounds = "; ".join(way.grounds)
    if way.child is None:
        sign, kind, text = "–", "open", f"direction open: {grounds}"
    else:
        sign, kind = ("↳" if way.child == lower else "↰"), "estimate"
        text = f"estimate: {way.parent} → {way.child}; {grounds}"
    value = "same function" if edge.same_function else f"{edge.measure.name} {cell(float(f'{edge.value:.3g}'))}"
    return {"sign": sign, "kind": kind, "text": text, "value": value, "link": link(edge.row)}
