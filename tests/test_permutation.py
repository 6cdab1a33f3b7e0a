"""Permutations keep the function, undo exactly, compose, and are refused when wrong; paths end where they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tracing_jax.axes import PERMUTABLE, axis_table, kind_of, table_from_axes
from tracing_jax.forward import logits
from tracing_jax.interpolation import interpolate, interpolated_leaves, path_groups
from tracing_jax.rewrites import (
    Padding,
    Permutation,
    compose,
    identity,
    invert,
    permute,
    random_permutations,
    share_moved,
)
from tracing_jax.sharding import make_mesh, shard
from tracing_jax.sources import InMemory, in_memory, rewritten, rewritten_donating, sharded
from tracing_jax.tree import flatten

ARCHS = [tiny.llama_mha, tiny.qwen3_gqa, tiny.olmo2_gqa, tiny.gemma_mqa, tiny.gpt2, tiny.mixtral]
TOKENS = np.random.default_rng(0).integers(61, size=(2, 9), dtype=np.int32)


def equal(tree, other):
    a, b = flatten(tree), flatten(other)
    return a.keys() == b.keys() and all(np.asarray(a[n]).tobytes() == np.asarray(b[n]).tobytes() for n in a)


def on_host(params):
    return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("arch", ARCHS)
def test_permuted_units_keep_the_logits_and_move_the_weights(arch):
    model = tiny.model(arch())
    table, expected = axis_table(model.arch), logits(model, TOKENS)
    weights = on_host(model.params)
    own = {kind_of(axis) for axis in table.sizes}
    for kinds in [(kind,) for kind in PERMUTABLE if kind in own] + [PERMUTABLE]:
        permutations = random_permutations(jax.random.key(1), table, kinds)
        assert {kind_of(axis) for axis in permutations} == set(kinds) & own
        moved = permute(weights, permutations, table)
        found = logits(InMemory(model.arch, jax.tree.map(jnp.asarray, moved)), TOKENS)
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
        can_move = any(table.sizes[axis] > 1 for axis in permutations)
        assert equal(moved, weights) != can_move, kinds


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("device", [True, False])
@pytest.mark.parametrize("arch", [tiny.qwen3_gqa, tiny.mixtral])
def test_inverse_restores_every_bit(arch, dtype, device):
    arch = arch()
    params, table = tiny.params_of(arch, dtype=dtype), axis_table(arch)
    params = params if device else on_host(params)
    permutations = random_permutations(jax.random.key(2), table, PERMUTABLE)
    moved = permute(params, permutations, table)
    assert not equal(moved, params)
    assert all(isinstance(leaf, jax.Array) == device for leaf in jax.tree.leaves(moved))
    assert equal(permute(moved, invert(permutations, table), table), params)


@pytest.mark.parametrize(
    ("arch", "holder", "nested"),
    [(tiny.qwen3_gqa, "kv_heads", "q_group"), (tiny.mixtral, "expert", "mlp"), (tiny.gpt2, "kv_heads", "q_group")],
)
def test_permuting_twice_is_permuting_by_the_composition(arch, holder, nested):
    arch = arch()
    params, table = on_host(tiny.params_of(arch)), axis_table(arch)
    every = [random_permutations(jax.random.key(seed), table, PERMUTABLE) for seed in (3, 4)]
    heads = random_permutations(jax.random.key(5), table, [holder])
    groups = random_permutations(jax.random.key(6), table, [nested, "embed"])
    for first, second in [every, (heads, groups), (groups, heads), (every[0], groups), (heads, every[1])]:
        twice = permute(permute(params, first, table), second, table)
        assert equal(twice, permute(params, compose(second, first, table), table))
    undone = compose(invert(every[0], table), every[0], table)
    assert share_moved(undone) == dict.fromkeys((kind_of(axis) for axis in every[0]), 0.0)


def test_lazily_permuted_source_equals_the_permuted_tree():
    model = tiny.model(tiny.olmo2_gqa())
    table = axis_table(model.arch)
    permutations = random_permutations(jax.random.key(7), table, PERMUTABLE)
    lazily = in_memory(rewritten(model, [Permutation(permutations)]))
    assert equal(lazily.params, permute(model.params, permutations, table))
    some = rewritten(model, [Permutation(permutations)]).layer(1, ("mlp/up_proj",))
    assert equal(some, {"mlp": {"up_proj": lazily.params["layers"]["1"]["mlp"]["up_proj"]}})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_resident_model_is_permuted_into_its_own_memory(dtype):
    arch = tiny.qwen3_gqa(num_kv_heads=2, num_layers=4, layer_ropes=(0,) * 4, layer_windows=(None,) * 4)
    table, mesh = axis_table(arch), make_mesh(data=2, model=2)
    model = in_memory(sharded(tiny.model(arch, dtype=dtype), mesh))
    given, kept = dict(model.params), on_host(model.params)
    permutations = random_permutations(jax.random.key(3), table, ["mlp", "kv_heads"])
    live: list[int] = []

    class Watching(Permutation):
        def apply(self, prefix, read, arch):
            found = super().apply(prefix, read, arch)
            live.append(sum(leaf.nbytes for leaf in jax.tree.leaves(model.params) if not leaf.is_deleted()))
            return found

    moved = rewritten_donating(model, [Watching(permutations)], "permuting")
    assert equal(moved.params, permute(kept, permutations, table))
    assert model.params["layers"] is given["layers"]  # nothing was put into the frozen model
    for name, leaf in flatten(model.params).items():
        is_permuted = any(axis in permutations for axis in table.leaves[name].axes)
        assert leaf.is_deleted() == is_permuted, name
        assert flatten(moved.params)[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
    # When the last subtree is permuted, of the layers before only the norms are left: all else was freed one by one.
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(kept["layers"]["0"]))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
    assert live == sorted(live, reverse=True)
    assert live[-1] <= total - 3.5 * layer


def test_memory_is_taken_over_only_by_rewrites_that_reorder():
    model = tiny.model(tiny.mixtral())
    with pytest.raises(ValueError, match="only rewrites that reorder"):
        rewritten_donating(model, [Padding(units=2)], "padding")
    with pytest.raises(ValueError, match="not a permutation"):
        rewritten_donating(model, [Permutation({"layers/0/expert": np.zeros(3, np.int32)})], "permuting")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model.params))


def test_sharded_leaves_keep_their_sharding():
    arch = tiny.qwen3_gqa(num_kv_heads=2)
    table, mesh = axis_table(arch), make_mesh(data=2, model=2)
    params = tiny.params_of(arch)
    spread = shard(params, table, mesh)
    permutations = random_permutations(jax.random.key(8), table, PERMUTABLE)
    moved = permute(spread, permutations, table)
    assert equal(moved, permute(params, permutations, table))
    for name, leaf in flatten(moved).items():
        assert leaf.sharding.is_equivalent_to(flatten(spread)[name].sharding, leaf.ndim), name
    assert sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(moved)) >= 2 * 7


def test_layers_of_one_shape_share_a_compiled_permutation():
    arch = tiny.qwen3_gqa(embed_dim=26, num_layers=4, layer_ropes=(0,) * 4, layer_windows=(None,) * 4)
    params, table = tiny.params_of(arch), axis_table(arch)
    permutations = random_permutations(jax.random.key(9), table, PERMUTABLE)
    from tracing_jax.rewrites import permutation

    before = permutation._take_on_device._cache_size()
    permute({"layers": {"0": params["layers"]["0"]}}, permutations, table)
    one_layer = permutation._take_on_device._cache_size() - before
    permute({"layers": params["layers"]}, permutations, table)
    assert permutation._take_on_device._cache_size() - before == one_layer


@pytest.mark.parametrize(
    ("axis", "wrong", "expected_message"),
    [
        ("layers/1/mlp", [0] * 20, "not a permutation"),
        ("layers/0/mlp", list(range(1, 21)), "not a permutation"),
        ("embed", list(range(7)), "expected integers of shape"),
        ("layers/0/q_group", [0, 1], "expected integers of shape"),
        ("layers/0/qk_dim", list(range(4)), "may not be permuted"),
        ("layers/9/mlp", list(range(20)), "no such axis"),
        ("layers/0/expert", list(range(3)), "no such axis"),
    ],
)
def test_bad_permutations_are_refused_by_name(axis, wrong, expected_message):
    arch = tiny.qwen3_gqa()
    bad = {axis: np.asarray(wrong, np.int32), "layers/1/kv_heads": np.asarray([0, 0, 1], np.int32)}
    with pytest.raises(ValueError, match=expected_message) as refused:
        permute(tiny.params_of(arch), bad, axis_table(arch))
    assert f"{axis}: " in str(refused.value)
    assert "layers/1/kv_heads: " in str(refused.value)


def test_units_of_experts_are_permuted_inside_their_expert_and_positions_never():
    table = axis_table(tiny.mixtral())
    with pytest.raises(ValueError, match=r"layers/0/mlp: expected integers of shape \(3, 20\), found int32 of \(20,\)"):
        permute(tiny.params_of(tiny.mixtral()), {"layers/0/mlp": np.arange(20, dtype=np.int32)}, table)
    params, expert = on_host(tiny.params_of(tiny.mixtral())), np.asarray([2, 0, 1], np.int32)
    mlp = random_permutations(jax.random.key(0), table, ["mlp"])["layers/0/mlp"]
    moved = permute(params, {"layers/0/mlp": mlp, "layers/0/expert": expert}, table)["layers"]["0"]["mlp"]
    before = params["layers"]["0"]["mlp"]
    for e in range(3):
        expected = before["down_proj"]["kernel"][expert[e]][mlp[e]]
        np.testing.assert_array_equal(moved["down_proj"]["kernel"][e], expected)
    np.testing.assert_array_equal(moved["router"]["kernel"], before["router"]["kernel"][:, expert])
    with pytest.raises(ValueError, match="position: its units may not be permuted"):
        permute(params, {"position": np.arange(24, dtype=np.int32)}, axis_table(tiny.gpt2()))


def test_any_pytree_can_be_permuted_by_the_names_of_its_axes():
    params = {"in": np.arange(6.0).reshape(2, 3), "square": np.arange(9.0).reshape(3, 3)}
    table = table_from_axes({"in": (None, "units"), "square": ("units", "units")}, params)
    p = np.asarray([2, 0, 1], np.int32)
    moved = permute(params, {"units": p}, table)
    np.testing.assert_array_equal(moved["in"], params["in"][:, p])
    np.testing.assert_array_equal(moved["square"], params["square"][p][:, p])
    with pytest.raises(ValueError, match="other is not in the axis table"):
        permute(params | {"other": np.zeros(3)}, {"units": p}, table)


def test_random_permutations_depend_on_key_and_axis_alone():
    small, deep = axis_table(tiny.qwen3_gqa()), axis_table(tiny.qwen3_gqa(num_layers=3))
    a = random_permutations(jax.random.key(0), small, ["mlp", "q_group"])
    b = random_permutations(jax.random.key(0), deep, ["mlp"])
    np.testing.assert_array_equal(a["layers/0/mlp"], b["layers/0/mlp"])
    assert not np.array_equal(a["layers/0/mlp"], a["layers/1/mlp"])
    assert not np.array_equal(a["layers/0/mlp"], random_permutations(jax.random.key(1), small, ["mlp"])["layers/0/mlp"])
    assert share_moved(identity(small, a)) == {"mlp": 0.0, "q_group": 0.0}
    with pytest.raises(ValueError, match="no axis of kind expert"):
        random_permutations(jax.random.key(0), small, ["expert"])


@pytest.mark.parametrize("groups", [path_groups(attn, emb) for attn in (False, True) for emb in (False, True)])
def test_paths_end_exactly_at_both_models_and_move_only_their_groups(groups):
    arch = tiny.llama_mha()
    base, ft = tiny.params_of(arch, 0), tiny.params_of(arch, 1)
    table = axis_table(arch)
    moving = interpolated_leaves(table, groups)
    ends = [flatten(interpolate(base, ft, alpha, moving)) for alpha in (0.0, 1.0)]
    for name, row in table.leaves.items():
        moves = row.group in groups
        np.testing.assert_array_equal(ends[0][name], flatten(base)[name])
        np.testing.assert_array_equal(ends[1][name], flatten(ft if moves else base)[name])
    middle = flatten(interpolate(base, ft, 0.25, moving))["layers/1/mlp/up_proj/kernel"]
    up_a, up_b = (tree["layers"]["1"]["mlp"]["up_proj"]["kernel"] for tree in (base, ft))
    np.testing.assert_allclose(middle, 0.75 * up_a + 0.25 * up_b, rtol=1e-6)


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match=r"unknown groups mpl; there are mlp, norm, attn, emb"):
        interpolated_leaves(axis_table(tiny.llama_mha()), ["mpl"])
