"""The exact tests are exact: p-values of independent models are uniform, broken units or not. Longer: benchmarks/."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest
import scipy.stats
import tiny
from cases import slow
from scipy.optimize import linear_sum_assignment

from benchmarks import exact_nulls
from benchmarks.intervals import clopper_pearson, mean_over_pairs, rounds, upper_bound
from tracing_jax.models import init_params
from tracing_jax.statistics.distinct_units import all_units
from tracing_jax.statistics.in_place import in_place
from tracing_jax.statistics.nulls import spearman
from tracing_jax.statistics.pvalues import holm

ARCH = tiny.qwen3_gqa(mlp_dim=40)
PAIRS = 60


@functools.partial(jax.jit, static_argnums=0)
def initialised(arch, seed):
    return init_params(arch, jax.random.key(seed))


def independent(i):
    return initialised(ARCH, 2 * i), initialised(ARCH, 2 * i + 1)


def with_broken_units(i):
    return exact_nulls.broken(independent(i), np.random.default_rng([1, i]))


@pytest.mark.slow
@pytest.mark.parametrize("models", [slow(independent), with_broken_units])
def test_csu_and_csh_are_uniform_per_layer_and_combined(models):
    measured = exact_nulls.measure(ARCH, models, PAIRS, "")
    ks = np.array([values.ks() for values in measured.values()])
    assert ks.shape == (4, 3)  # two statistics by two tests; two layers, and both together
    assert np.exp(holm(np.log(ks.ravel()))).min() > 0.05, ks


def test_the_check_sees_a_relative():
    def related(i):
        base = initialised(ARCH, i)
        return exact_nulls.broken((base, tiny.noisy(base, 0.2, i)), np.random.default_rng([1, i]))

    measured = exact_nulls.measure(ARCH, related, 8, "")
    assert max(values.combined.max() for values in measured.values()) < 1e-2


def test_the_check_finds_a_solver_that_is_given_the_order_of_units():
    """Without dropping zero units and shuffling the others, independent matrices seem related."""
    log_ps = []
    for seed in range(PAIRS):
        base, ft = np.random.default_rng(seed).normal(size=(2, 40, 16))
        base[32:] = ft[32:] = 0
        matched = linear_sum_assignment(np.abs(base @ ft.T), maximize=True)[1]
        log_ps.append(spearman(np.arange(40), matched).log_p)
    assert scipy.stats.kstest(np.exp(log_ps), "uniform").pvalue < 1e-6


def test_drawn_units_are_exact_whatever_the_other_order_makes_of_them():
    """Whoever knows which units are drawn can put at their places those of ft that all of base's units prefer."""
    rng, drawn, log_ps = np.random.default_rng(0), np.arange(0, 60, 5), []
    preferred = np.where(np.isin(np.arange(60), drawn), 1.0, 0.0)
    for _ in range(400):
        similarity = (preferred + 0.1 * rng.random((12, 60))).astype(np.float32)
        found = in_place(similarity, (all_units(60), all_units(60)), rng, drawn)
        log_ps.append((found.log_p_agreement, found.log_p_rank))
    ps = np.exp(np.array(log_ps))
    for level in (0.02, 0.1, 0.3):
        assert ((ps <= level).mean(axis=0) <= level + 3 * np.sqrt(level / 400)).all()


def test_units_left_out_at_the_same_places_of_both_models_raise_no_agreement():
    rng, kept, log_ps = np.random.default_rng(0), np.arange(0, 60, 5), []
    units = replace(all_units(60), kept=kept)
    for _ in range(400):
        log_ps.append(in_place(rng.random((60, 60), np.float32), (units, units), rng).log_p_agreement)
    for level in (0.02, 0.1, 0.3):
        assert (np.exp(log_ps) <= level).mean() <= level + 3 * np.sqrt(level / 400)


def test_broken_units_are_what_they_are_called():
    base, ft = with_broken_units(0)
    for params, each in ((base, 4), (ft, 2)):
        for layer in params["layers"].values():
            gate, up, down = (np.asarray(layer["mlp"][f"{n}_proj"]["kernel"]) for n in ("gate", "up", "down"))
            zero = ~(up.any(0) | down.any(1) | gate.any(0))
            dead = ~gate.any(0) & ~zero
            copies = len(up.T) - len(np.unique(up.T, axis=0)) - (each - 1)
            assert (zero.sum(), dead.sum(), copies) == (each, each, each)


def test_rounds_hold_every_pair_once_and_no_model_twice():
    found = rounds(10, np.random.default_rng(0))
    assert found.shape == (9, 5, 2)
    assert all(set(one.ravel()) == set(range(10)) for one in found)
    assert len({frozenset(pair) for pair in found.reshape(-1, 2).tolist()}) == 45
    with pytest.raises(ValueError, match="leave one out"):
        rounds(9, np.random.default_rng(0))


def test_clopper_pearson_is_scipys():
    for hits in (0, 3, 20):
        expected = scipy.stats.binomtest(hits, 20).proportion_ci(0.95, method="exact")
        np.testing.assert_allclose(clopper_pearson(hits, 20), expected, atol=1e-12)


def test_bound_of_a_mean_over_pairs_holds_as_often_as_it_says():
    """Models, not pairs, are drawn: each has an effect of its own on all its pairs."""
    rng, below, naive = np.random.default_rng(0), 0, 0
    for _ in range(300):
        effects, noise = rng.normal(size=12), rng.normal(size=(12, 12))
        values = effects[:, None] + effects + (noise + noise.T) / 2
        below += upper_bound(values, 0.95) < 0
        pairs = values[np.triu_indices(12, 1)]
        naive += pairs.mean() + 1.67 * pairs.std() / len(pairs) ** 0.5 < 0
        assert mean_over_pairs(values) == pytest.approx(pairs.mean())
    assert below < 30
    assert naive > 45
