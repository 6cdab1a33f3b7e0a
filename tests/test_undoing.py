"""Alignment undoes disguises: aligning a disguised model gives what aligning the model itself gives."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from cases import diagonal, slow
from reference64 import logits64
from safetensors.numpy import load_file, save_file

from tracing_jax import experiment
from tracing_jax.alignment import KINDS, Alignment, AlignmentError, align, aligned, alignment_problems
from tracing_jax.alignment import align_models as module
from tracing_jax.alignment.float64_leaves import leaf_cosines
from tracing_jax.alignment.procrustes import AdjacentWeights, mixing_matrices, scale_factors
from tracing_jax.arch import Arch
from tracing_jax.axes import PERMUTABLE
from tracing_jax.checkpoint import open_checkpoint, save_checkpoint
from tracing_jax.experiment.disguising import write_disguised
from tracing_jax.record import plain
from tracing_jax.rewrites import (
    DISGUISES,
    IdentityLayer,
    MeanSetting,
    Padding,
    Permutation,
    Renaming,
    Rewrite,
    UnitScaling,
    Untying,
    draw_rewrites,
)
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.tree import flatten, map_named

EXACT = 1e-10
"""The most that float64 weights may differ between align(disguise(ft)) and align(ft); measured: at most 2e-13."""

ARCHS = {
    "mha_biases": tiny.llama_mha,
    "gqa": tiny.qwen3_gqa,
    "mqa_gains_minus_one": tiny.gemma_mqa,
    "norms_behind_blocks": tiny.olmo2_gqa,
    "layer_norm_biases": tiny.gpt2,
    "experts": tiny.mixtral,
}
DISGUISE_NAMES = [name for name in DISGUISES if name != Renaming.name]


def in_float64(arch: Arch, seed: int = 0) -> InMemory:
    return InMemory(arch, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tiny.params_of(arch, seed)))


def finetuned(base: InMemory, share: float = 0.1) -> InMemory:
    """Returns base with noise of `share` of each leaf's own standard deviation, in float64."""
    rng = np.random.default_rng(1)
    noisy = map_named(lambda _, w: w + share * w.std() * rng.normal(size=w.shape), base.params)
    return InMemory(base.arch, noisy)


def drawn(names: str, arch: Arch, seed: int = 3) -> tuple[Rewrite, ...]:
    return draw_rewrites(names, jax.random.key(seed), arch, without=(Renaming.name,))


def greatest_difference(one: InMemory, other: InMemory) -> float:
    a, b = flatten(one.params), flatten(other.params)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def logits_apart(one: InMemory, other: InMemory) -> float:
    tokens = np.random.default_rng(0).integers(one.arch.vocab_size, size=(1, 12))
    expected = logits64(one.arch, one.params, tokens)
    return float(np.abs(logits64(other.arch, other.params, tokens) - expected).max() / max(1, np.abs(expected).max()))


@pytest.fixture
def engine():
    """Asks for the proof as it is, by the engine, which compiles for every shape."""


@pytest.fixture(autouse=True)
def proof_in_float64(monkeypatch, request):
    """Lets the float64 reference prove what else the engine would."""
    if "engine" in request.fixturenames:
        return

    def check(before, after, *, seed, tolerance):
        moved = logits_apart(in_memory(before), in_memory(after))
        if not moved <= 1e-9:
            raise ValueError(f"logits move by {moved}")
        return moved

    monkeypatch.setattr(module, "check_function", check)


def aligned_to(base: InMemory, ft: InMemory, *kinds: str, **how) -> tuple[InMemory, Alignment]:
    found = align(base, ft, kinds, evidence="weights", **how)
    return in_memory(aligned(ft, found)), found


def check_law(base: InMemory, ft: InMemory, listed: str, kinds: tuple[str, ...] = ("all",)) -> Alignment:
    """Checks that a disguise of ft changes nothing of the aligned model, and returns the alignment that undid it."""
    plain, _ = aligned_to(base, ft, *kinds)
    hidden = in_memory(rewritten(ft, drawn(listed, ft.arch)))
    again, found = aligned_to(base, hidden, *kinds)
    assert dataclasses.replace(again.arch, norm_eps=0.0) == dataclasses.replace(plain.arch, norm_eps=0.0)
    assert again.arch.norm_eps == pytest.approx(base.arch.norm_eps, rel=1e-12)
    assert greatest_difference(again, plain) < EXACT
    assert logits_apart(ft, again) < EXACT
    return found


def existing(arch: Arch) -> list[str]:
    return [name for name in DISGUISE_NAMES if not DISGUISES[name].unsupported(arch)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "backwards"), diagonal(ARCHS, [False, True]))
def test_aligning_a_model_disguised_in_every_way_is_aligning_the_model(name, backwards):
    base = in_float64(ARCHS[name]())
    names = existing(base.arch)
    found = check_law(base, finetuned(base), ",".join(names[::-1] if backwards else names))
    assert found.undone["identity"]["layers"]
    assert found.undone["padding"]["units"] > 0


@pytest.mark.parametrize("name", ["gqa", slow("layer_norm_biases")])
def test_by_hidden_states_too_aligning_a_disguised_model_is_aligning_the_model(name):
    """They are computed in float32; what the disguise does to the features is found in them alone."""
    arch = ARCHS[name]()
    base, tokens = in_float64(arch), np.random.default_rng(0).integers(61, size=(16, 16), dtype=np.int32)
    ft = finetuned(base)
    hidden = in_memory(rewritten(ft, drawn("all", arch)))
    plain, again = (align(base, model, ("all",), evidence="activations", tokens=tokens) for model in (ft, hidden))
    one, other = (in_memory(aligned(model, found)) for model, found in ((ft, plain), (hidden, again)))
    assert greatest_difference(one, other) < 1e-4
    assert plain.how == again.how == "states"
    assert np.median([*leaf_cosines(base, other, None).values()]) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_disguises_in_any_order_are_undone(seed):
    rng = np.random.default_rng(seed)
    name = list(ARCHS)[rng.integers(len(ARCHS))]
    base = in_float64(ARCHS[name]())
    order = rng.permutation(existing(base.arch))[: rng.integers(3, 7)]
    check_law(base, finetuned(base), ",".join(order))


@pytest.mark.parametrize("disguise", [name for name in DISGUISE_NAMES if name != "means"])
def test_each_disguise_alone_is_undone(disguise):
    base = in_float64(tiny.mixtral())
    check_law(base, finetuned(base), disguise)


@pytest.mark.parametrize(
    ("arch", "disguise"),
    [(tiny.gpt2(), "rotate"), (tiny.gpt2(), "means"), (tiny.gpt2(activation="relu"), "units,rotate,means,permute"),
     (tiny.olmo2_gqa(), "rotate"), (tiny.olmo2_gqa(), "rotate,permute"),
     (dataclasses.replace(tiny.llama_mha(), norm="layer_norm_plain"), "rotate,means,permute")],
)  # fmt: skip
def test_what_other_norms_and_activations_allow_is_undone(arch, disguise):  # the last has norms as OLMo 1 has
    """Rotations that keep the mean, means, positive factors of ReLU units, signs of features."""
    base = in_float64(arch)
    check_law(base, finetuned(base), disguise)


def test_means_that_were_set_are_reported():
    base = in_float64(tiny.gpt2())
    rewrite = drawn("means", base.arch)[0]
    shifted = MeanSetting({name: 1 + values for name, values in rewrite.values.items()})
    hidden = in_memory(rewritten(base, [shifted]))
    restored, found = aligned_to(base, hidden, "all")
    assert found.undone["means"]["greatest_change"] == pytest.approx(1, abs=0.5)
    assert aligned_to(base, base, "all")[1].undone["means"]["greatest_change"] < EXACT
    assert greatest_difference(restored, in_memory(rewritten(base, [Untying()]))) < EXACT


def test_norms_that_allow_no_rotation_leave_the_features_permuted():
    base = in_float64(tiny.gpt2())
    ft = in_memory(rewritten(finetuned(base), drawn("permute", base.arch)))
    ft.params["layers"]["1"]["mlp_norm"]["scale"][2] = 0  # beside a bias, which then cannot be folded
    ft.params["layers"]["1"]["mlp_norm"]["bias"][2] = 1
    _, found = aligned_to(base, ft, "all")
    assert "a gain is zero" in found.left_out["rotation"]
    assert "embed" in next(r for r in found.rewrites if isinstance(r, Permutation)).permutations
    rms = dataclasses.replace(tiny.llama_mha(), qkv_bias=False, o_bias=False)
    plain = dataclasses.replace(rms, norm="layer_norm_plain")
    with pytest.raises(ValueError, match="base has no head/norm/scale, layers/attn_norm/scale, layers/mlp_norm/scale"):
        aligned_to(in_float64(plain), in_float64(rms, 1), "rotation", "mlp")
    gains = dataclasses.replace(rms, norm="layer_norm_gain")
    _, found = aligned_to(in_float64(gains), in_float64(rms, 1), "rotation", "mlp")
    assert "do not commute with the same maps" in found.left_out["rotation"]


@pytest.mark.parametrize(("disguise", "kinds"), [
    ("units", ("scaling",)),
    ("values,queries", ("queries", "values")),
    ("gains", ("gains",)),
    ("rotate", ("rotation",)),
    ("permute", ("embed", "mlp", "kv_heads", "q_group", "expert", "scaling")),
    ("identity,units", ("identity", "mlp", "scaling")),
])  # fmt: skip
def test_kinds_can_be_asked_for_one_by_one(disguise, kinds):
    base = in_float64(tiny.mixtral())
    found = check_law(base, finetuned(base), disguise, kinds)
    assert {"identity", *found.undone} == {"identity", *(set(kinds) - set(PERMUTABLE)), *_brought(kinds)}


def _brought(kinds: tuple[str, ...]) -> set[str]:
    return {"gains"} if "rotation" in kinds else set()


def test_what_was_undone_is_reported():
    base = in_float64(tiny.gemma_mqa())
    rewrites = (
        IdentityLayer(1),
        Padding(units=4, kv_heads=1),
        *drawn("gains,units,values,queries,rotate,permute", dataclasses.replace(base.arch, num_layers=3, mlp_dim=24,
               num_kv_heads=2, layer_ropes=(0,) * 3, layer_windows=(None,) * 3)),
    )  # fmt: skip
    hidden = in_memory(rewritten(base, rewrites))
    restored, found = aligned_to(base, hidden, "all")
    report = found.undone
    assert report["identity"] == {"layers": [1]}
    assert report["padding"] == {"units": 4, "features": 0, "kv_heads": 1}
    assert report["rotation"]["angle_degrees"] > 60
    assert report["rotation"]["mean_greatest_entry"] < 0.8
    assert 0.2 < report["scaling"]["share_flipped"] < 0.8
    assert report["scaling"]["least"] < 0.5
    assert report["scaling"]["greatest"] > 2
    assert report["values"]["greatest_condition"] > 2
    assert report["queries"]["rms_angle_degrees"] > 30
    assert report["gains"]["greatest_factor"] > 1.5
    assert "untied" not in report  # as it came
    assert aligned_to(base, finetuned(base), "all")[1].undone["untied"]
    assert found.share_moved["mlp"] > 0.5
    # Nothing was learnt in between, so that base itself comes back, but for the head, which was untied.
    a, b = flatten(base.params), flatten(restored.params)
    assert max(float(np.abs(a[name] - b[name]).max()) for name in a) < EXACT
    np.testing.assert_allclose(b["head/lm_head/kernel"], a["embed/embedding"].T, atol=EXACT)
    assert all(pair["after"] == pytest.approx(1) for pair in found.likeness.values())
    assert set(found.arrays) >= {"rotate", "units/layers/0/mlp", "values/layers/1/v_dim", "fold/head/norm"}
    assert plain(found.undone) == found.undone


def test_copies_are_reported_and_made_one_again():
    base = in_float64(tiny.qwen3_gqa())
    rewrites = drawn("split,cancel,repeat,permute", base.arch)
    hidden = in_memory(rewritten(base, rewrites))
    restored, found = aligned_to(base, hidden, "auto")
    more = hidden.arch.mlp_dim - base.arch.mlp_dim, hidden.arch.num_kv_heads - base.arch.num_kv_heads
    assert found.undone == {"copies": {"units": more[0], "kv_heads": more[1]}}
    assert restored.arch == base.arch
    assert greatest_difference(restored, base) < EXACT


def test_units_that_only_resemble_each_other_are_no_copies():
    base = in_float64(tiny.qwen3_gqa())
    hidden = in_memory(rewritten(base, drawn("split", base.arch)))
    up = hidden.params["layers"]["0"]["mlp"]["up_proj"]["kernel"]
    copies = up[:, base.arch.mlp_dim :]
    copies += 0.1 * up.std() * np.random.default_rng(0).normal(size=copies.shape)
    with pytest.raises(AlignmentError, match="units more than in base, of which 0 are inactive"):
        aligned_to(base, hidden, "all")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "mqa_gains_minus_one", "experts"])
def test_auto_gives_back_a_permuted_model_bit_for_bit(name):
    base = in_float64(ARCHS[name]())
    ft = finetuned(base, 0.3)
    hidden = in_memory(rewritten(ft, drawn("permute", ft.arch)))
    restored, found = aligned_to(base, hidden, "auto")
    assert [rewrite.name for rewrite in found.rewrites] == ["permute"]
    assert greatest_difference(restored, ft) == 0


def test_auto_drops_padding_and_identity_layers_bit_for_bit():
    base = in_float64(tiny.qwen3_gqa())
    ft = finetuned(base, 0.2)
    hidden = in_memory(rewritten(ft, (IdentityLayer(0), Padding(units=3, kv_heads=2), IdentityLayer(2))))
    hidden = in_memory(rewritten(hidden, drawn("permute", hidden.arch)))
    restored, found = aligned_to(base, hidden, "auto")
    assert found.undone == {
        "identity": {"layers": [0, 2]}, "padding": {"units": 3, "features": 0, "kv_heads": 2}
    }  # fmt: skip
    assert restored.arch == base.arch
    assert greatest_difference(restored, ft) == 0


@pytest.mark.parametrize("disguise", ["units", "values", "queries", "gains", "rotate"])
def test_auto_sees_through_what_permutations_do_not_explain(disguise):
    base = in_float64(tiny.mixtral())
    ft = finetuned(base)
    hidden = in_memory(rewritten(ft, drawn(f"{disguise},permute", ft.arch)))
    restored, found = aligned_to(base, hidden, "auto")
    assert len(found.rewrites) > 1
    assert all(pair["after"] > 0.95 for pair in found.likeness.values())
    assert greatest_difference(restored, aligned_to(base, ft, "all")[0]) < EXACT


def test_other_vocabularies_meet_in_their_shared_tokens():
    base = in_float64(tiny.mixtral())
    ft = finetuned(base)
    ids = np.random.default_rng(5).permutation(base.arch.vocab_size).astype(np.int32)
    shared = {"vocab": (ids[:40], np.arange(40, dtype=np.int32))}
    renamed = in_memory(rewritten(ft, [Renaming(ids)]))
    plain_model, _ = aligned_to(base, ft, "all", shared={"vocab": (ids[:40], ids[:40])})
    hidden = in_memory(rewritten(renamed, drawn("rotate,gains,permute", ft.arch)))
    restored, _ = aligned_to(base, hidden, "all", shared=shared)
    back = in_memory(rewritten(restored, [Renaming(np.argsort(ids).astype(np.int32))]))
    assert greatest_difference(back, plain_model) < EXACT
    with pytest.raises(AlignmentError, match="stands for the same token"):
        aligned_to(base, InMemory(ft.arch, ft.params | {
            "embed": {"embedding": 0 * ft.params["embed"]["embedding"]},
            "head": ft.params["head"] | {"lm_head": {"kernel": 0 * ft.params["head"]["lm_head"]["kernel"]}},
        }), "all")  # fmt: skip


def test_independent_models_are_aligned_without_growing_alike():
    base, ft = in_float64(tiny.mixtral()), in_float64(tiny.mixtral(), seed=9)
    model, found = aligned_to(base, ft, "all")
    assert logits_apart(ft, model) < 1e-9
    after = [pair["after"] for kind, pair in found.likeness.items() if kind.endswith("kernel")]
    assert max(after) < 0.75
    assert np.mean(after) < 0.5


def test_weights_that_are_zero_do_not_stop_alignment():
    base = in_float64(tiny.mixtral())
    ft = finetuned(base)
    layer = ft.params["layers"]["1"]
    layer["attn"]["v_proj"]["kernel"][:, 0] = 0
    layer["attn"]["q_proj"]["kernel"][:, 1] = 0
    layer["mlp"]["up_proj"]["kernel"][0, :, :3] = 0
    layer["mlp"]["down_proj"]["kernel"][1] = 0
    model, found = aligned_to(base, ft, "all")
    assert logits_apart(ft, model) < 1e-9
    assert "too low rank" in found.left_out["layers/1/v_dim"]


@pytest.mark.parametrize(("change", "line"), [
    ({"num_layers": 3, "layer_ropes": (0,) * 3, "layer_windows": (None,) * 3}, "of which 0 add nothing"),
    ({"mlp_dim": 22}, "layers/1/mlp of 2: 2 units more than in base, of which 0 are inactive"),
    ({"embed_dim": 26}, "embed: 2 features more than in base, of which 0 are inactive"),
    ({"num_kv_heads": 4}, "layers/0/kv_heads: 1 units more than in base, of which 0 are inactive"),
])  # fmt: skip
def test_what_ft_has_more_must_do_nothing(change, line):
    base, ft = in_float64(tiny.mixtral()), in_float64(tiny.mixtral(**change))
    assert not alignment_problems(base.arch, ft.arch, ["all"])
    assert alignment_problems(ft.arch, base.arch, ["all"])
    with pytest.raises(AlignmentError, match=line):
        align(base, ft, ["all"], evidence="weights")


def test_words_that_do_not_fit_are_refused():
    arch = tiny.mixtral()
    latents, states = {"q_latent", "kv_latent"}, {"state_groups", "state_heads"}
    others = latents | states  # of other attention, and of recurrences
    assert not any(alignment_problems(arch, arch, [kind]) for kind in (*set(KINDS) - others, "all", "auto"))
    assert alignment_problems(arch, arch, ["q_latent"]) == ["neither model has units of kind q_latent"]
    assert not any(alignment_problems(tiny.deepseek(), tiny.deepseek(), [kind]) for kind in latents)
    assert "cannot be combined" in alignment_problems(arch, arch, ["all", "mlp"])[0]
    assert "kinds spin cannot be aligned" in alignment_problems(arch, arch, ["spin"])[0]
    assert alignment_problems(arch, tiny.mixtral(head_dim=8), ["values"])
    base = in_float64(arch)
    with pytest.raises(ValueError, match="scaling: estimated from weights alone; add rotation"):
        align(base, base, ["mlp", "scaling"], evidence="activations", tokens=np.zeros((1, 4), np.int32))


@pytest.mark.usefixtures("engine")
def test_a_wrong_map_is_refused(monkeypatch):
    base = tiny.model(tiny.mixtral())
    ft = InMemory(base.arch, tiny.noisy(base.params, 0.1))
    found = align(base, ft, ["all"], evidence="weights")
    assert found.logits_moved < 1e-4
    monkeypatch.setattr(UnitScaling, "apply", lambda self, prefix, read, arch: _only_up(read(prefix), prefix, self))
    with pytest.raises(ValueError, match=r"logits move by .* do not keep the function"):
        align(base, ft, ["scaling"], evidence="weights")


def _only_up(weights, prefix, scaling):
    name = "mlp/up_proj/kernel"
    grown = [w.with_values(w.float64 * (3 if leaf == name else 1)) for leaf, w in weights.items()]
    return dict(zip(weights, grown, strict=True))


def test_balanced_maps_follow_the_maps_of_ft_exactly():
    rng = np.random.default_rng(0)
    base = AdjacentWeights(rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 6)))
    ft = AdjacentWeights(base.writes + 0.1 * rng.normal(size=(2, 3, 8)), base.reads + 0.1 * rng.normal(size=(2, 3, 6)))
    N = rng.normal(size=(2, 3, 3))
    hidden = AdjacentWeights(N @ ft.writes, np.linalg.inv(N).swapaxes(1, 2) @ ft.reads)
    M, degenerate = mixing_matrices(base, ft)
    assert degenerate == []
    np.testing.assert_allclose(mixing_matrices(base, hidden)[0] @ N, M, atol=1e-10)
    np.testing.assert_allclose(mixing_matrices(base, base)[0], np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-10)
    z = rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))
    as_complex = AdjacentWeights(ft.writes + 1j * rng.normal(size=(2, 3, 8)), ft.reads + 0j)
    turned = AdjacentWeights(z[..., None] * as_complex.writes, as_complex.reads / z[..., None].conj())
    np.testing.assert_allclose(scale_factors(base, turned) * z, scale_factors(base, as_complex), atol=1e-12)


def test_the_noise_of_ft_hardly_moves_what_is_aligned():
    """Base plus noise is aligned already: continuous maps must not carry it far from where it stands."""
    base = in_float64(tiny.mixtral())
    ft = finetuned(base, 0.05)
    before = leaf_cosines(base, ft, None)
    after = leaf_cosines(base, aligned_to(base, ft, "all")[0], None)
    assert min(after[name] - before[name] for name in before) > -2e-3


@pytest.fixture
def config_of(quick_config):
    return lambda **fields: quick_config(**{"align": True, "align_axes": "all"} | fields)


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_a_run_sees_through_every_disguise_at_once(config_of, family, tmp_path):
    original = experiment.trace(config_of())["statistics"]["mode"]
    flat = original["aligned"]["curve"]
    assert flat["barrier"] < original["non_aligned"]["curve"]["barrier"] + 0.01
    folder = tmp_path / "hidden"
    names = ",".join(existing(open_checkpoint(str(family.member("finetune"))).arch))
    write_disguised(str(family.member("finetune")), names, 1, str(folder))
    record = experiment.trace(config_of(ft_model_id=str(folder)))
    sides = record["statistics"]["mode"]
    assert "different depth" in sides["non_aligned"]["not_applicable"]
    assert sides["aligned"]["curve"]["barrier"] == pytest.approx(flat["barrier"], abs=0.01)
    assert sides["aligned"]["curve"]["loss"] == pytest.approx(flat["loss"], abs=0.01)
    assert record["alignment"]["undone"].keys() >= {"identity", "padding", "rotation", "scaling", "values", "queries"}
    assert record["alignment"]["logits_moved"] < 1e-3
    arrays = np.load(tmp_path / "out" / "results.run" / "alignment.npz")
    assert {"layers/0/mlp", "rotate", "values/layers/0/v_dim"} <= set(arrays)


@pytest.mark.usefixtures("engine")
def test_a_run_goes_on_where_the_weights_do_not_allow_alignment(config_of, family, tmp_path):
    """A model with one more layer that does something."""
    deeper = tmp_path / "deeper"
    source = open_checkpoint(str(family.member("finetune")))
    save_checkpoint(deeper, rewritten(source, [IdentityLayer(1)]), source.folder)
    weights = load_file(deeper / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.0.mlp.down_proj.weight"].copy()
    save_file(weights, deeper / "model.safetensors")
    record = experiment.trace(config_of(ft_model_id=str(deeper), stat="emb,mode"))
    assert record["alignment"] is record["statistics"]["emb"]["aligned"] is None
    assert any("not aligned: ft has 1 layers more than base, of which 0" in note for note in record["notes"])
    assert record["statistics"]["emb"]["non_aligned"]["headline"] > 0.8
