"""Assignments are optimal; planted permutations come back from the weights, in any pytree; objectives never fall."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tracing_jax import blocked_matmul
from tracing_jax.axes import PERMUTABLE, axis_table, table_from_axes
from tracing_jax.matching import (
    Coordinate,
    Similarity,
    assign,
    assign_nested,
    match_weights,
    similarity,
    solve,
    value,
    weights,
)
from tracing_jax.matching.coordinate import coordinates
from tracing_jax.rewrites import identity, invert, permute, random_permutations
from tracing_jax.sharding import make_mesh, shard
from tracing_jax.tree import flatten, map_named

RNG = np.random.default_rng(0)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for axis, p in expected.items():
        np.testing.assert_array_equal(found[axis], p, err_msg=axis)


def planted(arch, kinds, noise, dtype=np.float32):
    """Returns base, a disguised fine-tuned model, the table, and the permutations that undo the disguise."""
    base, table = tiny.params_of(arch), axis_table(arch)
    disguise = random_permutations(jax.random.key(1), table, kinds)
    ft = permute(map_named(lambda _, leaf: np.asarray(leaf), tiny.noisy(base, noise)), disguise, table)
    cast = [jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree) for tree in (base, ft)]
    return *cast, table, invert(disguise, table)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 4), (5, 5), (3, 5)])
def test_assignment_is_the_best_of_all(n, m):
    similarity = RNG.normal(size=(n, m))
    columns = assign(similarity)
    assert columns.dtype == np.int32
    assert len(set(columns.tolist())) == n
    best = max(similarity[np.arange(n), list(p)].sum() for p in itertools.permutations(range(m), n))
    assert similarity[np.arange(n), columns].sum() == pytest.approx(best, rel=1e-12)


def blocks_of(inner):
    return lambda i, j: inner[i, :, j]


def test_only_promising_pairs_are_solved_inside():
    K, G = 5, 4
    base = RNG.normal(size=(K, G, 30))
    p, r = RNG.permutation(K), np.stack([RNG.permutation(G) for _ in range(K)])
    ft = np.zeros_like(base)
    ft[p[:, None], r] = base + 0.1 * RNG.normal(size=base.shape)
    asked = []

    def inner(i, j):
        asked.append((i, j))
        return base[i] @ ft[j].T

    found = assign_nested(inner, np.zeros((K, K)))
    np.testing.assert_array_equal(found[0], p)
    np.testing.assert_array_equal(found[1], r)
    assert len(asked) == K * K + K  # once each for the bounds, and once more for the pairs chosen


@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_nested_assignment_is_the_best_of_all(weight):
    K, G = 3, 2
    inner, outer = RNG.normal(size=(K, G, K, G)), weight * RNG.normal(size=(K, K))
    orders = list(itertools.permutations(range(G)))
    alike, both = Similarity(outer, blocks_of(inner)), Coordinate("k", "g", ("k", "g"))
    everything = [
        value(both, alike, {"k": np.asarray(p), "g": np.asarray(r)})
        for p in itertools.permutations(range(K))
        for r in itertools.product(orders, repeat=K)
    ]
    p, r = assign_nested(blocks_of(inner), outer)
    by_hand = sum(outer[k, p[k]] + sum(inner[k, g, p[k], r[k, g]] for g in range(G)) for k in range(K))
    assert by_hand == pytest.approx(max(everything), rel=1e-12)
    assert value(both, alike, solve(both, alike)) == pytest.approx(by_hand, rel=1e-12)


def test_impossible_assignments_are_refused():
    with pytest.raises(ValueError, match="1 of 4 similarities are NaN or infinite"):
        assign(np.asarray([[0.0, 1.0], [np.nan, 0.0]]))
    with pytest.raises(ValueError, match="2 of 4 similarities are NaN or infinite"):
        assign_nested(blocks_of(np.asarray([0.0, np.inf, 1.0, -np.inf]).reshape(2, 1, 2, 1)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="3 rows to 2 columns"):
        assign(np.zeros((3, 2)))


@pytest.mark.parametrize("arch", [tiny.llama_mha, tiny.qwen3_gqa, tiny.gpt2, tiny.mixtral])
def test_all_planted_permutations_come_back_from_the_weights(arch):
    base, ft, table, expected = planted(arch(), PERMUTABLE, 0.3)
    found = match_weights(base, ft, table, table.axes_of_kind(PERMUTABLE))
    assert_same(found.permutations, expected)
    assert found.converged
    assert found.objective[-1] > 0.9 * len(table.leaves) > found.objective[0]
    assert not found.left_out


@pytest.mark.parametrize("kinds", [PERMUTABLE, ("mlp",)])
def test_large_nested_axes_are_compared_block_by_block(kinds, monkeypatch):
    base, ft, table, expected = planted(tiny.mixtral(), kinds, 0.2)
    axes = table.axes_of_kind(kinds)
    at_once = match_weights(base, ft, table, axes)
    monkeypatch.setattr(similarity, "_NESTED_BYTES", 0)
    by_block = match_weights(base, ft, table, axes)
    assert_same(by_block.permutations, expected)
    np.testing.assert_allclose(by_block.objective, at_once.objective, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_similarity_of_weights_is_that_of_numpy_however_sliced(dtype, monkeypatch):
    base, ft, table, _ = planted(tiny.llama_mha(), PERMUTABLE, 0.2, dtype)
    pairs = similarity.weight_pairs(base, ft, table, {})
    axis = "layers/0/mlp"
    names, start = pairs.leaves_with_axes([axis]), identity(table, ["embed", axis])
    expected = 0
    for name in names:
        own = [np.moveaxis(np.asarray(side[name], np.float64), table.leaves[name].axes.index(axis), 0)
               for side in (pairs.base, pairs.ft)]  # fmt: skip
        one, other = (side.reshape(len(side), -1) / np.linalg.norm(side) for side in own)
        expected = expected + one @ other.T
    monkeypatch.setattr(blocked_matmul, "_BLOCK_ENTRIES", expected.size // 3)
    jax.clear_caches()  # programs made with the constant as it was
    (coordinate,) = coordinates(table, [axis])
    found = similarity.weight_similarity(pairs, coordinate, start, names)
    jax.clear_caches()
    np.testing.assert_allclose(found.units, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [(("kv_heads",), np.float32), (("q_group",), np.float32), (("mlp",), jnp.bfloat16), (("expert",), np.float32)],
)
def test_some_kinds_alone_come_back_too(kinds, dtype):
    arch = tiny.mixtral if "expert" in kinds else tiny.qwen3_gqa
    base, ft, table, expected = planted(arch(), kinds, 0.2, dtype)
    assert_same(match_weights(base, ft, table, table.axes_of_kind(kinds)).permutations, expected)


@pytest.mark.slow
def test_sharded_weights_are_matched_like_whole_ones():
    axes = {"in": ("embed", "mlp"), "out": ("mlp", "embed"), "bias": ("mlp",), "embedding": (None, "embed")}
    shapes = {"in": (6, 8), "out": (8, 6), "bias": (8,), "embedding": (9, 6)}
    base = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    table, mesh = table_from_axes(axes, base), make_mesh(data=2, model=4)
    disguise = random_permutations(jax.random.key(0), table, ["embed", "mlp"])
    ft = permute(base, disguise, table)
    whole, spread = (
        match_weights(f(base), f(ft), table, list(disguise)) for f in (dict, lambda t: shard(t, table, mesh))
    )
    assert_same(spread.permutations, invert(disguise, table))
    assert_same(spread.permutations, whole.permutations)
    np.testing.assert_allclose(spread.objective, whole.objective, rtol=1e-5)


def test_an_axis_is_solved_again_only_if_its_neighbours_moved(monkeypatch):
    base, ft, table, _ = planted(tiny.qwen3_gqa(), PERMUTABLE, 0.1)
    solved = []

    def counting(pairs, coordinate, permutations, names):
        solved.append(coordinate.axis)
        return found(pairs, coordinate, permutations, names)

    found = weights.weight_similarity
    monkeypatch.setattr(weights, "weight_similarity", counting)
    match_weights(base, ft, table, table.axes_of_kind(PERMUTABLE))
    # Features by the embedding, then every layer with all its weights, then the features once more with all of theirs.
    assert solved[0] == solved[-1] == "embed"
    assert sorted(solved[1:-1]) == sorted(table.axes_of_kind(["mlp", "kv_heads"]))


@pytest.mark.slow
def test_models_with_other_vocabularies_are_matched_by_the_tokens_they_share():
    base, ft, table, expected = planted(tiny.llama_mha(), PERMUTABLE, 0.2)
    order = RNG.permutation(61)[:50]  # ft's token i is base's token order[i]
    ft["embed"]["embedding"] = ft["embed"]["embedding"][order]
    ft["head"]["lm_head"]["kernel"] = ft["head"]["lm_head"]["kernel"][:, order]
    axes = table.axes_of_kind(PERMUTABLE)
    found = match_weights(base, ft, table, axes, shared={"vocab": (order, np.arange(50))})
    assert_same(found.permutations, expected)
    assert not found.left_out
    without = match_weights(base, ft, table, axes)
    assert without.left_out == dict.fromkeys(
        ["embed/embedding", "head/lm_head/kernel"], "61 units on vocab in base, 50 in ft"
    )


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 12):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(3)(x)


@pytest.mark.slow
def test_any_flax_model_is_matched_by_the_names_of_its_axes():
    module, x = Mlp(), RNG.normal(size=(5, 7)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), shapes)
    axes = {
        "Dense_0/kernel": (None, "first"),
        "Dense_0/bias": ("first",),
        "Dense_1/kernel": ("first", "second"),
        "Dense_1/bias": ("second",),
        "Dense_2/kernel": ("second", None),
        "Dense_2/bias": (None,),
    }
    table = table_from_axes(axes, params)
    disguise = random_permutations(jax.random.key(1), table, ["first", "second"])
    ft = permute(tiny.noisy(params, 0.1), disguise, table)
    found = match_weights(params, ft, table, ["first", "second"])
    assert_same(found.permutations, invert(disguise, table))
    apply = jax.jit(module.apply)
    outputs = [apply({"params": tree}, x) for tree in (ft, permute(ft, found.permutations, table))]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)


def small_problem(rng, n=4, noise=0.0):
    axes = {"in": (None, "a"), "between": ("a", "b"), "out": ("b", None), "loop": ("b", "b")}
    shapes = {"in": (2, n), "between": (n, n), "out": (n, 2), "loop": (n, n)}
    base, other = ({name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()} for _ in range(2))
    return (
        base,
        {name: base[name] + noise * other[name] for name in base} if noise else other,
        table_from_axes(axes, base),
    )


def cosines(base, ft):
    return sum(float((base[n] * ft[n]).sum() / np.linalg.norm(base[n]) / np.linalg.norm(ft[n])) for n in base)


@pytest.mark.parametrize("seed", range(3))
def test_descent_finds_the_best_of_all_permutations(seed):
    rng = np.random.default_rng(seed)
    base, ft, table = small_problem(rng, noise=0.3)
    disguise = {axis: rng.permutation(4).astype(np.int32) for axis in "ab"}
    ft = permute(ft, disguise, table)
    orders = [list(p) for p in itertools.permutations(range(4))]
    best = max(
        cosines(
            base,
            {"in": ft["in"][:, p], "between": ft["between"][p][:, q], "out": ft["out"][q], "loop": ft["loop"][q][:, q]},
        )
        for p, q in itertools.product(orders, repeat=2)
    )
    found = match_weights(base, ft, table, ["a", "b"])
    assert found.objective[-1] == pytest.approx(best, rel=1e-5)
    assert found.objective[-1] == pytest.approx(cosines(base, permute(ft, found.permutations, table)), rel=1e-5)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_objective_never_falls_between_strangers(seed):
    base, ft, table = small_problem(np.random.default_rng(seed), n=6)
    found = match_weights(base, ft, table, ["a", "b"])
    assert found.objective[0] == pytest.approx(cosines(base, ft), abs=1e-5)
    assert all(np.diff(found.objective) >= 0)
    assert found.converged
    if found.objective[-1] == found.objective[0]:
        assert_same(found.permutations, identity(table, ["a", "b"]))


def test_objective_never_falls_between_strange_language_models():
    arch = tiny.qwen3_gqa()
    table = axis_table(arch)
    axes = table.axes_of_kind(PERMUTABLE)
    found = match_weights(tiny.params_of(arch, 0), tiny.params_of(arch, 1), table, axes)
    assert all(np.diff(found.objective) >= 0)
    assert found.objective[-1] > found.objective[0]
    assert found.converged
    assert not match_weights(tiny.params_of(arch, 0), tiny.params_of(arch, 1), table, axes, max_sweeps=1).converged


def test_scale_of_a_weight_does_not_count_and_zero_weights_say_nothing():
    base, ft, table = small_problem(np.random.default_rng(0), n=6)
    plain = match_weights(base, ft, table, ["a", "b"])
    scaled = match_weights(base | {"in": 1000 * base["in"]}, ft | {"out": ft["out"] / 1000}, table, ["a", "b"])
    assert_same(scaled.permutations, plain.permutations)
    np.testing.assert_allclose(scaled.objective, plain.objective, rtol=1e-5)
    only = [{"in": tree["in"]} for tree in (base, ft)]
    alone = match_weights(*only, table_from_axes({"in": (None, "a")}, only[0]), ["a"])
    zeros = {name: np.zeros_like(leaf) for name, leaf in base.items() if name != "in"}
    assert_same({"a": match_weights(base, ft | zeros, table, ["a"]).permutations["a"]}, alone.permutations)


def test_axes_that_cannot_be_matched_are_all_named():
    base, _, table, _ = planted(tiny.qwen3_gqa(), ["mlp"], 0.0)
    ft = jax.tree.map(lambda leaf: leaf, base)
    for name in ("gate_proj", "up_proj"):
        ft["layers"]["1"]["mlp"][name]["kernel"] = jnp.ones((24, 16))
    del ft["layers"]["0"]["mlp"]
    axes = ["layers/1/mlp", "layers/0/mlp", "layers/7/mlp", "embed"]
    with pytest.raises(ValueError, match="cannot be matched") as refused:
        match_weights(base, ft, table, axes, shared={"embed": (np.arange(3), np.arange(3))})
    for line in [
        "layers/1/mlp: 20 units in base, 16, 20 in ft",
        "layers/0/mlp: no weight that both models have",
        "layers/7/mlp: no such axis",
        "embed: its units are given as shared",
    ]:
        assert line in str(refused.value)
    with pytest.raises(ValueError, match="layers/0/qk_dim: its units may not be permuted"):
        match_weights(base, base, table, ["layers/0/qk_dim"])
    with pytest.raises(ValueError, match=r"do not fit the axis table(.|\n)*missing: embed/embedding"):
        match_weights({"layers": base["layers"], "head": base["head"]}, base, table, ["embed"])


@pytest.mark.parametrize(
    ("ids", "expected_message"),
    [
        ((np.arange(3), np.asarray([0, 1, 61])), "vocab: indices run from 0 to 61 in ft, expected 0 to 60"),
        ((np.asarray([-1, 0]), np.arange(2)), "vocab: indices run from -1 to 0 in base"),
        ((np.arange(3), np.arange(2)), "vocab: expected two index vectors of one length"),
    ],
)
def test_shared_units_outside_the_models_are_refused(ids, expected_message):
    base, ft, table, _ = planted(tiny.qwen3_gqa(), ["mlp"], 0.0)
    with pytest.raises(ValueError, match=expected_message):
        match_weights(base, ft, table, ["embed"], shared={"vocab": ids})


def test_nan_in_a_weight_is_refused():
    base, ft, table = small_problem(np.random.default_rng(0))
    ft["in"][0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        match_weights(base, ft, table, ["a", "b"])
    assert flatten(base).keys() == flatten(ft).keys()
