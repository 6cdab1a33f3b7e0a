"""`screen`: exact on what it samples, finds fine-tunes in place or permuted, and reads no more than it says."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy.stats
import tiny
from cases import slow
from counting_store import CountingStore

from configs import screen
from tracing_jax import experiment
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.models import init_params
from tracing_jax.rewrites import permute, random_permutations
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, PrefetchingSource, Submodel, in_memory
from tracing_jax.statistics import Pair, Vocabularies, verdict
from tracing_jax.statistics.screen import Screen, parameters, plan_within

DEEP = {"num_layers": 6, "layer_ropes": (0,) * 6, "layer_windows": (None,) * 6}
ARCH = tiny.qwen3_gqa(mlp_dim=96, vocab_size=400, **DEEP)
IDS = np.arange(400, dtype=np.int32)
SAME = Vocabularies(True, IDS, IDS)


@functools.partial(jax.jit, static_argnums=0)
def initialised(arch, seed):
    return init_params(arch, jax.random.key(seed))


def pair_of(base, ft, seed=0, **fields):
    return Pair(base, ft, SAME, None, Compute(make_mesh(1, 1), 4), seed, **fields)


def moved(model):
    table = axis_table(model.arch)
    permutations = random_permutations(jax.random.key(3), table, ["embed", "mlp"])
    return InMemory(model.arch, permute(model.params, permutations, table))


BASE = tiny.model(ARCH, 0)
RELATED, OTHER = InMemory(ARCH, tiny.noisy(BASE.params, 0.1)), tiny.model(ARCH, 1)


def log10_p(result, part):
    return min(test.log10_p for test in result.tests if test.decides and test.name.startswith(part))


@pytest.mark.slow
def test_a_finetune_is_found_in_place_and_in_sampled_layers():
    result = Screen(0.7).compute(pair_of(BASE, RELATED))
    assert log10_p(result, "units in place") < -20
    assert log10_p(result, "sampled layers") < -20
    found = verdict({"screen": result}, 1e-3)
    assert (found.verdict, found.statistic) == ("undecided", "screen")  # units that were not read may cancel those
    assert "units that were not can cancel them" in found.meaning
    assert set(found.layers) <= {f"layer {i}" for i in range(6)}


@pytest.mark.slow
def test_a_permuted_finetune_is_found_in_sampled_layers_alone():
    result = Screen(0.7).compute(pair_of(BASE, moved(RELATED)))
    assert log10_p(result, "units in place") > -4
    assert log10_p(result, "sampled layers") < -20


def test_independent_models_are_not_called_related_and_alignment_silences():
    result = Screen(0.7).compute(pair_of(BASE, OTHER))
    assert result.log10_p > -2
    assert verdict({"screen": result}, 1e-3).verdict == "undecided"  # it has read a part only
    aligned = Screen(0.7).compute(pair_of(BASE, RELATED, aligned=True))
    assert aligned.log10_p is None
    assert "after alignment nothing has a null" in aligned.p_reason


@pytest.mark.slow
@pytest.mark.parametrize("broken", [slow(False), True])
def test_p_values_of_independent_models_are_uniform(broken):
    """Per layer by rank correlation, on runs of 13 of 40 units; with a fifth of them zero in the same places."""
    arch, ps = tiny.qwen3_gqa(mlp_dim=40), []
    for i in range(120):
        base, ft = (initialised(arch, 2 * i + side) for side in (0, 1))
        if broken:
            for params in (base, ft):
                for layer in params["layers"].values():
                    up = layer["mlp"]["up_proj"]
                    up["kernel"] = up["kernel"].at[:, 32:].set(0)
        result = Screen(0.7).compute(pair_of(InMemory(arch, base), InMemory(arch, ft), seed=i))
        (rank,) = [test for test in result.tests if test.name == "units in place, rank correlation"]
        ps += [log_p for log_p, units in zip(rank.log10_ps, rank.values["units"]) if units > 7]
    assert len(ps) > 150
    assert scipy.stats.kstest(10.0 ** np.array(ps), "uniform").pvalue > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_plan_stays_within_its_share(share):
    result = Screen(share).compute(pair_of(BASE, RELATED))
    assert all(0 < fact["share"] <= share for fact in result.read.values())
    assert result.read["ft"]["bytes"] == pytest.approx(4 * parameters(ARCH) * result.read["ft"]["share"])
    assert f"{result.read['ft']['share']:.3g} of ft" in result.notes[0]


def test_what_does_not_apply_is_said():
    narrow = dataclasses.replace(ARCH, embed_dim=32)
    assert any("different width" in line for line in plan_within(0.7, ARCH, narrow, SAME).left_out)
    assert Screen(1e-4).not_applicable(ARCH, ARCH, SAME) == [
        "units in place: 0.0001 of the weights holds fewer than 8 units a layer",
        "sampled layers: 0.0001 of the weights holds fewer than 2 layers' MLPs",
    ]
    assert not Screen(0.7).not_applicable(ARCH, ARCH, SAME)
    assert any("has no gate" in line for line in plan_within(0.7, tiny.gpt2(), tiny.gpt2(), SAME).left_out)


def test_an_excerpt_is_a_small_model_of_the_same_weights():
    tokens = np.asarray([7, 3, 8, 7], np.int32)
    found = Submodel(BASE, (4, 1), slice(10, 30), tokens)
    assert (found.arch.num_layers, found.arch.mlp_dim, found.arch.vocab_size) == (2, 20, 4)
    np.testing.assert_array_equal(found.embed()["embedding"], np.asarray(BASE.embed()["embedding"])[tokens])
    for place, layer in enumerate((4, 1)):
        for name, axis in (("gate_proj", 1), ("down_proj", 0)):
            whole = np.asarray(BASE.layer(layer)["mlp"][name]["kernel"])
            got = found.layer(place)["mlp"][name]["kernel"]
            np.testing.assert_array_equal(got, np.take(whole, range(10, 30), axis=axis))
    assert found.read[1] == 4 * found.read[0] > 0


@pytest.fixture(scope="module")
def folders(family):
    """Base and its fine-tune of the demo family."""
    return family.member("base"), family.member("finetune")


@pytest.mark.slow
def test_files_give_what_memory_gives_and_little_of_them_is_read(folders):
    checkpoints = [open_checkpoint(str(folder)) for folder in folders]
    counted = [dataclasses.replace(c, tensors=CountingStore(c.tensors)) for c in checkpoints]
    ids = np.arange(checkpoints[0].arch.vocab_size, dtype=np.int32)
    fields = (Vocabularies(True, ids, ids), None, Compute(make_mesh(1, 1), 4), 0)
    from_files = Screen(0.9).compute(Pair(*map(PrefetchingSource, counted), *fields))
    from_memory = Screen(0.9).compute(Pair(*map(in_memory, checkpoints), *fields))
    assert from_files.log10_p == pytest.approx(from_memory.log10_p, rel=1e-6)
    assert [len(side.tests) for side in (from_files, from_memory)] == [7, 7]
    for checkpoint, read in zip(counted, from_files.read.values()):
        assert checkpoint.tensors.bytes.total() == read["bytes"]
        assert 0 < read["bytes"] <= 0.9 * checkpoint.num_bytes


@pytest.mark.slow
def test_a_run_streams_hashes_nothing_and_says_what_it_read(folders, tmp_path):
    config = screen.get_config()
    config.base_model_id, config.ft_model_id = map(str, folders)
    config.screen.share, config.save = 0.5, str(tmp_path / "screen.p")
    record = experiment.trace(config)
    assert record["verdict"]["verdict"] == "undecided"
    assert record["verdict"]["statistic"] == "screen"
    assert record["statistics"]["screen"]["non_aligned"]["log10_p"] < -20
    assert not record["models"]["ft"]["files"]
    assert any(note.startswith("memory: stream") for note in record["notes"])
    assert 0 < record["statistics"]["screen"]["non_aligned"]["read"]["ft"]["share"] <= 0.5
