"""The contents of a zoo's report as plain values, from which the page, the CSV and the JSON are written."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from tracing_jax.statistics.verdict import VerdictName
from tracing_jax.zoo.folder import STATES, ZooFolder
from tracing_jax.zoo.plan import Proposal, ZooPlan
from tracing_jax.zoo.report.direction import Direction, ModelMeasures, directions, trained_order
from tracing_jax.zoo.report.families import Edge, Lineage, closest, clustered, lineage
from tracing_jax.zoo.report.merged import Merged, without_merged
from tracing_jax.zoo.report.pair_rows import PairRow, Uniformity, read_rows, uniformity
from tracing_jax.zoo.weights import read_model_measures

REPORT_FORMAT = 1
VERDICTS: tuple[VerdictName, ...] = ("identical", "related", "undecided", "no_evidence", "not_testable", "not_asked")


@dataclass(frozen=True)
class Disagreement:
    """A kind of disagreement (`verdict`, `edge` or `direction`), the pair, what was found and what the list states."""

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
        if row.known is not None and row.verdict is not None and row.is_related != row.known
    ]
    if parents is None:
        return lines
    for tree, estimates in zip(lineages, found, strict=True):
        for edge, estimate in zip(tree.edges, estimates, strict=True):
            lines += _of_edge(edge.row, estimate, parents)
    return lines


def missed_edges(edges: Iterable[Edge], parents: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Returns (parent, child) of the list's tree that are none of the edges that are drawn."""
    drawn = {frozenset(edge.row.models) for edge in edges}
    return [(up, name) for name, up in parents.items() if up is not None and frozenset((up, name)) not in drawn]


def _of_edge(row: PairRow, estimate: Direction, parents: Mapping[str, str | None]) -> list[Disagreement]:
    base, ft = row.models
    known = next((pair for pair in ((base, ft), (ft, base)) if parents.get(pair[1]) == pair[0]), None)
    if known is None:
        if row.known is False:
            return []  # the verdict is listed already
        return [Disagreement("edge", row.pair, "closest relatives", _kinship(base, ft, parents))]
    if estimate.child is not None and estimate.child != known[1]:
        found = f"{estimate.parent} → {estimate.child}"
        return [Disagreement("direction", row.pair, found, f"{known[0]} → {known[1]}")]
    return []


def _kinship(one: str, other: str, parents: Mapping[str, str | None]) -> str:
    up, down = parents.get(one), parents.get(other)
    if up is not None and up == down:
        return f"siblings, both made from {up}"
    return f"not made one from the other ({one} from {up or 'scratch'}, {other} from {down or 'scratch'})"


@dataclass(frozen=True)
class Contents:
    """A report; models have their short names.

    Attributes:
      ids: short name -> model id.
      parents: short name -> the model it was made from, where the list of models has it.
      rows: a row for each pair, strongest evidence first, then those that are not done.
      components: the families, those of merged models after the others, and after them the models that are in none.
      merged: the families of models that are related to several families, which are not related to one another.
      origins: of each of these families, the closest pair with each family that it is related to.
      order: all models, as the heatmap shows them.
      lineages, directions: of each family, the tree of closest relatives and the direction of each of its edges.
      measured: the models whose weights were measured.
      left_out: models of the list that could not be read, by their ids -> why.
      proposal: how the pairs that were compared were chosen from those of the list; None: they are all of them.
    """

    ids: Mapping[str, str]
    parents: Mapping[str, str | None] | None
    rows: Sequence[PairRow]
    components: Sequence[tuple[str, ...]]
    order: Sequence[str]
    lineages: Sequence[Lineage]
    directions: Sequence[Sequence[Direction]]
    uniformity: Uniformity
    measured: Sequence[str]
    left_out: Mapping[str, str] = field(default_factory=dict)
    merged: Sequence[Merged] = ()
    origins: Sequence[Sequence[Edge]] = ()
    proposal: Proposal | None = None

    @cached_property
    def families(self) -> list[tuple[str, ...]]:
        """The families: two models or more, or one that was merged from several families."""
        merged = {found.members for found in self.merged}
        return [members for members in self.components if len(members) > 1 or members in merged]

    @cached_property
    def alone(self) -> list[str]:
        """The models that are in no family."""
        return [members[0] for members in self.components if members not in self.families]

    @cached_property
    def not_compared(self) -> list[int]:
        """Of each family, how many pairs of its members were not asked for or were left out."""
        at = {name: i for i, members in enumerate(self.families) for name in members}
        asked = {frozenset(row.models) for row in self.rows if at.get(row.base, -1) == at.get(row.ft)}
        counted = Counter(at[next(iter(pair))] for pair in asked)
        return [math.comb(len(members), 2) - counted[i] for i, members in enumerate(self.families)]

    @cached_property
    def states(self) -> dict[str, int]:
        """The number of pairs in each state."""
        counted = Counter(row.state for row in self.rows)
        return {state: counted[state] for state in STATES}

    @cached_property
    def verdicts(self) -> dict[str, int]:
        """How many of the pairs that are done have which verdict."""
        counted = Counter(row.verdict for row in self.rows if row.verdict is not None)
        return {word: counted[word] for word in VERDICTS}

    @cached_property
    def disagreements(self) -> list[Disagreement]:
        """Where the report contradicts the tree of the list of models."""
        return disagreements(self.rows, self.lineages, self.directions, self.parents)

    @cached_property
    def missed(self) -> list[tuple[str, str]]:
        """Edges, parent before child, of the known tree that the report does not draw."""
        if self.parents is None:
            return []
        edges = [edge for tree in self.lineages for edge in tree.edges]
        return missed_edges([*edges, *(edge for found in self.origins for edge in found)], self.parents)

    @cached_property
    def origins_of(self) -> Mapping[tuple[str, ...], Sequence[Edge]]:
        """Members of a family of merged models -> its closest pair with each family that it is related to."""
        return {found.members: edges for found, edges in zip(self.merged, self.origins, strict=True)}

    def family_of(self, name: str) -> int | None:
        """Returns the number of the family that a model is in, from 1; None if it is in none."""
        return next((i + 1 for i, members in enumerate(self.families) if name in members), None)

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain data."""
        return {
            "format": REPORT_FORMAT,
            "models": [{"name": name, "id": self.ids[name], "family": self.family_of(name)} for name in self.order],
            "states": self.states,
            "verdicts": self.verdicts,
            "families": [self._family_dict(i) for i in range(len(self.families))],
            "alone": self.alone,
            "left_out": [{"id": model, "why": why} for model, why in self.left_out.items()],
            "proposal": None if self.proposal is None else asdict(self.proposal),
            "disagreements": [asdict(line) for line in self.disagreements],
            "missed_edges": [{"parent": parent, "child": child} for parent, child in self.missed],
            "no_evidence_p": asdict(self.uniformity),
            "pairs": [pair_dict(row) for row in self.rows],
        }

    def _family_dict(self, i: int) -> dict[str, Any]:
        tree = self.lineages[i]
        edges = [
            {"models": list(edge.row.models), "pair": edge.row.pair, "closeness": edge.measure.name,
             "value": edge.value, "same_function": edge.same_function,
             "parent": estimate.parent, "child": estimate.child, "grounds": list(estimate.grounds)}
            for edge, estimate in zip(tree.edges, self.directions[i], strict=True)
        ]  # fmt: skip
        origins = [
            {"models": list(edge.row.models), "pair": edge.row.pair, "closeness": edge.measure.name,
             "value": edge.value, "family": self.family_of(next(n for n in edge.row.models if n not in tree.models))}
            for edge in self.origins_of.get(tree.models, ())
        ]  # fmt: skip
        return {"family": i + 1, "models": list(self.families[i]), "edges": edges, "merged_from": origins,
                "not_compared": self.not_compared[i]}  # fmt: skip


def contents_of(folder: ZooFolder) -> Contents:
    """Returns the report of a zoo, as far as its pairs are done."""
    plan = folder.plan
    measures = {name: read_model_measures(folder.path, name) for name in plan.names.values()}
    return make_contents(plan, read_rows(folder), measures)


def make_contents(plan: ZooPlan, rows: Sequence[PairRow], measures: ModelMeasures) -> Contents:
    """Returns the report of rows that are judged together; the plan's order changes nothing."""
    names = sorted(plan.names.values())
    rows = sorted(rows, key=_evidence)
    trees, merged = without_merged(names, rows)
    families = [*(members for members in trees if len(members) > 1), *(found.members for found in merged)]
    components = [*families, *(members for members in trees if len(members) == 1)]
    trained = trained_order(measures)
    lineages = [lineage(members, rows, trained) for members in families]
    related = [row for row in rows if row.is_related]
    return Contents(
        ids={name: model for model, name in plan.names.items()},
        parents=_by_short_name(plan),
        rows=rows,
        components=components,
        order=clustered(components, rows),
        lineages=lineages,
        directions=[directions(tree.edges, _within(tree, related), measures) for tree in lineages],
        uniformity=uniformity(rows, plan.proposal is not None and plan.proposal.left_out > 0),
        measured=[name for name in names if measures.get(name) is not None],
        left_out=plan.left_out,
        merged=merged,
        origins=[_origins(found, related) for found in merged],
        proposal=plan.proposal,
    )


def _origins(found: Merged, related: Sequence[PairRow]) -> list[Edge]:
    """Returns the closest pair of merged models with each of the families that they are related to."""
    pairs = [[row for row in related if _joins(row, found.members, family)] for family in found.origins]
    return [edge for rows in pairs if (edge := closest(rows)) is not None]


def _joins(row: PairRow, members: Sequence[str], family: Sequence[str]) -> bool:
    return (row.base in members and row.ft in family) or (row.ft in members and row.base in family)


def pair_dict(row: PairRow) -> dict[str, Any]:
    """Returns one pair as plain data, in the order of the CSV's columns."""
    return {
        "pair": row.pair, "base": row.base, "ft": row.ft, "state": row.state, "verdict": row.verdict,
        "log10_p": row.log10_p, "adjusted_log10_p": row.adjusted_log10_p, "statistic": row.statistic,
        "jsd_nats_per_token": row.jsd, "l2": row.l2, "units_share": row.units, "in_place_log10_p": row.in_place_log10_p,
        "parts": row.parts, "known_related": row.known, "error": row.error,
    }  # fmt: skip


def _evidence(row: PairRow) -> tuple[int, float, float, str]:
    done = row.state == "done"
    log10_p = row.log10_p if row.log10_p is not None else 1.0
    return (0 if done else 1, log10_p, row.jsd if row.jsd is not None else 1.0, "--".join(sorted(row.models)))


def _within(tree: Lineage, rows: Sequence[PairRow]) -> list[PairRow]:
    members = {*tree.models}
    return [row for row in rows if {*row.models} <= members]


def _by_short_name(plan: ZooPlan) -> dict[str, str | None] | None:
    if plan.parents is None:
        return None
    return {plan.names[m]: None if parent is None else plan.names[parent] for m, parent in plan.parents.items()}
