"""Rewrites keep the function of every family for which they exist, undo, compose, and are refused where they do not."""

import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from cases import slow
from parity_cases import CASES
from reference64 import logits64

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, LeafSpec, axis_table, check
from tracing_jax.forward import check_function, logits
from tracing_jax.rewrites import (
    DISGUISES,
    CancellingUnits,
    GainScaling,
    GainSetting,
    IdentityLayer,
    KvRepetition,
    LayerRemoval,
    MeanSetting,
    Padding,
    Permutation,
    QueryKeyMaps,
    Renaming,
    Rewrite,
    Rotation,
    UnitScaling,
    UnitSplitting,
    Untying,
    ValueMixing,
    apply,
    arch_after,
    draw_rewrites,
    gains_in,
    inverses,
)
from tracing_jax.rewrites.linear_maps import apply_maps
from tracing_jax.rewrites.rewrite import Weight
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.tree import flatten

TOLERANCES = {
    np.float64: 1e-10,  # weights kept in float64: what the mathematics of a rewrite leaves, times 1e5
    np.float32: 1e-4,  # weights rounded once to float32, whose products and sums over some hundred terms remain
}
"""dtype of the weights -> the most that a rewrite moves float64 logit, relative to the larger of 1 and the largest."""

REWRITES: tuple[type[Rewrite], ...] = (
    Padding, IdentityLayer, Permutation, GainScaling, GainSetting, Rotation, MeanSetting, UnitScaling, ValueMixing,
    QueryKeyMaps, Renaming, UnitSplitting, CancellingUnits, KvRepetition,
)  # fmt: skip
LAYOUTS = [name for name in CASES if name.endswith(("mha-tied-default", "gqa-untied-default", "mqa-tied-default"))]
OPTIONS = ["llama-both_biases", "llama-narrow_heads", "llama-relu", "qwen2-layer_types", "qwen3-attention_bias",
           "gemma-attention_bias", "gemma2-attention_bias", "gemma3_text-scaled_local_rope", "olmo-no_clip",
           "olmo-attention_bias", "olmo2-attention_bias", "granite-biases", "mixtral-one_per_token",
           "gpt2-tied", "gpt2-untied", "gpt2-inner", "gpt2-odd_heads", "gpt2-relu",
           "gpt2-inverse_layer", "mixtral-one_expert"]  # fmt: skip
_HEADS = ("mha-tied", "gqa-untied", "mqa-tied")
_QUICK = [
    f"{family}-{_HEADS[i % 3]}-default" for i, family in enumerate(dict.fromkeys(n.split("-")[0] for n in LAYOUTS))
]
NAMES = [name if name in _QUICK + OPTIONS else slow(name) for name in LAYOUTS + OPTIONS]
"""Each family in one layout of heads by turns and each option; the slow run takes every family in every layout."""


read = functools.cache(lambda name: CASES[name].source())


def model(name: str, dtype: type = np.float64) -> InMemory:
    source = read(name)
    return InMemory(source.arch, jax.tree.map(lambda leaf: np.array(leaf, dtype), source.params))


def moved(before: InMemory, after: InMemory, tokens: np.ndarray, rewrites) -> float:
    """Returns the greatest change of a float64 logit, relative to the larger of 1 and the largest."""
    expected = logits64(before.arch, before.params, tokens)
    new_ids = Renaming.composed(rewrites)
    new_ids = np.arange(before.arch.vocab_size) if new_ids is None else new_ids
    found = logits64(after.arch, after.params, new_ids[tokens])[..., new_ids]
    return np.abs(found - expected).max() / max(1.0, np.abs(expected).max())


def draw(types, arch: Arch, seed: int = 0) -> list[Rewrite]:
    """Returns a random rewrite of each type, for the facts that those before it leave."""
    rewrites: list[Rewrite] = []
    for i, kind in enumerate(types):
        rewrites.append(kind.random(jax.random.key(seed + i), arch_after(rewrites, arch)))
    return rewrites


def existing(arch: Arch) -> list[type[Rewrite]]:
    return [kind for kind in REWRITES if not kind.unsupported(arch)]


def same(tree, other, tolerance: float) -> bool:
    a, b = flatten(tree), flatten(other)
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return False
    return all(np.abs(a[name] - b[name]).max() <= tolerance for name in a)


def test_the_reference_is_the_engine():
    for name in ("llama-both_biases", "gemma2-gqa-tied-linear", "gemma3_text-pattern_2", "olmo-gqa-tied-linear",
                 "olmo2-mqa-untied-llama3", "granite-biases", "mixtral-gqa-tied-linear", "gpt2-inner"):  # fmt: skip
        case = CASES[name]
        found = logits(case.source(), case.tokens())
        expected = logits64(case.arch(), case.source().params, case.tokens())
        np.testing.assert_allclose(found, expected, atol=2e-4 * max(1.0, np.abs(expected).max()), err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_each_rewrite_alone_keeps_the_logits(name):
    before, tokens = model(name), CASES[name].tokens()
    for kind in existing(before.arch):
        rewrite = kind.random(jax.random.key(3), before.arch)
        after = in_memory(rewritten(before, [rewrite]))
        check(after.params, axis_table(after.arch))
        assert moved(before, after, tokens, [rewrite]) <= TOLERANCES[np.float64], kind.name
        assert not same(before.params, after.params, 1e-6), kind.name


@pytest.mark.parametrize("name", NAMES)
def test_all_of_them_together_keep_the_logits_in_any_order(name):
    before, tokens = model(name, np.float32), CASES[name].tokens()
    types = existing(before.arch)
    for order in (types, types[::-1]):
        rewrites = draw(order, before.arch)
        after = in_memory(rewritten(before, rewrites))
        assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {np.dtype(np.float32)}
        assert moved(before, after, tokens, rewrites) <= TOLERANCES[np.float32]


def test_rows_behind_a_layer_norm_have_any_multiple_of_one_over_its_gain():
    arch = tiny.gpt2()
    rows = {*MeanSetting.zeros(arch).values}
    behind = ("attn/q_proj", "attn/k_proj", "attn/v_proj", "mlp/up_proj")
    assert rows >= {f"layers/{i}/{name}/kernel" for i in range(arch.num_layers) for name in behind}
    assert not any("lm_head" in name for name in rows)  # its norm has a bias, and it has none
    written = MeanSetting.random(jax.random.key(0), arch).values.keys()
    assert written < rows
    assert not any(f"/{part}/" in name for name in written for part in behind)
    plain = dataclasses.replace(arch, norm="layer_norm_plain", tied=False, qkv_bias=False, mlp_bias=False)
    assert {"head/lm_head/kernel", "layers/1/attn/q_proj/kernel"} <= {*MeanSetting.zeros(plain).values}

    before = tiny.model(arch, 0)
    name, norm = "layers/0/mlp/up_proj/kernel", before.params["layers"]["0"]["mlp_norm"]
    gain, kernel = (np.asarray(leaf, np.float64) for leaf in (norm["scale"], flatten(before.params)[name]))
    values = np.linspace(-3, 3, arch.mlp_dim)
    rewrite = MeanSetting({name: values})
    after = flatten(in_memory(rewritten(before, [rewrite])).params)
    added = values - (gain[:, None] * kernel).mean(axis=0)
    np.testing.assert_allclose(after[name], kernel + added / gain[:, None], rtol=1e-5, atol=1e-6)
    bias = np.asarray(flatten(before.params)[name.replace("kernel", "bias")], np.float64)
    given = np.asarray(norm["bias"], np.float64) / gain
    np.testing.assert_allclose(after[name.replace("kernel", "bias")], bias - added * given.sum(), rtol=1e-5, atol=1e-5)

    zero = jax.tree.map(np.array, before.params)
    zero["layers"]["0"]["mlp_norm"]["scale"][1] = 0
    kept = flatten(in_memory(rewritten(InMemory(arch, zero), [rewrite])).params)
    np.testing.assert_array_equal(kept[name], flatten(zero)[name])


@pytest.mark.parametrize("name", NAMES)
def test_inverses_bring_every_weight_back(name):
    before = model(name)
    if before.arch.tied:  # what is untied stays so
        before = in_memory(rewritten(before, [Untying()]))
    types = [kind for kind in existing(before.arch) if kind not in (GainSetting, MeanSetting)]
    rewrites = draw(types, before.arch, seed=7)
    undo = list(inverses(rewrites, before.arch))
    if Rotation in types and GainSetting in existing(before.arch):  # it has folded the gains
        undo.append(GainSetting(gains_in(lambda prefix: _leaves(before, prefix), before.arch)))
    after = in_memory(rewritten(before, rewrites + undo))
    assert same(before.params, after.params, 1e-10)


def _leaves(source: InMemory, prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): leaf for n, leaf in flatten(source.params).items() if n.startswith(prefix)}


@pytest.mark.parametrize("name", LAYOUTS + OPTIONS)
def test_table_says_of_every_leaf_what_it_does_on_the_residual_stream(name):
    table = axis_table(CASES[name].arch())
    assert all(len(row.roles) == len(row.axes) for row in table.leaves.values())
    for leaf, row in table.leaves_with_axis("embed").items():
        role = row.roles[row.axes.index("embed")]
        assert (role is None) == ("norm/" in leaf), leaf
        assert row.input_norm is None or role == "reads"
    for kind in ("mlp", "v_dim", "qk_dim"):
        for axis in table.axes_of_kind([kind]):
            rows = table.leaves_with_axis(axis).values()
            assert {row.roles[row.axes.index(axis)] for row in rows} >= {"writes", "reads"}


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("bloom-odd_heads", Rotation, "gains of norm are between a LayerNorm's output and the residual stream"),
        ("llama-gqa-untied-default", MeanSetting, "do not subtract the mean"),
        ("olmo-gqa-untied-default", GainScaling, "none of its norms has a gain"),
        ("olmo-gqa-untied-default", ValueMixing, "clip_qkv"),
        ("olmo-gqa-untied-default", QueryKeyMaps, "clip_qkv"),
        ("qwen3-gqa-untied-default", QueryKeyMaps, "normalised between projection and rope"),
        ("olmo2-gqa-untied-default", QueryKeyMaps, "normalised between projection and rope"),
        ("gpt2-tied", UnitScaling, "no gate, and gelu_tanh does not grow"),
        ("gpt2-inverse_layer", IdentityLayer, "scale their attention by their number"),
        ("gpt2-inverse_layer", LayerRemoval, "scale their attention by their number"),
        ("gpt2-odd_heads", QueryKeyMaps, "cannot be paired"),
        ("llama-gqa-untied-default", Untying, "not tied"),
    ],
)
def test_what_does_not_exist_for_a_family_is_refused_with_the_reason(name, kind, reason):
    arch = CASES[name].arch()
    assert any(reason in line for line in kind.unsupported(arch))
    if kind.name in DISGUISES:
        with pytest.raises(ValueError, match=f"{kind.name}: .*{reason}"):
            draw_rewrites(f"permute,{kind.name}", jax.random.key(0), arch)


@pytest.mark.parametrize(
    ("name", "matrix", "reason"),
    [
        ("gpt2-untied", lambda D: np.linalg.qr(np.random.default_rng(0).standard_normal((D, D)))[0], "vector of ones"),
        ("olmo2-gqa-untied-default", lambda D: np.eye(D)[::-1], "not diagonal"),
        ("llama-gqa-untied-default", lambda D: np.ones((D, D)), "not orthogonal"),
    ],
)  # fmt: skip
def test_a_matrix_that_the_norms_do_not_commute_with_is_refused(name, matrix, reason):
    arch = CASES[name].arch()
    (line,) = Rotation(matrix(arch.embed_dim)).problems(arch)
    assert reason in line
    assert Rotation.random(jax.random.key(0), arch).problems(arch) == []


def test_factors_of_units_without_a_gate_are_positive():
    arch = CASES["gpt2-relu"].arch()
    (line,) = UnitScaling({"layers/0/mlp": np.full(arch.mlp_dim, -1.0)}).problems(arch)
    assert line == "layers/0/mlp: a negative factor, which units without a gate do not allow"
    assert (UnitScaling.random(jax.random.key(0), arch).factors["layers/0/mlp"] > 0).all()


def test_a_gain_of_zero_with_a_bias_cannot_be_folded():
    before = model("gpt2-untied")
    norm = before.params["layers"]["1"]["mlp_norm"]
    norm["scale"][3], norm["bias"][3] = 0, 1
    with pytest.raises(ValueError, match="layers/1/mlp_norm: the gain of feature 3 is zero and its bias is not"):
        in_memory(rewritten(before, [Rotation.random(jax.random.key(0), before.arch)]))
    norm["bias"][3] = 0
    after = in_memory(rewritten(before, [rotation := Rotation.random(jax.random.key(0), before.arch)]))
    assert moved(before, after, CASES["gpt2-untied"].tokens(), [rotation]) <= TOLERANCES[np.float64]


@pytest.mark.parametrize(
    ("name", "padding", "reason"),
    [
        ("qwen3-gqa-untied-default", Padding(features=4), "share it"),
        ("gemma-gqa-untied-default", Padding(features=4), "root of their number"),
        ("olmo-gqa-untied-default", Padding(features=4), "subtracts the mean"),
        ("olmo2-gqa-untied-default", Padding(kv_heads=1), "over all heads together"),
        ("gpt2-tied", Padding(kv_heads=1), "no field for the width of a head"),
        ("llama-gqa-untied-default", Padding(units=-40), "no unit would be left"),
    ],
)
def test_axes_that_cannot_be_padded_are_refused_with_the_reason(name, padding, reason):
    with pytest.raises(ValueError, match=reason):
        rewritten(CASES[name].source(), [padding])


def test_data_that_do_not_fit_are_refused_all_at_once():
    source = CASES["llama-gqa-untied-default"].source()
    wrong = [
        Rotation(np.ones((24, 24))),
        UnitScaling({"layers/0/mlp": np.zeros(40), "layers/9/mlp": np.ones(40)}),
        ValueMixing({"layers/0/v_dim": np.ones((2, 8, 8))}),
        QueryKeyMaps({"layers/0/qk_dim": np.ones((2, 8), complex)}),
        GainScaling({"layers/0/attn_norm": np.full(24, np.nan)}),
        GainSetting({"head/norm": np.zeros(24)}),
        IdentityLayer(5),
        Renaming(np.zeros(31, np.int32)),
        Permutation({"layers/0/mlp": np.zeros(40, np.int32)}),
    ]
    with pytest.raises(ValueError, match="no such rewrite") as refused:
        rewritten(source, wrong)
    for text in ("not orthogonal", "a factor of zero", "layers/9/mlp: no such place", "cannot be inverted",
                 "expected one complex number per kv head and pair, (2, 4)", "NaN", "no place 5 among 2",
                 "no permutation of the vocabulary", "not a permutation"):  # fmt: skip
        assert text in str(refused.value)


def test_a_whole_tree_is_rewritten_like_a_source():
    before = model("llama-gqa-tied-default")
    rewrites = draw_rewrites("all", jax.random.key(2), before.arch)
    after = apply(before.params, rewrites, before.arch)
    assert same(after, in_memory(rewritten(before, rewrites)).params, 0.0)


@pytest.mark.parametrize("name", ["llama-gqa-tied-default", "mixtral-no_window"])
def test_a_sequence_of_rewrites_is_one_after_another(name):
    before = model(name)
    rewrites = draw(existing(before.arch), before.arch)
    together = apply(before.params, rewrites, before.arch)
    params, arch = before.params, before.arch
    for rewrite in rewrites:
        params = apply(params, [rewrite], arch)
        arch = rewrite.arch_after(arch)
    assert arch == arch_after(rewrites, before.arch)
    assert same(together, params, 0.0)
    split = len(rewrites) // 2
    first = rewritten(before, rewrites[:split])
    assert same(together, in_memory(rewritten(first, rewrites[split:])).params, 0.0)


@pytest.mark.parametrize("name", ["llama-gqa-untied-default", "gpt2-untied"])
def test_rewrites_are_pytrees_with_arrays_at_their_leaves(name):
    arch = model(name).arch
    for rewrite in [*draw(existing(arch), arch), LayerRemoval(1)]:
        leaves, structure = jax.tree.flatten(rewrite)
        assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
        again = jax.tree.unflatten(structure, leaves)
        assert type(again) is type(rewrite)
        assert all(one is other for one, other in zip(jax.tree.leaves(again), leaves, strict=True))
        rounded = jax.tree.map(lambda leaf: leaf.astype(np.complex64 if np.iscomplexobj(leaf) else leaf.dtype), rewrite)
        assert jax.tree.structure(rounded) == structure
        assert bool(leaves) == (type(rewrite) not in (Padding, IdentityLayer, LayerRemoval, KvRepetition))
    assert jax.tree.unflatten(jax.tree.structure(Padding(1, 2, 3)), []) == Padding(1, 2, 3)


@pytest.mark.parametrize("name", ["llama-gqa-untied-default", "mixtral-no_window", "gpt2-untied"])
def test_the_inverse_of_the_inverse_is_the_rewrite(name):
    arch = model(name).arch
    for kind in existing(arch):
        rewrite = kind.random(jax.random.key(1), arch)
        inverse = rewrite.inverse(arch)
        if inverse is None:
            assert kind in (GainSetting, MeanSetting)
            continue
        again = inverse.inverse(rewrite.arch_after(arch))
        if kind in (UnitSplitting, CancellingUnits, KvRepetition):
            assert again is None  # what was one again says nothing of the copies
            continue
        if kind is IdentityLayer:
            assert (inverse, again) == (LayerRemoval(rewrite.at), None)
            continue
        assert jax.tree.structure(again) == jax.tree.structure(rewrite)
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(rewrite), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_units_inside_experts_have_factors_of_their_own():
    up, down, gate = (
        np.random.default_rng(i).normal(size=shape) for i, shape in enumerate([(3, 5, 4)] * 2 + [(5, 3, 4)])
    )
    axes = {"up": ("expert", "embed", "mlp"), "down": ("mlp", "embed", "expert"), "gate": ("embed", "expert", "mlp")}
    down, roles = (
        down.transpose(2, 1, 0),
        {"up": (None, None, "writes"), "down": ("reads", None, None), "gate": (None,) * 3},
    )
    table = AxisTable({name: LeafSpec(axes[name], roles=roles[name]) for name in axes}, {}, {"mlp": "expert"})
    part = {name: Weight(leaf, leaf.dtype) for name, leaf in {"up": up, "down": down, "gate": gate}.items()}
    c = np.random.default_rng(3).uniform(1, 2, (3, 4))
    after = apply_maps(part, table, {"mlp": (c, 1 / c)})
    np.testing.assert_allclose(after["up"].values, np.einsum("edf,ef->edf", up, c))
    np.testing.assert_allclose(after["down"].values, np.einsum("fde,ef->fde", down, 1 / c))
    assert after["gate"] is part["gate"]


def test_zero_gains_survive_being_folded_and_scaled():
    before = model("llama-gqa-tied-default")
    before.params["layers"]["1"]["mlp_norm"]["scale"][:5] = 0
    before.params["head"]["norm"]["scale"][3] = 0
    for kind in (GainScaling, GainSetting, Rotation, Padding):
        rewrites = [kind.random(jax.random.key(0), before.arch)]
        after = in_memory(rewritten(before, rewrites))
        assert moved(before, after, CASES["llama-gqa-tied-default"].tokens(), rewrites) <= TOLERANCES[np.float64]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))


def test_units_and_layers_that_do_something_cannot_be_taken_away():
    source = CASES["llama-gqa-untied-default"].source()
    for rewrite, where in [(Padding(units=-3), "layers/0/mlp/up_proj/kernel on layers/0/mlp"),
                           (Padding(kv_heads=-1), "layers/0/attn/v_proj/kernel on layers/0/kv_heads"),
                           (Padding(features=-4), "embed/embedding on embed"),
                           (LayerRemoval(1), "layer 1: attn/o_proj/kernel, mlp/down_proj/kernel")]:  # fmt: skip
        with pytest.raises(ValueError, match=where):
            in_memory(rewritten(source, [rewrite]))


def test_full_rotation_of_queries_and_keys_moves_the_logits():
    """The paper lists it as a symmetry; with rotary positions it is none, and only the maps of pairs are."""
    before = model("llama-gqa-untied-default")
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    params = jax.tree.map(np.copy, before.params)
    for layer in params["layers"].values():
        for name in ("q_proj", "k_proj"):
            layer["attn"][name]["kernel"] = layer["attn"][name]["kernel"] @ q
    assert moved(before, InMemory(before.arch, params), CASES["llama-gqa-untied-default"].tokens(), []) > 0.1


def test_values_are_rounded_once_to_the_dtype_they_came_in():
    name = "qwen2-gqa-tied-default"
    before = model(name, ml_dtypes.bfloat16)
    wide = InMemory(before.arch, jax.tree.map(lambda leaf: leaf.astype(np.float64), before.params))
    rewrites = draw(existing(before.arch), before.arch)
    rounded, exact = (flatten(in_memory(rewritten(source, rewrites)).params) for source in (before, wide))
    for leaf, values in exact.items():
        assert rounded[leaf].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(rounded[leaf], values.astype(ml_dtypes.bfloat16))


def test_draws_depend_on_the_key_and_are_well_conditioned():
    arch = CASES["llama-gqa-untied-default"].arch()
    once, again, other = (draw_rewrites("all", jax.random.key(seed), arch) for seed in (0, 0, 1))
    assert [rewrite.name for rewrite in once] == [name for name in DISGUISES if name != "means"]
    for a, b, c in zip(once, again, other):
        assert repr(a) == repr(b)
        assert repr(a) != repr(c) or isinstance(a, IdentityLayer | Padding | KvRepetition)
    by_name = {rewrite.name: rewrite for rewrite in once}
    rotation, mixing = by_name["rotate"].matrix, by_name["values"].matrices["layers/1/v_dim"]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(len(rotation)), atol=1e-12)
    assert np.linalg.cond(mixing).max() < 10
    factors = by_name["units"].factors["layers/0/mlp"]
    assert ((np.abs(factors) >= 0.25) & (np.abs(factors) <= 4)).all()
    assert {-1, 1} == set(np.sign(factors))
    assert not np.allclose(by_name["units"].factors["layers/1/mlp"], factors)


def test_unknown_names_are_refused_with_the_list():
    arch = CASES["llama-gqa-untied-default"].arch()
    with pytest.raises(
        ValueError, match="unknown rewrites spin, twist; there are rename, identity, split, cancel, pad"
    ):
        draw_rewrites("rotate,spin,twist", jax.random.key(0), arch)
    with pytest.raises(ValueError, match="all cannot be combined with other names"):
        draw_rewrites("all,rotate", jax.random.key(0), arch)
    assert draw_rewrites("", jax.random.key(0), arch) == ()
    olmo = draw_rewrites("all", jax.random.key(0), CASES["olmo-gqa-untied-default"].arch(), without=["rename"])
    names = ["identity", "split", "cancel", "pad", "repeat", "units", "rotate", "means", "permute"]
    assert [rewrite.name for rewrite in olmo] == names


def test_a_rewrite_that_moves_the_logits_is_caught():
    before = CASES["llama-gqa-untied-default"].source()
    assert check_function(before, rewritten(before, draw([Rotation], before.arch)), seed=0) < 1e-4
    other = jax.tree.map(lambda leaf: leaf * 1.05, before.params)
    with pytest.raises(ValueError, match="do not keep the function"):
        check_function(before, InMemory(before.arch, other), seed=0)
