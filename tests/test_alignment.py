"""Correlations are Pearson's; a disguised fine-tuned model is aligned by weights and activations, and proven equal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import slow

from tracing_jax import blocked_matmul
from tracing_jax.alignment import LOGITS_TOLERANCE, align, aligned
from tracing_jax.alignment import align_models as module
from tracing_jax.axes import PERMUTABLE, axis_table
from tracing_jax.data import paired_one_to_one
from tracing_jax.forward import correlations, forward_pass, paired
from tracing_jax.models import apply_block, apply_embed, layer_inputs
from tracing_jax.rewrites import invert, permute, random_permutations
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, in_memory, sharded
from tracing_jax.tree import flatten

TAPS = ("residual", "heads", "units")
TOKENS = np.random.default_rng(0).integers(61, size=(6, 16), dtype=np.int32)
BLOCKS = paired_one_to_one(TOKENS, TOKENS)


def disguised(arch, kinds, noise, dtype=np.float32):
    """Returns base, the fine-tuned model in base's order, the same disguised, and what undoes the disguise."""
    base, table = tiny.model(arch, dtype=dtype), axis_table(arch)
    ft = jax.tree.map(np.asarray, tiny.noisy(base.params, noise))
    disguise = random_permutations(jax.random.key(1), table, kinds)
    hidden = jax.tree.map(jnp.asarray, permute(ft, disguise, table))
    return base, ft, InMemory(arch, hidden), invert(disguise, table)


def activations(model, tokens):
    """Returns for each layer the activations of every tap, `[tokens, units]`, of the whole batch at once."""
    block = jax.jit(apply_block, static_argnames=("arch", "taps"))
    x = apply_embed(model.arch, model.embed(), jnp.asarray(tokens), jnp.float32)
    for i in range(model.arch.num_layers):
        x, found, *_ = block(model.arch, model.layer(i), x, layer_inputs(model.arch, i), taps=TAPS)
        yield {tap: np.asarray(units, np.float64).reshape(tokens.size, -1) for tap, units in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("data", "batch_size", "slice_entries"), [(1, 4, 2**24), (2, 8, 2**24), (2, 4, 100)])
def test_correlations_are_those_of_numpy_however_batched_and_sliced(data, batch_size, slice_entries, monkeypatch):
    if slice_entries < 20 * 12:
        monkeypatch.setattr(blocked_matmul, "_BLOCK_ENTRIES", slice_entries)
        jax.clear_caches()  # programs made with the constant as it was
    base, ft = tiny.model(tiny.qwen3_gqa(), 0), tiny.model(tiny.qwen3_gqa(mlp_dim=12), 1)
    # A unit far from zero, and one that never varies.
    base.params["embed"]["embedding"] = base.params["embed"]["embedding"].at[:, 0].add(300.0).at[:, 1].set(0.7)
    mesh = make_mesh(data=data)
    sources = [sharded(source, mesh) for source in (base, ft)]
    found = list(correlations(*sources, BLOCKS, TAPS, Compute(mesh, batch_size)))
    assert [layer.layer for layer in found] == [0, 1]
    assert found[1].by_tap["units"].shape == (20, 12)
    np.testing.assert_array_equal(found[0].by_tap["residual"][1], 0)
    by_taps = [layer.by_tap for layer in found]
    for by_tap, a, b in zip(by_taps, activations(base, TOKENS), activations(ft, TOKENS), strict=True):
        for tap in TAPS:
            varies = a[tap].std(0) > 0
            expected = np.corrcoef(a[tap][:, varies].T, b[tap].T)[: varies.sum(), varies.sum() :]
            np.testing.assert_allclose(by_tap[tap][varies], expected, atol=2e-4, err_msg=tap)


def test_all_layers_and_batches_share_one_compiled_step():
    arch = tiny.qwen3_gqa(embed_dim=22, mlp_dim=26, num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None, 4, None))
    base, ft = tiny.model(arch, 0), tiny.model(arch, 1)
    steps = (forward_pass.block_step, paired._accumulate_step)
    before = [step._cache_size() for step in steps]
    list(correlations(base, ft, BLOCKS, ("units",), Compute(make_mesh(), 4)))
    assert [step._cache_size() for step in steps] == [count + 1 for count in before]
    list(correlations(base, ft, BLOCKS, ("gate",), Compute(make_mesh(), 4)))  # of equal width: the sums are the same
    assert paired._accumulate_step._cache_size() == before[1] + 1


def test_models_that_cannot_read_side_by_side_are_refused_before_any_work():
    base, deep = tiny.model(tiny.qwen3_gqa()), tiny.model(tiny.qwen3_gqa(num_layers=1))
    with pytest.raises(ValueError, match="cannot correlate") as refused:
        correlations(base, deep, paired_one_to_one(TOKENS + 40, TOKENS), ("unit",), Compute(make_mesh(), 4))
    for line in ["base has 2 layers, ft 1", "unknown taps unit; there are residual", "ids run from 40 to 100"]:
        assert line in str(refused.value)
    gpt2 = tiny.model(tiny.gpt2(num_positions=8))
    with pytest.raises(ValueError, match="cannot correlate") as refused:
        correlations(base, gpt2, BLOCKS, ("gate",), Compute(make_mesh(), 4))
    taps = "residual, heads, mlp_input, up, units, mlp_output"
    for line in [f"unknown taps gate; there are {taps}", "blocks of 16 tokens, the model has learned 8 positions"]:
        assert line in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kinds", "dtype"),
    [
        (tiny.qwen3_gqa, PERMUTABLE, np.float32),
        (tiny.qwen3_gqa, ("mlp",), jnp.bfloat16),
        (tiny.gpt2, PERMUTABLE, np.float32),
        (tiny.mixtral, PERMUTABLE, np.float32),
    ],
)
def test_weights_align_a_disguised_model(arch, kinds, dtype):
    base, ft, hidden, expected = disguised(arch(), kinds, 0.2, dtype)
    found = align(base, hidden, kinds, evidence="weights")
    for axis, p in expected.items():
        np.testing.assert_array_equal(found.permutations[axis], p, err_msg=axis)
    assert found.logits_moved < LOGITS_TOLERANCE
    assert found.share_moved.keys() == {axis.split("/")[-1] for axis in expected}
    assert found.share_moved["mlp"] > 0.5
    assert all(np.diff(found.objective) >= 0)
    restored = flatten(in_memory(aligned(hidden, found)).params)
    assert all(np.array_equal(restored[name], leaf) for name, leaf in flatten(ft).items())


@pytest.mark.parametrize("arch", [tiny.qwen3_gqa, slow(tiny.llama_mha), slow(tiny.gpt2), tiny.mixtral])
def test_activations_align_a_disguised_model(arch):
    base, _, hidden, expected = disguised(arch(), PERMUTABLE, 0.05)
    found = align(base, hidden, PERMUTABLE, evidence="activations", tokens=TOKENS, compute=Compute(make_mesh(), 4))
    for axis, p in expected.items():
        np.testing.assert_array_equal(found.permutations[axis], p, err_msg=axis)
    before, after = found.objective
    assert before < 0.5 < after <= 1
    assert found.logits_moved < LOGITS_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kind"),
    [(tiny.qwen3_gqa, "kv_heads"), (tiny.qwen3_gqa, "q_group"), (tiny.mixtral, "expert"), (tiny.mixtral, "mlp")],
)
def test_activations_align_one_kind_alone(arch, kind):
    base, _, hidden, expected = disguised(arch(), [kind], 0.05)
    found = align(base, hidden, [kind], evidence="activations", tokens=TOKENS, compute=Compute(make_mesh(), 4))
    assert found.permutations.keys() == expected.keys()
    for axis, p in expected.items():
        np.testing.assert_array_equal(found.permutations[axis], p, err_msg=axis)


def test_aligned_models_stay_as_they_are():
    base, ft, _, _ = disguised(tiny.qwen3_gqa(), ["mlp"], 0.1)
    found = align(base, InMemory(base.arch, jax.tree.map(jnp.asarray, ft)), evidence="weights")
    assert found.share_moved == {"embed": 0.0, "mlp": 0.0}
    assert found.objective[0] == found.objective[-1]
    assert found.logits_moved == 0


@pytest.mark.slow
def test_alignment_that_changes_the_function_is_refused(monkeypatch):
    base, _, hidden, _ = disguised(tiny.qwen3_gqa(), ["mlp"], 0.1)
    down = hidden.params["layers"]["0"]["mlp"]["down_proj"]
    rewritten = module.rewritten

    def forgetful(source, rewrites):
        moved = in_memory(rewritten(source, rewrites))
        moved.params["layers"]["0"]["mlp"]["down_proj"] = down
        return moved

    monkeypatch.setattr(module, "rewritten", forgetful)
    with pytest.raises(ValueError, match=r"logits move by .* expected at most 1e-03"):
        align(base, hidden, ["mlp"], evidence="weights")
    poisoned = dataclasses.replace(hidden, params=hidden.params | {"head": {"norm": {"scale": jnp.full(24, jnp.nan)}}})
    with pytest.raises(ValueError, match="or its weights hold NaN"):
        align(base, poisoned, ["mlp"], evidence="weights")


def test_models_that_cannot_be_aligned_are_refused_with_every_reason():
    base = tiny.model(tiny.qwen3_gqa())
    ft = tiny.model(tiny.qwen3_gqa(num_layers=1, mlp_dim=12, num_kv_heads=2))
    with pytest.raises(ValueError, match="cannot align") as refused:
        align(base, ft, ("mlp", "q_group", "vocab"), evidence="activations")
    for line in [
        "evidence by activations needs tokens",
        "kinds vocab cannot be aligned; choose from embed, mlp, kv_heads, q_group",
        "depth: 2 layers in base, 1 in ft",
        "mlp: 20 units in base, 12 in ft",
        "kv_heads: 3 units in base, 2 in ft",
    ]:
        assert line in str(refused.value)
    with pytest.raises(ValueError, match=r"kinds \(none\) cannot be aligned"):
        align(base, base, (), evidence="weights")
    with pytest.raises(ValueError, match="neither model has units of kind expert"):
        align(base, base, ("expert",), evidence="weights")
    with pytest.raises(ValueError, match="expert: no units in base, 3 in ft"):
        align(base, tiny.model(tiny.mixtral()), ("mlp",), evidence="weights")
