"""Where the report and the tree in the list of models disagree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tracing_jax.zoo.report.direction import Direction
from tracing_jax.zoo.report.lineage import Lineage
from tracing_jax.zoo.report.rows import PairRow


@dataclass(frozen=True)
class Disagreement:
    """A kind of disagreement (`verdict`, `edge` or `direction`), the pair, what was found and what the list says."""

    kind: str
    pair: str
    found: str
    known: str


def disagreements(
    rows: Sequence[PairRow],
    lineages: Sequence[Lineage],
    found: Sequence[Sequence[Direction]],
    parents: Mapping[str, str | None] | None,
) -> list[Disagreement]:
    """Returns every disagreement with what is known, by the models' short names; none where nothing is known."""
    lines = [
        Disagreement("verdict", row.pair, str(row.verdict), "related" if row.known else "no common ancestor")
        for row in rows
        if row.known is not None and row.verdict is not None and (row.verdict == "related") != row.known
    ]
    if parents is None:
        return lines
    for tree, ways in zip(lineages, found, strict=True):
        for edge, way in zip(tree.edges, ways, strict=True):
            lines += _of_edge(edge.row, way, parents)
    return lines


def missed_edges(lineages: Sequence[Lineage], parents: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Returns (parent, child) of the list's tree that are no edge of any tree of closest relatives."""
    drawn = {frozenset(edge.row.models) for tree in lineages for edge in tree.edges}
    return [(up, name) for name, up in parents.items() if up is not None and frozenset((up, name)) not in drawn]


def _of_edge(row: PairRow, way: Direction, parents: Mapping[str, str | None]) -> list[Disagreement]:
    base, ft = row.models
    known = next((pair for pair in ((base, ft), (ft, base)) if parents.get(pair[1]) == pair[0]), None)
    if known is None:
        if row.known is False:
            return []  # the verdict is listed already
        return [Disagreement("edge", row.pair, "closest relatives", _kinship(base, ft, parents))]
    if way.child is not None and way.child != known[1]:
        return [Disagreement("direction", row.pair, f"{way.parent} → {way.child}", f"{known[0]} → {known[1]}")]
    return []


def _kinship(one: str, other: str, parents: Mapping[str, str | None]) -> str:
    up, down = parents.get(one), parents.get(other)
    if up is not None and up == down:
        return f"siblings, both made from {up}"
    return f"not made one from the other ({one} from {up or 'scratch'}, {other} from {down or 'scratch'})"
