"""Which layer comes from which: pruned, stretched and unrelated models, and the sentence that says so."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tracing_jax.data import paired_one_to_one
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.statistics import Pair, Vocabularies, verdict
from tracing_jax.statistics.comparison import Comparison
from tracing_jax.statistics.match_all import (
    LayerMap,
    MatchAll,
    _calibrated,
    assign_layers,
    layer_map_sentence,
    ranges,
)
from tracing_jax.statistics.match_mlps import MatchMlps
from tracing_jax.tree import map_named

ARCH = tiny.qwen3_gqa(num_layers=5, layer_ropes=(0,) * 5, layer_windows=(None,) * 5, mlp_dim=40)
IDS = np.arange(61, dtype=np.int32)
TOKENS = np.random.default_rng(0).integers(61, size=(8, 24), dtype=np.int32)
BASE = tiny.model(ARCH, 0)


def pair_of(ft):
    blocks = paired_one_to_one(TOKENS, TOKENS)
    return Pair(BASE, ft, Vocabularies(True, IDS, IDS), TOKENS, Compute(make_mesh(1, 1), 4), seed=0, blocks=blocks)


def made_of(layers, units=40, noise=0.05, seed=3):
    """Returns a model of these layers of base (None: a new one) with so many units of each, and the units kept."""
    kept = [np.sort(np.random.default_rng([seed, i]).permutation(40)[:units]) for i in range(len(layers))]
    new = tiny.params_of(ARCH, 9)["layers"]
    noisy = tiny.noisy(BASE.params, noise)

    def cut(name, leaf):
        if "/mlp/" not in name:
            return leaf
        return jnp.take(leaf, kept[int(name.split("/")[1])], axis=0 if "down" in name else 1)

    chosen = {str(i): new[str(i)] if layer is None else noisy["layers"][str(layer)] for i, layer in enumerate(layers)}
    arch = dataclasses.replace(
        ARCH, num_layers=len(layers), mlp_dim=units, layer_ropes=(0,) * len(layers), layer_windows=(None,) * len(layers)
    )
    return InMemory(arch, map_named(cut, noisy | {"layers": chosen})), kept


@pytest.mark.slow
def test_a_model_pruned_in_depth_and_width_gives_back_its_layers_and_units():
    ft, kept = made_of([0, 2, 4], units=30)
    result = MatchAll().compute(pair_of(ft))
    assert [(p["base"], p["ft"]) for p in result.layer_map["pairs"]] == [(0, 0), (2, 1), (4, 2)]
    assert result.layer_map["unmatched_base"] == [1, 3]
    assert result.layer_map["unmatched_ft"] == []
    for base, ft_layer in ((0, 0), (2, 1), (4, 2)):
        units = result.arrays[f"units of base {base} and ft {ft_layer}"]
        right = (kept[ft_layer][units[:, 1]] == units[:, 0]).sum()
        assert right >= 0.95 * 30
    assert "3 of ft's 3 layers correspond to base's 5, in order" in result.layer_map["sentence"]
    assert "base's layers 1, 3 left no trace" in result.layer_map["sentence"]
    assert " units agree in the one of 15 pairs of layers where most do; " in result.effect
    assert verdict({"match_all": result}, 1e-3).verdict == "related"


def test_inserted_and_repeated_layers_are_told_apart():
    ft, _ = made_of([0, 1, 1, None, 2, 3, 4])
    found = MatchAll().compute(pair_of(ft)).layer_map
    pairs = {(p["base"], p["ft"]) for p in found["pairs"]}
    copies = {(c["base"], c["ft"]) for c in found["copies"]}
    assert pairs | copies == {(0, 0), (1, 1), (1, 2), (2, 4), (3, 5), (4, 6)}
    assert found["unmatched_ft"] == [3]
    assert found["unmatched_base"] == []


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_without_gates_layers_are_found_by_what_units_read_and_write(kind):
    """A permuted model with a layer less, as GPT-2 has them; and permuted experts without gates."""
    depth = {"num_layers": 4, "layer_windows": (None,) * 4, "mlp_dim": 40}
    if kind == "dense":
        arch, statistic = tiny.gpt2(**depth), MatchAll(forms=("forward", "weights"))
    else:
        arch, statistic = dataclasses.replace(tiny.mixtral(mlp_dim=40), gated=False, activation="relu2"), MatchMlps()
    base, stranger = (tiny.model(arch, seed) for seed in (0, 1))
    found = InMemory(arch, tiny.noisy(base.params, 0.05))
    if kind == "dense":
        layers = [found.layer(i) for i in (0, 2, 3)]
        arch = dataclasses.replace(arch, num_layers=3, layer_windows=(None,) * 3)
        found = InMemory(arch, found.params | {"layers": dict(zip("012", layers))})
    vocabularies = Vocabularies(True, IDS, IDS)
    assert statistic.not_applicable(base.arch, found.arch, vocabularies) == []
    hidden = in_memory(rewritten(found, draw_rewrites("permute", jax.random.key(3), found.arch)))
    related, unrelated = (
        statistic.compute(Pair(base, ft, vocabularies, TOKENS, Compute(make_mesh(), 8), 0)) for ft in (hidden, stranger)
    )
    assert verdict({"match_all": related}, 1e-3).verdict == "related"
    assert unrelated.log10_p > -3
    if kind == "dense":
        assert [(row["base"], row["ft"]) for row in related.layer_map["pairs"]] == [(0, 0), (2, 1), (3, 2)]
    other = dataclasses.replace(base.arch, gated=True)
    assert "ft has no gate, the other has" in statistic.not_applicable(other, base.arch, vocabularies)
    assert (
        "0 tokens, 32 are needed"
        in statistic.not_applicable(base.arch, base.arch, Vocabularies(False, IDS[:0], IDS[:0]))[0]
    )


@pytest.mark.slow
def test_an_unrelated_model_has_no_layer_of_base():
    result = MatchAll().compute(pair_of(tiny.model(dataclasses.replace(ARCH, mlp_dim=52), 1)))
    assert result.layer_map["pairs"] == []
    assert result.log10_p > -3
    assert "None of ft's 5 layers" in result.layer_map["sentence"]


@pytest.mark.parametrize("positions", [100, 2048])
def test_the_kept_activations_stay_within_the_memory_asked_for(positions):
    statistic = MatchAll(positions=positions, max_gib=400 * 4 * 2 * 2 * 5 * 40 * 2 / 2**30)
    assert statistic._positions(ARCH, ARCH) == min(positions, 400)


def test_firm_is_the_p_value_of_the_test_whose_own_effect_is_beyond_the_margin():
    """A tenth of the units agree, which is reserved: a rank correlation of .2, as chance gives, changes nothing."""
    other = Comparison(512, 512, 0.0, 1, -0.7, -0.5)
    for agreeing, r in ((51, 0.2), (51, 0.0), (100, 0.0), (51, 0.6)):
        table = [
            [Comparison(512, 512, r, agreeing, -9.0, -60.0) if i == j else other for j in range(4)] for i in range(4)
        ]
        null, log_p, firm = _calibrated(table, [0.05] * 4, [0.05] * 4, "test")
        own = dataclasses.replace(null, u=(0.05,))
        tests = {"agreement": own.log_p_agreement(0, table[0][0]), "rank": own.log_p_rank(0, table[0][0])}
        assert log_p[0, 0] == pytest.approx(min(tests.values()) + math.log(2))
        counts = [tests[name] for name, size in (("agreement", agreeing / 512), ("rank", r)) if size > 0.15]
        assert firm[0, 0] == pytest.approx(min(0.0, min(counts, default=0.0) + math.log(2)))
    assert tests["agreement"] < -8


def test_layers_are_assigned_by_evidence_and_may_stay_alone():
    log_p = np.full((3, 4), -0.1)
    log_p[0, 2], log_p[1, 0], log_p[1, 3] = -50.0, -40.0, -30.0
    found = assign_layers(log_p, math.log(1e-3 / 12))
    assert found == LayerMap(((0, 2), (1, 0)), ((1, 3),), (2,), (1,))
    assert assign_layers(log_p.T, math.log(1e-3 / 12)).pairs == ((0, 1), (2, 0))


def test_the_map_in_words():
    found = LayerMap(((0, 0), (1, 1), (4, 2)), ((4, 3),), (2, 3), (4,))
    words = layer_map_sentence(found, 5, 5, [(9, 10), (10, 10), (10, 10)])
    assert words == (
        "3 of ft's 5 layers correspond to base's 5, in order (base 0-1 → ft 0-1, base 4 → ft 2); "
        "ft's layer 3 repeats base's 4; base's layers 2-3 left no trace; nothing of base resembles ft's layer 4; "
        "in the matched layers 29 of 30 units agree."
    )
    assert ranges([3, 1, 2, 7]) == "layers 1-3, 7"
    assert ranges([5]) == "layer 5"
