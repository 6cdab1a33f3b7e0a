"""Statistics of mixtures and of attention by latents: what is found among relatives, and what does not apply."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rewritten_pairs import SAME, pair_of

from tracing_jax.axes import axis_table
from tracing_jax.rewrites import draw_rewrites, permute, random_permutations
from tracing_jax.sources import InMemory, MlpsAsLayers, in_memory, one_mlp, rewritten
from tracing_jax.statistics.csu import Csu, CsuAll
from tracing_jax.statistics.features_in_place import FeaturesInPlace
from tracing_jax.statistics.head_kernels import head_kernels
from tracing_jax.statistics.heads_in_place import HeadsInPlace
from tracing_jax.statistics.match_heads import MatchHeads
from tracing_jax.statistics.match_io import MatchIo
from tracing_jax.statistics.match_mlps import MatchMlps
from tracing_jax.tree import flatten, unflatten
from tracing_jax.zoo.weights import weight_measures

ARCH = tiny.deepseek()
BASE, UNRELATED = tiny.model(ARCH, 0), tiny.model(ARCH, 1)
RELATED = InMemory(ARCH, tiny.noisy(BASE.params, 0.02))


def permuted(model, *kinds):
    table = axis_table(model.arch)
    return InMemory(model.arch, permute(model.params, random_permutations(jax.random.key(3), table, kinds), table))


@pytest.mark.parametrize("statistic", [Csu(), HeadsInPlace(), FeaturesInPlace()], ids=lambda s: type(s).__name__)
def test_units_in_place_are_found_in_relatives_and_not_in_strangers(statistic):
    assert not statistic.not_applicable(ARCH, ARCH, SAME)
    assert statistic.compute(pair_of(BASE, RELATED)).log10_p < -4
    assert statistic.compute(pair_of(BASE, UNRELATED)).log10_p > -2


@pytest.mark.parametrize(
    ("statistic", "kinds"), [(Csu(), ["mlp"]), (HeadsInPlace(), ["kv_heads"]), (FeaturesInPlace(), ["embed"])]
)
def test_units_that_moved_are_in_place_no_longer(statistic, kinds):
    assert statistic.compute(pair_of(BASE, permuted(RELATED, *kinds))).log10_p > -2


def test_heads_are_matched_through_latents_whatever_their_order():
    moved = permuted(RELATED, "kv_heads", "kv_latent", "q_latent", "embed")
    found = MatchHeads().compute(pair_of(BASE, moved))
    test = next(test for test in found.tests if test.name.endswith("parametric"))
    assert sum(test.values["agreeing"]) == sum(test.values["units"]) == 3 * 6
    unrelated = MatchHeads().compute(pair_of(BASE, UNRELATED))
    test = next(test for test in unrelated.tests if test.name.endswith("parametric"))
    assert sum(test.values["agreeing"]) < 9


def test_kernels_of_heads_are_what_they_read_through_latents():
    layer, latent = BASE.params["layers"]["0"]["attn"], np.random.default_rng(0).normal(size=24)
    kernels = {name: np.asarray(kernel, np.float64) for name, kernel in head_kernels({"attn": layer}, ARCH).items()}
    arrays = {name: np.asarray(leaf, np.float64) for name, leaf in flatten(layer).items()}
    keys = (latent @ arrays["kv_a_proj/kernel"] * arrays["kv_a_norm/scale"]) @ arrays["k_proj/kernel"][:, 2]
    expected = np.concatenate([keys, latent @ arrays["k_rope_proj/kernel"]])
    np.testing.assert_allclose(np.tensordot(latent, kernels["k"], 1)[2], expected, atol=1e-5)
    queries = latent @ arrays["q_a_proj/kernel"] * arrays["q_a_norm/scale"]
    expected = np.concatenate([queries @ arrays[f"{name}/kernel"][:, 2, 0] for name in ("q_proj", "q_rope_proj")])
    np.testing.assert_allclose(np.tensordot(latent, kernels["q"], 1)[2, 0], expected, atol=1e-5)
    assert [kernels[name].shape for name in "qkvo"] == [(24, 6, 1, 6), (24, 6, 6), (24, 6, 3), (6, 1, 3, 24)]


def test_a_dense_model_with_grouped_queries_and_a_mixture_with_latents_are_compared():
    dense = tiny.model(tiny.qwen3_gqa(tied=False, num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3), 5)
    taken = flatten(BASE.params) | {
        name: leaf for name, leaf in flatten(dense.params).items() if name.startswith(("embed/", "head/"))
    }
    ft = InMemory(ARCH, unflatten(taken))
    for statistic in (FeaturesInPlace(), MatchHeads(), MatchMlps()):
        assert not statistic.not_applicable(dense.arch, ARCH, SAME)
        MatchHeads().compute(pair_of(dense, ft)) if isinstance(statistic, MatchHeads) else None
    assert FeaturesInPlace().compute(pair_of(dense, ft)).log10_p < -8
    assert MatchMlps().compute(pair_of(dense, ft)).log10_p > -2
    assert Csu().not_applicable(dense.arch, ARCH, SAME) == [
        "layer 1 has experts in one model and none in the other; see match_mlps"
    ]
    assert "see match_mlps" in MatchIo().not_applicable(dense.arch, ARCH, SAME)[0]
    assert "experts" in CsuAll().not_applicable(ARCH, ARCH, SAME)[0]


def test_every_mlp_finds_its_own_after_a_disguise():
    hidden = in_memory(rewritten(BASE, draw_rewrites("permute,gains", jax.random.key(3), ARCH)))
    moved = InMemory(hidden.arch, jax.tree.map(jnp.asarray, hidden.params))
    found = MatchMlps().compute(pair_of(BASE, moved))
    pairs = {row["ft"]: row["base"] for row in found.layer_map["pairs"]}
    names = MlpsAsLayers(BASE).name
    assert len(pairs) == 11
    assert all(names(i).split(" expert")[0] == names(j).split(" expert")[0] for i, j in pairs.items())
    assert (pairs[0], pairs[5], pairs[10]) == (0, 5, 10)  # the dense one and the shared ones


def test_one_mlp_is_a_model_of_one_layer():
    own = flatten(BASE.params)
    for layer, expert, leaf in (
        (0, None, own["layers/0/mlp/up_proj/kernel"]),
        (1, 2, own["layers/1/mlp/up_proj/kernel"][2]),
    ):
        model = one_mlp(BASE, layer, expert)
        assert np.array_equal(model.layer(0)["mlp"]["up_proj"]["kernel"], leaf)
        assert (model.arch.num_layers, model.arch.mlp_dim, model.arch.num_experts) == (1, leaf.shape[1], None)
        assert np.array_equal(model.layer(0)["mlp_norm"]["scale"], own[f"layers/{layer}/mlp_norm/scale"])


def test_measures_of_a_zoo_are_those_of_matrices_on_the_residual_stream():
    found = weight_measures(BASE)["matrices"]
    assert {"mlp/up_proj", "mlp/shared/up_proj", "attn/kv_a_proj", "attn/o_proj"} <= found.keys()
    assert "attn/k_proj" not in found
    assert len(found["mlp/up_proj"]["rms"]) == 3


def test_units_of_every_kind_are_counted_in_an_expert_of_a_layer():
    other = dataclasses.replace(ARCH, layer_experts=(False, False, True))
    assert "layer 1 has experts" in Csu().not_applicable(ARCH, other, SAME)[0]
