"""A learnt alignment lowers the loss between the models and keeps the function of both; refusals come first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tracing_jax.alignment import LOGITS_TOLERANCE, Learning, align, aligned, aligned_base
from tracing_jax.alignment.float64_leaves import in_float64
from tracing_jax.alignment.learned_maps import cayley, initial_values, mapped, rewrites_of
from tracing_jax.alignment.rewrite_estimation import folding, gains_of, setting
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment.validation import check_options
from tracing_jax.forward import logits, path_losses
from tracing_jax.interpolation import path_groups
from tracing_jax.options import RunOptions
from tracing_jax.rewrites import Untying
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, MappedSource, in_memory, rewritten
from tracing_jax.tree import flatten

KINDS = ("rotation", "gains", "scaling", "values", "queries")
TOKENS = np.random.default_rng(0).integers(61, size=(40, 8), dtype=np.int32)


def random_values(arch, kinds, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + 0.1 * rng.standard_normal(x.shape), initial_values(arch, kinds))


def test_cayley_transform_is_orthogonal_and_the_identity_at_zero():
    A = np.random.default_rng(0).standard_normal((7, 7))
    for arch in (tiny.gemma_mqa(), tiny.gpt2()):
        R = cayley(A, arch)
        np.testing.assert_allclose(R @ R.T, np.eye(7), atol=1e-12)
        np.testing.assert_array_equal(cayley(np.zeros((3, 3)), arch), np.eye(3))
    np.testing.assert_allclose(R.sum(axis=1), 1, atol=1e-12)  # a LayerNorm commutes with those that keep the mean


@pytest.mark.parametrize(
    ("make", "kinds"), [(tiny.gemma_mqa, KINDS), (tiny.gpt2, ("rotation", "gains", "values", "queries"))]
)
def test_learned_maps_are_the_rewrites_that_they_are_written_as(make, kinds):
    arch = make(num_layers=1, layer_ropes=(0,), layer_windows=(None,)) if make is tiny.gemma_mqa else make(num_layers=1)
    model = in_memory(in_float64(tiny.model(arch, 0)))
    model = in_memory(rewritten(model, folding(model)))  # which unties the head
    arch, gains = model.arch, {norm: 1 + np.arange(arch.embed_dim) / 50 for norm in gains_of(model)}
    values = random_values(arch, kinds)
    leaves = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in flatten(model.params).items()}
    in_float32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (values, gains))
    found = mapped(leaves, *in_float32, arch)
    rewrites = rewrites_of(values, arch)
    own = {norm: gain * np.exp(values["gains"][norm]) for norm, gain in gains.items()}
    expected = rewritten(model, [*rewrites, setting(in_float64(model, rewrites), own)])
    for name, leaf in flatten(in_memory(expected).params).items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-5, rtol=1e-4, err_msg=name)
    assert (
        np.abs(found["layers/0/attn/v_proj/kernel"] - flatten(model.params)["layers/0/attn/v_proj/kernel"]).max() > 0.1
    )


def midpoint_loss(base, ft):
    ends = [rewritten(model, [Untying()]) if model.arch.tied and not ft.arch.tied else model for model in (base, ft)]
    base, ft = (InMemory(end.arch, jax.tree.map(jnp.asarray, in_memory(end).params)) for end in ends)
    return path_losses(base, ft, TOKENS, [0.5], path_groups(True, True), Compute(make_mesh(), 40)).mean()


@functools.cache
def learned(ends):
    """Returns two models and what was learnt of them; a GPT-2 of one layer, which compiles fastest."""
    base, ft = tiny.model(tiny.gpt2(num_layers=1), 0), tiny.model(tiny.gpt2(num_layers=1), 1)
    found = align(
        base, ft, ("all",), evidence="learned", tokens=TOKENS, learning=Learning(12, 8, 0.03, ends=ends)
    )  # fmt: skip
    return base, ft, found


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["ft", "both"])
def test_a_learned_alignment_keeps_both_functions_and_lowers_the_midpoint(ends):
    base, ft, found = learned(ends)
    new_base, new_ft = aligned_base(base, found), aligned(ft, found)
    for before, after in ((base, new_base), (ft, new_ft)):
        expected = logits(before, TOKENS)
        assert np.abs(logits(after, TOKENS) - expected).max() < 1e-4 * np.abs(expected).max()
    assert found.logits_moved < LOGITS_TOLERANCE
    assert (not found.base_rewrites) == (ends == "ft")
    start = aligned(ft, align(base, ft, ("all",), evidence="weights"))
    assert midpoint_loss(new_base, new_ft) < midpoint_loss(base, start)
    assert found.objective[0] > min(found.objective) == found.objective[found.undone["learned"]["best_step"]]


def test_what_cannot_be_learned_is_refused_with_the_reason():
    base = tiny.model(tiny.gpt2(num_layers=1), 0)
    streamed = MappedSource(base, lambda subtree, _: subtree)
    with pytest.raises(ValueError, match="cannot align") as refused:
        align(base, streamed, ("mlp",), evidence="learned", tokens=TOKENS[:5])
    for line in ["mlp: nothing that can be learnt; choose all", "ft would be streamed, and the gradient",
                 "5 blocks of text to learn an alignment from, expected at least 32"]:  # fmt: skip
        assert line in str(refused.value)
    asked = {"base_model_id": "a", "ft_model_id": "b", "align": True, "align_evidence": "learned", "memory": "stream"}
    with pytest.raises(ConfigError) as refused:
        check_options(RunOptions.from_config(asked | {"dataset": "random"}))
    for line in ["so that models are not streamed; set memory=resident", "align_axes=embed,mlp: nothing of it can be",
                 "random tokens teach nothing"]:  # fmt: skip
        assert line in str(refused.value)
