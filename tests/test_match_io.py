"""`match_io`: units by what they read and write on shared tokens, through every rewrite that keeps the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import slow
from rewritten_pairs import IDS, agreeing, pair_of, pair_with_rewritten, related
from scipy.optimize import linear_sum_assignment

from tracing_jax.forward import logits
from tracing_jax.sources import InMemory
from tracing_jax.statistics import Vocabularies, verdict
from tracing_jax.statistics.match_io import MatchIo

DEEP = {"num_layers": 3, "layer_windows": (None,) * 3, "mlp_dim": 40}
GATED = tiny.llama_mha(**DEEP, layer_ropes=(0,) * 3)
UNGATED = tiny.gpt2(**DEEP)
ARCHS = {"gated": GATED, "ungated": UNGATED, "tied": tiny.gemma_mqa(**DEEP, layer_ropes=(0,) * 3)}
BASES = {name: tiny.model(arch, 0) for name, arch in ARCHS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_a_relative_is_found_and_an_independent_model_is_not(name):
    base = BASES[name]
    found = MatchIo().compute(pair_of(base, related(base, 0.1)))
    assert verdict({"match_io": found}, 1e-3).verdict == "related"
    assert found.headline > 0.8
    assert MatchIo().compute(pair_of(base, tiny.model(base.arch, 1))).log10_p > -1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rewrite"), [
    *[("gated", rewrite) for rewrite in ("rename", "gains", "units", "rotate", "permute")],
    ("ungated", "permute"), ("tied", "rotate"), ("ungated", "split,cancel,permute"), ("ungated", "rotate,means"),
    slow("gated", "split,cancel,permute"), slow("gated", "values"), slow("gated", "queries"),
    slow("ungated", "rename"), slow("tied", "permute"),
])  # fmt: skip
def test_no_rewrite_that_keeps_the_vocabulary_changes_it(name, rewrite):
    base, ft = BASES[name], related(BASES[name], 0.3)
    given, hidden = (MatchIo().compute(pair) for pair in (pair_of(base, ft), pair_with_rewritten(base, ft, rewrite)))
    for test, counts in agreeing(given).items():
        # Rounding may turn an assignment that is nearly tied.
        assert np.abs(np.array(agreeing(hidden)[test]) - counts).max() <= 1, test
    assert given.headline > 0.5


@pytest.mark.slow
def test_padded_units_take_no_part():
    base, ft = BASES["gated"], related(BASES["gated"], 0.3)
    given, padded = (MatchIo().compute(pair) for pair in (pair_of(base, ft), pair_with_rewritten(base, ft, "pad")))
    assert agreeing(padded) == agreeing(given)
    assert padded.tests[0].values["units"] == [40] * 3


def correlation(a, b):
    return np.abs(np.corrcoef(a, b)[: len(a), len(a) :])


def rows_of(model, layer):
    """Returns the responses and the effects of a GPT-2's units, in float64, tokens last."""
    layer, head, embedding = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), (model.layer(layer), model.head(), model.embed()["embedding"])
    )
    centred, written = (x - x.mean(1, keepdims=True) for x in (embedding, embedding * head["norm"]["scale"]))
    up = layer["mlp_norm"]["scale"][:, None] * layer["mlp"]["up_proj"]["kernel"]
    return (centred @ up).T, (written @ layer["mlp"]["down_proj"]["kernel"].T).T


def test_counts_are_those_of_numpy():
    base, ft = BASES["ungated"], related(BASES["ungated"], 1.0)
    expected = []
    for i in range(3):
        (up, effect), (up_ft, effect_ft) = rows_of(base, i), rows_of(ft, i)
        matched = [
            linear_sum_assignment(correlation(*side), maximize=True)[1] for side in ((up, up_ft), (effect, effect_ft))
        ]
        expected.append(int((matched[0] == matched[1]).sum()))
    found = agreeing(MatchIo().compute(pair_of(base, ft)))
    assert found["up and effect, agreement, calibrated"] == expected
    assert 4 < sum(expected) < 110


def changed_mlps(model, change):
    params = jax.tree.map(jnp.asarray, model.params)
    for i, layer in params["layers"].items():
        layer["mlp"] = change(layer, np.random.default_rng(int(i)))
    return InMemory(model.arch, params)


@pytest.mark.slow
def test_biases_of_the_mlp_and_what_layer_norms_subtract_do_not_matter():
    base, ft = BASES["ungated"], related(BASES["ungated"], 0.3)

    def with_mean(layer, rng):
        """Adds to each row what the norm before the MLP takes out of every input."""
        up, norm = layer["mlp"]["up_proj"], layer["mlp_norm"]
        added = rng.normal(size=40) / norm["scale"][:, None]
        moved = {"kernel": up["kernel"] + added, "bias": up["bias"] - norm["bias"] @ added}
        return layer["mlp"] | {"up_proj": {name: jnp.asarray(leaf, jnp.float32) for name, leaf in moved.items()}}

    def with_biases(layer, rng):
        return layer["mlp"] | {
            name: layer["mlp"][name] | {"bias": jnp.asarray(rng.normal(size=width), jnp.float32)}
            for name, width in (("up_proj", 40), ("down_proj", 24))
        }

    tokens = np.arange(20)[None]
    np.testing.assert_allclose(logits(changed_mlps(ft, with_mean), tokens), logits(ft, tokens), atol=0.05)
    given = agreeing(MatchIo().compute(pair_of(base, ft)))
    for change in (with_mean, with_biases):
        found = agreeing(MatchIo().compute(pair_of(base, changed_mlps(ft, change))))
        for test, counts in given.items():
            assert np.abs(np.array(found[test]) - counts).max() <= 1, (change, test)


def test_copied_units_that_write_nothing_are_no_evidence():
    """Ten units of the other model, appended with zero down rows, keep the function and take no part."""
    other = tiny.model(GATED, 1)
    params = jax.tree.map(np.array, other.params)
    for i, layer in params["layers"].items():
        for name in ("gate_proj", "up_proj"):
            layer["mlp"][name]["kernel"][:, :10] = np.asarray(BASES["gated"].layer(int(i))["mlp"][name]["kernel"])[
                :, :10
            ]
        layer["mlp"]["down_proj"]["kernel"][:10] = 0
    planted = InMemory(GATED, jax.tree.map(jnp.asarray, params))
    found = MatchIo().compute(pair_of(BASES["gated"], planted))
    assert found.tests[0].values["units"] == [30] * 3
    assert found.log10_p > -1


@pytest.mark.slow
def test_independent_models_agree_on_one_unit_as_random_matchings_do():
    models = [tiny.model(UNGATED, seed) for seed in range(12)]
    counts = [
        agreeing(MatchIo().compute(pair_of(*both)))["up and effect, agreement, parametric"]
        for both in zip(models[::2], models[1::2])
    ]
    assert 0.4 < np.mean(counts) < 2.0  # 18 layers, Poisson(1): four standard deviations are 0.94
    assert np.max(counts) <= 6


def test_sampled_units_and_tokens_are_enough():
    base, ft = BASES["gated"], related(BASES["gated"], 0.1)
    found = MatchIo(units=16, max_tokens=48).compute(pair_of(base, ft))
    assert found.tests[0].values["units"] == [16] * 3
    assert found.headline > 0.8


def test_control_models_set_the_allowance():
    base = BASES["gated"]
    vocabularies = Vocabularies(False, IDS, IDS[::-1].copy())
    pair = pair_of(base, tiny.model(GATED, 1), vocabularies, controls=(tiny.model(GATED, 5),))
    null = MatchIo().compute(pair).null["up and effect"]
    assert "control models (1), each against base and ft" in null["u from"]


def test_what_does_not_apply_says_why():
    none, same = (Vocabularies(True, ids, ids) for ids in (IDS[:3], IDS))
    assert MatchIo().not_applicable(GATED, GATED, same) == []
    assert MatchIo().not_applicable(GATED, UNGATED, same) == []
    assert "share 3 tokens" in MatchIo().not_applicable(GATED, GATED, none)[0]
    assert "see match_all" in MatchIo().not_applicable(GATED, tiny.llama_mha(), same)[0]
    experts = MatchIo().not_applicable(tiny.mixtral(), tiny.mixtral(), same)
    assert experts[0].startswith("base has experts")
