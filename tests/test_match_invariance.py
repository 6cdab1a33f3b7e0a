"""`match` is invariant under every rewrite that keeps the function; and its numbers are those of numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.optimize import linear_sum_assignment

from tracing_jax.data import paired_one_to_one
from tracing_jax.forward import activations
from tracing_jax.rewrites import DISGUISES, Renaming, draw_rewrites
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, in_memory, rewritten
from tracing_jax.statistics import Pair, Vocabularies, verdict
from tracing_jax.statistics.csu import Csu, CsuAll
from tracing_jax.statistics.match import Match
from tracing_jax.statistics.match_all import MatchAll

ARCH = tiny.llama_mha(num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3, mlp_dim=40)
IDS = np.arange(61, dtype=np.int32)
TOKENS = np.random.default_rng(0).integers(61, size=(8, 24), dtype=np.int32)
BASE = tiny.model(ARCH, 0)
RELATED = InMemory(ARCH, tiny.noisy(BASE.params, 0.1))


def pair_of(ft, new_ids=None):
    theirs = IDS if new_ids is None else new_ids
    vocabularies = Vocabularies(new_ids is None, IDS, theirs)
    blocks = paired_one_to_one(TOKENS, theirs[TOKENS])
    return Pair(BASE, ft, vocabularies, TOKENS, Compute(make_mesh(1, 1), 8), seed=0, blocks=blocks)


@pytest.mark.parametrize("test", [Csu(units=16), Match(forms=("weights",), units=16)])
def test_some_units_of_base_are_looked_for_among_all_of_fts(test):
    related, independent = (test.compute(pair_of(ft)) for ft in (RELATED, tiny.model(ARCH, 1)))
    assert related.tests[0].values["units"] == independent.tests[0].values["units"] == [16] * 3
    assert min(related.per_layer["values"]) > 0.9
    assert related.log10_p < -6
    assert independent.log10_p > -2


@pytest.fixture(scope="module")
def given():
    """The agreeing units of the pair as given, by form and layer."""
    result = Match().compute(pair_of(RELATED))
    return {test.name: np.array(test.values["agreeing"]) for test in result.tests}


@pytest.mark.parametrize("name", [name for name in DISGUISES if name not in ("pad", "identity", "repeat", "means")])
def test_match_does_not_change_under_a_rewrite(name, given):
    rewrites = draw_rewrites(name, jax.random.key(7), ARCH)
    after = in_memory(rewritten(RELATED, rewrites))
    hidden = InMemory(after.arch, jax.tree.map(jnp.asarray, after.params))
    result = Match().compute(pair_of(hidden, Renaming.composed(rewrites)))
    for test in result.tests:
        # Rounding may turn an assignment that is nearly tied.
        assert np.abs(np.array(test.values["agreeing"]) - given[test.name]).max() <= 2, test.name
    assert verdict({"match": result}, 1e-3).verdict == "related"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pad", "identity", "all"])
def test_rewrites_that_change_the_shape_do_not_hide_the_origin(name):
    rewrites = draw_rewrites(name, jax.random.key(7), ARCH)
    after = in_memory(rewritten(RELATED, rewrites))
    hidden = InMemory(after.arch, jax.tree.map(jnp.asarray, after.params))
    result = MatchAll().compute(pair_of(hidden, Renaming.composed(rewrites)))
    assert len(result.layer_map["pairs"]) == 3
    assert verdict({"match_all": result}, 1e-3).verdict == "related"


def correlation(a, b):
    return np.corrcoef(a.T.astype(np.float64), b.T.astype(np.float64))[: a.shape[1], a.shape[1] :]


def agreeing(gate, up):
    one, other = (linear_sum_assignment(s, maximize=True)[1] for s in (gate, np.abs(up)))
    return int((one == other).sum())


def test_match_counts_the_units_that_numpy_counts():
    ft = InMemory(ARCH, tiny.noisy(BASE.params, 1.5))
    result = Match().compute(pair_of(ft))
    counted = {test.name: list(test.values["agreeing"]) for test in result.tests}
    at, valid = np.broadcast_to(np.arange(24, dtype=np.int32), TOKENS.shape), np.ones(TOKENS.shape, bool)
    forward = [activations(m, TOKENS, at, valid, ("gate", "up"), Compute(make_mesh(1, 1), 8)) for m in (BASE, ft)]
    expected = [
        agreeing(correlation(a["gate"], b["gate"]), correlation(a["up"], b["up"])) for (_, a), (_, b) in zip(*forward)
    ]
    assert counted["forward, agreement, calibrated"] == expected

    def through_mlp(model, i, projection):
        x, layer = np.asarray(model.embed()["embedding"], np.float64), model.layer(i)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + ARCH.norm_eps) * np.asarray(layer["mlp_norm"]["scale"])
        return x @ np.asarray(layer["mlp"][projection]["kernel"], np.float64)

    expected = []
    for i in range(3):
        gate, up = (
            correlation(through_mlp(BASE, i, name), through_mlp(ft, i, name)) for name in ("gate_proj", "up_proj")
        )
        expected.append(agreeing(gate, up))
    assert counted["weights, agreement, calibrated"] == expected


@pytest.mark.slow
def test_csu_all_matches_the_rows_that_numpy_matches():
    ft = InMemory(ARCH, tiny.noisy(BASE.params, 1.5))
    tests = {test.name: test for test in CsuAll().compute(pair_of(ft)).tests}
    exact = tests["agreement, exact null"]
    assert len(exact.places) == 3 * 4
    place = exact.places.index("layers/1/mlp/down_proj")
    a, b = (np.asarray(m.layer(1)["mlp"]["down_proj"]["kernel"], np.float64).T for m in (BASE, ft))
    cosines = np.abs(a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    matched = linear_sum_assignment(cosines, maximize=True)[1]
    assert exact.values["agreeing"][place] == (matched == np.arange(24)).sum()
    loose = tests["agreement, no exact null"]
    assert not loose.decides
    assert {"embed/embedding", "head/lm_head", "layers/0/attn/q_proj"} <= set(loose.places)
    pairs = CsuAll(all_pairs=True).compute(pair_of(dataclasses.replace(ft)))
    assert len(pairs.tests[0].places) > 3 * len(exact.places)


@pytest.mark.slow
@pytest.mark.parametrize("statistic", [Csu(), CsuAll()])
def test_rows_too_many_for_a_matrix_of_cosines_are_matched_as_if_there_were_one(statistic, monkeypatch):
    ft = InMemory(ARCH, tiny.noisy(BASE.params, 1.5))
    whole = statistic.compute(pair_of(ft))
    monkeypatch.setattr("tracing_jax.statistics.cosine._WHOLE_BYTES", 0)
    monkeypatch.setattr("tracing_jax.statistics.cosine.cosines", None)
    assert statistic.compute(pair_of(ft)).tests == whole.tests
