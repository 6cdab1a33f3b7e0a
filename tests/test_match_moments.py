"""`match_moments`: descriptors that no rewrite changes, and the descendants that `match` does not detect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rewritten_pairs
import tiny
from rewritten_pairs import changed

from tracing_jax.axes import axis_table
from tracing_jax.forward import logits
from tracing_jax.options import MOMENT_SCOPES
from tracing_jax.rewrites import permute, random_permutations
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory
from tracing_jax.statistics import Pair, Vocabularies, verdict
from tracing_jax.statistics.csu_procrustes import CsuProcrustes
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.layer_moments import layer_descriptors, layer_moments
from tracing_jax.statistics.match_moments import (
    PROJECTIONS,
    MatchMoments,
    descriptors,
)
from tracing_jax.statistics.unit_descriptors import descriptor_correlations, spread_layers

ARCH = tiny.llama_mha(num_layers=4, layer_ropes=(0,) * 4, layer_windows=(None,) * 4, mlp_dim=40)
BASE = tiny.model(ARCH, 0)
LAYERS = spread_layers(4, 8)
KEY = jax.random.key(7)


def pair_of(base, ft):
    nothing = np.zeros(0, np.int32)
    vocabularies = Vocabularies(False, nothing, nothing, known=False)  # not even the tokens are known
    return Pair(base, ft, vocabularies, None, Compute(make_mesh(1, 1), 4), seed=0)


def descriptors_of(model):
    return [{side: found for side, (found, _) in layer.items()} for layer in descriptors(model, LAYERS, LAYERS)]


@pytest.mark.parametrize("name", ["rotate", "gains", "units", "values", "queries"])
def test_rewrites_that_keep_units_in_place_do_not_change_their_descriptors(name):
    for given, hidden in zip(descriptors_of(BASE), descriptors_of(changed(BASE, name)), strict=True):
        for side in PROJECTIONS:
            np.testing.assert_allclose(hidden[side], given[side], rtol=0, atol=1e-4)


def test_a_permutation_of_units_permutes_their_descriptors():
    table = axis_table(ARCH)
    moved = random_permutations(jax.random.key(1), table, ["embed", "mlp"])
    hidden = InMemory(ARCH, permute(BASE.params, moved, table))
    for i, (given, found) in enumerate(zip(descriptors_of(BASE), descriptors_of(hidden), strict=True)):
        for side in PROJECTIONS:
            np.testing.assert_allclose(found[side], given[side][moved[f"layers/{i}/mlp"]], rtol=0, atol=1e-4)


def test_descriptors_are_those_of_numpy():
    rows = []
    for i in range(4):
        layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), BASE.layer(i))
        gain, mlp = layer["mlp_norm"]["scale"], layer["mlp"]
        sides = (mlp["gate_proj"]["kernel"].T * gain, mlp["up_proj"]["kernel"].T * gain, mlp["down_proj"]["kernel"])
        rows.append([side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides])
    expected = [np.log([np.square(unit @ other.T).mean() for layer in rows for other in layer]) for unit in rows[2][1]]
    np.testing.assert_allclose(descriptors_of(BASE)[2]["up"], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["permute", "rotate", "gains", "units", "values", "queries", "pad"])
def test_a_relative_with_foreign_embeddings_is_found_through_every_disguise(name):
    unrelated = tiny.model(ARCH, 1)
    related = tiny.noisy(BASE.params, 0.1) | {part: unrelated.params[part] for part in ("embed", "head")}
    result = MatchMoments().compute(pair_of(BASE, changed(InMemory(ARCH, related), name)))
    assert verdict({"match_moments": result}, 1e-3).verdict == "related"
    assert result.headline > 0.5


def test_means_of_reading_rows_that_norms_subtract_hide_nothing():
    """Behind a LayerNorm any multiple of ones may be added to gate and up rows: the inputs have mean zero."""
    arch = dataclasses.replace(ARCH, norm="layer_norm_plain")
    base, rng = tiny.model(arch, 0), np.random.default_rng(0)
    ft = InMemory(arch, tiny.noisy(base.params, 0.1))
    params, tokens = jax.tree.map(np.array, ft.params), np.arange(24, dtype=np.int32)[None]
    for layer in params["layers"].values():
        for name in ("gate_proj", "up_proj"):
            layer["mlp"][name]["kernel"] += 2 * rng.standard_normal(40).astype(np.float32)
    hidden = InMemory(arch, params)
    np.testing.assert_allclose(logits(hidden, tokens), logits(ft, tokens), atol=2e-3)
    for statistic, pair in ((MatchMoments(forms=("model",)), pair_of), (CsuProcrustes(), rewritten_pairs.pair_of)):
        given, found = (statistic.compute(pair(base, model)) for model in (ft, hidden))
        assert given.log10_p < -3
        assert found.log10_p == pytest.approx(given.log10_p, abs=0.5)


def test_independent_models_are_not_called_related_even_with_dead_and_twin_units():
    other = tiny.model(ARCH, 1)
    for layer in other.params["layers"].values():
        for name in ("gate_proj", "up_proj"):
            kernel = np.asarray(layer["mlp"][name]["kernel"]).copy()
            kernel[:, :8] = 0.0
            kernel[:, 8:12] = kernel[:, 12:16]
            bias = np.asarray(layer["mlp"][name]["bias"]).copy()
            bias[8:12] = bias[12:16]
            layer["mlp"][name] |= {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    result = MatchMoments().compute(pair_of(BASE, other))
    assert result.log10_p > -2
    assert result.tests[0].values["units"] == [28] * 4  # without zero units, and with one of each two twins


def test_dead_units_have_no_similarity():
    (base, *_), (ft, *_) = (list(descriptors(model, LAYERS, LAYERS)) for model in (BASE, tiny.model(ARCH, 1)))
    live = np.arange(40) > 4
    found = descriptor_correlations(base["gate"], (ft["gate"][0], live))
    assert not found[:, :5].any()
    assert found[:, 5:].any(axis=0).all()


def test_controls_set_the_allowance():
    control = tiny.model(ARCH, 5)
    pair = dataclasses.replace(pair_of(BASE, tiny.model(ARCH, 1)), controls=(control,))
    null = MatchMoments().compute(pair).null["moments"]
    assert "control models (1), each against base and ft" in null["u from"]
    assert max(null["u"]) < 0.4


def test_layers_of_deep_models_are_spread():
    assert spread_layers(4, 8) == [0, 1, 2, 3]
    assert spread_layers(32, 8) == [0, 4, 9, 13, 18, 22, 27, 31]
    assert spread_layers(1, 8) == [0]


def test_other_depth_is_refused_with_the_reason():
    deeper = tiny.llama_mha(num_layers=5, layer_ropes=(0,) * 5, layer_windows=(None,) * 5)
    (line,) = MatchMoments(forms=("model",)).not_applicable(ARCH, deeper, pair_of(BASE, BASE).vocabularies)
    assert "see match_all" in line


def layer_descriptors_of(model):
    return [{side: found for side, (found, _) in layer.items()} for layer in layer_descriptors(model, LAYERS, LAYERS)]


@pytest.mark.parametrize("name", ["rotate", "gains", "units", "values", "queries"])
def test_rewrites_do_not_change_descriptors_by_a_layers_own_weights(name):
    for given, hidden in zip(layer_descriptors_of(BASE), layer_descriptors_of(changed(BASE, name)), strict=True):
        for side in PROJECTIONS:
            np.testing.assert_allclose(hidden[side], given[side], rtol=0, atol=2e-3)


def test_moments_of_a_layer_are_those_of_numpy():
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), BASE.layer(2))
    gain, mlp = layer["mlp_norm"]["scale"], layer["mlp"]
    rows = mlp["gate_proj"]["kernel"].T * gain, mlp["up_proj"]["kernel"].T * gain, mlp["down_proj"]["kernel"]
    lengths = [np.linalg.norm(side, axis=1) for side in rows]
    weight = np.prod(lengths, axis=0)
    expected = [
        (side / length[:, None]).T @ np.diag(weight / weight.sum()) @ (side / length[:, None])
        for side, length in zip(rows, lengths)
    ]
    sums = np.zeros((4, 24, 24))
    for h in range(6):
        q, k, v = (layer["attn_norm"]["scale"][:, None] * layer["attn"][f"{n}_proj"]["kernel"].reshape(24, 6, 4)[:, h]
                   for n in "qkv")  # fmt: skip
        products = q @ k.T, layer["attn"]["o_proj"]["kernel"].reshape(6, 4, 24)[h].T @ v.T
        sums += [side @ side.T for product in products for side in (product, product.T)]
    expected += [total / np.trace(total) for total in sums]
    for found, moment in zip(layer_moments(BASE.layer(2), ARCH, distinct_units(BASE, 2)), expected, strict=True):
        np.testing.assert_allclose(found, moment, atol=1e-5)


@pytest.mark.parametrize("name", ["identity", "permute"])
def test_a_relative_of_another_depth_is_found_layer_by_layer(name):
    unrelated = tiny.model(ARCH, 1)
    related = tiny.noisy(BASE.params, 0.02) | {part: unrelated.params[part] for part in ("embed", "head")}
    hidden = changed(changed(InMemory(ARCH, related), "identity"), name)
    result = MatchMoments().compute(pair_of(BASE, hidden))
    assert len(result.layer_map["pairs"]) >= 2
    in_order = [pair["ft"] for pair in result.layer_map["pairs"]]
    assert in_order == sorted(in_order)
    assert verdict({"match_moments": result}, 1e-3).verdict == "related"
    deeper = tiny.llama_mha(num_layers=5, layer_ropes=(0,) * 5, layer_windows=(None,) * 5, mlp_dim=40)
    assert MatchMoments().compute(pair_of(BASE, tiny.model(deeper, 1))).log10_p > -1


def test_the_forms_are_two_tests_and_the_first_is_what_it_was_alone():
    pair = pair_of(BASE, InMemory(ARCH, tiny.noisy(BASE.params, 0.3)))
    both, alone = MatchMoments().compute(pair), MatchMoments(forms=("model",)).compute(pair)
    assert list(both.tests[: len(alone.tests)]) == list(alone.tests)
    assert [test.name for test in both.tests if test.decides][-1] == "layer moments, agreement, calibrated"
    assert both.null["moments"] == alone.null["moments"]


def test_drawn_layers_and_units_find_what_all_of_them_do():
    """And their test says which layers it read, clears nobody, and has no p-value where nothing is to be found."""
    noisy = InMemory(ARCH, jax.tree.map(lambda x: x + 0.01 * x.std() * jax.random.normal(KEY, x.shape), BASE.params))
    for form in MOMENT_SCOPES:
        some = MatchMoments(forms=(form,), layers=2, units=32)
        found = some.compute(pair_of(BASE, noisy))
        assert found.log10_p < -6
        test = found.tests[0]
        assert len(test.places) == 2
        assert set(test.places) < {f"layer {i}" for i in range(4)}
        assert f"layers {', '.join(name.split()[1] for name in test.places)} were drawn" in found.notes[0]
        assert max(test.values["units"]) == 32
        assert found.blind_to == ("layers that were not drawn",)
        assert some.compute(pair_of(BASE, tiny.model(ARCH, 1))).log10_p > -2
        permuted = random_permutations(jax.random.key(1), axis_table(ARCH), ["embed", "mlp"])
        hidden = InMemory(ARCH, permute(noisy.params, permuted, axis_table(ARCH)))
        assert some.compute(pair_of(BASE, hidden)).log10_p < -6
    shallow = dataclasses.replace(ARCH, num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3)
    nothing = pair_of(BASE, BASE).vocabularies
    assert not MatchMoments().not_applicable(ARCH, shallow, nothing)
    assert MatchMoments(layers=2).not_applicable(ARCH, shallow, nothing)
