"""Children whose maps were estimated: tests of parents, and what the alignment does to shares."""

import jax
import numpy as np
import pytest

from benchmarks import siblings as merging
from tests.test_merges import ARCH, leaves, model, models_of, sibling
from tracing_jax.merges import MergeModels, merge_report
from tracing_jax.merges.exchange import log_p_of_layer
from tracing_jax.rewrites import draw_rewrites
from tracing_jax.sources import in_memory, rewritten


def test_what_maps_leave_of_a_unit_is_no_evidence_of_another_parent():
    """The error of a scale goes along the unit, and so does decay: p-values stay uniform only across the unit."""
    origin = leaves(0)
    models = models_of(origin, [sibling(origin, 0), sibling(origin, 1)], origin)
    rng, log_ps = np.random.default_rng(1), {True: [], False: []}
    for seed in range(200):
        base, a, b = rng.normal(size=(3, 32, 48))
        child = (base + 0.5 * 0.3 * a) * (1 + 0.02 * rng.normal(size=(32, 1)))
        uninvolved = (base + 0.3 * b) * (1 + 0.3 * rng.normal(size=(32, 1)))
        rows = np.stack([child, base, base + 0.3 * a, uninvolved])
        for mapped, found in log_ps.items():
            found.append(log_p_of_layer(models, [rows], 1, seed, mapped=mapped))
    assert np.mean(np.exp(log_ps[False]) <= 0.02) > 0.2
    for level in (0.3, 0.1, 0.02):
        assert np.mean(np.exp(log_ps[True]) <= level) <= level + 3 * np.sqrt(level / 200)


@pytest.mark.slow
def test_parents_of_a_rotated_child_are_tested_and_the_bias_is_stated():
    origin = leaves(0)
    parents = [sibling(origin, seed) for seed in range(3)]
    child = model(merging.task_arithmetic(origin, parents, [0.6, 0.4, 0.0]))
    hidden = in_memory(rewritten(child, draw_rewrites("rotate,units", jax.random.key(1), ARCH)))
    named = {name: model(parent) for name, parent in zip("ABC", parents)}
    found = merge_report(MergeModels(hidden, named, model(origin)), align=("auto",))
    assert found.parts == {"A": "part", "B": "part", "C": "none"}
    bias = found.record["alignment_bias"]
    assert set(bias["noise"]) == set(bias["parents"]) == set("ABC")
    off = max(abs(found.shares[name] - truth) for name, truth in zip("ABC", (0.6, 0.4, 0.0)))
    assert off < max(0.01, 3 * bias["largest"])
    for name, truth in zip("AB", (0.6, 0.4)):  # errors contain the bias
        own = found.record["whole"]["shares"][name]
        assert own["low"] <= truth <= own["high"]
        assert own["se"] >= max(abs(bias[of][name]) for of in ("noise", "parents"))
    assert "the alignment by itself moves shares by" in repr(found)
