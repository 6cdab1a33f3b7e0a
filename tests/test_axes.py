"""The axis table names every axis of every weight: the same leaves as the models, and every disagreement at once."""

import math

import jax
import numpy as np
import pytest
import transformers
from parity_cases import CASES

from tracing_jax.arch import Arch, arch_from_config
from tracing_jax.axes import (
    GROUPS,
    PERMUTABLE,
    SYMMETRY,
    AxisTable,
    LeafSpec,
    axis_table,
    check,
    kind_of,
    table_from_axes,
)
from tracing_jax.models import init_params
from tracing_jax.rewrites import check_permutations
from tracing_jax.tree import Tree, flatten, unflatten


def _shapes(arch: Arch) -> Tree:
    return jax.eval_shape(lambda key: init_params(arch, key), jax.random.key(0))


def _tiny() -> tuple[Tree, AxisTable]:
    arch = CASES["llama-both_biases"].arch()
    return _shapes(arch), axis_table(arch)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("llama-both_biases", set()),
        ("gemma3_text-pattern_2", set()),
        ("olmo2-mqa-tied-default", set()),
        ("gpt2-untied", {"position"}),
        ("mixtral-no_window", {"expert"}),
    ],
)
def test_every_axis_has_a_symmetry_and_every_leaf_a_group(name, own):
    table = axis_table(CASES[name].arch())
    special = {"position", "expert", "q_latent", "kv_latent", "qk_nope", "qk_rope"}
    special |= {kind for kind in SYMMETRY if kind.startswith(("state_", "per_layer"))}
    special |= {"tap", "scalar", "expert_latent"}
    assert {kind_of(axis) for axis in table.sizes} == set(SYMMETRY) - (special - own)
    assert set(PERMUTABLE) < set(SYMMETRY)
    assert {row.group for row in table.leaves.values()} == set(GROUPS)
    assert {axis for row in table.leaves.values() for axis in row.axes} == set(table.sizes)
    layers = {axis.rsplit("/", 1)[0] for axis in table.sizes if axis.startswith("layers/")}
    parents = {f"{layer}/q_group": f"{layer}/kv_heads" for layer in layers}
    assert table.parent_axis == parents | (
        {f"{layer}/mlp": f"{layer}/expert" for layer in layers} if "expert" in own else {}
    )


def test_axes_reach_as_far_as_their_names_say():
    _, table = _tiny()
    assert all(leaf.startswith("layers/1/") for leaf in table.leaves_with_axis("layers/1/mlp"))
    assert len(table.leaves_with_axis("layers/1/mlp")) == 5  # three kernels and the biases of gate and up
    whole_model = {leaf.split("/")[0] for leaf in table.leaves_with_axis("embed")}
    assert whole_model == {"embed", "layers", "head"}


def test_groups_are_those_of_the_path():
    _, table = _tiny()
    group = {leaf: row.group for leaf, row in table.leaves.items()}
    assert group["layers/0/mlp/up_proj/kernel"] == group["layers/0/mlp/down_proj/bias"] == "mlp"
    assert group["layers/0/attn/o_proj/bias"] == "attn"
    assert group["layers/0/attn_norm/scale"] == "norm"
    assert group["embed/embedding"] == group["head/norm/scale"] == group["head/lm_head/kernel"] == "emb"


def test_restricted_table_is_that_of_the_subtree():
    params, table = _tiny()
    part = table.restricted("layers/1/")
    check(params["layers"]["1"], part)
    assert part.leaves["mlp/up_proj/kernel"].axes == ("embed", "layers/1/mlp")


def test_check_reports_all_disagreements_at_once():
    params, table = _tiny()
    leaves = flatten(params)
    del leaves["layers/0/mlp/up_proj/kernel"]
    leaves["layers/0/mlp/router/kernel"] = np.zeros((24, 3))
    leaves["layers/1/mlp/gate_proj/kernel"] = np.zeros((24, 41))
    leaves["layers/1/attn/q_proj/kernel"] = np.zeros((24, 32))
    with pytest.raises(ValueError, match="axis table") as caught:
        check(unflatten(leaves), table)
    message = str(caught.value)
    assert "missing: layers/0/mlp/up_proj/kernel" in message
    assert "unexpected: layers/0/mlp/router/kernel (24, 3)" in message
    assert "layers/1/mlp/gate_proj/kernel has 41 units on layers/1/mlp, expected 40" in message
    assert "wrong rank: layers/1/attn/q_proj/kernel is (24, 32)" in message
    assert len(message.splitlines()) == 5


def test_axes_of_kind_are_in_the_order_of_the_layers():
    _, table = _tiny()
    assert table.axes_of_kind(["mlp"]) == ["layers/0/mlp", "layers/1/mlp"]
    assert table.axes_of_kind(["embed"]) == ["embed"]
    assert table.axes_of_kind([]) == []


def test_one_list_of_kinds_serves_every_family():
    _, table = _tiny()
    assert table.axes_of_kind(["mlp", "expert"]) == table.axes_of_kind(["mlp"])
    experts = axis_table(CASES["mixtral-no_window"].arch()).axes_of_kind(["expert", "mlp"])
    assert experts == ["layers/0/mlp", "layers/0/expert", "layers/1/mlp", "layers/1/expert"]
    with pytest.raises(ValueError, match="no axis of kind expert"):
        table.axes_of_kind(["expert"])


def test_axes_of_an_unknown_kind_are_refused_with_the_list():
    _, table = _tiny()
    with pytest.raises(ValueError, match=r"experts, lanes.*embed, kv_heads, mlp, q_group, qk_dim, v_dim, vocab"):
        table.axes_of_kind(["mlp", "lanes", "experts"])


def test_table_of_a_foreign_tree():
    params = [{"w": np.zeros((3, 5)), "b": np.zeros(5)}, {"w": np.zeros((5, 2))}]
    axes = {"0/w": (None, "hidden"), "0/b": ("hidden",), "1/w": ("hidden", "out")}
    table = table_from_axes(axes, params)
    assert table.sizes == {"hidden": 5, "out": 2}
    assert table.leaves["1/w"] == LeafSpec(("hidden", "out"))
    check(params, table)


def test_table_that_does_not_fit_a_foreign_tree_is_refused_whole():
    params = {"a": np.zeros((3, 5)), "b": np.zeros(4), "c": np.zeros(2)}
    with pytest.raises(ValueError, match="axis table") as caught:
        table_from_axes({"a": (None, "hidden"), "b": ("hidden",), "d": ("out",)}, params)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["missing", "unexpected", "wrong size"]


_PUBLISHED_SIZES = {
    "Llama-2-7b": (
        transformers.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000),
        6_738_415_616,
    ),
    "Llama-2-70b": (
        transformers.LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
        ),
        68_976_648_192,
    ),
    "Qwen3-8B": (
        transformers.Qwen3Config(
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_key_value_heads=8,
        ),
        8_190_735_360,
    ),
    "gemma-2-9b": (
        transformers.Gemma2Config(
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
        ),
        9_241_705_984,
    ),
    "gpt2": (transformers.GPT2Config(), 124_439_808),
    "Mixtral-8x7B": (transformers.MixtralConfig(), 46_702_792_704),
}


@pytest.mark.parametrize("name", _PUBLISHED_SIZES)
def test_published_models_have_their_published_number_of_parameters(name):
    config, expected = _PUBLISHED_SIZES[name]
    arch = arch_from_config(config)
    shapes, table = _shapes(arch), axis_table(arch)
    check(shapes, table)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    assert sum(math.prod(table.sizes[axis] for axis in row.axes) for row in table.leaves.values()) == expected


def test_heads_with_slopes_of_their_own_are_not_permuted():
    table = axis_table(CASES["bloom-odd_heads"].arch())
    assert table.axes_of_kind(PERMUTABLE) == table.axes_of_kind(["embed", "mlp"])
    with pytest.raises(ValueError, match="those of kv_heads, q_group are not alike"):
        table.axes_of_kind(["kv_heads"])
    with pytest.raises(ValueError, match="may not be permuted"):
        check_permutations({"layers/0/kv_heads": np.arange(6)[::-1]}, table)
