"""`match_heads`: query heads by their QK and OV products on shared tokens; and the null of their agreement."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from cases import slow
from rewritten_pairs import IDS, agreeing, pair_of, pair_with_rewritten, related
from scipy.optimize import linear_sum_assignment

from tracing_jax.forward import logits
from tracing_jax.sources import InMemory
from tracing_jax.statistics import Vocabularies, verdict
from tracing_jax.statistics.head_null import (
    best_layers_log_sf,
    best_ordered_map,
    heads_log_sf,
    log_grouped_agreement,
    ordered_maps_log_sf,
)
from tracing_jax.statistics.match_heads import MatchHeads

DEEP = {"num_layers": 4, "layer_windows": (None,) * 4}
GROUPED = tiny.llama_mha(**DEEP, layer_ropes=(0,) * 4, num_kv_heads=3, q_group=2, qkv_bias=False, o_bias=False)
NORMED = tiny.qwen3_gqa(**DEEP, layer_ropes=(0,) * 4)
UNGATED = tiny.gpt2(**DEEP)
ARCHS = {"grouped": GROUPED, "normed": NORMED, "ungated": UNGATED}
BASES = {name: tiny.model(arch, 0) for name, arch in ARCHS.items()}
TEST = "attention and output, agreement, calibrated"


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_a_relative_is_found_and_an_independent_model_is_not(name):
    base = BASES[name]
    found = MatchHeads().compute(pair_of(base, related(base, 0.1)))
    assert verdict({"match_heads": found}, 1e-3).verdict == "related"
    assert agreeing(found)[TEST] == [6] * 4
    assert MatchHeads().compute(pair_of(base, tiny.model(base.arch, 1))).log10_p > -1
    assert bool([note for note in found.notes if "approximate" in note]) == (name == "normed")


@pytest.mark.parametrize(("name", "rewrite"), [
    *[("grouped", name) for name in ("rename", "gains", "values", "queries", "rotate", "permute")],
    ("ungated", "permute"), ("ungated", "rotate,means"), ("normed", "permute"),
    *[slow("grouped", name) for name in ("units", "pad")], slow("ungated", "values"), slow("normed", "rotate"),
])  # fmt: skip
def test_no_rewrite_that_keeps_the_vocabulary_changes_it(name, rewrite):
    base, ft = BASES[name], related(BASES[name], 0.4)
    given, hidden = (MatchHeads().compute(pair) for pair in (pair_of(base, ft), pair_with_rewritten(base, ft, rewrite)))
    assert agreeing(hidden) == agreeing(given)
    assert sum(agreeing(given)[TEST]) > 12


def test_mlps_play_no_part():
    base = BASES["grouped"]
    ft, other = related(base, 0.4), tiny.model(GROUPED, 1)
    layers = {i: layer | {"mlp": other.params["layers"][i]["mlp"]} for i, layer in ft.params["layers"].items()}
    changed = InMemory(GROUPED, ft.params | {"layers": layers})
    assert MatchHeads().compute(pair_of(base, changed)) == MatchHeads().compute(pair_of(base, ft))


def test_biases_of_queries_keys_and_values_do_not_matter():
    base, ft = BASES["ungated"], related(BASES["ungated"], 0.4)
    params = jax.tree.map(jnp.asarray, ft.params)
    for layer in params["layers"].values():
        for name in ("q_proj", "k_proj", "v_proj"):
            layer["attn"][name]["bias"] = 3 * layer["attn"][name]["bias"] + 1
    changed = InMemory(UNGATED, params)
    assert MatchHeads().compute(pair_of(base, changed)) == MatchHeads().compute(pair_of(base, ft))


def test_heads_behind_a_sink_write_nothing():
    """A sink above all scores takes all attention: such heads of base, in another model, are no evidence."""
    arch = dataclasses.replace(GROUPED, sinks=True)
    base, closed = tiny.model(arch, 0), jax.tree.map(jnp.asarray, related(tiny.model(arch, 0), 0.1).params)
    assert MatchHeads().compute(pair_of(base, InMemory(arch, closed))).headline > 0.8
    ids = np.arange(40, dtype=np.int32)[None]
    for layer in closed["layers"].values():
        layer["attn"]["sinks"] = jnp.full_like(layer["attn"]["sinks"], 1e9)
    shut = logits(InMemory(arch, closed), ids)
    for sink in (1e9, 60.0):
        for layer in closed["layers"].values():
            layer["attn"]["sinks"] = jnp.full_like(layer["attn"]["sinks"], sink)
        np.testing.assert_allclose(logits(InMemory(arch, closed), ids), shut, atol=1e-5)
        assert MatchHeads().compute(pair_of(base, InMemory(arch, closed))).headline == 0


@pytest.mark.parametrize("even", [False, True])
def test_heads_that_attend_alike_and_cancel_one_another_are_no_evidence(even):
    """Half of base's heads in an independent model's place, each twice, with opposite outputs: nothing is written.

    The queries of both may be any if they are so short that all tokens are attended to.
    """
    base, other = BASES["ungated"], jax.tree.map(jnp.asarray, tiny.model(UNGATED, 1).params)
    once = jax.tree.map(jnp.asarray, base.params)
    for i, layer in other["layers"].items():
        attn, own = layer["attn"], once["layers"][i]["attn"]
        for name, axis in {"q": 1, "k": 1, "v": 1, "o": 0}.items():
            heads = jnp.moveaxis(own[f"{name}_proj"]["kernel"], axis, 0)[:3]
            others = jnp.sin(jnp.arange(heads.size)).reshape(heads.shape)
            opposite = {"o": -heads, "q": others if even else heads + 1e-3 * others}
            both = jnp.concatenate([heads, opposite.get(name, heads)]) * (1e-5 if even and name == "q" else 1)
            attn[f"{name}_proj"]["kernel"] = jnp.moveaxis(both, 0, axis)
        layer["attn_norm"] = once["layers"][i]["attn_norm"]
    other |= {name: once[name] for name in ("embed", "head") if name in once}
    found = MatchHeads().compute(pair_of(base, InMemory(UNGATED, other)))
    assert found.headline == 0
    assert found.log10_p == 0


def forms_of(model, layer):
    """Returns the two matrices of each of a GPT-2's heads, in float64."""
    params, head, embedding = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), (model.layer(layer), model.head(), model.embed()["embedding"])
    )
    tokens = []
    for rows in (embedding, embedding * head["norm"]["scale"]):
        rows = rows - rows.mean(1, keepdims=True)
        rows = rows - rows.mean(0)
        tokens.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    read, written = tokens[0] * params["attn_norm"]["scale"], tokens[1]
    forms = [[], []]
    for h in range(6):
        q, k, v = (params["attn"][f"{name}_proj"]["kernel"].reshape(24, 6, 4)[:, h] for name in "qkv")
        o = params["attn"]["o_proj"]["kernel"].reshape(6, 4, 24)[h]
        for form, product in zip(forms, (read @ q @ k.T @ read.T, written @ o.T @ v.T @ read.T)):
            centred = product - product.mean(0) - product.mean(1, keepdims=True) + product.mean()
            form.append(centred.ravel() / np.linalg.norm(centred))
    return forms


def test_counts_are_those_of_numpy():
    base, ft = BASES["ungated"], related(BASES["ungated"], 1.8)
    expected = []
    for i in range(4):
        attention, output = (
            linear_sum_assignment(np.array(a) @ np.array(b).T, maximize=True)[1]
            for a, b in zip(forms_of(base, i), forms_of(ft, i))
        )
        expected.append(int((attention == output).sum()))
    assert agreeing(MatchHeads().compute(pair_of(base, ft)))[TEST] == expected
    assert 0 < sum(expected) < 24


def test_agreement_of_groups_is_that_of_all_permutations_that_keep_them():
    counts = np.zeros(7)
    for outer in itertools.permutations(range(3)):
        for inner in itertools.product(itertools.permutations(range(2)), repeat=3):
            counts[sum(outer[g] == g and inner[g][q] == q for g in range(3) for q in range(2))] += 1
    np.testing.assert_allclose(np.exp(log_grouped_agreement(3, 2)), counts / counts.sum(), atol=1e-12)
    for groups, queries in ((8, 1), (1, 8), (4, 7)):
        probabilities = np.exp(log_grouped_agreement(groups, queries))
        k = np.arange(len(probabilities))
        assert probabilities.sum() == pytest.approx(1)
        assert (probabilities * k).sum() == pytest.approx(1)
        assert (probabilities * k**2).sum() - 1 == pytest.approx(1 + (min(groups, queries) > 1))


def test_the_null_is_the_sum_of_its_three_parts():
    rng, draws, found = np.random.default_rng(0), 200_000, np.zeros(200_000, int)
    for u in (0.05, 0.2):
        found += rng.choice(7, size=draws, p=np.exp(log_grouped_agreement(3, 2))) + rng.poisson(0.5, draws)
        found += rng.binomial(6, u, draws)
    for k in (1, 3, 6, 9):
        low, high = scipy.stats.binomtest(int((found >= k).sum()), draws).proportion_ci(0.9999)
        assert low < np.exp(heads_log_sf([k - 1, 1], 3, 2, (0.05, 0.2), 1.5)) < high
    assert heads_log_sf([0, 0], 3, 2, (0.05, 0.2), 1.5) == 0.0
    assert best_layers_log_sf([0, 0], [6, 6], 3, 2, 0.05, 1.0, 4) == 0.0
    deep = heads_log_sf([32] * 32, 8, 4, [0.05] * 32, 1.0)
    assert -1e4 < deep < -500


def test_the_null_of_the_best_layers_bounds_the_most_that_agree_by_chance():
    """Some heads of layers of 8, in groups of 2: of each of two layers the best of 5, at random and by convergence."""
    rng, draws = np.random.default_rng(0), 100_000
    chance = rng.choice(9, size=(draws, 2, 5), p=np.exp(log_grouped_agreement(4, 2))) + rng.poisson(0.5, (draws, 2, 5))
    found = np.minimum(chance + rng.binomial(6, 0.05, (draws, 2, 5)), 6).max(axis=2).sum(axis=1)
    for k in range(1, 13):
        bound = np.exp(best_layers_log_sf([k - 1, 1], [6, 6], 4, 2, 0.05, 1.5, 5))
        seen = (found >= k).mean()
        assert seen - 4 * np.sqrt(seen / draws) <= bound <= 1
        assert bound < 6 * seen or k < 6  # a bound that serves: the layers' own tails are added up
    one = best_layers_log_sf([4], [6], 4, 2, 0.05, 1.5, 1)
    assert best_layers_log_sf([4], [6], 4, 2, 0.05, 1.5, 3) == pytest.approx(one + np.log(3))
    assert best_layers_log_sf([7], [6], 4, 2, 0.05, 1.5, 3) == -np.inf


def with_layers(model, places):
    """Returns a model with these of its layers, in this order."""
    arch = dataclasses.replace(
        model.arch,
        num_layers=len(places),
        layer_windows=(None,) * len(places),
        layer_ropes=model.arch.layer_ropes[:1] * len(places),
    )
    layers = {str(i): model.params["layers"][str(place)] for i, place in enumerate(places)}
    return InMemory(arch, model.params | {"layers": layers})


@pytest.mark.parametrize("deeper", ["base", slow("ft")])
def test_a_relative_with_a_layer_less_is_found_and_an_independent_model_is_not(deeper):
    base, ft = BASES["ungated"], with_layers(related(BASES["ungated"], 0.1), (0, 2, 3))
    hidden = pair_with_rewritten(base, ft, "permute,means")
    pair = hidden if deeper == "base" else dataclasses.replace(hidden, base=hidden.ft, ft=hidden.base)
    assert MatchHeads().not_applicable(pair.base.arch, pair.ft.arch, pair.vocabularies) == []
    found = MatchHeads().compute(pair)
    assert verdict({"match_heads": found}, 1e-3).verdict == "related"
    assert agreeing(found)[TEST] == [6] * 3
    expected = [(0, 0), (2, 1), (3, 2)]
    assert list(found.tests[0].places) == [
        f"base {i} : ft {j}" for i, j in (expected if deeper == "base" else [(j, i) for i, j in expected])
    ]
    other = MatchHeads().compute(pair_of(base, with_layers(tiny.model(UNGATED, 1), (0, 2, 3))))
    assert other.log10_p > -1


def test_the_map_of_layers_is_the_best_of_all_in_order():
    rng = np.random.default_rng(0)
    for rows, columns in ((3, 5), (5, 2), (4, 4), (1, 3)):
        counts = rng.integers(0, 4, (rows, columns))
        found, few = best_ordered_map(counts), min(rows, columns)
        every = [
            list(zip(i, j))
            for i in itertools.combinations(range(rows), few)
            for j in itertools.combinations(range(columns), few)
        ]
        assert found in every
        assert sum(counts[place] for place in found) == max(sum(counts[place] for place in one) for one in every)


def test_the_null_of_the_best_map_bounds_the_most_that_agree_by_chance():
    rng, draws = np.random.default_rng(0), 20_000
    counts = rng.choice(7, size=(draws, 3, 4), p=np.exp(log_grouped_agreement(3, 2)))
    counts = counts + rng.poisson(0.5, counts.shape) + rng.binomial(6, 0.05, counts.shape)
    best = np.array([sum(one[place] for place in best_ordered_map(one)) for one in counts])
    for k in range(1, 16):
        seen = (best >= k).mean()
        bound = np.exp(ordered_maps_log_sf([k, 0, 0], (3, 2), (4, 3), 0.05, 1.5))
        assert seen - 4 * np.sqrt(seen / draws) <= bound <= 1
        assert bound < 2 * seen or seen > 0.1 or seen * draws < 20


def test_heads_of_layers_that_repeat_count_once():
    """Two models of two layers, each used three times: that is two pairs of layers, not six."""
    base, ft = BASES["ungated"], related(BASES["ungated"], 0.1)
    places = (0, 1) * 3
    found = MatchHeads().compute(pair_of(with_layers(base, places), with_layers(ft, places)))
    assert agreeing(found)[TEST] == [6, 6, 0, 0, 0, 0]
    once = MatchHeads().compute(pair_of(with_layers(base, places), with_layers(ft, (0, 1))))
    assert agreeing(once)[TEST] == [6, 6]


@pytest.mark.slow
def test_independent_models_agree_on_one_head_as_random_matchings_do():
    models = [tiny.model(GROUPED, seed) for seed in range(12)]
    counts = [agreeing(MatchHeads().compute(pair_of(*both)))[TEST] for both in zip(models[::2], models[1::2])]
    assert 0.2 < np.mean(counts) < 2.2  # 24 layers of variance 2: four standard deviations are 1.2


def test_heads_that_slopes_tell_apart_are_never_firm():
    base = InMemory(dataclasses.replace(GROUPED, alibi_slopes=tuple(0.5**i for i in range(6))), BASES["grouped"].params)
    found = MatchHeads().compute(pair_of(base, base))
    assert found.log10_p < -4
    assert found.firm_log10_p == 0
    assert "ALiBi" in found.reservation


def test_control_models_set_the_allowance():
    base = BASES["grouped"]
    pair = pair_of(base, tiny.model(GROUPED, 1), controls=(tiny.model(GROUPED, 5),))
    assert "control models (1)" in MatchHeads().compute(pair).null["attention and output"]["u from"]


def test_what_does_not_apply_says_why():
    none, same = (Vocabularies(True, ids, ids) for ids in (IDS[:3], IDS))
    assert MatchHeads().not_applicable(GROUPED, NORMED, same) == []
    assert MatchHeads().not_applicable(tiny.mixtral(), tiny.mixtral(), same) == []
    assert "share 3 tokens" in MatchHeads().not_applicable(GROUPED, GROUPED, none)[0]
    reason = MatchHeads().not_applicable(GROUPED, with_layers(BASES["grouped"], (0, 2, 3)).arch, same)
    assert reason == [
        "different depth (4 and 3 layers), and too few heads: if all of 3 x 6 agreed, p would be 0.0018; see match_all"
    ]
    single = tiny.llama_mha(num_kv_heads=1, q_group=1)
    assert "base has one head" in MatchHeads().not_applicable(single, single, same)[0]
