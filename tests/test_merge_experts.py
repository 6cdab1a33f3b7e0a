"""Children with experts that were made from MLPs of dense models."""

import collections
import dataclasses
import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import tracing_jax.merges.models as merge_models
from tests import tiny
from tests.parity_cases import CASES
from tests.test_merges import model, sibling
from tracing_jax.axes import axis_table, kind_of
from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.merges import MergeModels, merge_report, opened_models, read_sums
from tracing_jax.tree import flatten

MOE = tiny.mixtral(mlp_dim=40)
DENSE = dataclasses.replace(MOE, num_experts=None)


def leaves(arch, seed):
    return {name: np.asarray(leaf, np.float64) for name, leaf in flatten(tiny.params_of(arch, seed)).items()}


ORIGIN = leaves(DENSE, 0)
PARENTS = [sibling(ORIGIN, seed) for seed in range(3)]


def child_of(mlps):
    """Attention, norms, embedding and head of the first parent, and an expert of each of these weights of MLPs."""
    child = leaves(MOE, 9) | {name: leaf for name, leaf in PARENTS[0].items() if "/mlp/" not in name}
    return child | {name: np.stack([mlp[name] for mlp in mlps]) for name in ORIGIN if "/mlp/" in name}


def models_of(child, origin=ORIGIN):
    parents = {name: model(parent, arch=DENSE) for name, parent in zip("ABC", PARENTS)}
    return MergeModels(model(child, arch=MOE), parents, None if origin is None else model(origin, arch=DENSE))


@pytest.mark.parametrize("with_origin", [True, False])
def test_each_expert_is_that_of_its_parent(with_origin):
    found = merge_report(models_of(child_of([PARENTS[0], PARENTS[1], PARENTS[0]]), ORIGIN if with_origin else None))
    for expert, owner in enumerate("ABA"):
        shares = found.record["by_expert"][str(expert)]["shares"]
        assert {name: share["share"] for name, share in shares.items()} == pytest.approx(
            {name: float(name == owner) for name in "ABC"}, abs=1e-5
        )
    assert found.parts == {"A": "part", "B": "part", "C": "none"}
    assert found.record["method"]["name"] == "stitched"
    assert yaml.safe_load(found.record["recipe"]) == {
        "base_model": "A", "gate_mode": "random", "dtype": "float32",
        "experts": [{"source_model": owner} for owner in "ABA"],
    }  # fmt: skip
    assert "expert 1" in repr(found)
    assert set(found.record["left_out"]) == {f"layers/{i}/mlp/router/kernel" for i in range(2)}


def test_experts_that_are_merges_have_shares_and_no_recipe():
    """Read in slices or whole, which are the same sums."""
    mixed = {name: 0.7 * PARENTS[1][name] + 0.3 * PARENTS[2][name] for name in ORIGIN}
    models = models_of(child_of([mixed, PARENTS[0], mixed]))
    found = merge_report(models)
    assert found.record["recipe"] is None
    shares = found.record["by_expert"]["2"]["shares"]
    assert [shares[name]["share"] for name in "ABC"] == pytest.approx([0, 0.7, 0.3], abs=1e-5)


def test_slices_of_experts_have_the_sums_of_the_whole(monkeypatch):
    models = models_of(child_of(PARENTS))
    whole = read_sums(models)
    monkeypatch.setattr(merge_models, "SLICE_BYTES", 4000)
    sliced = read_sums(models)
    assert {t.place.expert for t in sliced.tensors} == {None, 0, 1, 2}
    by_place = {tensor.place: tensor for tensor in sliced.tensors}
    for tensor in whole.tensors:
        np.testing.assert_allclose(by_place[tensor.place].gram, tensor.gram, rtol=1e-9, atol=1e-9)
    for layer, matrices in whole.units.items():
        for own, other in zip(matrices, sliced.units[layer], strict=True):
            np.testing.assert_array_equal(own, other)


def test_files_of_a_mixture_beside_those_of_dense_models(tmp_path):
    """As transformers writes them: experts in tensors of their own, Mistral's MLPs by other names."""
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
             "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "rope_theta": 777.0,
             "rms_norm_eps": 1e-6, "tie_word_embeddings": False}  # fmt: skip
    dense = sizes | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
    mixture = sizes | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 3,
                       "num_experts_per_tok": 2, "sliding_window": None}  # fmt: skip

    def written(name, config, tensors):
        (folder := tmp_path / name).mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file({key: np.ascontiguousarray(value, np.float32) for key, value in tensors.items()},
                  folder / "model.safetensors")  # fmt: skip
        return open_checkpoint(str(folder))

    names = tensor_shapes(leaf_layouts(DENSE).values())
    rng = np.random.default_rng(0)
    parents = {name: {key: rng.normal(size=shape) for key, shape in names.items()} for name in "AB"}
    child = {key: value for key, value in parents["A"].items() if ".mlp." not in key}
    for layer in range(2):
        block = f"model.layers.{layer}."
        child[f"{block}block_sparse_moe.gate.weight"] = rng.normal(size=(3, 24))
        for expert, owner in enumerate("BAB"):
            for theirs, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                child[f"{block}block_sparse_moe.experts.{expert}.{ours}.weight"] = parents[owner][
                    f"{block}mlp.{theirs}_proj.weight"
                ]
    opened = {name: written(name, dense, tensors) for name, tensors in parents.items()}
    found = merge_report(opened_models(written("child", mixture, child), opened, None))
    assert [own["source_model"] for own in yaml.safe_load(found.record["recipe"])["experts"]] == list("BAB")
    assert found.parts == {"A": "part", "B": "part"}


@pytest.mark.parametrize("name", ["nemotron_h-latent", "gemma4_text-experts"])
def test_only_leaves_of_experts_are_summed_by_expert(name):
    """A shared expert, the projections around experts and the MLP of a dense layer are one tensor each."""
    child = CASES[name].source()
    models = MergeModels(child, {"A": child, "B": child})
    sums = read_sums(models)
    found = collections.Counter(tensor.place.name for tensor in sums.tensors)
    axes = {leaf: spec.axes for leaf, spec in axis_table(child.arch).leaves.items() if leaf in found}
    experts = [leaf for leaf, own in axes.items() if own and kind_of(own[0] or "") == "expert" and "router" not in leaf]
    assert experts
    assert found == {leaf: child.arch.num_experts if leaf in experts else 1 for leaf in axes}
