"""The tree of a family on the page of a zoo: a branch for each model, with its edge, and other parents."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracing_jax.error_messages import counted
from tracing_jax.report.formatting import cell, p_cell
from tracing_jax.zoo.report.contents import Contents
from tracing_jax.zoo.report.direction import Direction
from tracing_jax.zoo.report.families import EVIDENCE, UNITS, Edge, Lineage
from tracing_jax.zoo.report.heatmap import link

_BETWEEN = (
    "Related to models of each family above, which show no relation to one another: merged from them or from relatives "
    "of theirs, or both families descend from it and have moved too far apart for a test. tracing-jax merge finds "
    "the shares."
)


_NAMED_PAIRS = 3

_Joined = Mapping[str, list[tuple[str, Edge, Direction]]]


@dataclass
class Branch:
    """A model below the one it is attached to, with the edge between them; the root has none."""

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
    if contents.not_compared[i]:
        text = f"{_not_compared(i, contents)} {text}".strip()
    return {"title": title, "text": text, "root": branches(root(tree, estimates), joined), "origins": origins}


def _not_compared(i: int, contents: Contents) -> str:
    """Returns what is not known of a family of which some pairs were not compared."""
    asked = {frozenset(row.models) for row in contents.rows}
    left = (pair for pair in itertools.combinations(contents.families[i], 2) if frozenset(pair) not in asked)
    named = ", ".join(f"{one} and {other}" for one, other in itertools.islice(left, _NAMED_PAIRS))
    more = f", and {count:,} more" if (count := contents.not_compared[i] - _NAMED_PAIRS) > 0 else ""
    remedy = "; --candidates=all compares all" if contents.proposal is not None else ""
    return (
        f"{not_compared(i, contents)} ({named}{more}{remedy}). Models that are related only through a third one may be "
        "unrelated to each other: it may be merged from both."
    )


def not_compared(i: int, contents: Contents) -> str:
    """Returns `4 of its 10 pairs were not compared`; nothing if all were asked for."""
    pairs = math.comb(len(contents.families[i]), 2)
    count = contents.not_compared[i]
    verb = "was" if count == 1 else "were"
    return f"{count:,} of its {counted(pairs, 'pair', 'pairs')} {verb} not compared" if count else ""


def root(tree: Lineage, estimates: Sequence[Direction]) -> str:
    """Returns the model from which most estimates point away; of several, the one with most edges, then by name."""
    below = {estimate.child for estimate in estimates if estimate.child is not None}
    edges = {name: sum(name in edge.row.models for edge in tree.edges) for name in tree.models}
    parents = {name: sum(estimate.parent == name for estimate in estimates) for name in tree.models}
    return min(tree.models, key=lambda name: (name in below, parents[name] == 0, -edges[name], name))


def branches(name: str, joined: _Joined, above: str | None = None) -> Branch:
    """Returns the branch of a model with everything that is attached to it; the largest number of relatives first."""
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
