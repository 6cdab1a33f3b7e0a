"""Every MLP against every MLP: experts of a mixture, dense layers, and copies of one MLP in several experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rewritten_pairs import SAME, pair_of

from tracing_jax.options import RunOptions
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sources import InMemory, MlpsAsLayers, in_memory, rewritten
from tracing_jax.statistics import make_statistic
from tracing_jax.statistics.match_mlps import MatchMlps, chosen_places

MIXTURE = tiny.mixtral(mlp_dim=48)
DENSE = dataclasses.replace(MIXTURE, num_experts=None, experts_per_token=None)
EXPERTS = 3


def upcycled(dense, noise=0.1):
    """A mixture whose experts are all the MLP of the layer, each with noise of its own."""
    rng = np.random.default_rng(0)
    fresh = tiny.model(MIXTURE, 9)
    layers = {}
    for i, layer in dense.params["layers"].items():
        mlp = {"router": fresh.params["layers"][i]["mlp"]["router"]}
        for name in ("gate_proj", "up_proj", "down_proj"):
            kernel = np.asarray(layer["mlp"][name]["kernel"])
            copies = np.stack([kernel] * EXPERTS)
            moved = copies + noise * kernel.std() * rng.standard_normal(copies.shape)
            mlp[name] = {"kernel": jnp.asarray(moved, jnp.float32)}
        layers[i] = {**layer, "mlp": mlp}
    return InMemory(MIXTURE, {**dense.params, "layers": layers})


def after(model, names):
    hidden = in_memory(rewritten(model, draw_rewrites(names, jax.random.key(3), model.arch)))
    return InMemory(hidden.arch, jax.tree.map(jnp.asarray, hidden.params))


def noisy(model, noise=0.1):
    rng = np.random.default_rng(0)
    return InMemory(
        model.arch,
        jax.tree.map(lambda w: w + noise * w.std() * rng.standard_normal(w.shape).astype(np.float32), model.params),
    )


def pairs_in(result):
    return {(row["base"], row["ft"]) for row in result.layer_map["pairs"] + result.layer_map["copies"]}


def test_an_mlp_is_a_layer_with_the_weights_of_one_expert():
    model = tiny.model(MIXTURE, 0)
    mlps = MlpsAsLayers(model)
    assert (mlps.arch.num_layers, mlps.arch.num_experts, mlps.name(4)) == (6, None, "layer 1 expert 1")
    np.testing.assert_array_equal(
        mlps.layer(4)["mlp"]["up_proj"]["kernel"], model.params["layers"]["1"]["mlp"]["up_proj"]["kernel"][1]
    )
    assert set(mlps.layer(4, ("mlp_norm",))) == {"mlp_norm"}
    dense = tiny.model(DENSE, 0)
    assert MlpsAsLayers(dense).name(1) == "layer 1"
    np.testing.assert_array_equal(
        MlpsAsLayers(dense).layer(1)["mlp"]["up_proj"]["kernel"],
        dense.params["layers"]["1"]["mlp"]["up_proj"]["kernel"],
    )


def test_each_expert_of_an_upcycled_mixture_comes_from_the_dense_mlp_of_its_layer():
    dense = tiny.model(DENSE, 0)
    result = MatchMlps().compute(pair_of(dense, upcycled(dense)))
    assert pairs_in(result) == {(layer, EXPERTS * layer + expert) for layer in (0, 1) for expert in range(EXPERTS)}
    assert result.headline == 1
    assert result.firm_log10_p is None or result.firm_log10_p < -10
    in_place = next(test for test in result.tests if test.name == "units in place, agreement")
    # Of each layer the first expert: the others repeat it.
    assert list(in_place.places) == [f"base layer {i} : ft layer {i} expert 0" for i in (0, 1)]
    assert min(k / n for k, n in zip(in_place.values["agreeing"], in_place.values["units"])) > 0.9


def test_experts_that_repeat_one_another_in_a_stranger_are_one_piece_of_evidence():
    stranger, base = tiny.model(DENSE, 1), tiny.model(DENSE, 0)
    once = MatchMlps().compute(pair_of(base, stranger))
    several = MatchMlps().compute(pair_of(base, upcycled(stranger, noise=0.0)))
    assert several.layer_map["pairs"] == []
    for test in several.tests:
        if test.name.startswith("units in place"):
            assert len(test.places) <= 2 * DENSE.num_layers
    ps = [next(t.log10_p for t in found.tests if t.name == "units in place, agreement") for found in (once, several)]
    assert ps[1] > ps[0] - 1


def test_permuted_experts_and_units_are_found_again():
    base = tiny.model(MIXTURE, 0)
    moved = after(base, "permute")
    result = MatchMlps().compute(pair_of(base, moved))
    found = {ft: base for base, ft in pairs_in(result)}
    assert len(found) == 6
    assert all(base // EXPERTS == ft // EXPERTS for ft, base in found.items())
    router = [np.asarray(m.params["layers"]["0"]["mlp"]["router"]["kernel"]) for m in (base, moved)]
    norms = [np.linalg.norm(kernel, axis=0) for kernel in router]
    for ft in range(EXPERTS):
        assert norms[1][ft] == pytest.approx(norms[0][found[ft]], rel=1e-5)


@pytest.mark.parametrize("other", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_strangers_have_no_mlp_in_common_and_alignment_silences(other):
    base, unrelated = tiny.model(MIXTURE, 0), tiny.model(other, 1)
    result = MatchMlps().compute(pair_of(base, unrelated))
    assert not pairs_in(result)
    assert result.log10_p > -2
    assert "None of ft's" in result.layer_map["sentence"]
    aligned = MatchMlps().compute(pair_of(base, base, aligned=True))
    assert aligned.log10_p is None
    assert aligned.layer_map is None


def test_of_large_mixtures_some_mlps_are_looked_for_among_those_of_their_layers():
    base = tiny.model(MIXTURE, 0)
    hidden = after(noisy(base), "permute")
    result = MatchMlps(max_pairs=12).compute(pair_of(base, hidden))
    assert "2 of base's 6 MLPs were drawn, and matched to the 6 of ft's layers 0, 1" in result.notes[0]
    assert (result.headline, len(pairs_in(result))) == (1.0, 2)
    assert result.blind_to == ("MLPs that were not drawn",)
    assert MatchMlps().compute(pair_of(base, hidden)).blind_to is None
    assert result.log10_p < -3
    unrelated = MatchMlps(max_pairs=12).compute(pair_of(base, tiny.model(MIXTURE, 1)))
    assert unrelated.headline == 0
    assert unrelated.log10_p > -2


@pytest.mark.parametrize(("experts", "layers", "drawn"), [(128, 4, 2), (256, 4, 1), (64, 4, 4), (4096, 1, 1)])
def test_no_more_pairs_are_compared_than_are_allowed(experts, layers, drawn):
    large = dataclasses.replace(
        MIXTURE, num_experts=experts, num_layers=48, layer_ropes=(0,) * 48, layer_windows=(None,) * 48
    )
    ours, theirs = chosen_places(large, large, 4096, np.random.default_rng(0))
    assert len(ours) * len(theirs) <= 4096
    assert (len(ours), len(theirs)) == (layers * drawn, layers * experts)
    assert {layer for layer, _ in ours} == {layer for layer, _ in theirs}


def test_what_does_not_apply_says_why():
    assert "base has no gate, the other has" in MatchMlps().not_applicable(tiny.gpt2(), DENSE, SAME)[0]
    deep = dataclasses.replace(MIXTURE, num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3)
    assert "54 pairs of MLPs" in MatchMlps(max_pairs=53).not_applicable(MIXTURE, deep, SAME)[0]
    assert MatchMlps(max_pairs=12).not_applicable(MIXTURE, MIXTURE, SAME) == []
    assert MatchMlps().not_applicable(MIXTURE, DENSE, SAME) == []
    assert make_statistic("match_mlps", RunOptions(level=0.01)).level == 0.01
