"""`heads_in_place`: descriptors that no rotation changes, and an exact null over kv heads and their queries."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
import tiny
from rewritten_pairs import NO_TOKENS, SAME, changed, pair_of
from scipy.optimize import linear_sum_assignment

from tracing_jax.axes import axis_table
from tracing_jax.rewrites import MeanSetting, permute, random_permutations
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.statistics import verdict
from tracing_jax.statistics.head_descriptors import descriptor_cosines, head_descriptors, moments_of_layers
from tracing_jax.statistics.heads_in_place import HeadsInPlace
from tracing_jax.statistics.nulls import total_agreement_log_sf

DEPTH = {"num_layers": 4, "layer_ropes": (0,) * 4, "layer_windows": (None,) * 4}
ARCH = tiny.llama_mha(num_kv_heads=3, q_group=2, **DEPTH)
BASE = tiny.model(ARCH, 0)
RELATED = InMemory(ARCH, tiny.noisy(BASE.params, 0.02))


def permuted(model, kinds, seed=3):
    table = axis_table(model.arch)
    moved = random_permutations(jax.random.key(seed), table, kinds)
    return InMemory(model.arch, permute(model.params, moved, table)), moved


def fixed_points(sizes):
    """The exact tail by listing all permutations."""
    counts = np.zeros(sum(sizes) + 1)
    for chosen in itertools.product(*(list(itertools.permutations(range(n))) for n in sizes)):
        counts[sum(int((np.array(p) == np.arange(len(p))).sum()) for p in chosen)] += 1
    return np.cumsum(counts[::-1])[::-1] / counts.sum()


@pytest.mark.parametrize("sizes", [(1,), (4,), (3, 2, 2), (2, 2, 2, 2), (5, 3)])
def test_the_total_of_fixed_points_has_the_distribution_of_all_permutations(sizes):
    expected = fixed_points(sizes)
    found = np.exp([total_agreement_log_sf(k, sizes) for k in range(sum(sizes) + 1)])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_tail_goes_far_below_floats():
    sizes = [8, *[4] * 8] * 32
    every = -sum(math.lgamma(n + 1) for n in sizes)
    assert total_agreement_log_sf(sum(sizes), sizes) == pytest.approx(every, rel=1e-12)
    assert every / math.log(10) < -400
    for k, wrong in ((3, (2,)), (-1, (2,)), (1, ()), (1, (0, 2))):
        with pytest.raises(ValueError, match="must hold"):
            total_agreement_log_sf(k, wrong)


def descriptors_of(model, vocabularies=SAME, rows=128):
    moments = moments_of_layers(model, range(4), vocabularies.ids_base, rows)
    return np.stack([head_descriptors(model.layer(i), model.arch, moments, 4) for i in range(4)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotate", "gains", "units", "values", "queries"])
def test_rewrites_that_keep_heads_in_place_do_not_change_their_descriptors(name):
    np.testing.assert_allclose(descriptors_of(changed(BASE, name)), descriptors_of(BASE), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_means_that_norms_subtract_do_not_change_descriptors():
    given = tiny.model(tiny.gpt2(num_layers=4, layer_windows=(None,) * 4), 0)
    rng = np.random.default_rng(0)
    every = {name: rng.normal(size=zeros.shape) for name, zeros in MeanSetting.zeros(given.arch).values.items()}
    set_everywhere = in_memory(rewritten(given, [MeanSetting(every)]))
    set_everywhere = InMemory(set_everywhere.arch, jax.tree.map(np.asarray, set_everywhere.params))
    for other in (changed(given, "means,rotate"), set_everywhere):
        np.testing.assert_allclose(descriptors_of(other), descriptors_of(given), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_permutation_of_heads_permutes_their_descriptors():
    hidden, moved = permuted(BASE, ["embed", "mlp", "kv_heads", "q_group"])
    for i, (given, found) in enumerate(zip(descriptors_of(BASE), descriptors_of(hidden), strict=True)):
        kv, queries = moved[f"layers/{i}/kv_heads"], moved[f"layers/{i}/q_group"]
        np.testing.assert_allclose(found, given[kv[:, None], queries], rtol=1e-3, atol=1e-3)


def test_descriptors_are_those_of_numpy():
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), BASE.layer(2))
    gain, attn = layer["attn_norm"]["scale"], layer["attn"]
    k, g = 1, 1
    A = gain[:, None] * attn["q_proj"]["kernel"][:, k, g] @ (gain[:, None] * attn["k_proj"]["kernel"][:, k]).T
    B = gain[:, None] * attn["v_proj"]["kernel"][:, k] @ attn["o_proj"]["kernel"][k, g]
    table = np.asarray(BASE.params["embed"]["embedding"], np.float64)
    rows = [table - table.mean(0)]
    by_name = {"gate_proj": [], "up_proj": [], "down_proj": []}
    for i in range(4):
        one = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), BASE.layer(i))
        units = {n: one["mlp"][n]["kernel"].T * one["mlp_norm"]["scale"] for n in ("gate_proj", "up_proj")}
        units["down_proj"] = one["mlp"]["down_proj"]["kernel"]
        order = np.argsort(-np.prod([np.linalg.norm(u, axis=1) for u in units.values()], axis=0))[:10]
        for n, u in units.items():
            by_name[n].append(u[order])
    rows += [np.concatenate(some) for some in by_name.values()]
    moments = [(u.T / np.square(u).sum(1)) @ u for u in rows]
    expected = []
    for X in (A, B):
        square = np.trace(X.T @ X)
        singular = np.linalg.svd(X)[1][:4] / square**0.5
        expected += [np.log(square), *np.log(singular), np.trace(X) / square**0.5, np.trace(X @ X) / square]
        for M in moments:
            forms = (X.T @ M @ X, X @ M @ X.T, X.T @ M @ X @ M)
            expected += [np.log(np.trace(form) / square) for form in forms]
    np.testing.assert_allclose(descriptors_of(BASE, rows=40)[2][k, g], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_heads_of_independent_models_are_in_place_as_often_as_by_chance():
    """The number in place against its exact distribution; and no p-value is smaller than it should be."""
    agreeing, log_ps = [], []
    for i in range(14):
        base, ft = (tiny.model(ARCH, 100 + 2 * i + side) for side in (0, 1))
        result = HeadsInPlace().compute(pair_of(base, ft, seed=i))
        (test,) = result.tests
        agreeing.append(test.values["agreeing"])
        log_ps.append(test.log10_p)
    kv, queries = np.array(agreeing)[:, ::2], np.array(agreeing)[:, 1::2]
    assert kv.mean() == pytest.approx(1, abs=4 / kv.size**0.5)  # each matching has mean and variance 1
    assert queries.mean() == pytest.approx(3, abs=4 * (3 / queries.size) ** 0.5)
    assert f"by chance about {4 * kv.shape[1]} are" in result.effect
    p = 10.0 ** np.array(log_ps)
    for level in (0.05, 0.2, 0.5):
        assert (p <= level).mean() <= level + 3 * (level * (1 - level) / len(p)) ** 0.5


@pytest.mark.parametrize("name", ["rotate", "gains", "units", "values", "queries"])
def test_a_relative_is_found_through_rewrites_that_keep_its_heads_in_place(name):
    result = HeadsInPlace().compute(pair_of(BASE, changed(RELATED, name)))
    assert result.headline > 0.8
    assert verdict({"heads_in_place": result}, 1e-3).verdict == "related"


def test_heads_that_write_nothing_are_matched_by_lot_and_the_others_stay():
    params = jax.tree.map(np.array, RELATED.params)
    for layer in params["layers"].values():
        layer["attn"]["o_proj"]["kernel"][2] *= 1e-7
    whole, partly = (HeadsInPlace().compute(pair_of(BASE, ft)).tests[0] for ft in (RELATED, InMemory(ARCH, params)))
    queries = [test.values["agreeing"][1::2] for test in (whole, partly)]
    assert queries[0] == [6] * 4
    assert all(4 <= found <= 6 for found in queries[1])
    assert min(partly.values["agreeing"][::2]) >= 1
    assert partly.log10_p < -2


def test_heads_stay_when_mlps_and_embeddings_are_others_and_permuted_heads_are_not_found():
    foreign = tiny.model(ARCH, 9).params
    layers = {
        i: {**layer, "mlp": foreign["layers"][i]["mlp"], "mlp_norm": foreign["layers"][i]["mlp_norm"]}
        for i, layer in RELATED.params["layers"].items()
    }
    retrained = InMemory(ARCH, foreign | {"layers": layers})
    result = HeadsInPlace().compute(pair_of(BASE, retrained, NO_TOKENS))
    assert result.log10_p < -3
    hidden, moved = permuted(RELATED, ["kv_heads"])
    found = HeadsInPlace().compute(pair_of(BASE, hidden)).tests[0]
    in_place = [int((moved[f"layers/{i}/kv_heads"] == np.arange(3)).sum()) for i in range(4)]
    assert list(found.values["agreeing"][::2]) == in_place


def in_order_of_norm(model):
    """The model with the kv heads of each layer in order of the norm of their QK products."""
    norms = descriptors_of(model)[:, :, :, 0].mean(axis=2)
    moved = {f"layers/{i}/kv_heads": np.argsort(norm) for i, norm in enumerate(norms)}
    return InMemory(model.arch, permute(model.params, moved, axis_table(model.arch)))


def test_heads_that_were_sorted_in_both_models_are_no_evidence():
    arch = tiny.llama_mha(num_kv_heads=6, q_group=1, **DEPTH)
    base, ft = (tiny.model(arch, seed) for seed in (0, 1))
    both = HeadsInPlace().compute(pair_of(in_order_of_norm(base), in_order_of_norm(ft)))
    assert both.log10_p is None
    assert "sorted" in both.p_reason
    assert not both.tests[0].decides
    one = HeadsInPlace().compute(pair_of(in_order_of_norm(base), ft))
    assert one.log10_p > -3


def test_heads_of_a_stranger_that_were_put_in_order_afterwards_are_no_evidence():
    """Whoever has both models can permute the heads of one until the matching is the identity."""
    arch = tiny.llama_mha(num_kv_heads=6, q_group=1, **DEPTH)
    base, other = (tiny.model(arch, seed) for seed in (0, 1))
    cosines = descriptor_cosines(list(descriptors_of(base)), list(descriptors_of(other)))
    matched = {
        f"layers/{i}/kv_heads": linear_sum_assignment(layer[:, 0, :, 0], maximize=True)[1].astype(np.int32)
        for i, layer in enumerate(cosines)
    }
    hidden = InMemory(arch, permute(other.params, matched, axis_table(arch)))
    result = HeadsInPlace().compute(pair_of(base, hidden))
    assert result.log10_p < -4
    assert result.firm_log10_p > -2
    assert verdict({"heads_in_place": result}, 1e-3).verdict == "undecided"


def test_the_smallest_possible_p_value_is_stated():
    result = HeadsInPlace().compute(pair_of(BASE, BASE))
    floor = 4 * math.log10(6 * 2**3)
    assert result.headline == 1
    assert result.log10_p == pytest.approx(-floor)
    assert result.notes == [f"p is at least 10^{-floor:.1f}: that of 36 heads in place in 16 matchings"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [tiny.llama_mha(), tiny.qwen3_gqa(), tiny.gemma_mqa(), tiny.olmo2_gqa(), tiny.gpt2(),
                                  tiny.mixtral()], ids=lambda arch: arch.family)  # fmt: skip
def test_every_family_has_heads(arch):
    base = tiny.model(arch, 0)
    assert HeadsInPlace().not_applicable(arch, arch, SAME) == []
    result = HeadsInPlace().compute(pair_of(base, InMemory(arch, tiny.noisy(base.params, 0.001))))
    assert result.headline == 1


def test_what_does_not_apply_says_why():
    (line,) = HeadsInPlace().not_applicable(ARCH, tiny.qwen3_gqa(num_kv_heads=6, q_group=1), SAME)
    assert "3 and 6 kv heads, 2 and 1 queries" in line
    single = dataclasses.replace(ARCH, num_kv_heads=1, q_group=1)
    assert "single head" in HeadsInPlace().not_applicable(single, single, SAME)[0]
    sloped = dataclasses.replace(ARCH, alibi_slopes=tuple(0.5**i for i in range(6)))
    assert "slopes of ALiBi" in HeadsInPlace().not_applicable(sloped, sloped, SAME)[0]
    deeper = tiny.model(tiny.llama_mha(num_kv_heads=3, q_group=2), 0)
    assert "4 and 2 layers" in HeadsInPlace().compute(pair_of(BASE, deeper)).notes[1]
    aligned = HeadsInPlace().compute(pair_of(BASE, BASE, aligned=True))
    assert (aligned.log10_p, aligned.headline) == (None, 1)
