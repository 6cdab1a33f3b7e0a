"""Students of feed-forward networks learn their teacher, know nothing of one another, and tell relatives apart."""

import dataclasses

import numpy as np
import pytest
import tiny

from tracing_jax.cli.config_files import to_config
from tracing_jax.data import paired_one_to_one
from tracing_jax.experiment import ConfigError, check_config
from tracing_jax.experiment.validation import statistic_names
from tracing_jax.matching import match_units
from tracing_jax.options import RunOptions
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory
from tracing_jax.statistics import COSTLY, REGISTRY, Pair, Vocabularies
from tracing_jax.statistics.calibration import null_of
from tracing_jax.statistics.comparison import Comparison, against_each_other
from tracing_jax.statistics.match_distilled import MatchDistilled, _Compared, _tests, student_seeds
from tracing_jax.statistics.students import StudentTraining, fit_student, student_correlations

D, F, S = 16, 48, 4096
RECIPE = StudentTraining(F, steps=600, batch=256)


def teacher(seed, gated=True):
    """A random FFN: gated, or with the gate's units alone."""
    rng = np.random.default_rng(seed)
    gate, up, down = rng.normal(size=(D, F)), rng.normal(size=(D, F)), rng.normal(size=(F, D))

    def ffn(x):
        pre = x @ gate / 2
        return (pre / (1 + np.exp(-pre)) * (x @ up if gated else 1) @ down).astype(np.float32)

    return ffn


def inputs(seed=0):
    return np.random.default_rng(seed).normal(size=(S, D)).astype(np.float32)


def agreeing(base, ft):
    by_tap = student_correlations(base, ft)
    rng = np.random.default_rng(0)
    return against_each_other(match_units(by_tap["gate"], rng), match_units(np.abs(by_tap["up"]), rng)).agreeing


@pytest.mark.slow
@pytest.mark.parametrize("gated", [True, False])
def test_a_student_explains_its_teacher(gated):
    x = inputs()
    student = fit_student(x, teacher(0, gated)(x), RECIPE, seed=0)
    assert student.explained > 0.85
    assert student.left_out == 0
    assert student.gate.shape == student.up.shape == (D, F)


@pytest.mark.parametrize(("whole", "rest", "firm"), [(900, 50, False), (280, 300, False), (900, 100, True)])
def test_agreement_of_up_to_three_times_the_allowance_is_not_firm(whole, rest, firm):
    """Of 2,000 units: 5 % by up and 2 % by the rest of it may agree in a layer, 1 % of the rest in all together."""

    def layers(agreeing, count=4):
        return [Comparison(2000, 2000, 0.0, agreeing, 0.0, 0.0)] * count

    found = _Compared({"whole": layers(whole), "rest": layers(rest)}, {}, {})
    shares = {"whole": [0.05] * 4, "rest": [0.02] * 4, "rest together": [0.01]}
    nulls = {name: null_of(layers(1, 12), share, "test") for name, share in shares.items()}
    agreement, rank, *_ = _tests(found, nulls, [])
    assert agreement.log10_p < -5
    assert (agreement.firm_log10_p < -5) == firm
    assert agreement.firm_log10_p in (0.0, agreement.log10_p)
    assert rank.log10_p == 0
    assert _tests(found, nulls, range(4))[0].log10_p == 0  # layers that do nothing


def test_a_student_follows_from_its_seed_and_no_other():
    x = inputs()
    y, short = teacher(0)(x), StudentTraining(F, steps=20, batch=64)
    once, again, other = (fit_student(x, y, short, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once.gate, again.gate)
    assert np.abs(np.corrcoef(once.gate.ravel(), other.gate.ravel())[0, 1]) < 0.2


def test_the_scale_and_the_mean_of_the_output_and_a_few_outliers_change_nothing():
    x = inputs()
    y, short = teacher(0)(x), StudentTraining(F, steps=20, batch=64)
    plain = fit_student(x, y, short, seed=0)
    moved = fit_student(4 * x, 8 * y + 32, short, seed=0)
    np.testing.assert_allclose(moved.gate, plain.gate, atol=1e-3)
    y[:3] *= 1e4
    outliers, without = fit_student(x, y, short, seed=0), fit_student(x[3:], y[3:], short, seed=0)
    assert outliers.left_out == pytest.approx(3 / S)
    np.testing.assert_array_equal(outliers.gate, without.gate)


def test_students_of_one_teacher_find_the_same_units_whatever_its_disguise_and_of_two_teachers_do_not():
    x, rng = inputs(), np.random.default_rng(1)
    y = teacher(0)(x)
    rotation = np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)
    one = (x, fit_student(x, y, RECIPE, seed=1))
    disguised = (x @ rotation, fit_student(x @ rotation, y @ rotation, RECIPE, seed=2))
    other = (x, fit_student(x, teacher(5)(x), RECIPE, seed=3))
    assert agreeing(one, disguised) > 12
    assert agreeing(one, other) < 8


@pytest.mark.slow
def test_correlations_are_those_of_the_pre_activations():
    short = StudentTraining(8, steps=3, batch=32)
    sides = [(x, fit_student(x, teacher(seed)(x), short, seed)) for seed, x in ((0, inputs(0)), (1, inputs(0) + 3))]
    found = student_correlations(*sides)
    for tap in ("gate", "up"):
        a, b = (x.astype(np.float64) @ getattr(student, tap) for x, student in sides)
        np.testing.assert_allclose(found[tap], np.corrcoef(a.T, b.T)[:8, 8:], atol=1e-4)


@pytest.mark.parametrize(("x", "y", "message"), [
    (np.ones((8, 4), np.float32), np.ones((8, 4), np.float32), "8 samples"),
    (np.full((64, 4), np.nan, np.float32), np.ones((64, 4), np.float32), "not finite"),
    (np.ones((64, 4), np.float32), np.ones((64, 4), np.float32), "is constant"),
])  # fmt: skip
def test_what_cannot_be_learnt_is_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        fit_student(x, y, RECIPE, seed=0)


GPT2 = tiny.gpt2(num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3, mlp_dim=64)
TOKENS = np.random.default_rng(0).integers(61, size=(170, 24), dtype=np.int32)
QUICK = MatchDistilled(tokens=4096, steps=1000, batch=128)
BASE = tiny.model(GPT2, 0)


def pair_of(base, ft, **fields):
    ids = np.arange(61, dtype=np.int32)
    fields = {"vocabularies": Vocabularies(True, ids, ids), "tokens": TOKENS, "seed": 0} | fields
    blocks = paired_one_to_one(TOKENS, TOKENS)
    return Pair(base=base, ft=ft, blocks=blocks, compute=Compute(make_mesh(1, 1), 64), **fields)


@pytest.mark.slow
def test_a_relative_without_a_gate_is_found_an_independent_model_is_not():
    related = QUICK.compute(pair_of(BASE, InMemory(GPT2, tiny.noisy(BASE.params, 0.05))))
    other = QUICK.compute(pair_of(BASE, tiny.model(GPT2, 1)))
    assert related.log10_p < -3 < other.log10_p
    assert [test.decides for test in related.tests] == [True, True, False, False]
    assert min(related.null["explained"]["ft"]) > 0.9
    assert any("variance explained" in note for note in related.notes)


@pytest.mark.slow
def test_controls_set_the_allowance_and_alignment_silences():
    short = dataclasses.replace(QUICK, steps=5)
    pair = pair_of(BASE, tiny.model(GPT2, 1), controls=(tiny.model(GPT2, 2),), aligned=True)
    result = short.compute(pair)
    assert "control models (1), each against base and ft" in result.null["rest"]["u from"]
    assert result.log10_p is None
    assert any("no evidence" in note for note in result.notes)


@pytest.mark.slow
def test_a_dense_model_against_a_mixture_of_another_width_has_students_of_one_width():
    dense, mixture = tiny.qwen3_gqa(), tiny.mixtral(mlp_dim=12)
    assert set(REGISTRY) >= COSTLY == {"match_distilled"}
    assert QUICK.not_applicable(dense, mixture, pair_of(BASE, BASE).vocabularies) == []
    result = dataclasses.replace(QUICK, steps=2).compute(pair_of(tiny.model(dense), tiny.model(mixture)))
    assert result.tests[0].values["units"] == [12, 12]


def test_models_of_other_depth_are_sent_to_match_all():
    (problem,) = QUICK.not_applicable(GPT2, tiny.gpt2(), pair_of(BASE, BASE).vocabularies)
    assert "different depth (3 and 2 layers)" in problem


def test_the_two_students_of_a_layer_never_share_a_seed(monkeypatch):
    pair = pair_of(BASE, BASE)
    seeds = [
        seed for name in ("students", "control 0 base") for i in range(20) for seed in student_seeds(pair, name, i)
    ]
    assert len(set(seeds)) == len(seeds)
    monkeypatch.setattr(Pair, "generator", lambda self, *names: np.random.default_rng(0))
    with pytest.raises(ValueError, match="both students would start from seed"):
        student_seeds(pair, "students", 0)


def test_all_means_what_trains_nothing_and_the_others_are_asked_for_by_name():
    every = statistic_names(RunOptions(stat=("all",)))
    assert "match_distilled" not in every
    assert statistic_names(RunOptions(stat=("all", "match_distilled", "match"))) == [*every, "match_distilled"]


def test_settings_that_cannot_train_are_refused(tmp_path):
    config = to_config(RunOptions(stat=("match_distilled",)).on_demo())
    config.save = str(tmp_path / "x.p")
    config.match_distilled.update(tokens=8, steps=0, batch=0)
    with pytest.raises(ConfigError) as error:
        check_config(config)
    for field in ("tokens=8: at least 32", "steps=0", "batch=0"):
        assert f"match_distilled.{field}" in str(error.value)
