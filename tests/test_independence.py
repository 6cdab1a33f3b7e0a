"""The tests with p-values: exact where they claim it, equivariant, equal to numpy, and no p-value after alignment."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from scipy.optimize import linear_sum_assignment

from tracing_jax import forward
from tracing_jax.axes import axis_table
from tracing_jax.data import PairedBlocks, paired_one_to_one
from tracing_jax.forward import forward_pass, logits, path_losses
from tracing_jax.matching import live_units, match_units
from tracing_jax.options import MATCH_FORMS, RunOptions
from tracing_jax.rewrites import permute, random_permutations
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory
from tracing_jax.statistics import (
    REGISTRY,
    Identity,
    Pair,
    Result,
    Test,
    Vocabularies,
    hidden_by,
    make_statistic,
    over_pairs,
    verdict,
)
from tracing_jax.statistics.calibration import (
    DEFAULT_ALLOWANCE,
    control_pairs,
    measured_allowance,
    null_of,
    upper_share,
)
from tracing_jax.statistics.comparison import (
    Comparison,
    against_each_other,
    against_identity,
    sampled_partners,
)
from tracing_jax.statistics.csh import Csh
from tracing_jax.statistics.csu import Csu, CsuAll
from tracing_jax.statistics.identity_starts import diagonal_ranks
from tracing_jax.statistics.jsd import Jsd
from tracing_jax.statistics.l2 import L2, distances
from tracing_jax.statistics.match import Match, form_tests
from tracing_jax.statistics.match_all import MatchAll
from tracing_jax.statistics.match_crossfit import MatchCrossfit
from tracing_jax.statistics.match_io import MatchIo
from tracing_jax.statistics.match_moments import MatchMoments
from tracing_jax.statistics.mode import Mode, midpoint_losses
from tracing_jax.statistics.perm_mode_l2 import PermModeL2
from tracing_jax.statistics.permuted_copies import draw_permutations
from tracing_jax.tree import flatten

ARCH = tiny.qwen3_gqa(num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3, mlp_dim=40)
UNSEEN = np.arange(48, 61, dtype=np.int32)
SAME = Vocabularies(
    True, np.arange(61, dtype=np.int32), np.arange(61, dtype=np.int32), unseen={"unreachable tokens": (UNSEEN, UNSEEN)}
)
TOKENS = np.random.default_rng(0).integers(61, size=(8, 24), dtype=np.int32)


def pair_of(base, ft, **fields):
    blocks = paired_one_to_one(TOKENS, TOKENS)
    fields = {"vocabularies": SAME, "tokens": TOKENS, "blocks": blocks, "seed": 0} | fields
    return Pair(base=base, ft=ft, compute=Compute(make_mesh(1, 1), 4), **fields)


def finetuned(base, share=0.1):
    return InMemory(base.arch, tiny.noisy(base.params, share))


BASE = tiny.model(ARCH, 0)
RELATED, OTHER = finetuned(BASE), tiny.model(ARCH, 1)
TESTS = [Csu(), CsuAll(), Csh(blocks=4, block_size=32), Match(), MatchAll(), MatchMoments(), MatchIo(),
         MatchCrossfit(), L2(num_perm=19), PermModeL2(num_perm=19), Mode(num_perm=19, alphas=())]  # fmt: skip


@pytest.mark.parametrize("statistic", TESTS, ids=lambda statistic: type(statistic).__name__)
def test_a_relative_is_found_an_independent_model_is_not_and_alignment_silences_all(statistic):
    related, other = statistic.compute(pair_of(BASE, RELATED)), statistic.compute(pair_of(BASE, OTHER))
    if not isinstance(statistic, Mode | PermModeL2):  # untrained models have no path of low loss
        assert related.log10_p < (-0.9 if isinstance(statistic, L2) else -8)
    assert -2.5 < other.log10_p <= 0
    aligned = statistic.compute(pair_of(BASE, RELATED, aligned=True))
    assert aligned.log10_p is None
    assert "after alignment nothing has a null" in aligned.p_reason
    assert all(test.log10_p is None and test.log10_ps is None for test in aligned.tests)
    assert aligned.headline == related.headline


def p_values_in(found, where=""):
    """Yields where a record, or a part of it, holds a p-value."""
    if isinstance(found, dict):
        for key, value in found.items():
            if value is not None and re.search(r"(log10_?|adjusted_)p(s|_|$)|p_value", key):
                yield f"{where}/{key}"
            yield from p_values_in(value, f"{where}/{key}")
    elif isinstance(found, list | tuple):
        for i, value in enumerate(found):
            yield from p_values_in(value, f"{where}/{i}")
    elif isinstance(found, str) and re.search(r"\bp = |log10 p", found):
        yield f"{where}: {found}"


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTRY)
def test_no_p_value_of_any_kind_is_left_in_an_aligned_result(name):
    small = {"l2": {"num_perm": 3}, "perm_mode_l2": {"num_perm": 3}, "mode": {"num_perm": 3},
             "csh": {"blocks": 4, "block_size": 32}, "match_distilled": {"steps": 2},
             "screen": {"share": 1.0}}  # fmt: skip
    statistic = make_statistic(name, RunOptions.from_config(small))
    given, aligned = (statistic.compute(pair_of(BASE, RELATED, aligned=side)).as_dict() for side in (False, True))
    assert list(p_values_in(given)) or name in ("cos", "emb", "jsd")
    assert list(p_values_in(aligned)) == []
    assert aligned["headline"] is not None


def test_matching_is_that_of_scipy_and_moves_with_its_units():
    rng = np.random.default_rng(0)
    similarity = rng.normal(size=(12, 17))
    found = match_units(similarity, np.random.default_rng(1))
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    np.testing.assert_array_equal(found.base, rows)
    np.testing.assert_array_equal(found.ft, columns)
    p, q = rng.permutation(12), rng.permutation(17)
    moved = match_units(similarity[np.ix_(p, q)], np.random.default_rng(2))
    assert set(zip(p[moved.base], q[moved.ft])) == set(zip(found.base, found.ft))
    wide = match_units(similarity.T, np.random.default_rng(1))
    assert set(zip(wide.ft, wide.base)) == set(zip(found.base, found.ft))


def test_dead_units_take_no_part_and_duplicated_ones_fall_by_lot():
    rng = np.random.default_rng(0)
    similarity = rng.normal(size=(30, 30))
    similarity[[3, 4]] = 0
    similarity[:, 29] = 0
    similarity[20:28] = similarity[20]  # eight units that cannot be told apart
    found = match_units(similarity, np.random.default_rng(0))
    assert (found.live_base, found.live_ft, len(found.base)) == (28, 29, 28)
    assert not set(found.base) & {3, 4}
    assert 29 not in found.ft
    orders = {tuple(match_units(similarity, np.random.default_rng(s)).ft[18:26]) for s in range(6)}
    assert len(orders) > 3
    rows, columns = live_units(similarity, np.eye(30)[:, ::-1])
    assert 3 not in rows
    assert 29 not in columns


def test_zero_units_at_the_end_leak_nothing():
    """The case of STATISTICS section 1: a fifth of the units zero in both models, in the same place."""
    log_ps = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        a, b = (rng.normal(size=(50, 16)) for _ in range(2))
        a[40:] = b[40:] = 0
        similarity = np.abs(a @ b.T)
        log_ps.append(against_identity(match_units(similarity, rng), 50, 50).log_p_rank)
    assert scipy.stats.kstest(np.exp(log_ps), "uniform").pvalue > 0.01


def test_csu_is_the_rank_correlation_and_agreement_of_numpys_matching():
    result = Csu().compute(pair_of(BASE, finetuned(BASE, 1.5)))
    log_ps, agreeing = [], []
    for i in range(3):
        a, b = (np.asarray(m.layer(i)["mlp"]["up_proj"]["kernel"], np.float64).T for m in (BASE, finetuned(BASE, 1.5)))
        cosines = np.abs(a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1))
        matched = linear_sum_assignment(cosines, maximize=True)[1]
        r, h = scipy.stats.spearmanr(np.arange(40), matched).statistic, 40
        log_ps.append(scipy.stats.t.logsf(r * math.sqrt((h - 2) / (1 - r * r)), h - 2))
        agreeing.append(int((matched == np.arange(40)).sum()))
    rank = result.tests[0]
    by_t, found = np.array(log_ps) / math.log(10), np.array(rank.log10_ps)
    assert (found >= by_t - 1e-9).all()  # of 40 units the t tail is a little too light
    assert (found <= np.maximum(by_t, math.log10(5e-6)) + 0.2).all()
    assert list(rank.values["agreeing"]) == agreeing
    fisher = scipy.stats.combine_pvalues(10.0**found).pvalue
    assert rank.log10_p == pytest.approx(math.log10(fisher), rel=1e-6)


@pytest.mark.slow
def test_csh_and_jsd_are_those_of_numpy():
    small = Csh(blocks=3, block_size=16)
    pair = pair_of(BASE, finetuned(BASE, 1.0))
    blocks = grams_blocks(small, pair)
    found = small.compute(pair)
    for i, (a, b) in enumerate(zip(*(units(model, blocks.base) for model in (pair.base, pair.ft)))):
        correlation = np.abs(np.corrcoef(a.T, b.T)[:40, 40:])
        matched = linear_sum_assignment(correlation, maximize=True)[1]
        assert found.tests[0].values["agreeing"][i] == (matched == np.arange(40)).sum()
    one, other = (log_softmax(logits(model, TOKENS).astype(np.float64)) for model in (pair.base, pair.ft))
    middle = np.logaddexp(one, other) - math.log(2)
    expected = 0.5 * ((np.exp(one) * (one - middle)).sum(-1) + (np.exp(other) * (other - middle)).sum(-1))
    assert Jsd().compute(pair).headline == pytest.approx(expected.mean(), rel=1e-4)
    assert Jsd().compute(pair_of(BASE, BASE)).headline == pytest.approx(0, abs=1e-6)


def grams_blocks(statistic, pair):
    from tracing_jax.statistics.csh import random_blocks

    shape = (statistic.blocks, statistic.block_size)
    return random_blocks(pair.vocabularies, shape, pair.generator("csh", "tokens"))


def units(model, tokens):
    at = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    layers = forward.activations(
        model, tokens, at, np.ones(tokens.shape, bool), ("units",), Compute(make_mesh(1, 1), 2)
    )
    return [np.asarray(by_tap["units"], np.float64) for _, by_tap in layers]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("statistic", [Csh(blocks=5, block_size=16), Match(forms=("forward",)), Jsd()],
                         ids=lambda statistic: type(statistic).__name__)  # fmt: skip
def test_forward_statistics_make_one_pass_per_model(statistic, monkeypatch):
    """Every layer of every model sees each of its batches once."""
    calls, step = [], forward_pass.block_step
    monkeypatch.setattr(forward_pass, "block_step", lambda *args, **more: (calls.append(0), step(*args, **more))[1])
    statistic.compute(pair_of(BASE, OTHER))
    layers, batches, models = 3, 2, 2
    assert len(calls) == layers * batches * models


@pytest.mark.slow
def test_l2_of_permuted_copies_is_that_of_the_copies():
    pair = pair_of(BASE, OTHER)
    permutations = draw_permutations(pair, 3)
    observed, permuted = distances(pair, permutations)

    def mean_distance(ft):
        pairs = zip(flatten(BASE.params).values(), flatten(ft).values(), strict=True)
        return np.mean([np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b, np.float64)) for a, b in pairs])

    assert observed == pytest.approx(mean_distance(OTHER.params), rel=1e-6)
    copies = [permute(OTHER.params, p, axis_table(ARCH)) for p in permutations]
    np.testing.assert_allclose(permuted, [mean_distance(copy) for copy in copies], rtol=1e-6)


def test_a_light_finetune_does_not_cancel_in_l2():
    light = finetuned(BASE, 1e-6)
    observed, _ = distances(pair_of(BASE, light), [])
    leaves = zip(flatten(BASE.params).values(), flatten(light.params).values(), strict=True)
    expected = np.mean([np.linalg.norm(np.float64(a) - np.float64(b)) for a, b in leaves])
    assert observed == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_midpoints_of_permuted_copies_are_those_of_the_copies():
    pair = pair_of(BASE, OTHER)
    permutations = draw_permutations(pair, 2)
    found = midpoint_losses(pair, permutations, ("mlp", "norm", "attn", "emb"))
    for loss, permutation in zip(found, permutations):
        copy = InMemory(ARCH, permute(OTHER.params, permutation, axis_table(ARCH)))
        losses = path_losses(BASE, copy, TOKENS, [0.5], ("mlp", "norm", "attn", "emb"), pair.compute)
        assert loss == pytest.approx(losses.mean(dtype=np.float64), rel=1e-5)
    with pytest.raises(ValueError, match="2 permuted copies at 1 alphas"):
        path_losses(BASE, OTHER, TOKENS, [0.5], ("mlp",), pair.compute, copies=permutations)


@pytest.mark.parametrize("kinds", [("mlp",), ("embed",), ("embed", "mlp", "kv_heads", "q_group")])
def test_match_does_not_change_under_a_permutation_while_the_constrained_tests_lose_their_power(kinds):
    table = axis_table(ARCH)
    hidden = InMemory(ARCH, permute(RELATED.params, random_permutations(jax.random.key(3), table, kinds), table))
    before, after = (Match().compute(pair_of(BASE, ft)) for ft in (RELATED, hidden))
    for one, other in zip(before.tests, after.tests, strict=True):
        assert one.values["agreeing"] == other.values["agreeing"]
        if "rank" not in one.name:
            assert one.log10_ps == other.log10_ps
    assert Csu().compute(pair_of(BASE, hidden)).log10_p > -2.5


@pytest.mark.slow
def test_match_sees_through_negative_scaling_of_the_up_side():
    params = jax.tree.map(jnp.asarray, RELATED.params)
    for i in range(3):
        mlp = params["layers"][str(i)]["mlp"]
        signs = np.random.default_rng(i).choice([-3.0, 0.5], size=40)
        mlp["up_proj"]["kernel"] = mlp["up_proj"]["kernel"] * signs
        mlp["down_proj"]["kernel"] = mlp["down_proj"]["kernel"] / signs[:, None]
    negated = InMemory(ARCH, params)
    np.testing.assert_allclose(logits(negated, TOKENS), logits(RELATED, TOKENS), atol=2e-3)
    before, after = (Match().compute(pair_of(BASE, ft)) for ft in (RELATED, negated))
    assert after.log10_p == pytest.approx(before.log10_p, rel=0.02)
    assert Csu().compute(pair_of(BASE, negated)).log10_p < -8


@pytest.mark.slow
def test_match_reads_the_text_through_two_tokenizers_where_bytes_coincide():
    """Half of the positions, of blocks that differ in length, are enough; the others are not looked at."""
    at = np.tile(np.arange(0, 24, 2, dtype=np.int32), (8, 1))
    longer = np.concatenate([TOKENS, np.zeros((8, 5), np.int32)], axis=1)
    valid = np.ones(at.shape, bool)
    valid[:, -1] = False
    spoilt_at = at.copy()
    spoilt_at[:, -1] = 0
    blocks = PairedBlocks(TOKENS, longer, at, spoilt_at, valid, "test")
    result = Match(forms=("forward",)).compute(pair_of(BASE, RELATED, blocks=blocks))
    assert result.log10_p < -8
    few = blocks.sampled(20, np.random.default_rng(0))
    assert few.num_pairs <= 20
    assert few.valid[:, -1].sum() <= few.num_pairs


def test_outside_controls_set_the_allowance():
    pair = pair_of(BASE, OTHER, controls=(tiny.model(ARCH, 5),))
    null = Match(forms=("weights",)).compute(pair).null["weights"]
    assert "control models (1), each against base and ft" in null["u from"]
    assert all(0 < u < 0.5 for u in null["u"])
    assert Match(forms=("weights",)).compute(pair_of(BASE, OTHER)).null["weights"]["u"] == [DEFAULT_ALLOWANCE] * 3


@pytest.mark.slow
def test_controls_set_the_allowance_of_every_pair_of_layers_whatever_the_depth_of_ft():
    deeper = dataclasses.replace(ARCH, num_layers=4, layer_ropes=(0,) * 4, layer_windows=(None,) * 4)
    for ft, against in ((OTHER, "base and ft"), (tiny.model(deeper, 1), "base")):
        pair = pair_of(BASE, ft, controls=(tiny.model(ARCH, 5),))
        null = MatchAll(forms=("weights",)).compute(pair).null["weights"]
        assert f"each against {against}:" in null["u from"]
        assert null["u"] == Match().allowance("weights", pair)[0]


@pytest.mark.slow
def test_controls_read_bases_tokens_whatever_the_ids_of_fts():
    ids = np.random.default_rng(3).permutation(61).astype(np.int32)  # ft's id of each of base's tokens
    renamed = dataclasses.replace(OTHER, params={**OTHER.params, "embed": take_rows(OTHER.params["embed"], ids)})
    shared = Vocabularies(False, SAME.ids_base, ids)
    fields = {"vocabularies": shared, "blocks": paired_one_to_one(TOKENS, ids[TOKENS])}
    for form in MATCH_FORMS:
        controls = {"controls": (tiny.model(ARCH, 5), finetuned(BASE))}
        expected, _ = Match().allowance(form, pair_of(BASE, OTHER, **controls))
        found, _ = Match().allowance(form, pair_of(BASE, renamed, **controls, **fields))
        assert found == expected
        assert min(found) > 0.9  # the second control is no control: it is a fine-tune of base


def take_rows(embed, ids):
    rows = np.empty_like(embed["embedding"])
    rows[ids] = embed["embedding"]
    return {**embed, "embedding": rows}


def test_controls_are_layers_that_do_not_correspond():
    pairs = control_pairs(6, 6, np.random.default_rng(0))
    assert len(pairs) == 20
    assert all(abs(i - j) >= 2 for i, j in pairs)
    assert len(control_pairs(40, 40, np.random.default_rng(0))) == 64
    assert set(control_pairs(3, 3, np.random.default_rng(0))) == {(i, j) for i in range(3) for j in range(3) if i != j}
    assert control_pairs(1, 1, np.random.default_rng(0)) == []


def test_without_controls_the_null_is_widened_and_says_so():
    alone = null_of([], [0.05], "table")
    many = null_of([Comparison(100, 100, 0.01, 1, -0.5, -0.5)] * 10, [0.05], "table")
    assert alone.lam > many.lam == 1.0
    assert alone.s > many.s == 1.0
    assert "only 0 control pairs" in alone.notes[0]
    found = Comparison(100, 100, 0.5, 30, 0.0, 0.0)
    assert many.log_p_agreement(0, found) < alone.log_p_agreement(0, found) < 0
    assert many.log_p_rank(0, found) < alone.log_p_rank(0, found) < 0


def test_the_upper_share_is_clopper_pearsons():
    expected = scipy.stats.binomtest(7, 90).proportion_ci(0.98, method="exact").high  # two-sided 98 %: 1 % above
    assert upper_share(7, 90, 0.01) == pytest.approx(expected, rel=1e-9)
    assert upper_share(90, 90, 0.01) < 1


def test_few_controls_never_make_the_allowance_smaller_than_the_default():
    """One pair with 9 of 11,008 units in common says little of the next pair; twenty such pairs say more."""
    none = [Comparison(11008, 11008, 0.0, 9, 0.0, 0.0)]
    assert measured_allowance([none], 1e-3) == [DEFAULT_ALLOWANCE]
    assert measured_allowance([none] * 19, 1e-3) == [DEFAULT_ALLOWANCE]
    assert measured_allowance([none] * 20, 1e-3)[0] < 0.01
    assert measured_allowance([none] * 20, 1e-3, models=10) == [DEFAULT_ALLOWANCE]  # each with base and with ft


@pytest.mark.slow
def test_the_allowance_covers_a_new_pair():
    """Shares of pairs are spread more than counts are: of 20 pairs the bound holds for the 21st at its confidence."""
    rng, level, beyond = np.random.default_rng(0), 0.1, 0
    for _ in range(2000):
        shares = rng.beta(4, 60, size=21)
        seen = [[Comparison(500, 500, 0.0, int(k), 0.0, 0.0)] for k in rng.binomial(500, shares)]
        beyond += seen[-1][0].agreeing / 500 > measured_allowance(seen[:-1], level)[0]
    assert scipy.stats.binomtest(beyond, 2000, level / 10, alternative="greater").pvalue > 1e-3


def test_agreement_of_a_few_times_the_allowance_is_reserved():
    layers = [Comparison(512, 512, 0.1, k, 0.0, 0.0) for k in (70, 0, 1, 2)]
    null = null_of([Comparison(512, 512, 0.0, 1, 0.0, 0.0)] * 10, [0.05] * 4, "table")
    agreement = form_tests("forward", layers, null)[0]
    assert agreement.log10_p < -10
    assert agreement.firm_log10_p == 0
    beyond = form_tests("forward", [Comparison(512, 512, 0.1, 90, 0.0, 0.0), *layers[1:]], null)[0]
    assert beyond.firm_log10_p == beyond.log10_p < -20


def test_against_each_other_counts_the_units_that_both_send_to_the_same():
    rng = np.random.default_rng(0)
    gate, up = rng.normal(size=(9, 14)), rng.normal(size=(9, 14))
    one, other = (match_units(s, np.random.default_rng(i)) for i, s in enumerate((gate, up)))
    tall = against_each_other(*(match_units(s.T, np.random.default_rng(i)) for i, s in enumerate((gate, up))))
    wide = against_each_other(one, other)
    assert (wide.units, wide.choices, wide.agreeing) == (9, 14, int((one.ft == other.ft).sum()))
    assert (tall.units, tall.choices, tall.agreeing) == (9, 14, wide.agreeing)


def test_partners_are_those_of_both_matchings_in_either_shape():
    rng = np.random.default_rng(0)
    for shape in ((9, 14), (14, 9), (400, 400)):
        scores = rng.normal(size=shape)
        one, other = (match_units(s, np.random.default_rng(i)) for i, s in enumerate((scores, -scores)))
        found = np.array(sampled_partners(one, other, first=5))
        by = [dict(zip(matching.base.tolist(), matching.ft.tolist())) for matching in (one, other)]
        both = sorted(by[0].keys() & by[1].keys())
        assert len(found) == min(len(both), 128)
        assert {0, len(both) - 1} <= {both.index(unit - 5) for unit in found[:, 0]}
        assert [[by[0][unit - 5], by[1][unit - 5]] for unit in found[:, 0]] == found[:, 1:].tolist()
    none = match_units(np.zeros((3, 4)), np.random.default_rng(0))
    assert sampled_partners(none, none) == []


def result_with(log10_p, places=("layer 0", "layer 1", "layer 2")):
    ps = [log10_p, -0.2, -0.1]
    return Result(0.5, "x", log10_p, tests=[Test("t", log10_p, "Fisher", places, ps, {"units": [30, 30, 30]})])


def test_the_verdict_is_holms_minimum_over_the_deciding_statistics():
    """Only tests that decide count, and of these only what no reservation applies to makes a pair related."""
    found = verdict({"csu": result_with(-9.0), "csh": result_with(-0.5), "l2": result_with(-50.0)}, 1e-3)
    assert (found.verdict, found.statistic, list(found.layers)) == ("related", "csu", ["layer 0"])
    assert found.adjusted_log10_p == pytest.approx(-9 + math.log10(2))
    assert [row["place"] for row in found.evidence][:2] == ["layer 0", "layer 0"]
    assert verdict({"csu": result_with(-2.0)}, 1e-3).verdict == "undecided"
    nothing = verdict({"l2": result_with(-50.0), "csu": Result(None, "csu", not_applicable="no gate")}, 1e-3)
    assert (nothing.verdict, nothing.statistic) == ("not_testable", None)
    assert "csu: no gate" in nothing.meaning
    assert verdict({"l2": result_with(-50.0)}, 1e-3).verdict == "not_asked"
    with pytest.raises(ValueError, match=r"level=0\.2"):
        verdict({}, 0.2)


def test_an_exact_test_decides_before_a_calibrated_one_that_is_shown_no_smaller():
    def calibrated(log10_p):
        test = Test("t", log10_p, "Fisher", ["layer 0"], [log10_p], {"units": [30]}, calibrated=True)
        return Result(0.5, "x", log10_p, tests=[test])

    def deciding(exact, assumed, level=1e-3):
        found = verdict({"match": calibrated(assumed), "csu": result_with(exact)}, level)
        return found.statistic, found.calibrated, found.parts["MLPs"]["statistic"]

    assert deciding(-40.0, -900.0) == ("csu", False, "csu")
    assert deciding(-5.0, -900.0) == ("match", True, "match")
    assert deciding(-5.0, -4.0) == ("csu", False, "csu")
    assert deciding(-13.0, -900.0, level=1e-14) == ("match", True, "match")  # csu alone is not below this level
    weak = {"match": calibrated(-1.40), "match_io": calibrated(-1.52)}  # equal after Holm
    assert verdict(weak, 1e-3).statistic == "match_io"


def test_no_evidence_takes_a_test_that_sees_through_every_rewrite():
    blind, sees = (dataclasses.replace(result_with(-0.5), blind_to=hidden) for hidden in (("permuted units",), ()))
    assert verdict({"csu": blind}, 1e-3).verdict == "undecided"
    assert "csu does not detect permuted units: run match, or auto" in verdict({"csu": blind}, 1e-3).meaning
    found = verdict({"csu": blind, "match": sees}, 1e-3)
    assert found.verdict == "no_evidence"
    assert "those tests do not detect embeddings that were replaced before further training" in found.meaning
    refused = dict.fromkeys(("match_crossfit", "match_moments"), Result(None, "x", not_applicable="experts"))
    assert "would, but they do not apply" in verdict({"csu": blind, "match": sees, **refused}, 1e-3).meaning
    assert "embeddings" not in verdict({"match": sees, "match_crossfit": sees}, 1e-3).meaning
    part = dataclasses.replace(sees, blind_to=("layers that were not drawn",))
    assert "embeddings that were replaced" in verdict({"match": sees, "match_moments": part}, 1e-3).meaning
    assert verdict({"match_distilled": sees}, 1e-3).verdict == "undecided"  # its power has not been measured
    assert verdict({"match": result_with(-0.5)}, 1e-3).verdict == "undecided"  # nobody said what hides from it
    assert verdict({"csu": blind, "match": dataclasses.replace(sees, log10_p=-2.0)}, 1e-3).verdict == "undecided"


def test_a_test_without_units_clears_nobody():
    def looked_at(*units):
        test = Test(
            "t", -0.1, "Fisher", [f"layer {i}" for i in range(len(units))], [-0.1] * len(units), {"units": units}
        )
        return Result(0.0, "x", -0.1, tests=[test], blind_to=())

    assert verdict({"match": looked_at(0, 0, 0, 0)}, 1e-3).verdict == "undecided"
    assert verdict({"match": looked_at(90, 0, 0, 0)}, 1e-3).verdict == "undecided"
    assert verdict({"match": looked_at(90, 90, 0, 0)}, 1e-3).verdict == "no_evidence"
    assert verdict({"match": looked_at(9, 9, 9, 9)}, 1e-3).verdict == "undecided"  # too few for a small p-value
    assert verdict({"match": looked_at(16, 9, 9, 9)}, 1e-3).verdict == "no_evidence"


def test_reserved_evidence_calls_no_pair_related():
    reserved = dataclasses.replace(result_with(-30.0), reservation="it can be planted", firm_log10_p=-0.2)
    found = verdict({"csu": reserved, "match": dataclasses.replace(result_with(-0.5), blind_to=())}, 1e-3)
    assert found.verdict == "undecided"
    assert "it can be planted" in found.meaning
    assert found.adjusted_log10_p == pytest.approx(-30 + math.log10(2))
    firm = dataclasses.replace(reserved, firm_log10_p=-5.0)
    assert verdict({"csu": firm}, 1e-3).verdict == "related"


def test_identical_tensors_are_the_verdict_whatever_the_tests_say():
    same, most = Identity(9, 9), Identity(8, 9)
    assert verdict({"csu": result_with(-0.5)}, 1e-3, same).verdict == "identical"
    assert verdict({}, 1e-3, same).verdict == "identical"
    assert verdict({"csu": result_with(-9.0)}, 1e-3, most).verdict == "related"


def test_a_copied_part_is_said_whatever_the_tests_of_the_others_find():
    """A copied embedding makes no body related, and no pair one of which nothing was found."""
    copied = Identity(1, 9, {"embedding": (1, 1), "MLPs": (0, 8)})
    sees = dataclasses.replace(result_with(-0.2), blind_to=())
    found = verdict({"match": sees, "unseen_tokens": result_with(-0.1)}, 1e-3, copied)
    assert found.verdict == "undecided"
    assert found.meaning == "every tensor of the embedding is identical; no other sign of common weights was found"
    assert {part: finding["verdict"] for part, finding in found.parts.items()} == {
        "MLPs": "no_evidence", "embedding": "identical"
    }  # fmt: skip
    assert found.parts["embedding"]["effect"] == "its one tensor is identical"
    related = verdict({"match": result_with(-9.0)}, 1e-3, copied)
    assert related.verdict == related.parts["MLPs"]["verdict"] == "related"
    assert verdict({"match": sees}, 1e-3, Identity(1, 9, {"embedding": (1, 2)})).verdict == "no_evidence"


def test_experts_are_a_part_of_their_own():
    of_experts = result_with(-9.0, ("base layer 0 expert 1 : ft layer 0", "x", "y"))
    assert list(verdict({"match_mlps": of_experts}, 1e-3).parts) == ["experts"]
    assert list(verdict({"match_mlps": result_with(-9.0)}, 1e-3).parts) == ["MLPs"]


@pytest.mark.parametrize(("moved", "hidden"), [(False, ()), (True, ("layers that were moved",))])
def test_layers_that_may_be_moved_hide_from_what_compares_those_of_equal_index(moved, hidden):
    deep = dataclasses.replace(ARCH, num_layers=5, layer_ropes=(0,) * 5, layer_windows=(None,) * 5)
    assert hidden_by("match", ARCH, ARCH, moved) == hidden
    assert hidden_by("csu", ARCH, ARCH, moved)[2:] == hidden
    assert hidden_by("match_all", ARCH, ARCH, moved) == hidden_by("match_mlps", ARCH, deep) == ()
    assert hidden_by("match_moments", ARCH, deep, moved) == ()
    assert hidden_by("csh", ARCH, deep)[1:] == ("layers that were moved",)


def test_of_norms_behind_blocks_only_other_signs_are_said_to_hide():
    signs = dataclasses.replace(ARCH, post_norms=True)
    rotated, flipped = "a rotated residual stream", "features of the residual stream of other signs"
    assert hidden_by("csu", signs, signs)[1:] == (flipped,)
    assert hidden_by("csu", ARCH, ARCH)[1:] == hidden_by("csu", signs, ARCH)[1:] == (rotated,)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_ranks_of_the_diagonal_are_those_of_each_row_among_its_entries(shape):
    """Of rows, and of columns in their place, in numpy."""
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    rows[3] = 0
    sizes = np.abs(rows, dtype=np.float64) / np.abs(rows, dtype=np.float64).mean(axis=0)
    wanted = [
        np.mean([(x < row[i % shape[1]]) + (x == row[i % shape[1]]) / 2 for x in row]) for i, row in enumerate(sizes)
    ]
    np.testing.assert_allclose(diagonal_ranks(rows), wanted, atol=1e-6)
    np.testing.assert_allclose(diagonal_ranks(rows.T, axis=0), wanted, atol=1e-6)


def test_what_has_no_shape_in_common_is_said():
    wide = dataclasses.replace(ARCH, embed_dim=30)
    deep = dataclasses.replace(ARCH, num_layers=5)
    none = Vocabularies(False, np.zeros(0, np.int32), np.zeros(0, np.int32))
    assert "rows have no cosine" in Csu().not_applicable(ARCH, wide, SAME)[0]
    assert "see match_all" in Match().not_applicable(ARCH, deep, SAME)[0]
    assert "share no tokens" in Csh().not_applicable(ARCH, ARCH, none)[0]
    assert "share no token" in Jsd().not_applicable(ARCH, ARCH, none)[0]
    assert "different width: embed has 24 and 30" in L2().not_applicable(ARCH, wide, SAME)[0]
    assert "different depth" in PermModeL2().not_applicable(ARCH, deep, SAME)[0]
    assert MatchAll().not_applicable(ARCH, deep, SAME) == []
    assert "raise it" in MatchAll(max_gib=1e-6).not_applicable(ARCH, deep, SAME)[0]
    assert Csu().not_applicable(ARCH, deep, SAME) == []
    assert {"csu", "csu_all", "csh", "l2", "jsd", "match", "match_all", "perm_mode_l2"} <= set(REGISTRY)


def test_pairs_side_by_side_pay_for_each_other_by_holm():
    adjusted = over_pairs([-9.0, None, -2.0, -0.1])
    assert adjusted == [pytest.approx(-9 + math.log10(3)), None, pytest.approx(-2 + math.log10(2)), -0.1]
    assert over_pairs([-4.0]) == [-4.0]
    assert over_pairs([None, None]) == [None, None]
