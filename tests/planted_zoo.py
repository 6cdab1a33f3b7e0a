"""Zoos whose families are known: plans with records as a run writes them, cut to what a report reads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tracing_jax.record import plain, write_json
from tracing_jax.zoo import PairState, ZooFolder, ZooPlan, make_plan
from tracing_jax.zoo.plan import ModelList
from tracing_jax.zoo.report.pair_rows import PairRow, row_of, with_verdicts

SHAPE = {"num_layers": 4, "mlp_dim": 256, "vocab_size": 1000}


def plan_of(models: Sequence[str], parents: Mapping[str, str | None] | None = None) -> ZooPlan:
    """Returns a plan of every two of the models."""
    pairs = tuple((one, other) for i, one in enumerate(models) for other in models[i + 1 :])
    return make_plan(ModelList(tuple(models), pairs, parents), ConfigDict({"stat": "csu,match_all,jsd"}))


def record_of(
    log10_p: float | None,
    jsd: float | None = 0.3,
    units: float | None = None,
    csu: float | None = None,
    l2: float | None = None,
    shapes: tuple[Mapping[str, Any], Mapping[str, Any]] = (SHAPE, SHAPE),
) -> dict[str, Any]:
    """Returns the record of a pair: its p-value, and what is measured of how close the models are."""
    statistics: dict[str, Any] = {
        "jsd": {"headline": jsd, "log10_p": None},
        "match": {"headline": units, "log10_p": log10_p},
        "csu": {"headline": None, "log10_p": csu},
        "l2": {"headline": l2, "log10_p": None},
    }
    return {
        "args": {},
        "models": {side: {"shape": dict(shape)} for side, shape in zip(("base", "ft"), shapes)},
        "statistics": {name: {"non_aligned": result, "aligned": None} for name, result in statistics.items()},
        "verdict": {
            "adjusted_log10_p": log10_p, "firm_log10_p": log10_p, "statistic": "match", "level": 1e-3,
            "verdict": "not_testable" if log10_p is None else "undecided", "sees_all_rewrites": True,
        },
    }  # fmt: skip


def rows_of(plan: ZooPlan, records: Mapping[str, Mapping[str, Any] | PairState]) -> list[PairRow]:
    """Returns the judged rows of a plan whose pairs have these records or states, by name; the others are missing."""
    rows = []
    for pair in plan.pairs:
        found = records.get(pair.name, PairState("missing"))
        state, record = (found, None) if isinstance(found, PairState) else (PairState("done"), found)
        rows.append(row_of(pair, plan.names, state, record))
    return with_verdicts(rows)


def planted(sizes: Sequence[int], seed: int = 0, name: str = "model") -> tuple[ZooPlan, dict[str, dict[str, Any]]]:
    """Returns a zoo with families of these sizes, each a tree of fine-tunes, its names shuffled over the families.

    Relatives are the further apart, in the divergence of their predictions, the more edges lie between them.
    """
    random = np.random.default_rng(seed)
    order = [f"{name}-{i:03d}" for i in random.permutation(sum(sizes))]
    parents: dict[str, str | None] = {}
    for size in sizes:
        members, order = order[:size], order[size:]
        parents |= {m: members[random.integers(i)] if i else None for i, m in enumerate(members)}
    plan = plan_of(sorted(parents), parents)
    lengths = {m: 0.01 + 0.05 * random.random() for m in parents}
    records = {
        pair.name: _related(_steps(pair.base, pair.ft, parents), lengths, random)
        if pair.related
        # Nearly uniform: of many zoos one would have a pair below the level by chance.
        else record_of(float(np.log10(1.0 - 0.99 * random.random())), 0.4 + 0.2 * random.random())
        for pair in plan.pairs
    }
    return plan, records


def two_trees(distances, more=()):
    """Records of a, a1 and b, b1, two unrelated trees, and of `merge`, related to all four; l2 by pair of families."""
    tree = dict.fromkeys(("a", "a1"), "a") | dict.fromkeys(("b", "b1"), "b") | dict.fromkeys(("merge", *more), "ab")
    plan = plan_of(list(tree))
    records = {}
    for pair in plan.pairs:
        kinds = tuple(sorted((tree[pair.base], tree[pair.ft])))
        related = bool({*kinds[0]} & {*kinds[1]})
        records[pair.name] = record_of(-50.0 if related else -0.2, csu=-50.0, l2=distances.get(kinds, 0.1))
    return plan, records


def write_zoo(folder: Path, plan: ZooPlan, records: Mapping[str, Mapping[str, Any] | PairState]) -> ZooFolder:
    """Writes the plan and the records as finished, failed or missing pairs, as workers do."""
    (folder / "pairs").mkdir(parents=True)
    plan.write(folder)
    zoo = ZooFolder(folder)
    for pair in plan.pairs:
        found = records.get(pair.name)
        if isinstance(found, PairState):
            zoo.failed(pair, found.error)
        elif found is not None:
            zoo.begin(pair, {})
            asked = plain({k: v for k, v in plan.options_of(pair, zoo.path).as_dict().items() if k != "save"})
            write_json(zoo.record_file(pair), {**found, "args": asked})
    return zoo


def _steps(one: str, other: str, parents: Mapping[str, str | None]) -> set[str]:
    """Returns the models whose edge to their parent lies on the way between two relatives."""
    return set(_line(one, parents)) ^ set(_line(other, parents))


def _line(name: str | None, parents: Mapping[str, str | None]) -> list[str]:
    found = []
    while name is not None:
        found.append(name)
        name = parents[name]
    return found


def _related(steps: set[str], lengths: Mapping[str, float], random: np.random.Generator) -> dict[str, Any]:
    jsd = sum(lengths[step] for step in steps)
    return record_of(-20.0 - 400.0 * random.random(), jsd, units=1.0 - 0.1 * len(steps), csu=-50.0)
