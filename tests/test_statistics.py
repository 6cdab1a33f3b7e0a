"""Every statistic against numpy in float64, and what it says of pairs it cannot compare."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tracing_jax.axes import axis_table
from tracing_jax.interpolation import path_groups
from tracing_jax.rewrites import permute, random_permutations
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory
from tracing_jax.statistics import Pair, Vocabularies
from tracing_jax.statistics.comparison import overlapped
from tracing_jax.statistics.cosine import Cos, Emb, best_cosines
from tracing_jax.statistics.mode import CONTROL_FEATURES, NO_DESCENT, Mode, control_note, curve_of
from tracing_jax.statistics.perm_mode_l2 import PermModeL2
from tracing_jax.statistics.permuted_copies import CHOSEN_ORDER

ARCH = tiny.llama_mha()
SAME = Vocabularies(True, np.arange(61, dtype=np.int32), np.arange(61, dtype=np.int32))
NO_TOKENS = Vocabularies(False, np.zeros(0, np.int32), np.zeros(0, np.int32))


def pair_of(base, ft, vocabularies=SAME):
    tokens = np.random.default_rng(0).integers(61, size=(3, 12), dtype=np.int32)
    return Pair(base, ft, vocabularies, tokens, Compute(make_mesh(1, 1), 4), seed=0)


def best_in_float64(a, b):
    a, b = (
        np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True) for x in (a, b)
    )
    return (a @ b.T).max(1)


def test_best_cosines_are_those_of_numpy_and_zero_rows_have_none(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.normal(size=(37, 8))), jnp.asarray(rng.normal(size=(53, 8)))
    expected = best_in_float64(a, b)
    np.testing.assert_allclose(best_cosines(a, b), expected, atol=1e-6)
    monkeypatch.setattr("tracing_jax.statistics.cosine._SLICE_BYTES", 4 * 53 * 5)  # five rows at a time
    np.testing.assert_allclose(best_cosines(a, b), expected, atol=1e-6)
    assert best_cosines(a.at[3].set(0), b)[3] == 0


def test_cos_is_the_mean_of_the_medians_over_units():
    base, ft = tiny.model(ARCH, 0), tiny.model(ARCH, 1)
    gates = [[m.layer(i)["mlp"]["gate_proj"]["kernel"].T for m in (base, ft)] for i in range(2)]
    medians = [np.median(best_in_float64(*gate)) for gate in gates]
    result = Cos().compute(pair_of(base, ft))
    np.testing.assert_allclose(result.per_layer["values"], medians, atol=1e-6)
    assert result.headline == pytest.approx(np.mean(medians), abs=1e-6)
    assert result.log10_p is None
    assert result.p_reason


def test_cos_sees_through_permuted_units_but_not_through_permuted_features():
    base, table = tiny.model(ARCH), axis_table(ARCH)
    for kind, expected in (("mlp", True), ("embed", False)):
        ft = InMemory(ARCH, permute(base.params, random_permutations(jax.random.key(0), table, [kind]), table))
        assert (Cos().compute(pair_of(base, ft)).headline > 0.999) is expected


def test_emb_compares_the_rows_of_shared_tokens():
    base, ft = tiny.model(ARCH, 0), tiny.model(ARCH, 1)
    ids_base, ids_ft = np.array([4, 9, 30, 31], np.int32), np.array([1, 2, 60, 5], np.int32)
    rows = np.asarray(base.embed()["embedding"])[ids_base], np.asarray(ft.embed()["embedding"])[ids_ft]
    expected = np.median(best_in_float64(*rows))
    result = Emb().compute(pair_of(base, ft, Vocabularies(False, ids_base, ids_ft)))
    assert result.headline == pytest.approx(expected, abs=1e-6)


def test_emb_draws_rows_from_the_seed_when_there_are_too_many():
    pair = pair_of(tiny.model(ARCH, 0), tiny.model(ARCH, 1))
    drawn = [Emb(max_rows=10).compute(dataclasses.replace(pair, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "10 embedding rows" in drawn[0].distribution["label"]


@pytest.mark.slow
def test_mode_on_a_model_and_itself_is_flat():
    model = tiny.model(ARCH)
    found = Mode(attn=True, emb=True).compute(pair_of(model, model))
    assert NO_DESCENT in found.notes  # however flat the path is
    assert control_note("none", ARCH, path_groups(True, True)) in found.notes
    curve = found.curve
    np.testing.assert_allclose(curve.loss, curve.loss[0], atol=1e-5)
    assert curve.barrier == pytest.approx(0, abs=1e-5)
    assert curve.end_loss_ft_own == pytest.approx(curve.loss[-1], abs=1e-5)


def test_mode_names_controls_of_the_architecture_and_what_they_are_not():
    """An independent pair is not shown beside higher barriers of another kind of model, as if it were related."""
    gated, plain = dataclasses.replace(ARCH, embed_dim=CONTROL_FEATURES), tiny.gpt2()
    note = control_note("none", gated, path_groups(True, True))
    assert "Llama type" in note
    assert "1.48 to 1.73" in note
    assert ", with" not in note
    assert "every weight on the path, where here some are not" in control_note("none", gated, path_groups(False, True))
    note = control_note("maps", plain, path_groups(True, True))
    assert "GPT-2 type" in note
    assert "0.39 to 0.45" in note
    assert f"64 features, not {plain.embed_dim}" in note
    assert "mixture of experts" in control_note("none", tiny.mixtral(), path_groups(True, True))


@pytest.mark.slow
def test_a_rank_among_copies_says_what_it_rests_on_and_that_a_low_path_is_no_evidence():
    pair = pair_of(tiny.model(ARCH, 0), tiny.model(ARCH, 1))
    found = PermModeL2(num_perm=9).compute(pair)
    assert {NO_DESCENT, CHOSEN_ORDER} <= set(found.notes)
    assert CHOSEN_ORDER not in Mode().compute(pair).notes


def test_mode_ends_at_fts_own_loss_only_if_everything_moves():
    pair = pair_of(tiny.model(ARCH, 0), tiny.model(ARCH, 1))
    everything, mlps = (Mode(attn=moves, emb=moves).compute(pair).curve for moves in (True, False))
    assert everything.loss[-1] == pytest.approx(everything.end_loss_ft_own, abs=1e-5)
    assert abs(mlps.loss[-1] - mlps.end_loss_ft_own) > 0.01
    assert everything.loss[0] == pytest.approx(mlps.loss[0], abs=1e-5)


@pytest.mark.slow
def test_mode_by_layer_finds_the_layer_that_carries_the_barrier():
    base, other = tiny.model(ARCH, 0), tiny.model(ARCH, 1)
    layers = base.params["layers"] | {"1": other.params["layers"]["1"]}
    found = Mode(attn=True, by_layer=True).compute(pair_of(base, InMemory(ARCH, base.params | {"layers": layers})))
    first, second = found.per_layer["values"]
    assert first == pytest.approx(0, abs=1e-5)
    ends = (found.curve.loss[0] + found.curve.loss[-1]) / 2
    assert second == pytest.approx(found.curve.midpoint - ends, abs=1e-5)
    assert abs(second) > 1e-3


def test_mode_always_has_both_ends_and_the_middle():
    model = tiny.model(ARCH)
    assert Mode(alphas=(0.2,)).compute(pair_of(model, model)).curve.alpha == [0.0, 0.2, 0.5, 1.0]


def test_barrier_is_the_largest_excess_over_the_line_between_the_ends():
    alphas, loss = np.array([0, 0.25, 0.5, 0.75, 1]), np.array([2.0, 3.0, 5.0, 7.0, 4.0])
    curve = curve_of(alphas, loss, None, ())
    assert (curve.midpoint, curve.barrier, curve.barrier_alpha) == (5.0, 7.0 - 3.5, 0.75)
    assert curve_of(alphas, np.array([2.0, 1.0, 1.0, 1.0, 4.0]), None, ()).barrier == 0.0


def test_cos_compares_the_units_of_all_experts():
    arch = tiny.mixtral()
    base, ft, table = tiny.model(arch, 0), tiny.model(arch, 1), axis_table(arch)
    gates = [[m.layer(i)["mlp"]["gate_proj"]["kernel"] for m in (base, ft)] for i in range(2)]
    rows = [[np.concatenate([np.asarray(expert).T for expert in kernel]) for kernel in pair] for pair in gates]
    result = Cos().compute(pair_of(base, ft))
    np.testing.assert_allclose(result.per_layer["values"], [np.median(best_in_float64(*r)) for r in rows], atol=1e-6)
    hidden = permute(base.params, random_permutations(jax.random.key(0), table, ["mlp", "expert"]), table)
    assert Cos().compute(pair_of(base, InMemory(arch, hidden))).headline > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("arch", [tiny.gpt2(), tiny.mixtral()], ids=lambda arch: arch.family)
def test_mode_and_emb_of_other_families(arch):
    pair = pair_of(tiny.model(arch, 0), tiny.model(arch, 1))
    assert Mode(attn=True, emb=True).not_applicable(arch, arch, SAME) == []
    curve = Mode(attn=True, emb=True).compute(pair).curve
    assert curve.loss[-1] == pytest.approx(curve.end_loss_ft_own, abs=1e-5)
    rows = (np.asarray(model.embed()["embedding"]) for model in (pair.base, pair.ft))
    assert Emb().compute(pair).headline == pytest.approx(np.median(best_in_float64(*rows)), abs=1e-6)


@pytest.mark.parametrize(("statistic", "base", "ft", "message"), [
    (Cos(), tiny.gpt2(), tiny.gpt2(), "no gate: the MLPs of base (family gpt2) have none"),
    (Cos(), tiny.llama_mha(), tiny.gpt2(), "no gate: the MLPs of ft (family gpt2) have none"),
    (Mode(), tiny.llama_mha(), tiny.gpt2(), "norm rms / layer_norm"),
    (Mode(), tiny.llama_mha(), tiny.gpt2(), "only one model has mlp/gate_proj/kernel"),
    (Mode(), tiny.llama_mha(), tiny.mixtral(), "different width: expert has no and 3 units"),
    (Mode(), tiny.mixtral(), tiny.llama_mha(), "different width: expert has 3 and no units"),
    (Mode(), tiny.mixtral(num_experts=4), tiny.mixtral(), "different width: expert has 4 and 3 units"),
    (Mode(emb=True), tiny.gpt2(), tiny.gpt2(num_positions=8), "different width: position has 24 and 8 units"),
])  # fmt: skip
def test_what_other_families_cannot_be_compared_by_is_said(statistic, base, ft, message):
    problems = statistic.not_applicable(base, ft, SAME)
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(("statistic", "changes", "vocabularies", "message"), [
    (Mode(), {"num_layers": 3}, SAME, "different depth: 2 and 3 layers"),
    (Mode(), {"mlp_dim": 7}, SAME, "mlp has 20 and 7 units"),
    (Mode(), {"embed_dim": 8}, SAME, "embed has 24 and 8 units"),
    (Mode(), {"mlp_bias": False}, SAME, "only one model has mlp/up_proj/bias"),
    (Mode(), {"activation": "relu"}, SAME, "activation silu / relu"),
    (Mode(attn=True), {"num_kv_heads": 2, "q_group": 3}, SAME, "kv_heads has 6 and 2 units"),
    (Mode(emb=True), {}, NO_TOKENS, "different tokenizers"),
    (Mode(emb=True), {"tied": True}, SAME, "ties its head"),
    (Cos(), {"num_layers": 3}, SAME, "different depth"),
    (Cos(), {"embed_dim": 8}, SAME, "different width"),
    (Emb(), {"embed_dim": 8}, SAME, "different width"),
    (Emb(), {}, NO_TOKENS, "share no token"),
])  # fmt: skip
def test_what_cannot_be_compared_is_said(statistic, changes, vocabularies, message):
    problems = statistic.not_applicable(ARCH, dataclasses.replace(ARCH, **changes), vocabularies)
    assert any(message in problem for problem in problems), problems


def test_what_does_not_move_may_differ():
    """Heads may differ where attention stays, the vocabulary where embeddings stay, the MLP's width for cos."""
    heads = dataclasses.replace(ARCH, num_kv_heads=2, q_group=3)
    assert Mode().not_applicable(ARCH, heads, SAME) == []
    assert Mode(attn=True).not_applicable(ARCH, dataclasses.replace(ARCH, vocab_size=7), NO_TOKENS) == []
    assert Cos().not_applicable(ARCH, dataclasses.replace(ARCH, mlp_dim=7), SAME) == []


def test_work_overlaps_the_making_of_the_next_item_and_keeps_its_order():
    done = []

    def items():
        for i in range(4):
            if i >= 1:
                assert len(done) >= i - 1  # of those before, at most one is still being worked on
            yield i

    def work(i):
        done.append(i)
        return i * i

    assert list(overlapped(items(), work)) == [0, 1, 4, 9]
    assert list(overlapped([], work)) == []
    with pytest.raises(ZeroDivisionError):
        list(overlapped([1, 0, 2], lambda i: 1 / i))
