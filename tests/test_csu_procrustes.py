"""`csu_procrustes`: units in place, through a rotation of the residual stream; as exact as `csu`."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats
import tiny
from rewritten_pairs import IDS, SAME, changed, pair_of
from scipy.optimize import linear_sum_assignment

from tracing_jax.axes import axis_table
from tracing_jax.rewrites import permute, random_permutations
from tracing_jax.sources import InMemory
from tracing_jax.statistics import Vocabularies, verdict
from tracing_jax.statistics.csu import Csu
from tracing_jax.statistics.csu_procrustes import CsuProcrustes

ARCH = tiny.llama_mha(mlp_dim=40)
BASE = tiny.model(ARCH, 0)
RELATED = InMemory(ARCH, tiny.noisy(BASE.params, 0.3))


@pytest.mark.slow
def test_p_values_of_independent_models_are_uniform_also_with_one_embedding():
    """The map may come from what both share: it says nothing of the units."""
    p_values, combined = [], []
    for i in range(30):
        base, ft = (tiny.params_of(ARCH, 100 + 2 * i + side) for side in (0, 1))
        if i % 2:
            ft["embed"] = base["embed"]
        rank, *_ = CsuProcrustes().compute(pair_of(InMemory(ARCH, base), InMemory(ARCH, ft), seed=i)).tests
        p_values += list(rank.log10_ps)
        combined.append(rank.log10_p)
    assert scipy.stats.kstest(10.0 ** np.array(p_values), "uniform").pvalue > 0.01
    assert scipy.stats.kstest(10.0 ** np.array(combined), "uniform").pvalue > 0.01


@pytest.mark.parametrize("name", ["rotate", "gains", "values", "queries", "units"])
def test_a_rotated_relative_is_found(name):
    hidden = changed(RELATED, name)
    given, found = (CsuProcrustes().compute(pair_of(BASE, ft)) for ft in (RELATED, hidden))
    assert found.headline == given.headline == 1
    assert verdict({"csu_procrustes": found}, 1e-3).verdict == "related"


def test_csu_does_not_find_what_was_rotated():
    assert Csu().compute(pair_of(BASE, changed(RELATED, "rotate"))).log10_p > -2


def test_permuted_features_are_found_and_permuted_units_move_the_matching():
    table = axis_table(ARCH)
    moved = random_permutations(jax.random.key(3), table, ["embed", "mlp"])
    features = {axis: p for axis, p in moved.items() if axis == "embed"}
    assert (
        CsuProcrustes().compute(pair_of(BASE, InMemory(ARCH, permute(RELATED.params, features, table)))).headline == 1
    )
    found = CsuProcrustes().compute(pair_of(BASE, InMemory(ARCH, permute(RELATED.params, moved, table)))).tests[1]
    in_place = [int((moved[f"layers/{i}/mlp"] == np.arange(40)).sum()) for i in range(2)]
    assert list(found.values["agreeing"]) == in_place


def test_the_units_are_those_that_numpy_finds():
    ft = InMemory(ARCH, tiny.noisy(BASE.params, 1.2))

    def tokens(model):
        head = np.asarray(model.params["head"]["lm_head"]["kernel"], np.float64).T
        gain = np.asarray(model.params["head"]["norm"]["scale"], np.float64)
        parts = [np.asarray(model.params["embed"]["embedding"], np.float64), head * gain]
        parts = [part - part.mean(0) for part in parts]
        return np.concatenate([part / np.linalg.norm(part) for part in parts])

    u, _, vt = np.linalg.svd(tokens(ft).T @ tokens(BASE))
    expected = []
    for i in range(2):
        layers = [jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), m.layer(i)) for m in (BASE, ft)]
        a, b = (layer["mlp"]["up_proj"]["kernel"].T * layer["mlp_norm"]["scale"] for layer in layers)
        b = b @ u @ vt
        cosines = np.abs(a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
        expected.append((linear_sum_assignment(cosines, maximize=True)[1] == np.arange(40)).sum())
    found = CsuProcrustes().compute(pair_of(BASE, ft)).tests[1]
    assert list(found.values["agreeing"]) == expected
    assert 2 < min(expected) < 40


@pytest.mark.parametrize("arch", [tiny.qwen3_gqa(), tiny.gemma_mqa(), tiny.olmo2_gqa(), tiny.gpt2()],
                         ids=lambda arch: arch.family)  # fmt: skip
def test_every_dense_family_applies(arch):
    base = tiny.model(arch, 0)
    assert CsuProcrustes().not_applicable(arch, arch, SAME) == []
    assert CsuProcrustes().compute(pair_of(base, InMemory(arch, tiny.noisy(base.params, 0.1)))).headline == 1


def test_what_does_not_apply_says_why():
    nothing = Vocabularies(False, IDS[:0], IDS[:0])
    for ft, vocabularies, reason in (
        (dataclasses.replace(ARCH, embed_dim=8), SAME, "different width"),
        (tiny.mixtral(), SAME, "experts"),
        (ARCH, nothing, "share no tokens"),
    ):
        (line,) = CsuProcrustes().not_applicable(ARCH, ft, vocabularies)
        assert reason in line
    aligned = CsuProcrustes().compute(pair_of(BASE, RELATED, aligned=True))
    assert (aligned.log10_p, aligned.headline) == (None, 1)
