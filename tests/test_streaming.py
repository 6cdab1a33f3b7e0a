"""Streamed models: every statistic, alignment and whole runs give what they give on models in memory."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from records import assert_same_numbers, without_circumstances

from tracing_jax import experiment
from tracing_jax.alignment import align
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.data import paired_one_to_one
from tracing_jax.experiment import ConfigError, memory
from tracing_jax.rewrites import Permutation, random_permutations
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import InMemory, PrefetchingSource, rewritten, sharded
from tracing_jax.statistics import REGISTRY, Pair, Vocabularies, make_statistic
from tracing_jax.statistics.match_distilled import MatchDistilled
from tracing_jax.tree import flatten

ARCH = tiny.llama_mha(num_layers=3, layer_ropes=(0,) * 3, layer_windows=(None,) * 3)
TOKENS = np.random.default_rng(0).integers(61, size=(8, 24), dtype=np.int32)
IDS = np.arange(61, dtype=np.int32)


@dataclasses.dataclass
class OnDisk:
    """A source of numpy leaves that is not in memory, like a checkpoint."""

    model: InMemory

    @property
    def arch(self):
        return self.model.arch

    def embed(self):
        return jax.device_get(self.model.embed())

    def layer(self, index, only=()):
        return jax.device_get(self.model.layer(index, only))

    def head(self):
        return jax.device_get(self.model.head())


def pair_of(base, ft):
    return Pair(
        base, ft, Vocabularies(True, IDS, IDS, unseen={"unreachable tokens": (IDS[48:], IDS[48:])}), TOKENS,
        Compute(make_mesh(1, 1), 4), 0, blocks=paired_one_to_one(TOKENS, TOKENS),
    )  # fmt: skip


def streamed(model):
    return PrefetchingSource(sharded(OnDisk(model), make_mesh(1, 1)))


@pytest.fixture(scope="module")
def options():
    from tracing_jax.cli.config_files import to_config
    from tracing_jax.options import RunOptions

    config = to_config(RunOptions(stat=("mode",)))
    config.l2.num_perm = config.perm_mode_l2.num_perm = 9
    config.mode.num_perm, config.csh.blocks, config.csh.block_size = 3, 4, 32
    config.mode.attn = config.mode.emb = config.perm_mode_l2.attn = config.perm_mode_l2.emb = True
    config.screen.share = 1.0
    return RunOptions.from_config(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTRY)
def test_every_statistic_is_the_same_on_streamed_models(name, options):
    base = tiny.model(ARCH)
    ft = InMemory(ARCH, tiny.noisy(base.params, 0.3))
    statistic = make_statistic(name, options)
    if isinstance(statistic, MatchDistilled):
        statistic = dataclasses.replace(statistic, steps=20, batch=32)
    resident, lazy = (
        statistic.compute(pair).as_dict() for pair in (pair_of(base, ft), pair_of(streamed(base), streamed(ft)))
    )
    if name == "screen":  # of a source without slices whole leaves are read, which the record says
        for result in (resident, lazy):
            result["read"], result["notes"] = None, result["notes"][1:]
    assert_same_numbers(resident, lazy)


@pytest.mark.slow
def test_alignment_finds_the_same_permutations_of_streamed_models():
    base = tiny.model(ARCH)
    planted = random_permutations(jax.random.key(3), axis_table(ARCH), ("embed", "mlp", "kv_heads"))
    ft = OnDisk(InMemory(ARCH, tiny.noisy(base.params, 0.1)))
    moved = PrefetchingSource(sharded(rewritten(ft, [Permutation(planted)]), make_mesh(1, 1)))
    found = align(streamed(base), moved, ("embed", "mlp", "kv_heads"), evidence="weights")
    for axis, p in found.permutations.items():
        assert np.array_equal(planted[axis][p], np.arange(len(p)))


@pytest.fixture
def config_of(quick_config):
    given = {"stat": "mode,csu,match,l2", "l2": {"num_perm": 5}}
    return lambda name, **fields: quick_config(name, **given | fields)


@pytest.mark.slow
def test_a_streamed_run_gives_the_record_of_a_resident_one(config_of):
    steps = {"permute": True, "align": True, "eval": True}
    records = [experiment.trace(config_of(m, memory=m, **steps)) for m in ("resident", "stream")]
    assert "memory: stream, as asked for" in records[1]["notes"]
    assert_same_numbers(*map(without_circumstances, records))


@pytest.mark.slow
def test_the_aligned_model_is_written_when_asked(config_of, family, tmp_path):
    folder = tmp_path / "back"
    experiment.trace(config_of("a", memory="stream", permute=True, align=True, save_aligned=str(folder)))
    written, own = (open_checkpoint(str(path)) for path in (folder, family.member("finetune")))
    for part in ("embed", "head"):
        for name, leaf in flatten(getattr(own, part)()).items():
            assert np.array_equal(flatten(getattr(written, part)())[name], leaf)
    assert all(np.array_equal(leaf, flatten(written.layer(1))[name]) for name, leaf in flatten(own.layer(1)).items())


@pytest.mark.slow
def test_max_layers_looks_at_the_first_layers_alone(config_of):
    record = experiment.trace(config_of("one", max_layers=1, stat="csu,mode"))
    assert record["models"]["base"]["shape"]["num_layers"] == 1
    assert record["statistics"]["csu"]["non_aligned"]["tests"][0]["places"] == ["layer 0"]
    assert any("only the first 1 layers" in note for note in record["notes"])


@pytest.mark.parametrize(("fields", "message"), [
    ({"memory": "paper"}, "memory=paper: paper is none of auto, resident, stream"),
    ({"memory": "stream", "align": True, "align_axes": "all"}, "need both models in memory"),
    ({"save_aligned": "somewhere"}, "nothing is aligned"),
    ({"max_layers": 1, "disguise": "units"}, "leave disguise out"),
    ({"max_layers": -1}, "max_layers=-1: at least 0"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(config_of, fields, message):
    with pytest.raises(ConfigError, match=message):
        experiment.trace(config_of("refused", **fields))


def test_auto_streams_what_does_not_fit_and_says_so(config_of, family, monkeypatch):
    model = open_checkpoint(str(family.member("base")))
    size = sum(leaf.nbytes for i in range(2) for leaf in flatten(model.layer(i)).values())
    size += sum(leaf.nbytes for part in (model.embed(), model.head()) for leaf in flatten(part).values())
    assert model.num_bytes == size
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 2 * size)
    record = experiment.trace(config_of("auto", stat="csu"))
    (note,) = [note for note in record["notes"] if note.startswith("memory")]
    assert "stream" in note
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: 4 * size)
    assert memory.choose_memory("auto", (model, model), make_mesh(1, 1))[0] == "resident"
    assert json.loads(Path(config_of("auto").save).with_suffix(".json").read_text()) == record


def test_free_memory_of_this_machine_is_a_number_that_it_can_have():
    free = memory.free_bytes(make_mesh(1, 1))
    assert free is None or 2**20 < free < 2**50
