"""Mixtures of experts and attention by latents: routers, groups of experts, layers without experts, and their files."""

import dataclasses
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from make_golden import hf_model
from parity_cases import CASES, LIVE_CASES, leaf_of
from safetensors.numpy import load_file, save_file
from scipy.special import expit, softmax

from tracing_jax.alignment import align
from tracing_jax.arch import Router, UnsupportedModelError, read_arch
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import CheckpointError, open_checkpoint
from tracing_jax.checkpoint.hf_layouts import leaf_layouts
from tracing_jax.checkpoint.hf_names import IN_MEMORY
from tracing_jax.checkpoint.tensor_layout import tensor_shapes
from tracing_jax.forward import logits
from tracing_jax.forward.forward_pass import forward
from tracing_jax.matching import assign_in_groups
from tracing_jax.models import mlp
from tracing_jax.models.mlp import expert_weights
from tracing_jax.rewrites import Padding, Permutation, UnitScaling, draw_rewrites, random_permutations
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import MlpsAsLayers, in_memory, rewritten
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.tree import flatten

ALL = CASES | LIVE_CASES
GROUPED = ALL["deepseek_v3-groups"]

# Routers


def _weights64(router: Router, k: int, scores: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Returns the weights of the experts of one token, as the papers define them."""
    E = len(scores)
    weight = expit(scores) if router.scores == "sigmoid" else softmax(scores)
    preferred = weight + (bias if router.selects_with_bias else 0)
    groups = np.arange(E) // (E // router.groups)
    best = [
        np.sort(preferred[groups == g])[::-1][: 2 if router.group_score == "top2" else 1].sum()
        for g in range(router.groups)
    ]
    open_groups = np.argsort(best)[::-1][: router.groups_per_token]
    chosen = [e for e in np.argsort(preferred)[::-1] if groups[e] in open_groups][:k]
    found = np.zeros(E)
    found[chosen] = weight[chosen]
    if router.normalized:
        found /= max(found.sum(), router.floor)
    return found * router.scale


_ROUTERS = {
    "mixtral": Router(),
    "not normalized": Router(normalized=False),
    "scaled": Router("sigmoid", normalized=True, scale=2.5),
    "floor": Router("sigmoid", floor=5.0),
    "selection": Router("sigmoid", selects_with_bias=True),
    "selection of softmax": Router(selects_with_bias=True),
    "groups by best": Router(normalized=False, groups=4, groups_per_token=2),
    "groups by best two": Router("sigmoid", groups=4, groups_per_token=3, group_score="top2", selects_with_bias=True),
    "one group": Router("sigmoid", groups=2, groups_per_token=1, group_score="top2", selects_with_bias=True),
}


@pytest.mark.parametrize("name", _ROUTERS)
def test_weights_of_experts_are_those_of_their_definition(name):
    rng, (D, E, T, k) = np.random.default_rng(0), (6, 8, 40, 3)
    kernel, bias, x = rng.normal(size=(D, E)), rng.normal(size=E), rng.normal(size=(1, T, D))
    arch = dataclasses.replace(tiny.mixtral(), num_experts=E, experts_per_token=k, router=_ROUTERS[name])
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "correction_bias": jnp.asarray(bias, jnp.float32)}
    found = expert_weights(arch, params, jnp.asarray(x, jnp.float32))[0]
    expected = [_weights64(_ROUTERS[name], k, row @ kernel, bias) for row in x[0]]
    np.testing.assert_allclose(found, expected, atol=1e-5)


_MIXTURES = {
    case.family: name for name, case in ALL.items() if "expert" in json.dumps(case.config) and "dense" not in name
}


@pytest.mark.parametrize("name", _MIXTURES.values())
def test_experts_that_compute_their_own_tokens_alone_give_the_same(name, monkeypatch):
    """However tokens choose: groups of other sizes are filled up, and none is left out."""
    source = ALL[name].source()
    arch, rng = source.arch, np.random.default_rng(0)
    params = next(own for i in range(arch.num_layers) if "router" in (own := source.layer(i)["mlp"]))
    x = jnp.asarray(rng.normal(size=(2, 21, arch.embed_dim)), jnp.float32)
    monkeypatch.setattr(mlp, "_GROUP", 4)
    monkeypatch.setattr(mlp, "_saves_time", lambda *_: True)
    for uneven in (0, 5):
        scores = rng.random((2, 21, arch.num_experts)) + uneven * np.arange(arch.num_experts)
        chosen = scores >= np.sort(scores)[..., [-arch.experts_per_token]]
        weights = jnp.asarray(np.where(chosen, rng.normal(size=scores.shape), 0), jnp.float32)
        every, own = (mlp._experts(arch, params, x, weights, (), grouped)[0] for grouped in (False, True))
        assert jnp.abs(every).max() > 0
        np.testing.assert_allclose(own, every, atol=2e-6 * float(jnp.abs(every).max()))


def test_experts_compute_their_own_tokens_where_that_is_less(monkeypatch):
    arch = dataclasses.replace(tiny.mixtral(), num_experts=16, experts_per_token=2)
    seen = []
    monkeypatch.setattr(mlp, "_selected_experts", lambda arch, own, x, weights: seen.append(x.shape) or 0 * x)
    model = tiny.model(arch)
    for blocks, T in ((1, 32), (16, 64)):
        list(forward(model, [jnp.zeros((blocks, T), jnp.int32)], jnp.float32))
        jax.jit(lambda tokens: [output.hidden for output in forward(model, [tokens], jnp.float32)])(
            jnp.zeros((blocks, T), jnp.int32)
        )
    assert set(seen) == {(16, 64, arch.embed_dim)}
    assert len(seen) == 1  # once for all layers, and not where another program may ask for gradients


def test_sparsemixer_weights_each_expert_among_those_close_to_it():
    scores, tolerance = np.array([2.0, 1.9, 1.0, -3.0]), 0.1
    arch = dataclasses.replace(
        tiny.mixtral(), num_experts=4, experts_per_token=2, router=Router("sparsemixer", tolerance=tolerance)
    )
    found = expert_weights(arch, {"kernel": jnp.eye(4)}, jnp.asarray(scores, jnp.float32)[None, None])[0, 0]
    # (2 - 1.9) / 2 is at most .2, (2 - 1) / 2 is not; without the first, (1.9 - 1) / 1.9 is not.
    np.testing.assert_allclose(found, [softmax([2.0, 1.9])[0], 1.0, 0.0, 0.0], atol=1e-6)


# Groups of experts


def test_permutations_of_experts_keep_their_groups():
    table = axis_table(GROUPED.arch())
    axes = table.axes_of_kind(["expert"])
    assert axes == ["layers/1/expert", "layers/2/expert"]
    found = random_permutations(jax.random.key(1), table, ["expert"])
    for axis in axes:
        groups = found[axis].reshape(4, 2) // 2
        assert (groups[:, 0] == groups[:, 1]).all()
        assert sorted(groups[:, 0]) == [0, 1, 2, 3] != groups[:, 0].tolist()
    torn = np.array([1, 2, 0, 3, 4, 5, 6, 7], np.int32)
    with pytest.raises(ValueError, match="layers/1/expert: units of one group must stay together; there are 4 groups"):
        rewritten(GROUPED.source(), [Permutation({axes[0]: torn})]).layer(1)


@pytest.mark.slow
def test_experts_torn_from_their_groups_are_another_model():
    source, arch = GROUPED.source(), GROUPED.arch()
    free = dataclasses.replace(arch, router=dataclasses.replace(arch.router, groups=1, groups_per_token=1))
    torn = np.array([1, 2, 0, 3, 4, 5, 6, 7], np.int32)
    moved = in_memory(rewritten(dataclasses.replace(source, arch=free), [Permutation({"layers/1/expert": torn})]))
    expected = logits(source, GROUPED.tokens())
    found = logits(dataclasses.replace(moved, arch=arch), GROUPED.tokens())
    assert np.abs(found - expected).max() > 1e-2


def test_assignment_in_groups_is_the_best_that_keeps_them():
    rng = np.random.default_rng(3)
    similarity = rng.normal(size=(4, 4))
    orders = [
        [0, 1, 2, 3],
        [1, 0, 2, 3],
        [0, 1, 3, 2],
        [1, 0, 3, 2],
        [2, 3, 0, 1],
        [3, 2, 0, 1],
        [2, 3, 1, 0],
        [3, 2, 1, 0],
    ]
    best = max(orders, key=lambda order: similarity[np.arange(4), order].sum())
    assert assign_in_groups(similarity, 2).tolist() == best


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deepseek_v3-groups", "deepseek_v2-no_q_latent", "qwen2_moe-every_other", "gpt_oss-default"]
)
def test_alignment_by_weights_undoes_a_permutation(name):
    source = ALL[name].source()
    planted = draw_rewrites("permute", jax.random.key(7), source.arch)
    ft = in_memory(rewritten(source, planted))
    kinds = sorted({axis.rsplit("/", 1)[-1] for axis in planted[0].permutations})
    found = align(source, ft, kinds, evidence="weights")
    leaves, expected = (flatten(in_memory(model).params) for model in (rewritten(ft, found.rewrites), source))
    assert all(np.array_equal(leaves[leaf], expected[leaf]) for leaf in expected)


@pytest.mark.slow
def test_alignment_by_activations_says_what_has_none():
    source = ALL["deepseek_v3-groups"].source()
    tokens = np.random.default_rng(0).integers(31, size=(8, 12), dtype=np.int32)
    found = align(
        source,
        source,
        ["mlp", "expert", "kv_latent"],
        evidence="activations",
        tokens=tokens,
        compute=Compute(make_mesh()),
    )
    left_out = {f"layers/{i}/kv_latent" for i in range(3)} | {f"layers/{i}/shared/mlp" for i in (1, 2)}
    assert set(found.left_out) == left_out
    with pytest.raises(ValueError, match="no activations of layers/0/kv_latent"):
        align(source, source, ["kv_latent"], evidence="activations", tokens=tokens)


# Layers of several kinds


def test_every_mlp_is_a_layer_of_its_own():
    source = ALL["qwen2_moe-every_other"].source()  # 5 experts of 12 units and a shared one of 18 in layer 1 alone
    mlps = MlpsAsLayers(source)
    names = [mlps.name(i) for i in range(mlps.arch.num_layers)]
    assert names == ["layer 0", *(f"layer 1 expert {e}" for e in range(5)), "layer 1 shared expert", "layer 2"]
    assert [mlps.arch.mlp_dim_of(i) for i in range(8)] == [40, *[12] * 5, 18, 40]
    own = flatten(source.params)
    for index, leaf in ((0, own["layers/0/mlp/up_proj/kernel"]), (3, own["layers/1/mlp/up_proj/kernel"][2]),
                        (6, own["layers/1/mlp/shared/up_proj/kernel"])):  # fmt: skip
        layer = flatten(mlps.layer(index))
        assert np.array_equal(layer["mlp/up_proj/kernel"], leaf)
        assert {name for name in layer if name.startswith("mlp/")} == {
            f"mlp/{side}_proj/kernel" for side in ("gate", "up", "down")
        }


def test_a_unit_of_a_clamped_glu_without_up_projection_is_not_silent():
    arch = dataclasses.replace(tiny.llama_mha(mlp_bias=False, num_layers=1), clamped_glu=(7.0, 1.702))
    params = tiny.params_of(arch)
    for projection, silent in (("up_proj", 0), ("gate_proj", 1)):
        kernel = np.array(params["layers"]["0"]["mlp"][projection]["kernel"])
        kernel[:, :3] = 0
        changed = tiny.with_leaf(params, f"layers/0/mlp/{projection}/kernel", kernel)
        kept = distinct_units(dataclasses.replace(tiny.model(arch), params=changed), 0).kept
        assert set(range(3)) <= set(kept.tolist()) if not silent else not set(range(3)) & set(kept.tolist())
    assert "add one" in UnitScaling.unsupported(arch)[0]


def test_units_of_gpt_oss_are_dropped_where_their_gates_are_zero():
    source = ALL["gpt_oss-default"].source()
    padded = in_memory(rewritten(source, [Padding(units=2)]))
    back = in_memory(rewritten(padded, [Padding(units=-2)]))
    assert np.array_equal(
        back.params["layers"]["0"]["mlp"]["up_proj"]["kernel"], source.params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    )
    gate = np.array(padded.params["layers"]["0"]["mlp"]["gate_proj"]["bias"])
    gate[:, -1] = 1.0  # a unit that writes, though its up-projection is zero
    changed = dataclasses.replace(padded, params=tiny.with_leaf(padded.params, "layers/0/mlp/gate_proj/bias", gate))
    with pytest.raises(ValueError, match=r"cannot remove units of layers/0/mlp/gate_proj/bias"):
        in_memory(rewritten(changed, [Padding(units=-2)]))


# Files


@pytest.mark.torch
@pytest.mark.parametrize("family", sorted(IN_MEMORY))
def test_models_saved_as_transformers_holds_them_are_read(family):
    case = next(case for case in ALL.values() if case.family == family)
    tensors = {name: tensor.numpy() for name, tensor in hf_model(case).state_dict().items()}
    layouts = leaf_layouts(case.arch(), tensors)
    assert tensor_shapes(layouts.values()) == {
        name: tensor.shape for name, tensor in tensors.items() if name in tensor_shapes(layouts.values())
    }
    found = {name: leaf_of(layout, tensors) for name, layout in layouts.items()}
    for name, leaf in flatten(case.source().params).items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def _written(folder, case, extra=None, **config):
    tensors = {
        name: case.weight(name, shape) for name, shape in tensor_shapes(leaf_layouts(case.arch()).values()).items()
    }
    (folder / "config.json").write_text(json.dumps(case.config | config))
    save_file(tensors | (extra or {}), folder / "model.safetensors")
    return folder


def test_stacked_experts_that_are_stored_transposed_are_read_as_transformers_turns_them(tmp_path):
    plain = ALL["qwen3_moe-default"]
    case = dataclasses.replace(plain, config=plain.config | {"moe_intermediate_size": 10})  # no square matrices
    folder = _written(tmp_path, case)
    tensors = load_file(folder / "model.safetensors")
    of_experts = [name for name in tensors if ".experts." in name]
    single = {name: tensors.pop(name) for name in of_experts}
    for before in {name.partition(".experts.")[0] for name in of_experts}:
        gate, up, down = (
            np.stack([single[f"{before}.experts.{e}.{part}_proj.weight"] for e in range(case.config["num_experts"])])
            for part in ("gate", "up", "down")
        )
        both = np.concatenate([gate, up], axis=1)
        for part, stack in (("gate_up", both), ("down", down)):
            tensors[f"{before}.experts.{part}_proj"] = np.ascontiguousarray(stack.swapaxes(1, 2))
    save_file(tensors, folder / "model.safetensors")
    opened = open_checkpoint(str(folder))
    assert any("tensors are stored transposed" in note for note in opened.notes)
    ours, theirs = (flatten(in_memory(source).params) for source in (opened, case.source()))
    assert all(np.array_equal(ours[name], leaf) for name, leaf in theirs.items())


def test_layers_that_predict_further_tokens_are_left_out_with_a_note(tmp_path):
    extra = {f"model.layers.3.{name}.weight": np.ones((2, 2), np.float32) for name in ("eh_proj", "mlp.gate")}
    folder = _written(tmp_path, GROUPED, extra, num_nextn_predict_layers=1)
    opened = open_checkpoint(str(folder))
    assert "2 tensors are left out, of layers that predict further tokens" in opened.notes[0]
    folder = _written(tmp_path, GROUPED, extra, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=re.escape("unexpected tensor model.layers.3.eh_proj.weight")):
        open_checkpoint(str(folder))


def test_a_config_of_kimi_k2_is_that_of_deepseek_v3(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(GROUPED.config | {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "x.Y"}})
    )
    assert read_arch(tmp_path) == GROUPED.arch()


def test_a_config_of_mimo_is_that_of_qwen2_and_its_layers_that_predict_further_tokens_are_left_out(tmp_path):
    case = CASES["qwen2-gqa-untied-default"]
    extra = {"model.mtp_layers.0.input_proj.weight": np.ones((2, 2), np.float32)}
    own = {"model_type": "mimo", "attention_bias": True, "num_nextn_predict_layers": 1, "use_mrope": False}
    opened = open_checkpoint(str(_written(tmp_path, case, extra, **own)))
    assert opened.arch == case.arch()
    assert any("of layers that predict further tokens" in note for note in opened.notes)


@pytest.mark.parametrize("sizes", [{"num_experts": 10_000, "num_hidden_layers": 199}, {"num_experts": 10_000}])
def test_experts_that_the_files_do_not_have_are_refused_at_once(sizes, tmp_path):
    folder = _written(tmp_path, ALL["qwen3_moe-every_other"], decoder_sparse_step=1, **sizes)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(folder))
    assert time.monotonic() - start < 5
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek_v3-groups", {"num_experts_per_tok": 9}, "9 experts for each token, of 8"),
        ("deepseek_v3-groups", {"topk_group": 1}, "3 experts for each token, of 1 groups"),
        ("deepseek_v3-groups", {"n_group": 3}, "2 of 3 groups of 8 experts"),
        ("deepseek_v3-groups", {"num_key_value_heads": 2}, "num_key_value_heads 2 is not num_attention_heads 4"),
        ("deepseek_v2-groups", {"norm_topk_prob": True}, "norm_topk_prob is set"),
        ("deepseek_v2-groups", {"topk_method": "noaux_tc"}, "is not greedy or group_limited_greedy"),
        ("phimoe-biases", {"num_experts_per_tok": 1}, "its router always selects 2"),
        ("ernie4_5_moe-interval", {"use_bias": True}, "use_bias"),
    ],
)
def test_configs_that_ask_for_what_is_not_computed_are_refused(name, changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ALL[name].config | changes))
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        read_arch(tmp_path)
