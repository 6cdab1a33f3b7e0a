"""Parents that are nearly the same: joint regions of their shares, and what is said of them together."""

import dataclasses

import numpy as np
import pytest

from benchmarks import siblings as merging
from tests.test_merges import leaves, models_of, report_of, sibling
from tracing_jax.merges import estimate
from tracing_jax.merges.figure import figure_of_shares
from tracing_jax.merges.normal_equations import TensorSums
from tracing_jax.merges.regions import joint_regions

ORIGIN = leaves(0)
ONE, OTHER = (sibling(ORIGIN, seed) for seed in range(2))


def close_to(one, other, size):
    """A sibling that differs from its base as one does, but for so much of what another one does."""
    return {name: leaf + size * (other[name] - ORIGIN[name]) for name, leaf in one.items()}


def test_joint_regions_cover():
    """Of two parents whose differences have a cosine of .9 both shares are inside in 95 % within three points."""
    models = models_of(ORIGIN, [ONE, OTHER], ORIGIN)
    place, rng, inside, wider, errors = next(models.places()), np.random.default_rng(0), [], [], []
    for _ in range(400):
        common, *own = rng.normal(size=(3, 64, 32))
        x = common + np.array(own) / 3
        noise = rng.normal(size=(64, 1)) * rng.normal(size=(64, 32))
        z = np.stack([0.6 * x[0] + 0.3 * x[1] + noise, *x, rng.normal(size=(64, 32))]).reshape(4, 16, -1)
        grams = np.einsum("crn,drn->rcd", z, z)
        found = estimate(models, [TensorSums(place, grams, np.full(16, 128.0), np.zeros((1, 4), np.float32), 0.0)])
        (region,) = joint_regions(found)
        errors.append(region.correlation)
        away = np.linalg.solve(region.axes.T, np.array([0.6, 0.3]) - region.center)
        inside.append(away @ away <= 1)
        low, high = found.interval()
        wider.append(2 * np.linalg.norm(region.axes[:, 0]) / (high[0] - low[0]))
        assert region.together[0] == pytest.approx(found.values.sum())
    assert 0.92 < np.mean(inside) < 0.98
    assert min(wider) > 1  # a region of two shares reaches beyond the interval of each
    assert np.mean(errors) < -0.7


def test_only_parents_that_are_alike_are_named_together():
    alike = close_to(ONE, OTHER, 0.05)
    third = sibling(ORIGIN, 2)
    child = merging.task_arithmetic(ORIGIN, [ONE, alike, third], [0.3, 0.2, 0.4])
    found = report_of(child, [ONE, alike, third], ORIGIN)
    assert found.parts == {"A": "one_of", "B": "one_of", "C": "part"}
    assert found.sentence.startswith("C had a part, and one of these, or several: A, B; they are too alike for shares")
    assert "together 0.50" in found.sentence
    assert "A and B together: 0.50" in repr(found)


@pytest.mark.slow
def test_parents_that_hide_each_other_are_not_cleared():
    """Given each other neither has a part; where one of them has it alone, the other one has none."""
    alike, third = close_to(ONE, OTHER, 0.15), sibling(ORIGIN, 2)
    rng = np.random.default_rng(7)
    for shares, size, words in (
        ((0.3, 0.2, 0.4), 0.02, ["one_of", "one_of"]),
        ((0.5, 0.0, 0.4), 0.001, ["part", "none"]),
    ):
        child = merging.task_arithmetic(ORIGIN, [ONE, alike, third], shares)
        noisy = {name: leaf + size * rng.normal(size=leaf.shape) for name, leaf in child.items()}
        found = report_of(noisy, [ONE, alike, third], ORIGIN)
        assert found.parts == dict(zip("ABC", [*words, "part"]))
        if words[0] == "one_of":
            assert (
                "one of these, or several: A, B; they are too alike for shares of each, together 0.50" in found.sentence
            )
            assert "without it this one has" in repr(found)


@pytest.mark.slow
def test_a_parent_that_was_subtracted_is_found():
    child = merging.task_arithmetic(ORIGIN, [ONE, OTHER], [0.6, -0.4])
    found = report_of(child, [ONE, OTHER], ORIGIN)
    assert set(found.parts.values()) == {"part"}
    assert found.record["sentence"].startswith("merged of A (0.600 ± 0.000) and B (-0.400 ± 0.000)")
    alone = report_of(merging.task_arithmetic(ORIGIN, [OTHER], [-0.5]), [OTHER], ORIGIN)
    assert alone.parts == {"A": "part"}


@pytest.mark.slow
def test_parents_of_opposite_differences_are_not_cleared():
    opposite = {name: 2 * ORIGIN[name] - leaf for name, leaf in close_to(ONE, OTHER, 0.15).items()}
    child = merging.task_arithmetic(ORIGIN, [ONE, opposite], [0.25, -0.25])
    rng = np.random.default_rng(7)
    noisy = {name: leaf + 0.02 * rng.normal(size=leaf.shape) for name, leaf in child.items()}
    assert "none" not in report_of(noisy, [ONE, opposite], ORIGIN).parts.values()


@pytest.mark.slow
def test_figure_shows_regions_of_parents_that_are_alike(drawn):
    child = merging.task_arithmetic(ORIGIN, [ONE, OTHER], [0.3, 0.2])
    apart = figure_of_shares(report_of(child, [ONE, OTHER], ORIGIN).record)
    alike = close_to(ONE, OTHER, 0.5)
    noisy = {n: leaf + 0.02 * np.random.default_rng(7).normal(size=leaf.shape) for n, leaf in child.items()}
    found = figure_of_shares(report_of(noisy, [ONE, alike], ORIGIN).record)
    assert len(found.axes) == len(apart.axes) + 1
    assert "regions" in found.axes[-1].get_title()


def test_two_parents_whose_shares_sum_to_one_have_no_region():
    models = models_of(merging.linear([ONE, OTHER], [1, 1]), [ONE, OTHER])
    grams = np.einsum("crn,drn->rcd", *[np.random.default_rng(0).normal(size=(3, 16, 64))] * 2)
    tensor = TensorSums(next(models.places()), grams, np.full(16, 64.0), np.zeros((1, 3), np.float32), 0.0)
    found = estimate(models, [tensor])
    assert joint_regions(found) == []
    assert joint_regions(dataclasses.replace(found, undefined="equal")) == []
