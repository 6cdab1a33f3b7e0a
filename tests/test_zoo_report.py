"""The report of a zoo: families, closest relatives and directions found exactly where they were planted; the page."""

import base64
import csv
import hashlib
import itertools
import json
import math
import re
from dataclasses import replace

import jax
import numpy as np
import planted_zoo as zoos
import pytest
import tiny
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from scipy.sparse.csgraph import minimum_spanning_tree

from tracing_jax.axes import PERMUTABLE, axis_table
from tracing_jax.rewrites import permute, random_permutations
from tracing_jax.sources import InMemory
from tracing_jax.statistics import Identity, Result, verdict
from tracing_jax.zoo import PairState, make_plan, weights
from tracing_jax.zoo.__main__ import main
from tracing_jax.zoo.plan import ModelList, Proposal
from tracing_jax.zoo.proposing import CLOSED_PER_MODEL, selected
from tracing_jax.zoo.report import html as page_of
from tracing_jax.zoo.report import make_contents, write_report, zoo_sentence
from tracing_jax.zoo.report.direction import direction, directions
from tracing_jax.zoo.report.families import WEIGHTS, Edge, clustered, families, lineage
from tracing_jax.zoo.report.pair_rows import PairRow, with_verdicts
from tracing_jax.zoo.weights import model_measures_file, read_model_measures, weight_measures, write_model_measures

SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=6).filter(lambda sizes: sum(sizes) > 1)


def contents(plan, records, measures=None):
    return make_contents(plan, zoos.rows_of(plan, records), measures or {})


def edges_of(found):
    inside = [edge for tree in found.lineages for edge in tree.edges]
    return {frozenset(edge.row.models) for edge in [*inside, *(edge for edges in found.origins for edge in edges)]}


def arrows_of(found):
    return {(way.parent, way.child) for ways in found.directions for way in ways if way.child is not None}


def united(models, links):
    """Returns the connected components, by joining sets until nothing changes."""
    groups = [{m} for m in models]
    for one, other in links:
        joined = [g for g in groups if one in g or other in g]
        groups = [g for g in groups if g not in joined] + [set().union(*joined)]
    return {frozenset(g) for g in groups}


# Families.


@pytest.mark.slow
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(
    st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=20)
)))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_families_are_the_connected_components(graph):
    n, links = graph
    names = [f"m{i}" for i in range(n)]
    plan = zoos.plan_of(names)
    wanted = {frozenset((names[i], names[j])) for i, j in links if i != j}
    records = {p.name: zoos.record_of(-200.0 if {p.base, p.ft} in wanted else -0.2) for p in plan.pairs}
    found = families(names, zoos.rows_of(plan, records))
    assert {frozenset(members) for members in found} == united(names, [tuple(link) for link in wanted])
    assert sorted(itertools.chain(*found)) == sorted(names)


@given(SIZES, st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_planted_families_come_back_and_stand_together_in_the_heatmap(sizes, seed):
    plan, records = zoos.planted(sizes, seed)
    rows = zoos.rows_of(plan, records)
    found = families(plan.names.values(), rows)
    assert [len(members) for members in found] == sorted(sizes, reverse=True)
    assert all(plan.by_name[row.pair].related == (row.verdict == "related") for row in rows)
    order = clustered(found, rows)
    assert sorted(order) == sorted(plan.names.values())
    for members in found:
        at = sorted(order.index(name) for name in members)
        assert at == list(range(at[0], at[0] + len(members)))


@pytest.mark.slow
@given(SIZES, st.integers(0, 1000), st.randoms())
@settings(deadline=None, max_examples=6)
def test_the_order_of_the_list_changes_nothing(sizes, seed, random):
    plan, records = zoos.planted(sizes, seed)
    models, pairs = list(plan.names), [(p.base, p.ft) for p in plan.pairs]
    random.shuffle(models)
    random.shuffle(pairs)
    turned = make_plan(ModelList(tuple(models), tuple(pairs), plan.parents), ConfigDict(dict(plan.config)))
    one, other = contents(plan, records).as_dict(), contents(turned, records).as_dict()
    assert one == other


# Holm.


def test_verdicts_are_by_holm_over_all_pairs_that_are_done():
    plan = zoos.plan_of([f"m{i}" for i in range(5)])
    p = [1e-5, 2e-4, 5e-3, 0.2, 0.4, 0.6, 0.8, 0.9]
    names = [pair.name for pair in plan.pairs]
    records = {name: zoos.record_of(math.log10(x)) for name, x in zip(names, p)}
    rows = zoos.rows_of(plan, records | {names[8]: PairState("failed", "ValueError: no")})
    expected, largest = [], 0.0
    for i, x in enumerate(p):
        largest = max(largest, min(1.0, (len(p) - i) * x))
        expected.append(largest)
    assert [10**row.adjusted_log10_p for row in rows[:8]] == pytest.approx(expected)
    assert [row.verdict for row in rows] == ["related", "undecided", "undecided", *["no_evidence"] * 5, None, None]
    assert [row.state for row in rows[8:]] == ["failed", "missing"]


def test_a_pair_without_a_test_that_applies_is_said_to_be_not_testable_and_adjusts_nobody():
    plan = zoos.plan_of(["a", "b", "c"])
    records = {"a--b": zoos.record_of(None), "a--c": zoos.record_of(-3.5)}
    rows = zoos.rows_of(plan, records)
    assert [row.verdict for row in rows] == ["not_testable", "related", None]
    assert rows[1].adjusted_log10_p == pytest.approx(-3.5)


def test_pairs_that_were_left_out_count_in_holm():
    plan = zoos.plan_of(["a", "b", "c"])
    rows = zoos.rows_of(plan, {"a--b": zoos.record_of(-5.0), "a--c": zoos.record_of(-0.1)})
    assert with_verdicts(rows, left_out=98)[0].adjusted_log10_p == pytest.approx(-3.0)
    assert [row.adjusted_log10_p for row in with_verdicts(rows)] == [row.adjusted_log10_p for row in rows]


# Models with parents in two families.


@pytest.mark.parametrize("more", [(), ("merge1",)])
def test_a_merge_has_a_parent_in_each_of_two_families_which_stay_apart(more):
    lies_between = {("a", "b"): 1.4, ("a", "ab"): 0.7, ("ab", "b"): 0.7}
    found = contents(*zoos.two_trees(lies_between, more))
    assert found.families == [("a", "a1"), ("b", "b1"), ("merge", *more)]
    assert [edges[0].row.other("merge") for edges in (found.origins[0][:1], found.origins[0][1:])] == ["a", "b"]
    data = found.as_dict()["families"][2]["merged_from"]
    assert [origin["family"] for origin in data] == [1, 2]
    page = page_of(found, "merged")
    assert "merged from families 1 and 2" in page
    assert found.order.index("merge") == 4


def test_a_relation_that_no_test_saw_makes_no_merge():
    """Distances to an ancestor add up to more, and one missed pair among many relatives is no sign of two families."""
    moved_apart = {("a", "b"): 1.4, ("a", "ab"): 1.0, ("ab", "b"): 1.0}
    assert contents(*zoos.two_trees(moved_apart)).families == [("a", "a1", "b", "b1", "merge")]
    assert len(contents(*zoos.two_trees({("a", "a"): None, ("ab", "b"): None})).families) == 1
    names = [f"m{i}" for i in range(6)]
    plan = zoos.plan_of(names)
    records = {pair.name: zoos.record_of(-0.2 if pair.name == "m0--m1" else -50.0) for pair in plan.pairs}
    assert contents(plan, records).families == [tuple(names)]


def test_a_merge_of_another_depth_than_its_parents_has_two():
    plan = zoos.plan_of(["a", "b", "deep"])
    deeper = (zoos.SHAPE, zoos.SHAPE | {"num_layers": 6})
    records = {name: zoos.record_of(-50.0, shapes=deeper) for name in ("a--deep", "b--deep")}
    found = contents(plan, records | {"a--b": zoos.record_of(-0.2)})
    assert found.families == [("deep",)]
    assert found.alone == ["a", "b"]
    assert edges_of(found) == {frozenset(("a", "deep")), frozenset(("b", "deep"))}


def test_a_zoo_says_of_a_pair_with_an_identical_part_what_its_record_says():
    result = Result(0.5, "x", -0.1, blind_to=())
    for equal, word in ((1, "undecided"), (0, "no_evidence")):
        identity = Identity(equal, 9, {"embedding": (equal, 1), "MLPs": (0, 8)})
        alone = verdict({"match": result}, 1e-3, identity)
        assert alone.verdict == word
        plan = zoos.plan_of(["a", "b"])
        (pair,) = plan.pairs
        record = zoos.record_of(-0.1) | {"verdict": json.loads(json.dumps(alone.as_dict()))}
        (row,) = zoos.rows_of(plan, {pair.name: record})
        assert row.verdict == word


def test_the_parts_of_related_pairs_are_judged_over_all_pairs_and_shown(tmp_path):
    """Of 10 pairs a part needs a tenth of the level; a pair that is not related has no parts."""
    models = ["a", "b", "c", "d", "e"]
    plan = zoos.plan_of(models)
    found = {"MLPs": ("related", -9.0), "attention": ("related", -3.5), "all parts": ("no_evidence", -0.2)}
    parts = {part: {"verdict": word, "log10_p": p, "statistics": ["match"]} for part, (word, p) in found.items()}
    parts["embedding"] = {"verdict": "identical", "statistics": []}
    records = {}
    for pair in plan.pairs:
        records[pair.name] = zoos.record_of(-9.0 if pair.name == "a--b" else -0.1)
        records[pair.name]["verdict"]["parts"] = parts
    folder = zoos.write_zoo(tmp_path / "zoo", plan, records)
    write_report(folder)
    words = "MLPs related, attention undecided, all parts no evidence, embedding identical"
    data = {row["pair"]: row["parts"] for row in json.loads((folder.path / "report.json").read_text())["pairs"]}
    assert data["a--b"]["MLPs"] == {"verdict": "related", "log10_p": -8.0}
    assert data["a--b"]["embedding"] == {"verdict": "identical", "log10_p": None}
    assert not any(shown for name, shown in data.items() if name != "a--b")
    with open(folder.path / "report.csv", encoding="utf-8", newline="") as file:
        table = {row["pair"]: row["parts"] for row in csv.DictReader(file)}
    assert {name: shown for name, shown in table.items() if shown} == {"a--b": words}
    page = Page((folder.path / "report.html").read_text("utf-8"))
    assert words in page.text
    assert f"a and b: related ({words})" in page.text + " ".join(str(value) for *_, value in page.attributes)


def test_a_pair_across_that_is_not_done_or_undecided_keeps_one_family():
    plan, records = zoos.two_trees({("a", "b"): 1.4, ("a", "ab"): 0.7, ("ab", "b"): 0.7})
    records["a--b"] = zoos.record_of(-2.9)
    assert len(contents(plan, records).families) == 1


def test_a_family_of_which_pairs_were_not_compared_is_said_to_be_one():
    """Without the pairs across two unrelated trees, a merge of both is no different from a common relative."""
    plan, records = zoos.two_trees({("a", "b"): 1.4, ("a", "ab"): 0.7, ("ab", "b"): 0.7})
    inside = tuple(pair for pair in plan.pairs if not across(pair))
    found = contents(replace(plan, pairs=inside, proposal=Proposal(10, 4, 0, 0)), records)
    assert found.not_compared == [4]
    assert found.as_dict()["families"][0]["not_compared"] == 4
    assert zoo_sentence(found) == "5 models, 6 pairs: 1 family, 4 pairs inside families not compared"
    page = page_of(found, "left out")
    assert "4 of its 10 pairs were not compared (a and b, a and b1, a1 and b, and 1 more" in page
    assert "may be unrelated to each other" in page
    assert contents(plan, records).not_compared == [0, 0, 0]


@pytest.mark.parametrize("trace", [-3.0, -0.5])
def test_a_merge_is_told_from_a_relative_though_only_traces_are_compared(trace):
    """Clear traces close the triangles over it, so that the report is that of all pairs; others close none."""
    plan, records = zoos.two_trees({("a", "b"): 1.4, ("a", "ab"): 0.7, ("ab", "b"): 0.7})
    traces = {name: dict.fromkeys(plan.names, 0.0) for name in plan.names}
    for pair in plan.pairs:
        if not across(pair):
            traces[pair.base][pair.ft] = trace
    kept, left_out, closing = selected(plan, traces)
    assert (len(kept), len(left_out), closing) == ((10, 0, 4) if trace < -1 else (6, 4, 0))
    found = contents(replace(plan, pairs=tuple(kept)), records)
    assert (found.families == contents(plan, records).families) == (trace < -1)


def test_closing_triangles_costs_a_bounded_number_of_pairs_for_each_model():
    """All pairs of the relatives of one model would be as many as the list has."""
    models = [f"m{i:03d}" for i in range(60)]
    plan = zoos.plan_of(models)
    traces = {name: {other: -9.0 if "m000" in (name, other) else 0.0 for other in models} for name in models}
    kept, left_out, closing = selected(plan, traces)
    assert closing == CLOSED_PER_MODEL * len(models)
    assert len(kept) == len(models) - 1 + closing
    assert {pair.name for pair in kept}.isdisjoint(pair.name for pair, _ in left_out)
    assert len(kept) + len(left_out) == len(plan.pairs)


def across(pair):
    return {pair.base[0], pair.ft[0]} == {"a", "b"}


@pytest.mark.slow
@given(st.integers(3, 9), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_every_model_is_in_one_family_whatever_was_found(size, seed):
    random = np.random.default_rng(seed)
    names = [f"m{i}" for i in range(size)]
    plan = zoos.plan_of(names)
    records = {
        pair.name: zoos.record_of(random.choice([-50.0, -2.9, -0.2]), l2=random.choice([None, 0.5, 1.0]))
        for pair in plan.pairs
        if random.random() < 0.9
    }
    found = contents(plan, records)
    assert sorted(itertools.chain(*found.components)) == names
    assert len(found.lineages) == len(found.directions) == len(found.families)
    for merged, edges in zip(found.merged, found.origins, strict=True):
        assert len(edges) == len(merged.origins) >= 2
        assert not {*merged.members} & {*itertools.chain(*merged.origins)}
    page_of(found, "any")


# Closest relatives.


@given(st.integers(2, 9), st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_a_tree_joins_a_family_at_the_least_total_distance(size, seed):
    random = np.random.default_rng(seed)
    names = [f"m{i}" for i in range(size)]
    plan = zoos.plan_of(names)
    jsd = {p.name: float(random.uniform(0.01, 0.6)) for p in plan.pairs}
    rows = zoos.rows_of(plan, {name: zoos.record_of(-300.0, x) for name, x in jsd.items()})
    tree = lineage(names, rows, {})
    distance = np.zeros((size, size))
    for p in plan.pairs:
        distance[names.index(p.base), names.index(p.ft)] = jsd[p.name]
    assert len(tree.edges) == size - 1
    assert sum(edge.value for edge in tree.edges) == pytest.approx(minimum_spanning_tree(distance).sum())
    assert united(names, [edge.row.models for edge in tree.edges]) == {frozenset(names)}


@given(SIZES, st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_the_planted_tree_comes_back_where_distance_grows_along_it(sizes, seed):
    plan, records = zoos.planted(sizes, seed)
    found = contents(plan, records)
    assert edges_of(found) == {frozenset(pair) for pair in plan.parents.items() if pair[1] is not None}
    assert not found.disagreements
    assert not found.missed


def test_a_pair_called_independent_is_no_edge_however_close():
    plan = zoos.plan_of(["a", "b", "c"])
    records = {"a--b": zoos.record_of(-0.1, 0.001), "a--c": zoos.record_of(-99, 0.2), "b--c": zoos.record_of(-99, 0.3)}
    assert edges_of(contents(plan, records)) == {frozenset("ac"), frozenset("bc")}


def test_measures_are_not_mixed_and_the_next_joins_what_one_leaves_apart():
    plan = zoos.plan_of(["a", "b", "c", "d"])
    jsd = {"a--b": 0.1, "c--d": 0.1}
    units = {"a--b": 0.5, "a--c": 0.7, "b--c": 0.8, "a--d": 0.2, "b--d": 0.2, "c--d": 0.1}
    records = {name: zoos.record_of(-99, jsd.get(name), units[name]) for name in units}
    (tree,) = contents(plan, records).lineages
    found = {frozenset(edge.row.models): edge.measure.name for edge in tree.edges}
    assert found == {
        frozenset("ab"): "divergence of predictions, nats per token",
        frozenset("cd"): "divergence of predictions, nats per token",
        frozenset("bc"): "share of MLP units that agree",
    }


def test_without_any_closeness_the_evidence_joins_a_family():
    plan = zoos.plan_of(["a", "b", "c"])
    records = {name: zoos.record_of(log10_p, None) for name, log10_p in (("a--b", -9), ("a--c", -80), ("b--c", -70))}
    (tree,) = contents(plan, records).lineages
    assert edges_of(contents(plan, records)) == {frozenset("ac"), frozenset("bc")}
    assert {edge.measure.name for edge in tree.edges} == {"log10 p after Holm"}


def copy_of(relatives):
    """A family `base`, `tuned` and `copy`, a disguised copy of `tuned`; rounding would hang the copy on base."""
    plan = zoos.plan_of(["base", "copy", "tuned"])
    records = {
        "base--copy": zoos.record_of(-99, 0.1 - 1e-9, csu=-0.3),
        "base--tuned": zoos.record_of(-99, 0.1, csu=-200.0 if relatives else -0.2),
        "copy--tuned": zoos.record_of(-99, 5e-9, csu=0.0),
    }
    return contents(plan, records)


def test_a_disguised_copy_hangs_on_the_model_whose_units_stand_in_place():
    found = copy_of(relatives=True)
    assert edges_of(found) == {frozenset(("base", "tuned")), frozenset(("tuned", "copy"))}
    assert ("tuned", "copy") in arrows_of(found)


def test_between_copies_the_direction_is_open_where_nothing_tells():
    found = copy_of(relatives=False)
    assert not arrows_of(found)
    assert any("copy cannot be distinguished" in way.grounds[0] for ways in found.directions for way in ways)


# Direction.


def measured(embedding, head, length=10.0):
    """Returns the measures of a model whose matrices are so many times further from initialisation than the least."""
    """Returns the measures of a model whose matrices are so many times further from initialisation than the least."""
    matrices = {
        kind: {"effective_rank": [100 / value]}
        for kind, value in (("embed/embedding", embedding), ("head/lm_head", head))
    }
    return {"matrices": matrices, "length": length}


def star(l2):
    """Returns the records of `root` and two children, with these distances of weights."""
    plan = zoos.plan_of(["one", "root", "two"])
    records = {name: zoos.record_of(-500, 0.1, csu=-500, l2=distance) for name, distance in l2.items()}
    return plan, records


def test_children_hang_on_the_less_trained_model_though_they_lie_nearer_to_each_other():
    plan, records = star({"one--root": 1.6, "root--two": 1.5, "one--two": 1.4})
    measures = {"root": measured(1.0, 10.0), "one": measured(1.2, 14.0), "two": measured(1.2, 13.9)}
    found = contents(plan, records, measures)
    assert arrows_of(found) == {("root", "one"), ("root", "two")}
    assert edges_of(contents(plan, records)) == {frozenset(("one", "two")), frozenset(("root", "two"))}


def test_a_grandchild_hangs_on_its_parent():
    plan, records = star({"one--root": 1.5, "root--two": 2.1, "one--two": 0.8})
    measures = {"root": measured(1.0, 10.0), "one": measured(1.2, 14.0), "two": measured(1.3, 15.5)}
    assert arrows_of(contents(plan, records, measures)) == {("root", "one"), ("one", "two")}


def test_siblings_without_their_parent_are_left_open():
    plan = zoos.plan_of(["one", "two"])
    records = {"one--two": zoos.record_of(-500, 0.1, csu=-500, l2=1.5)}
    found = contents(plan, records, {"one": measured(1.2, 14.0), "two": measured(1.201, 14.01)})
    assert not arrows_of(found)
    assert "siblings" in found.directions[0][0].grounds[0]


def test_grounds_that_contradict_each_other_or_are_missing_leave_it_open():
    plan = zoos.plan_of(["one", "two"])
    opposite = {"one": measured(1.2, 14.0), "two": measured(1.0, 19.0)}
    for distance, measures, word in (
        (1.5, opposite, "contradict"),
        (1.5, {}, "measured"),
        (None, opposite, "not known"),
    ):
        fields = {} if distance is None else {"csu": -500, "l2": distance}
        found = contents(plan, {"one--two": zoos.record_of(-500, 0.1, **fields)}, measures)
        assert not arrows_of(found)
        assert word in found.directions[0][0].grounds[0]


@pytest.mark.parametrize(("small", "layer_map", "said"), [
    ({"mlp_dim": 128}, None, "small has 128 of"),
    ({"vocab_size": 900}, None, "tokens were added to the other"),
    ({"num_layers": 3}, {"pairs": [{"agreeing": 200}] * 3, "copies": []}, "all 3 layers of small are among"),
    ({"num_layers": 3}, {"pairs": [{"agreeing": 200}] * 3, "copies": [{"base": 1, "ft": 1}]}, "more than once"),
    ({"num_layers": 3}, {"pairs": [{"agreeing": 200}] * 2, "copies": []}, "small has 3 layers"),
])  # fmt: skip
def test_shapes_are_said_and_draw_no_arrow(small, layer_map, said):
    """A smaller model may be pruned or the larger one grown, whichever of them was trained less."""
    plan = zoos.plan_of(["large", "small"])
    record = zoos.record_of(-99, 0.1, shapes=(zoos.SHAPE, zoos.SHAPE | small))
    record["statistics"]["match_all"] = {"non_aligned": {"headline": 1.0, "layer_map": layer_map}}
    found = contents(plan, {"large--small": record}, {"large": measured(1.0, 10.0), "small": measured(1.2, 14.0)})
    assert not arrows_of(found)
    assert said in found.directions[0][0].grounds[0]


def test_a_model_has_one_parent_at_most():
    rows = [
        PairRow(
            f"{name}--child", name, "child", None, "done", level=1e-3, l2=distance, jsd=distance, in_place_log10_p=-99.0
        )
        for name, distance in (("b", 1.6), ("a", 1.5))
    ]
    measures = {"a": measured(1.0, 10.0), "b": measured(1.0, 10.0), "child": measured(2.0, 30.0)}
    edges = [Edge(row, WEIGHTS, row.l2) for row in rows]
    assert [direction(edge, rows, measures).child for edge in edges] == ["child", "child"]
    far, near = directions(edges, rows, measures)
    assert (near.parent, near.child) == ("a", "child")
    assert (far.child, far.grounds[-1]) == (None, "but child has a closer parent, a")


# Disagreements.


def test_every_disagreement_with_the_known_tree_is_listed():
    parents = {"a": None, "b": "a", "c": "b", "x": None}
    plan = zoos.plan_of(list(parents), parents)
    records = {p.name: zoos.record_of(-99 if p.related else -0.1, 0.3) for p in plan.pairs}
    records["a--x"] = zoos.record_of(-99, 0.2)
    records["a--c"] = zoos.record_of(-99, 0.1)
    records["a--b"] = zoos.record_of(-500, 0.15, csu=-500, l2=1.5)
    measures = {"a": measured(1.2, 14.0), "b": measured(1.0, 10.0)}  # as if a were trained from b
    found = {(line.kind, line.pair) for line in contents(plan, records, measures).disagreements}
    assert found == {("verdict", "a--x"), ("edge", "a--c"), ("direction", "a--b")}
    assert contents(plan, records, measures).missed == [("b", "c")]


# The page and its data.


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A zoo with two families in which two pairs failed and one is missing, and its written report."""
    plan, records = zoos.planted([2, 2], 3)
    names = list(records)
    records[names[0]] = PairState("failed", "ValueError: layer 3 <is> gone\nand more")
    records[names[1]] = PairState("failed", "MemoryError: too large")
    del records[names[2]]
    folder = zoos.write_zoo(tmp_path_factory.mktemp("zoo") / "broken", plan, records)
    return folder, names, write_report(folder).read_text("utf-8")


def test_missing_and_failed_pairs_are_shown_and_never_dropped(broken):
    folder, names, text = broken
    page = Page(text)
    assert "3 pairs not done" in text
    assert [page.count("rect", word) for word in ("failed", "missing")] == [3, 2]  # with one each in the legend
    words = page.text
    assert "ValueError: layer 3 <is> gone" in words
    assert "and more" not in words
    assert all(name in words for name in names[:3])
    drawn = [a for tag, a in page.elements if tag == "rect" and "x" in a and a["class"] != "bar"]
    assert len(drawn) == len(folder.plan.pairs)


@pytest.mark.slow
def test_the_page_refers_to_nothing_but_the_pages_of_its_pairs(broken):
    folder, _, text = broken
    links = {a[key] for _, a in Page(text).elements for key in ("href", "src") if a.get(key)}
    done = {pair.name for pair in folder.plan.pairs if folder.state(pair).state == "done"}
    assert links == {f"pairs/{name}.html" for name in done}
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|@import|url\((?!#)", text)


def test_only_the_script_of_the_page_may_run(broken):
    text = broken[2]
    (allowed,) = re.findall(r"script-src '(sha256-[^']+)'", text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert [f"sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}" for s in scripts] == [allowed]


def test_csv_and_json_hold_every_pair(broken):
    folder, _, _ = broken
    data = json.loads((folder.path / "report.json").read_text("utf-8"))
    with open(folder.path / "report.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["pair"] for row in table] == [row["pair"] for row in data["pairs"]]
    assert {row["pair"] for row in table} == {pair.name for pair in folder.plan.pairs}
    for written, row in zip(table, data["pairs"], strict=True):
        assert written == {key: "" if value in (None, {}) else str(value) for key, value in row.items()}
    assert data["states"] == {"done": 3, "running": 0, "failed": 2, "missing": 1}
    assert not [path for path in folder.path.iterdir() if path.name.endswith(".tmp")]


def test_names_and_errors_are_escaped():
    evil = ["<script>alert('a')</script>", "</script><b>\"'&", "c"]
    plan = replace(zoos.plan_of(["a", "b", "c"]), names=dict(zip("abc", evil)))
    records = {"a--b": zoos.record_of(-99, 0.1), "a--c": PairState("failed", "<img src=x>")}
    text = page_of(contents(plan, records), "<i>title</i>")
    tags = Page(text).tags
    assert not tags & {"i", "img"}
    assert sum(tag == "script" for tag, _ in Page(text).elements) == 2


@pytest.mark.slow
def test_a_large_zoo_has_every_pair_once_in_a_small_page():
    plan, records = zoos.planted([20, 15, 10, 5, *[1] * 20], 5, "an-organisation-some-model-7b")
    found = contents(plan, records)
    text = page_of(found, "large")
    cells = sum(tag == "rect" and "x" in a and a["class"] != "bar" for tag, a in Page(text).elements)
    assert cells == sum(row.verdict == "related" for row in found.rows)
    assert cells + text.count("h1v1h-1z") == len(plan.pairs) == 70 * 69 // 2
    assert len(text) < 600_000
    (data,) = re.findall(r'id="grouped">(.*?)</script>', text)
    grouped = json.loads(data)
    values = [v for row in grouped["rows"] for v in row if v is not None]
    assert len(values) == text.count("h1v1h-1z")
    by_pair = {row.pair: row for row in found.rows}
    for top, row in enumerate(grouped["rows"]):
        for left, value in enumerate(row):
            if value is not None:
                one, other = (top, left) if value % 2 else (left, top)
                pair = f"{grouped['names'][one]}--{grouped['names'][other]}"
                assert -(value // 2) / 100 == pytest.approx(by_pair[pair].log10_p, abs=0.006)


def test_a_sparse_list_is_a_graph_with_an_arc_for_every_pair():
    plan, records = zoos.planted([4, 3, 2, 1], 2)
    few = tuple(pair for i, pair in enumerate(plan.pairs) if i % 4 == 0)
    page = Page(page_of(contents(replace(plan, pairs=few), records), "few"))
    arcs = [a for tag, a in page.elements if tag == "path" and "0 0 1 0" in a.get("d", "")]
    assert len(arcs) == len(few)
    assert not [a for tag, a in page.elements if tag == "rect" and "x" in a and a["class"] != "bar"]
    assert "An arc joins" in page.text


def test_p_values_are_written_as_everywhere_else(broken):
    assert "log10" not in re.sub(r"<(script|style).*?</\1>", "", broken[2], flags=re.DOTALL)


def test_the_answer_in_one_sentence():
    plan, records = zoos.planted([3, 2, 1], 0)
    assert zoo_sentence(contents(plan, records)) == "6 models, 15 pairs: 2 families, 1 model in none"
    assert zoo_sentence(contents(plan, {})) == "6 models, 15 pairs: 0 families, 6 models in none, 15 pairs not done"


def test_independent_pairs_are_held_against_the_uniform():
    plan, records = zoos.planted([1] * 12, 2)
    found = contents(plan, records).uniformity
    assert sum(found.counts) == 66
    assert found.ks_p > 0.01
    ones = contents(plan, {name: zoos.record_of(0.0) for name in records}).uniformity
    assert (ones.ones, ones.too_small) == (66, pytest.approx(1.0))
    low = contents(plan, {name: zoos.record_of(-1.2) for name in records})
    assert low.uniformity.too_small < 1e-6
    assert "more small p-values" in page_of(low, "low")


def test_p_values_of_pairs_that_were_selected_by_the_same_weights_are_not_held_against_the_uniform():
    plan, records = zoos.planted([1] * 12, 2)
    few = [zoos.record_of(-1.2) for _ in plan.pairs]
    chosen = replace(plan, pairs=plan.pairs[:40], proposal=Proposal(66, 26, 0, 0))
    found = contents(chosen, dict(zip(records, few)))
    assert sum(found.uniformity.counts) == 40
    assert (found.uniformity.ks_p, found.uniformity.too_small) == (None, None)
    page = page_of(found, "chosen")
    assert "are not tested for it" in page
    assert "more small p-values" not in page
    assert 'class="uniform"' not in page
    every = contents(replace(plan, proposal=Proposal(66, 0, 0, 0)), records)
    assert every.uniformity.ks_p is not None
    assert 'class="uniform"' in page_of(every, "every")


@pytest.mark.slow
def test_the_command_writes_the_report_and_says_where(tmp_path, capsys):
    folder = zoos.write_zoo(tmp_path / "zoo", *zoos.planted([2, 1], 0))
    main(["report", str(folder.path)])
    assert capsys.readouterr().out.strip() == str(folder.path / "report.html")
    assert {"report.html", "report.csv", "report.json"} <= {path.name for path in folder.path.iterdir()}
    with pytest.raises(SystemExit, match=r"no zoo\.json in it"):
        main(["report", str(tmp_path)])


# Facts on the weights.


@pytest.mark.parametrize("family", [tiny.qwen3_gqa, tiny.mixtral])
def test_measures_survive_permutation(family):
    model = tiny.model(family())
    table = axis_table(family())
    moved = permute(model.params, random_permutations(jax.random.key(1), table, PERMUTABLE), table)
    one, other = weight_measures(model), weight_measures(InMemory(family(), moved))
    assert one["matrices"].keys() == other["matrices"].keys()
    for kind, measures in one["matrices"].items():
        for measure, values in measures.items():
            assert other["matrices"][kind][measure] == pytest.approx(values, rel=1e-4), (kind, measure)
    assert other["length"] == pytest.approx(one["length"], rel=1e-5)


def test_initialisation_measures_as_nothing_whatever_its_scale():
    for scale in (0.02, 3.0):
        matrix = scale * np.random.default_rng(0).normal(size=(600, 400)).astype(np.float32)
        found = weights.measures_of(matrix)
        assert weights.effective_rank(matrix) == pytest.approx(1 / (1 / 600 + 1 / 400), rel=0.01)
        assert found["excess_kurtosis"] == pytest.approx(0.0, abs=0.05)
        assert found["length_variation"] == pytest.approx((2 * 400) ** -0.5, rel=0.1)
        assert found["rms"] == pytest.approx(scale, rel=0.01)


def test_heavy_tails_have_a_positive_excess_kurtosis():
    laplace = np.random.default_rng(0).laplace(size=(600, 400)).astype(np.float32)
    assert weights.measures_of(laplace)["excess_kurtosis"] == pytest.approx(3.0, abs=0.2)
    assert weights.measures_of(np.sign(laplace))["excess_kurtosis"] == pytest.approx(-2.0)


def test_a_matrix_of_rank_one_has_one_direction_and_zeros_have_none():
    random = np.random.default_rng(0)
    matrix = np.outer(random.normal(size=30), random.normal(size=20)).astype(np.float32)
    assert weights.effective_rank(matrix) == pytest.approx(1.0, rel=1e-4)
    assert weights.effective_rank(0 * matrix) == 0.0


def test_effective_ranks_do_not_see_padding_and_rotation(monkeypatch):
    random = np.random.default_rng(0)
    matrix = (random.normal(size=(60, 40)) * np.geomspace(1, 9, 40)).astype(np.float32)
    padded = np.pad(matrix, ((0, 0), (0, 12)))
    turned = (0.8 * padded @ np.linalg.qr(random.normal(size=(52, 52)))[0]).astype(np.float32)
    monkeypatch.setattr(weights, "_ROWS_AT_ONCE", 25)
    assert weights.effective_rank(turned) == pytest.approx(weights.effective_rank(matrix), rel=1e-4)


def test_measures_are_written_into_the_zoo_and_read_again(tmp_path):
    source = tiny.model(tiny.llama_mha())
    assert read_model_measures(tmp_path, "one") is None
    file = write_model_measures(tmp_path, "one", "org/one", source)
    assert file == model_measures_file(tmp_path, "one") == tmp_path / "models" / "one.json"
    assert read_model_measures(tmp_path, "one", {"w": [8, 1]}) is None
    write_model_measures(tmp_path, "one", "org/one", source, {"w": [8, 1]})
    assert read_model_measures(tmp_path, "one", {"w": [8, 1]}) is not None
    assert read_model_measures(tmp_path, "one", {"w": [8, 2]}) is None  # the model was replaced in place
    assert read_model_measures(tmp_path, "one")["length"] == pytest.approx(weight_measures(source)["length"])
    file.write_text(json.dumps({"format": -1}))
    assert read_model_measures(tmp_path, "one") is None


def test_no_arrow_is_drawn_between_models_farther_apart_than_was_measured():
    """As long and hard trained fine-tunes are: there both grounds have agreed on a wrong arrow."""

    def directed(distance):
        row = PairRow("a--b", "a", "b", None, "done", level=1e-3, l2=distance, in_place_log10_p=-99.0)
        fewer = {"embed/embedding": {"effective_rank": [20.0]}, "head/lm_head": {"effective_rank": [20.0]}}
        more = {"embed/embedding": {"effective_rank": [40.0]}, "head/lm_head": {"effective_rank": [40.0]}}
        measures = {"a": {"length": 1.0, "matrices": more}, "b": {"length": 1.0, "matrices": fewer}}
        return direction(Edge(row, WEIGHTS, distance), [row], measures)

    assert (directed(0.3).parent, directed(0.3).child) == ("a", "b")
    assert directed(0.5).child is None
    assert "so far apart" in directed(0.5).grounds[0]
