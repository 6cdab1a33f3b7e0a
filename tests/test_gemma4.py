"""Gemma 4: heads of two sizes, shared keys and per-layer embeddings through caches, rewrites, files and tests."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import CASES

from tracing_jax.alignment import align
from tracing_jax.arch import UnsupportedModelError, read_arch
from tracing_jax.axes import axis_table
from tracing_jax.forward import forward, logits
from tracing_jax.models import empty_cache
from tracing_jax.rewrites import KvRepetition, ValueMixing, draw_rewrites
from tracing_jax.sources import InMemory, MlpsAsLayers, in_memory, rewritten
from tracing_jax.statistics.unit_outputs import reached_experts
from tracing_jax.tree import flatten

ONE_KEY, SHARED, EXPERTS = (f"gemma4_text-{name}" for name in ("values_are_keys", "shared_keys", "experts"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [ONE_KEY, SHARED])
def test_a_text_read_in_pieces_has_the_states_of_the_whole(name):
    model, tokens = CASES[name].source(), jnp.asarray(CASES[name].tokens())
    whole = [output.hidden for output in forward(model, [tokens], jnp.float32)][-1]
    caches = [empty_cache(model.arch, i, len(tokens), 12, jnp.float32) for i in range(model.arch.num_layers)]
    for start, stop in ((0, 7), (7, 12)):
        positions = jnp.tile(jnp.arange(start, stop), (len(tokens), 1))
        outputs = list(
            forward(model, [tokens[:, start:stop]], jnp.float32, positions=[positions], caches=[caches])
        )  # fmt: skip
        caches = [output.cache for output in outputs if output.cache is not None]
        assert jnp.abs(outputs[-1].hidden - whole[:, start:stop]).max() < 2e-5 * jnp.abs(whole).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", [ONE_KEY, SHARED, EXPERTS])
def test_every_rewrite_keeps_the_function(name):
    model, tokens = CASES[name].source(), CASES[name].tokens()
    rewrites = draw_rewrites("all", jax.random.key(3), model.arch, without=("rename",))
    names = {rewrite.name for rewrite in rewrites}
    assert {"permute", "gains", "units", "rotate"} <= names  # signs of the features
    assert not names & {"values", "queries"}  # they are normalised
    assert ("identity" in names) == (name != SHARED)
    expected, found = logits(model, tokens), logits(in_memory(rewritten(model, rewrites)), tokens)
    assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", [ONE_KEY, SHARED, EXPERTS])
def test_alignment_finds_a_permutation(name):
    model = CASES[name].source()
    planted = draw_rewrites("permute", jax.random.key(7), model.arch)
    kinds = sorted({axis.rsplit("/", 1)[-1] for axis in planted[0].permutations})
    assert ("kv_heads" in kinds) == (name != SHARED)
    ft = in_memory(rewritten(model, planted))
    found = align(model, ft, kinds, evidence="weights")
    leaves, expected = (flatten(in_memory(source).params) for source in (rewritten(ft, found.rewrites), model))
    assert all(np.array_equal(leaves[leaf], expected[leaf]) for leaf in expected)


def test_queries_of_shared_keys_have_the_axes_of_the_layer_that_has_them():
    arch = CASES[SHARED].arch()
    table = axis_table(arch)
    assert arch.layer_mixers[-2:] == (("shared_attn",), ("shared_global_attn",))
    assert table.leaves["layers/3/shared_attn/q_proj/kernel"].axes == (
        "embed", "layers/2/kv_heads", "layers/3/q_group", "layers/2/qk_dim",
    )  # fmt: skip
    assert table.parent_axis["layers/4/q_group"] == "layers/1/kv_heads"
    assert "layers/4/kv_heads" not in table.sizes
    assert "layers/1/v_dim" not in axis_table(CASES[ONE_KEY].arch()).sizes  # its values are its keys


def test_an_mlp_alone_has_the_norms_of_its_own():
    model = CASES[EXPERTS].source()
    views, layer = MlpsAsLayers(model), model.layer(1)
    for expert, before, after in ((3, "mlp_norm", "expert_post_norm"), (-1, "shared_mlp_norm", "shared_mlp_post_norm")):
        alone = views.layer(views.places.index((1, expert)))
        np.testing.assert_array_equal(alone["mlp_norm"]["scale"], layer[before]["scale"])
        expected = np.asarray(layer[after]["scale"]) * np.asarray(layer["mlp_post_norm"]["scale"])
        np.testing.assert_allclose(alone["mlp_post_norm"]["scale"], expected)
        assert alone.keys() == {"mlp", "mlp_norm", "mlp_post_norm"}


def test_experts_that_are_multiplied_by_nothing_are_not_reached():
    model = CASES[EXPERTS].source()
    layer = model.layer(0)
    router = layer["mlp"]["router"] | {"expert_scale": layer["mlp"]["router"]["expert_scale"].at[2].set(0)}
    layers = model.params["layers"] | {"0": layer | {"mlp": layer["mlp"] | {"router": router}}}
    changed = InMemory(model.arch, model.params | {"layers": layers})
    reached = [reached_experts(source, 0) for source in (model, changed)]
    assert reached[0][2]
    assert not reached[1][2]


def test_what_its_heads_do_not_allow_is_refused():
    arch = CASES[ONE_KEY].arch()
    assert "values are normalised" in ValueMixing.unsupported(arch)[0]
    assert "two sizes" in KvRepetition.unsupported(arch)[0]


@pytest.mark.parametrize(
    ("changes", "expected_message"),
    [
        ({"use_bidirectional_attention": "all"}, "is_causal is False"),
        ({"vocab_size_per_layer_input": 30}, "vocab_size_per_layer_input 30 is not vocab_size 31"),
        ({"num_kv_shared_layers": 4}, "leaves no layer of type full_attention with keys"),
        ({"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config sets intermediate_size of layer 1"),
        ({"per_layer_config": {"1": {"head_dim": 6}}}, "heads of different sizes"),
        ({"enable_moe_block": True}, "num_experts or moe_intermediate_size is not"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_cause(changes, expected_message, tmp_path):
    config = CASES[SHARED].config | {"use_double_wide_mlp": False} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=expected_message):
        read_arch(tmp_path)
