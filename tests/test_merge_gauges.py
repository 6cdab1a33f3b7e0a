"""Children whose maps were estimated: tests of parents, and what the alignment does to shares."""

import jax
import numpy as np
import pytest

from benchmarks import siblings as merging
from tests.test_merges import ARCH, leaves, model, models_of, sibling
from tracing_jax.merges import MergeModels, merge_report, read_sums
from tracing_jax.merges.alignment_bias import AlignmentBias, moved_shares, shares_by
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


def test_errors_of_each_part_contain_what_the_alignment_does_there():
    """Measured on a merge whose share moves by .1 in the second layer: there alone errors grow, by its square."""
    origin = leaves(0)
    parents = [sibling(origin, seed) for seed in range(2)]
    child = merging.task_arithmetic(origin, parents, [0.6, 0.4])
    moved = merging.task_arithmetic(origin, parents, [0.7, 0.4])
    made = models_of(child, parents, origin)
    back = models_of(child | {name: leaf for name, leaf in moved.items() if "/1/" in name}, parents, origin)
    sums = read_sums(made)
    bias = AlignmentBias(made.names, {"noise": moved_shares(made, sums, back, read_sums(back))})
    without, found = (shares_by("layer", made, sums, own) for own in (None, bias))
    np.testing.assert_allclose(found[0].errors, without[0].errors, atol=1e-6)
    np.testing.assert_allclose(found[1].errors, np.hypot(without[1].errors, [0.1, 0.0]), atol=1e-5)
    assert bias.as_dict()["largest"] == pytest.approx(bias.of("whole", None, made.names)[0])
    assert 0 < bias.largest < 0.1


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
    shown = [shares for by in ("role", "layer", "tensor") for shares in found.record[f"by_{by}"].values()]
    shown += [shares for own in found.record["by_role_and_layer"].values() for shares in own.values()]
    parts = [(truth, share) for part in shown if not part["undefined"]
             for truth, share in zip((0.6, 0.4, 0.0), part["shares"].values())]  # fmt: skip
    assert all(share["se"] >= share["bias"] for _, share in parts)  # each part its own
    assert len({share["bias"] for _, share in parts}) > len(parts) / 2
    assert np.mean([share["low"] <= truth <= share["high"] for truth, share in parts]) > 0.9
    assert "the alignment by itself moves shares by" in repr(found)


@pytest.mark.slow
def test_without_the_base_the_child_is_aligned_to_the_parent_of_the_largest_share():
    """Whichever is named first; it alone is then not tested."""
    parents = [sibling(leaves(0), seed) for seed in range(3)]
    child = model(merging.linear(parents, [0.2, 0.8, 0.0]))
    hidden = in_memory(rewritten(child, draw_rewrites("rotate", jax.random.key(1), ARCH)))
    found = merge_report(MergeModels(hidden, dict(zip("ABC", map(model, parents)))), align=("auto",))
    assert any(note.startswith("the child was aligned to B") for note in found.record["notes"])
    assert found.parts == {"A": "part", "B": "not_testable", "C": "none"}
    assert found.shares["A"] == pytest.approx(0.2, abs=max(0.01, 3 * found.record["alignment_bias"]["largest"]))
