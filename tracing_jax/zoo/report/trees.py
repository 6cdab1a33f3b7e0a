"""The tree of a family on the page of a zoo: a branch for each model, with the edge it hangs on, and other parents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracing_jax.report.formatting import cell, p_cell
from tracing_jax.zoo.report.contents import Contents
from tracing_jax.zoo.report.direction import Direction
from tracing_jax.zoo.report.families import EVIDENCE, UNITS, Edge, Lineage
from tracing_jax.zoo.report.heatmap import link

_BETWEEN = (
    "Related to models of each family above, which show no relation to one another: merged from them or from relatives "
    "of theirs, or both families descend from it and have moved too far apart to be told. tracing-jax merge finds "
    "the shares."
)


_Joined = Mapping[str, list[tuple[str, Edge, Direction]]]


@dataclass
class Branch:
    """A model below the one it hangs on, with the edge between them; the root has none."""

    name: str
    edge: Mapping[str, str] | None = None
    children: list["Branch"] = field(default_factory=list)


def family_part(i: int, contents: Contents) -> dict[str, Any]:
    """Returns what the template needs of a family: its title, how close its edges are measured, and its tree."""
    tree, estimates = contents.lineages[i], contents.directions[i]
    joined: dict[str, list[tuple[str, Edge, Direction]]] = {name: [] for name in tree.models}
    for edge, estimate in zip(tree.edges, estimates, strict=True):
        joined[edge.row.base].append((edge.row.ft, edge, estimate))
        joined[edge.row.ft].append((edge.row.base, edge, estimate))
    estimated = sum(estimate.child is not None for estimate in estimates)
    text = f"Direction estimated for {estimated} of {counted(len(estimates), 'edge', 'edges')}." if estimates else ""
    origins = [_origin(edge, number, tree.models) for edge, number in _origins(contents, tree.models)]
    title = f"Family {i + 1}: {counted(len(tree.models), 'model', 'models')}" + merged_from(contents, tree.models)
    if origins:
        text = f"{_BETWEEN} {text}".strip()
    return {"title": title, "text": text, "root": branches(root(tree, estimates), joined), "origins": origins}


def root(tree: Lineage, estimates: Sequence[Direction]) -> str:
    """Returns the model from which most estimates point away; of several, the one with most edges, then by name."""
    below = {estimate.child for estimate in estimates if estimate.child is not None}
    edges = {name: sum(name in edge.row.models for edge in tree.edges) for name in tree.models}
    parents = {name: sum(estimate.parent == name for estimate in estimates) for name in tree.models}
    return min(tree.models, key=lambda name: (name in below, parents[name] == 0, -edges[name], name))


def branches(name: str, joined: _Joined, above: str | None = None) -> Branch:
    """Returns the branch of a model with everything that hangs on it; the largest number of relatives first."""
    found = Branch(name)
    for other, edge, estimate in sorted(joined[name], key=lambda item: item[0]):
        if other != above:
            child = branches(other, joined, name)
            child.edge = _edge(edge, estimate, other)
            found.children.append(child)
    return found


def _edge(edge: Edge, estimate: Direction, lower: str) -> dict[str, str]:
    grounds = "; ".join(estimate.grounds)
    upper = edge.row.other(lower)
    if estimate.child is None:
        sign, kind, text = "–", "open", f"{upper} – {lower}, direction open: {grounds}"
    else:
        sign, kind = ("↳" if estimate.child == lower else "↰"), "estimate"
        text = f"{estimate.parent} → {estimate.child}, an estimate: {grounds}"
    return {"sign": sign, "kind": kind, "text": text, "value": _closeness(edge), "link": link(edge.row)}


def _closeness(edge: Edge) -> str:
    if edge.same_function:
        return "same function"
    if edge.measure is EVIDENCE:
        return f"p after Holm {p_cell(edge.row.shown_log10_ps[1])}"
    if edge.measure is UNITS:
        return f"{edge.value:.0%} of MLP units agree"
    return f"{edge.measure.name} {cell(float(f'{edge.value:.3g}'))}"


def _origin(edge: Edge, number: int | None, members: Sequence[str]) -> dict[str, str]:
    parent, child = sorted(edge.row.models, key=lambda name: name in members)
    family = f"family {number}" if number is not None else "in no other family"
    return {"parent": parent, "child": child, "family": family, "value": _closeness(edge), "link": link(edge.row)}


def merged_from(contents: Contents, members: tuple[str, ...]) -> str:
    """Returns `; merged from families 1 and 2` for merged models, else nothing."""
    numbers = [str(number) for _, number in _origins(contents, members)]
    return f"; merged from families {' and '.join(numbers)}" if numbers else ""


def _origins(contents: Contents, members: tuple[str, ...]) -> list[tuple[Edge, int | None]]:
    """Returns the closest pair with each family that merged models are related to, and the number of that family.

    None is a parent that is in no other family.
    """
    edges = contents.origins_of.get(members, ())
    return [(edge, contents.family_of(next(n for n in edge.row.models if n not in members))) for edge in edges]


def counted(number: int, one: str, many: str) -> str:
    """Returns a number with its noun: `1 family`, `3 families`."""
    return f"{number:,} {one if number == 1 else many}"
