"""`match_crossfit`: a rotation learnt from some layers' MLPs, and the agreement of the others under it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from cases import slow
from rewritten_pairs import agreeing, changed, pair_of, pair_with_rewritten, related
from scipy.optimize import linear_sum_assignment

from tracing_jax.sources import InMemory
from tracing_jax.statistics import Vocabularies, unit_alignment, verdict
from tracing_jax.statistics.csu import Csu
from tracing_jax.statistics.distinct_units import all_units
from tracing_jax.statistics.match_crossfit import (
    REPEATED,
    MatchCrossfit,
    control_places,
    folds,
)
from tracing_jax.statistics.repeated_layers import repeated_layers
from tracing_jax.statistics.unit_alignment import learn_rotation, row_similarities, units_of, weighted_moments

DEEP = {"num_layers": 4, "layer_windows": (None,) * 4, "mlp_dim": 48}
GATED = tiny.llama_mha(**DEEP, layer_ropes=(0,) * 4)
UNGATED = tiny.gpt2(**DEEP)
ARCHS = {"gated": GATED, "ungated": UNGATED}
BASES = {name: tiny.model(arch, 0) for name, arch in ARCHS.items()}
FOREIGN = ("embed", "head")
NO_VOCABULARY = np.zeros(0, np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_a_relative_with_foreign_embeddings_is_found_and_an_independent_model_is_not(name):
    base = BASES[name]
    found = MatchCrossfit().compute(pair_of(base, related(base, 0.1, FOREIGN)))
    assert verdict({"match_crossfit": found}, 1e-3).verdict == "related"
    assert found.headline > 0.9
    assert MatchCrossfit().compute(pair_of(base, tiny.model(base.arch, 1))).log10_p > -1


@pytest.mark.parametrize(("name", "rewrite"), [
    ("gated", "rotate"), ("ungated", "permute"), ("ungated", "rotate,means"),
    *[slow("gated", rewrite) for rewrite in ("permute", "gains", "units", "pad", "split,cancel,permute")],
])  # fmt: skip
def test_no_rewrite_hides_a_relative(name, rewrite):
    base, ft = BASES[name], related(BASES[name], 0.1, FOREIGN)
    given, hidden = (
        MatchCrossfit().compute(pair) for pair in (pair_of(base, ft), pair_with_rewritten(base, ft, rewrite))
    )
    for test, counts in agreeing(given).items():
        assert np.abs(np.array(agreeing(hidden)[test]) - counts).max() <= 2, test


def test_some_units_keep_the_order_of_the_projections():
    """The first pairs are those of the gates, whose sign is fixed: rows in another order lose the rotation."""
    arch = tiny.llama_mha()
    units = units_of(tiny.params_of(arch)["layers"]["0"], arch, all_units(arch.mlp_dim))
    which = np.array([3, 1, 5])
    some = units.some(which)
    assert list(some.rows) == list(units.rows) == ["gate", "up", "down"]
    for name, rows in units.rows.items():
        np.testing.assert_array_equal(some.rows[name], np.asarray(rows)[which])


def test_a_planted_rotation_comes_back():
    rotation = scipy.stats.special_ortho_group(24, 0).rvs().astype(np.float32)
    base = [units_of(BASES["gated"].layer(i), GATED, all_units(GATED.mlp_dim)) for i in (0, 1)]
    order = np.random.default_rng(0).permutation(48)
    ft = [layer.some(order) for layer in base]
    turned = [
        type(layer)({name: side @ rotation.T for name, side in layer.rows.items()}, layer.live, layer.weight)
        for layer in ft
    ]
    moments = tuple([m for layer in side for m in weighted_moments(layer)] for side in (base, turned))
    found = learn_rotation(base, turned, moments, np.random.default_rng(1))
    np.testing.assert_allclose(np.asarray(found), rotation, atol=1e-3)
    similarities = row_similarities(base[0], turned[0], found)
    for side in similarities.values():
        np.testing.assert_allclose(np.diag(np.asarray(side)[order]), 1, atol=1e-4)

    # Units that take no part are not seen, and of fewer pairs of units nothing is compiled anew.
    programs = (unit_alignment._some_rows, unit_alignment._crosses, unit_alignment._sums_of_cosines)
    before = [program._cache_size() for program in programs]
    idle = [replace(layer, live=np.arange(48) >= 5) for layer in base]
    idle_ft = [replace(layer, live=order >= 5) for layer in turned]
    found = learn_rotation(idle, idle_ft, moments, np.random.default_rng(1))
    np.testing.assert_allclose(np.asarray(found), rotation, atol=1e-3)
    assert [program._cache_size() for program in programs] == before
    for side in row_similarities(idle[0], idle_ft[0], found).values():
        assert not np.asarray(side)[:5].any()
        assert not np.asarray(side)[:, order < 5].any()


def test_matching_under_the_rotation_is_that_of_numpy(monkeypatch):
    """With the identity in place of the learnt rotation, the counts are those of cosines of weights."""
    import tracing_jax.statistics.match_crossfit as module

    monkeypatch.setattr(module, "learn_rotation", lambda base, *_: jnp.eye(24))
    base, ft = BASES["gated"], related(BASES["gated"], 1.5)
    found = agreeing(MatchCrossfit().compute(pair_of(base, ft)))
    expected = []
    for i in (0, 2):
        cosines = []
        for name in ("gate_proj", "up_proj"):
            a, b = (
                np.asarray(m.layer(i)["mlp"][name]["kernel"], np.float64).T
                * np.asarray(m.layer(i)["mlp_norm"]["scale"])
                for m in (base, ft)
            )
            cosines.append(a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1))
        gate, up = (linear_sum_assignment(c, maximize=True)[1] for c in (cosines[0], np.abs(cosines[1])))
        expected.append(int((gate == up).sum()))
    assert found["gate and up, even and odd layers, agreement, calibrated"][::2] == expected
    assert 4 < sum(expected) < 90


def test_the_rotation_does_not_depend_on_the_layers_held_out():
    base, ft = BASES["gated"], related(BASES["gated"], 0.3)
    other = tiny.model(GATED, 1).params["layers"]
    changed = InMemory(GATED, ft.params | {"layers": ft.params["layers"] | {i: other[i] for i in ("0", "2")}})
    fold = folds(4)[0]
    assert (list(fold.train), list(fold.held_out)) == ([1, 3], [0, 2])
    given, after = (MatchCrossfit()._rotation(pair_of(base, model), fold, "pair") for model in (ft, changed))
    np.testing.assert_array_equal(np.asarray(given), np.asarray(after))


@pytest.mark.slow
def test_planted_units_of_no_effect_do_not_move_the_rotation():
    """A quarter of ft's units are replaced by units of an unrelated model that write next to nothing."""
    base, ft = BASES["gated"], related(BASES["gated"], 0.1)
    other, params = tiny.model(GATED, 1), jax.tree.map(np.array, ft.params)
    for i, layer in params["layers"].items():
        for name in ("gate_proj", "up_proj"):
            layer["mlp"][name]["kernel"][:, :12] = np.asarray(other.layer(int(i))["mlp"][name]["kernel"])[:, :12]
        layer["mlp"]["down_proj"]["kernel"][:12] *= 1e-4
    planted = InMemory(GATED, jax.tree.map(jnp.asarray, params))
    assert MatchCrossfit().compute(pair_of(base, planted)).headline > 0.6


@pytest.mark.slow
def test_independent_models_agree_on_one_unit_as_random_matchings_do():
    models = [tiny.model(UNGATED, seed) for seed in range(8)]
    counts = [
        agreeing(MatchCrossfit().compute(pair_of(*both)))["up and down, halves, agreement, parametric"]
        for both in zip(models[::2], models[1::2])
    ]
    assert 0.0 < np.mean(counts) < 2.0  # 16 layers, Poisson(1): four standard deviations are 1
    assert np.max(counts) <= 6


def test_every_layer_is_held_out_twice_and_never_trained_on_then():
    for num_layers in (2, 5):
        found = folds(num_layers)
        assert sorted(i for fold in found for i in fold.held_out) == sorted([*range(num_layers)] * 2)
        assert all(sorted([*fold.train, *fold.held_out]) == [*range(num_layers)] for fold in found)


def test_controls_are_held_out_layers_that_do_not_correspond():
    rng = np.random.default_rng(0)
    for num_layers, least, count in ((2, 1, 0), (4, 1, 8), (12, 2, 64)):
        places = control_places(folds(num_layers), rng)
        assert len(places) == count
        for f, i, j in places:
            assert {i, j} <= set(folds(num_layers)[f].held_out)
            assert abs(i - j) >= least


@pytest.mark.slow
def test_control_models_set_the_allowance():
    pair = pair_of(BASES["gated"], tiny.model(GATED, 1), controls=(tiny.model(GATED, 5),))
    null = MatchCrossfit().compute(pair).null["gate and up, halves"]
    assert "control models (1)" in null["u from"]
    assert len(null["u"]) == 4


def test_what_does_not_apply_says_why():
    nothing = Vocabularies(False, NO_VOCABULARY, NO_VOCABULARY, known=False)
    assert MatchCrossfit().not_applicable(GATED, GATED, nothing) == []
    assert (
        MatchCrossfit().not_applicable(GATED, tiny.llama_mha(**DEEP, layer_ropes=(0,) * 4, embed_dim=30), nothing) == []
    )
    assert "only one model has gates" in MatchCrossfit().not_applicable(GATED, UNGATED, nothing)[0]
    assert "see match_all" in MatchCrossfit().not_applicable(GATED, tiny.llama_mha(), nothing)[0]
    assert "experts" in MatchCrossfit().not_applicable(tiny.mixtral(), tiny.mixtral(), nothing)[0]
    single = tiny.llama_mha(num_layers=1, layer_ropes=(0,), layer_windows=(None,))
    assert "one layer" in MatchCrossfit().not_applicable(single, single, nothing)[0]


def test_layers_that_repeat_others_are_evidence_of_nothing():
    """Of unrelated models whose layers are used twice, the rotation is learnt from the layers held out."""

    def repeated(model):
        layers = {str(i): model.params["layers"][str(i // 2)] for i in range(4)}
        return InMemory(model.arch, model.params | {"layers": layers})

    def halved(model):
        layers = {str(i): model.params["layers"][str(i)] for i in range(2)}
        return InMemory(model.arch.with_layers([0, 1]), model.params | {"layers": layers})

    one, other = (tiny.model(GATED, seed) for seed in (0, 1))
    assert (repeated_layers(one), repeated_layers(repeated(one))) == ([], [1, 3])
    for names in ("units", "gains", "rotate", "permute", "pad"):
        assert repeated_layers(changed(repeated(one), names)) == [1, 3], names
    single, doubled = (Csu().compute(pair_of(f(one), f(other))) for f in (halved, repeated))
    assert [test.places for test in doubled.tests] == [["layer 0", "layer 2"]] * 3
    assert doubled.tests[1].values["agreeing"] == single.tests[1].values["agreeing"]
    found = MatchCrossfit().compute(pair_of(repeated(one), repeated(other)))
    assert found.firm_log10_p == 0.0
    assert found.reservation == REPEATED
    assert MatchCrossfit().compute(pair_of(one, repeated(other))).reservation != REPEATED
