"""`features_in_place`: one matching of features over all matrices, exact, whatever was done to units or tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from rewritten_pairs import NO_TOKENS, SAME, pair_of
from scipy.optimize import linear_sum_assignment

from tracing_jax.axes import axis_table
from tracing_jax.rewrites import draw_rewrites, permute, random_permutations
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.statistics import features_in_place, verdict
from tracing_jax.statistics.features_in_place import FeaturesInPlace

ARCH = tiny.llama_mha()
BASE = tiny.model(ARCH, 0)
RELATED = InMemory(ARCH, tiny.noisy(BASE.params, 1.0))


def changed(model, kinds, seed=1):
    table = axis_table(model.arch)
    return InMemory(model.arch, permute(model.params, random_permutations(jax.random.key(seed), table, kinds), table))


@pytest.mark.slow
def test_p_values_of_independent_models_are_uniform():
    """Also where some features are constant in the embedding, and others large, at the same places in both."""
    p_values, agreeing = [], []
    for i in range(30):
        base, ft = (tiny.params_of(ARCH, 100 + 2 * i + side) for side in (0, 1))
        base["embed"]["embedding"] = jnp.asarray(base["embed"]["embedding"]).at[:, 20:].set(0.5)
        base["embed"]["embedding"] = base["embed"]["embedding"].at[:, :6].mul(30)
        agreement, rank, _ = FeaturesInPlace().compute(pair_of(InMemory(ARCH, base), InMemory(ARCH, ft), seed=i)).tests
        p_values.append(10**rank.log10_p)
        agreeing += agreement.values["agreeing"]
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(agreeing) == pytest.approx(1, abs=4 / 30**0.5)  # of a random permutation, with variance 1


@pytest.mark.slow
def test_features_that_stay_are_found_and_move_with_those_of_one_model():
    result = FeaturesInPlace().compute(pair_of(BASE, RELATED))
    assert result.headline == 1
    assert result.log10_p == pytest.approx(-math.lgamma(25) / math.log(10), abs=1e-3)
    assert [test.decides for test in result.tests] == [True, False, False]
    assert verdict({"features_in_place": result}, 1e-3).verdict == "undecided"  # the p-value is reserved
    table = axis_table(ARCH)
    moved = random_permutations(jax.random.key(3), table, ["embed"])
    found = FeaturesInPlace().compute(pair_of(BASE, InMemory(ARCH, permute(RELATED.params, moved, table))))
    assert found.tests[0].values["agreeing"] == [int((moved["embed"] == np.arange(24)).sum())]
    assert found.tests[1].values["r"][0] == pytest.approx(np.corrcoef(np.argsort(moved["embed"]), np.arange(24))[0, 1])


def test_features_of_a_stranger_that_were_put_in_order_afterwards_are_no_evidence():
    """Whoever has both models can permute the features of one until the matching is the identity."""
    pair, table = pair_of(BASE, tiny.model(ARCH, 5)), axis_table(ARCH)
    similarity = np.asarray(FeaturesInPlace()._summed(pair, features_in_place._matrices(pair)))
    matched = linear_sum_assignment(np.abs(similarity), maximize=True)[1]
    sorted_ = InMemory(ARCH, permute(pair.ft.params, {"embed": matched}, table))
    result = FeaturesInPlace().compute(pair_of(BASE, sorted_))
    assert result.log10_p < -10
    assert result.firm_log10_p > -3
    assert verdict({"features_in_place": result}, 1e-3).verdict == "undecided"


@pytest.mark.parametrize("name", ["gains", "units", "values", "queries"])
def test_rewrites_that_leave_features_in_place_hide_nothing(name):
    after = in_memory(rewritten(RELATED, draw_rewrites(name, jax.random.key(7), ARCH)))
    found = FeaturesInPlace().compute(pair_of(BASE, InMemory(ARCH, jax.tree.map(jnp.asarray, after.params))))
    assert found.headline == 1


def test_units_heads_and_tokens_may_be_others():
    assert FeaturesInPlace().compute(pair_of(BASE, changed(RELATED, ["mlp", "kv_heads"]))).headline > 0.8
    foreign = tiny.model(ARCH, 9).params
    swapped = InMemory(ARCH, RELATED.params | {part: foreign[part] for part in ("embed", "head")})
    assert FeaturesInPlace().compute(pair_of(BASE, swapped)).headline > 0.5
    found = FeaturesInPlace().compute(pair_of(BASE, RELATED, NO_TOKENS))
    assert found.headline > 0.9
    assert "embedding, lm_head" in found.notes[0]


def correlations(a, b):
    rows = [np.moveaxis(np.asarray(m, np.float64), axis, 0).reshape(24, -1) for m, axis in (a, b)]
    return np.corrcoef(*rows)[:24, 24:]


def test_the_features_are_those_that_numpy_finds():
    ft = InMemory(ARCH, tiny.noisy(BASE.params, 6.0))
    total = correlations((BASE.params["embed"]["embedding"], 1), (ft.params["embed"]["embedding"], 1))
    heads = [
        (np.asarray(m.params["head"]["lm_head"]["kernel"]) * np.asarray(m.params["head"]["norm"]["scale"])[:, None], 0)
        for m in (BASE, ft)
    ]
    total += correlations(*heads)
    for i in range(2):
        layers = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), m.layer(i)) for m in (BASE, ft)]
        for part, norm, names in (
            ("attn", "attn_norm", ("q_proj", "k_proj", "v_proj")), ("mlp", "mlp_norm", ("gate_proj", "up_proj"))
        ):  # fmt: skip
            for name in names:
                gains = [layer[norm]["scale"] for layer in layers]
                kernels = [layer[part][name]["kernel"] for layer in layers]
                total += correlations(*((k * g.reshape(-1, *[1] * (k.ndim - 1)), 0) for k, g in zip(kernels, gains)))
        for part, name in (("attn", "o_proj"), ("mlp", "down_proj")):
            total += correlations(*((layer[part][name]["kernel"], -1) for layer in layers))
    expected = (linear_sum_assignment(np.abs(total), maximize=True)[1] == np.arange(24)).sum()
    found = FeaturesInPlace().compute(pair_of(BASE, ft)).tests[0]
    assert 3 < expected < 24
    assert found.values["agreeing"] == [expected]


def test_large_matrices_are_sampled(monkeypatch):
    ft = InMemory(ARCH, tiny.noisy(BASE.params, 3.0))
    whole = FeaturesInPlace().compute(pair_of(BASE, ft)).headline
    for name in ("_COLUMNS", "_TOKENS"):
        monkeypatch.setattr(features_in_place, name, 12)
    shares = [FeaturesInPlace().compute(pair_of(BASE, ft, seed=seed)).headline for seed in range(4)]
    assert 0.2 < min(shares) < max(shares) < whole


@pytest.mark.parametrize("arch", [tiny.qwen3_gqa(), tiny.gemma_mqa(), tiny.olmo2_gqa(), tiny.gpt2(), tiny.mixtral()],
                         ids=lambda arch: arch.family)  # fmt: skip
def test_every_family_has_features(arch):
    base = tiny.model(arch, 0)
    assert FeaturesInPlace().not_applicable(arch, arch, SAME) == []
    assert FeaturesInPlace().compute(pair_of(base, InMemory(arch, tiny.noisy(base.params, 0.3)))).headline == 1
    assert FeaturesInPlace().compute(pair_of(base, tiny.model(arch, 1))).log10_p > -3


def test_an_upcycled_model_and_one_of_other_depth_are_compared_on_what_they_share():
    experts = tiny.mixtral(num_layers=1, layer_ropes=(0,), layer_windows=(None,))
    dense = dataclasses.replace(tiny.llama_mha(), num_kv_heads=3, q_group=2, qkv_bias=False)
    base, ft = tiny.model(dense, 0), tiny.model(experts, 1)
    ft.params["embed"], ft.params["head"] = base.params["embed"], base.params["head"]
    found = FeaturesInPlace().compute(pair_of(base, ft))
    assert found.headline == 1
    assert "2 and 1 layers" in found.notes[0]
    assert "down_proj, gate_proj, up_proj" in found.notes[1]


def test_an_interrupted_sum_is_continued(tmp_path, monkeypatch):
    expected, calls = FeaturesInPlace().compute(pair_of(BASE, RELATED)), []
    kept = RunCache(tmp_path)
    monkeypatch.setattr("tracing_jax.run_cache.WriteBudget.allows", lambda budget, num_bytes: True)
    add = features_in_place._with_correlations

    def dying(*given):
        calls.append(0)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return add(*given)

    monkeypatch.setattr(features_in_place, "_with_correlations", dying)
    with pytest.raises(KeyboardInterrupt):
        FeaturesInPlace().compute(pair_of(BASE, RELATED, run_cache=kept))
    assert FeaturesInPlace().compute(pair_of(BASE, RELATED, run_cache=kept)).tests == expected.tests
    assert len(calls) == 10 + 1 + 7 + 1 + 7 - 8  # the embedding and layer 0 were kept
    assert not list(tmp_path.rglob("*.npz"))


def test_what_does_not_apply_says_why():
    (line,) = FeaturesInPlace().not_applicable(ARCH, dataclasses.replace(ARCH, embed_dim=8), SAME)
    assert "different width" in line
    aligned = FeaturesInPlace().compute(pair_of(BASE, RELATED, aligned=True))
    assert (aligned.log10_p, aligned.headline) == (None, 1)
