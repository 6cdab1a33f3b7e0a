"""Models with parents in two families: related to both, where no pair across the families shows a relation.

Connected components would make one family of two unrelated trees and a model that was merged from both.
"""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tracing_jax.zoo.report.families import families
from tracing_jax.zoo.report.pair_rows import PairRow

BETWEEN = 1.2
"""A merge in weights is between its parents: its distances to them add up to theirs, times at most this.

They add up to it exactly if nothing was trained afterwards. The distances of an ancestor to two descendants that moved
apart independently add up to 1.4 times theirs.
"""

_LEAST_SHARE = 0.1  # of the way: nearer to a parent, a model may as well be its fine-tune

_Parts = tuple[tuple[str, ...], ...]
_Rows = Mapping[frozenset[str], PairRow]


@dataclass(frozen=True)
class Merged:
    """Relatives of one another that are related to members of the same several families.

    Attributes:
      members: the models, sorted.
      origins: the families to which each of them is related, each sorted.
    """

    members: tuple[str, ...]
    origins: tuple[tuple[str, ...], ...]


def without_merged(models: Iterable[str], rows: Sequence[PairRow]) -> tuple[list[tuple[str, ...]], list[Merged]]:
    """Returns the families, a model of none as a family of one, and the models that are related to two families.

    A model may be related to two families if two of its relatives show no relation to each other, by a test that is
    invariant under every rewrite. Without all such models the others fall into parts. One of these models is between
    parts if it is related to two or more, of which no finished pair across them is anything but `no evidence`, and if
    its weights lie between theirs; where it has another shape than both, so that there is no distance, if such models
    are no more than the smallest part has. Otherwise a relation that no test detected is the likelier reason, and it
    stays in the family of its relatives.

    Args:
      models: names.
      rows: of the zoo, with verdicts.
    """
    names = sorted(models)
    by_models = {frozenset(row.models): row for row in rows}
    relatives: dict[str, set[str]] = {name: set() for name in names}
    for row in rows:
        if row.is_related:
            relatives[row.base].add(row.ft)
            relatives[row.ft].add(row.base)
    doubtful = {name for name in names if _has_unrelated(relatives[name], by_models)}
    parts = _families(names, doubtful, rows)
    between: dict[str, _Parts] = {}
    for name in sorted(doubtful):
        touched = tuple(part for part in parts if relatives[name] & {*part})
        if len(touched) > 1 and _are_unrelated(touched, rows):
            between[name] = touched
    between = {
        name: found for name, found in between.items() if _is_between(name, found, between, relatives, by_models)
    }
    while True:  # parts may have been joined by those of the doubtful that stayed
        found = _families(names, between, rows)
        whole = {part: next(family for family in found if part[0] in family) for part in parts}
        origins = {name: tuple(dict.fromkeys(whole[part] for part in of)) for name, of in between.items()}
        if all(len(of) > 1 for of in origins.values()):
            break
        between = {name: of for name, of in between.items() if len(origins[name]) > 1}
    merged = []
    for of in dict.fromkeys(origins.values()):
        same = {name for name in origins if origins[name] == of}
        merged += [Merged(members, of) for members in _families(names, {*names} - same, rows)]
    return found, merged


def _families(names: Sequence[str], but: Collection[str], rows: Sequence[PairRow]) -> list[tuple[str, ...]]:
    kept = {name for name in names if name not in but}
    return families(kept, [row for row in rows if {*row.models} <= kept])


def _has_unrelated(relatives: Collection[str], rows: _Rows) -> bool:
    found = (rows.get(frozenset(pair)) for pair in itertools.combinations(relatives, 2))
    return any(row is not None and row.verdict == "no_evidence" for row in found)


def _are_unrelated(parts: _Parts, rows: Sequence[PairRow]) -> bool:
    """Returns whether pairs across any two parts were compared, and none shows more than no evidence."""
    part_of = {name: i for i, part in enumerate(parts) for name in part}
    across: dict[frozenset[int], set[str]] = {}
    for row in rows:
        if row.verdict is not None and {*row.models} <= part_of.keys():
            across.setdefault(frozenset(part_of[name] for name in row.models), set()).add(row.verdict)
    return all(across.get(frozenset(pair)) == {"no_evidence"} for pair in itertools.combinations(range(len(parts)), 2))


def _is_between(
    name: str, parts: _Parts, all_between: Mapping[str, _Parts], relatives: Mapping[str, set[str]], rows: _Rows
) -> bool:
    detours = [
        detour
        for one, other in itertools.combinations(parts, 2)
        for a, b in itertools.product(relatives[name] & {*one}, relatives[name] & {*other})
        if (detour := _detour(name, a, b, rows)) is not None
    ]
    if detours:
        return min(detours) <= BETWEEN
    related = [[rows.get(frozenset((name, other))) for other in relatives[name] & {*part}] for part in parts]
    if not all(any(map(_differ, found)) for found in related):
        return False
    return sum(found == parts for found in all_between.values()) <= min(map(len, parts))


def _differ(row: PairRow | None) -> bool:
    """Returns whether two models are known to have different shapes."""
    return row is not None and row.shapes[0] != row.shapes[1]


def _detour(name: str, a: str, b: str, rows: _Rows) -> float | None:
    """Returns how much longer the way from a to b is by this model; None where it is not known or too near to one."""
    found = [rows.get(frozenset(pair)) for pair in ((name, a), (name, b), (a, b))]
    to_a, to_b, direct = (row.l2 if row is not None else None for row in found)
    if to_a is None or to_b is None or not direct:
        return None
    return (to_a + to_b) / direct if min(to_a, to_b) >= _LEAST_SHARE * direct else float("inf")
