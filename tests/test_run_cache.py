"""An interrupted run goes on where it stopped, and comes to the same record; a changed one starts over, and says so."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from records import assert_same_numbers, without_circumstances

from tracing_jax import experiment
from tracing_jax.experiment import memory, steps
from tracing_jax.matching import weights
from tracing_jax.run_cache import HELD_SECONDS, RUN_CACHE, WRITE_SHARE, HeldResults, RunCache, WriteBudget
from tracing_jax.sharding import make_mesh
from tracing_jax.statistics.csu import Csu

STATISTICS = "csu,csh,match,mode,l2,jsd,cos,csu_all"


@pytest.fixture
def config_of(quick_config):
    steps = {"permute": True, "align": True, "eval": True}
    few = {"l2": {"num_perm": 5}, "perm_mode_l2": {"num_perm": 5}}
    return lambda name="run", **fields: quick_config(name, **{"stat": STATISTICS} | steps | few | fields)


@pytest.fixture(autouse=True)
def _written_at_once(monkeypatch):
    monkeypatch.setattr("tracing_jax.run_cache.HELD_SECONDS", 0.0)


def dying_after(monkeypatch, pieces):
    """Makes the run end, as if killed, once so many pieces are kept."""
    written = []
    write = RunCache._write

    def write_and_die(file, content):
        write(file, content)
        written.append(file)
        if len(written) == pieces:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunCache, "_write", staticmethod(write_and_die))
    return written


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["resident", "stream"])
def test_a_run_stopped_again_and_again_comes_to_the_record_of_one_that_was_not(
    config_of, monkeypatch, memory, tmp_path
):
    expected = experiment.trace(config_of("whole", memory=memory))
    monkeypatch.setattr(WriteBudget, "allows", lambda budget, num_bytes: num_bytes > 0)  # states after every layer
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            dying_after(patch, 20)
            try:
                record = experiment.trace(config_of(memory=memory))
                break
            except KeyboardInterrupt:
                stops += 1
    assert stops >= 3
    assert any("continues an interrupted run" in note for note in record["notes"])
    assert_same_numbers(without_circumstances(record), without_circumstances(expected), tolerance=1e-6)
    assert not (tmp_path / "run" / "results.run" / RUN_CACHE).exists()


@pytest.mark.parametrize("layer_seconds", [3.0, 40.0, 1000.0])
@pytest.mark.parametrize("bytes_per_second", [5e6, 1e8, 5e9])
def test_writing_unfinished_states_takes_two_per_cent_of_the_time_at_most(tmp_path, layer_seconds, bytes_per_second):
    """On a disk of any speed; only the first write can exceed the share, on one that is slower than assumed."""
    seconds, num_bytes = 0.0, 2_100_000_000
    starts, shares, writing = [], [], 0.0
    cache = RunCache(tmp_path, budget=WriteBudget(lambda: seconds)).scope("some", "statistic")

    def arrays():
        nonlocal seconds
        seconds += num_bytes / bytes_per_second
        return {"x": np.zeros(1)}

    while len(starts) < 5:
        seconds += layer_seconds
        start = seconds
        cache.save_if_due(arrays, num_bytes, "hidden")
        if seconds > start:
            writing += seconds - start
            starts.append(start)
            shares.append(writing / seconds)
    slower_than_assumed = bytes_per_second < 1e8
    assert max(shares[slower_than_assumed:]) <= WRITE_SHARE
    assert min(np.diff(starts)) >= 30
    assert len(list(tmp_path.rglob("hidden.npz"))) == 1  # one copy that is replaced


def test_results_are_written_once_a_run_is_some_seconds_old_and_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr("tracing_jax.run_cache.HELD_SECONDS", HELD_SECONDS)
    seconds = 0.0
    cache = RunCache(tmp_path, (tmp_path / "facts.json", b"{}"), held=HeldResults(lambda: seconds)).scope("statistic")
    cache.save({"x": 1}, 0)
    cache.save_arrays(lambda: {"y": np.arange(3)}, "arrays")
    assert not list(tmp_path.iterdir())
    assert cache.load(dict, 0) == {"x": 1}
    np.testing.assert_array_equal(cache.load_arrays("arrays")["y"], np.arange(3))
    cache.delete("arrays")
    seconds = HELD_SECONDS
    cache.save({"x": 2}, 1)
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["0.json", "1.json", "facts.json"]
    assert RunCache(tmp_path).scope("statistic").load(dict, 0) == {"x": 1}


def test_states_are_not_written_in_a_short_run(tmp_path):
    cache = RunCache(tmp_path)
    cache.save_if_due(lambda: pytest.fail("written"), 1, "hidden")
    RunCache().save_if_due(lambda: pytest.fail("written"), 1, "hidden")


@pytest.mark.slow
def test_finished_layers_are_not_compared_again(config_of, monkeypatch):
    with monkeypatch.context() as patch:
        dying_after(patch, 2)  # what the run is, and the first layer
        with pytest.raises(KeyboardInterrupt):
            experiment.trace(config_of(stat="csu", permute=False, align=False, eval=False))
    from tracing_jax.statistics import csu

    compared = []
    compare = csu.similarities
    monkeypatch.setattr(csu, "similarities", lambda *rows: compared.append(0) or compare(*rows))
    record = experiment.trace(config_of(stat="csu", permute=False, align=False, eval=False))
    assert len(compared) == record["models"]["base"]["shape"]["num_layers"] - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "decides", "before", "after"),
    [
        ("memory", "choose_memory", ("resident", ""), ("stream", "")),
        ("mesh.data", "make_mesh", make_mesh(1, 1), make_mesh(2, 1)),
    ],
)
def test_models_that_lie_elsewhere_are_started_over(config_of, monkeypatch, name, decides, before, after):
    fields = {"stat": "mode", "permute": False, "align": False, "eval": False, "memory": "auto", "batch_size": 3}

    monkeypatch.setattr(memory, decides, lambda *_: after)
    expected = experiment.trace(config_of("whole", **fields))
    monkeypatch.setattr(memory, decides, lambda *_: before)
    with monkeypatch.context() as patch:
        dying_after(patch, 2)  # what the run is, and the first chunk
        with pytest.raises(KeyboardInterrupt):
            experiment.trace(config_of(**fields))
    monkeypatch.setattr(memory, decides, lambda *_: after)
    record = experiment.trace(config_of(**fields))
    assert any(f"of other {name}: it is started over" in note for note in record["notes"])
    assert_same_numbers(record["statistics"], expected["statistics"], tolerance=1e-6)


@pytest.mark.slow
def test_the_model_whose_place_an_aligned_one_takes_is_gone(config_of, monkeypatch):
    compute, models, alive = steps._compute, [], []

    def watching(inputs, pair, reasons):
        models.append(weakref.ref(pair.ft))
        gc.collect()
        alive.append([model() is not None for model in models])
        return compute(inputs, pair, reasons)

    monkeypatch.setattr(steps, "_compute", watching)
    experiment.trace(config_of(stat="l2", align_axes="rotation", permute=False, eval=False))
    assert alive == [[True], [False, True]]


def test_several_processes_take_only_what_they_agreed_on(tmp_path, monkeypatch):
    def start(seen=True):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr("tracing_jax.run_cache.broadcast_one", lambda value: value)
        monkeypatch.setattr("tracing_jax.run_cache.all_agree", lambda value: value and seen)
        return RunCache.open(tmp_path / RUN_CACHE, {"config": 1})

    first, note = start()
    first.save({"value": 1}, "one")
    assert note is None
    assert first.load(dict, "one") is None  # another may have asked before it was there

    second, note = start()
    second.save({"value": 2}, "two")
    assert note == "continues an interrupted run: 1 finished results"
    assert second.scope("layers").folder == tmp_path / RUN_CACHE / "layers"
    assert [second.load(dict, name) for name in ("one", "two")] == [{"value": 1}, None]

    unseen, note = start(seen=False)
    assert "which not all processes see" in note
    assert unseen.load(dict, "one") is None
    assert not list(tmp_path.rglob("one.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stat", "work", "pieces"),
    [
        ("match_all", "correlate", 1 + 2),
        ("match_moments", "descriptor_correlations", 1 + 2 * 2 + 1),
        ("match_io", "responses", 1 + 3),
        ("match_crossfit", "learn_rotation", 1 + 2),
        ("match_distilled", "fit_student", 1 + 2),
    ],
)
def test_what_a_layer_took_is_not_done_again(config_of, monkeypatch, stat, work, pieces):
    fields = {
        "stat": stat,
        "permute": False,
        "align": False,
        "eval": False,
        "match_distilled": {"steps": 20},
        "match": {"forms": "weights"},
        "match_all": {"forms": "weights"},
    }
    module = importlib.import_module(f"tracing_jax.statistics.{stat}")
    do, done = getattr(module, work), []
    monkeypatch.setattr(module, work, lambda *given: done.append(0) or do(*given))
    expected = experiment.trace(config_of("whole", **fields))
    whole = len(done)
    with monkeypatch.context() as patch:
        dying_after(patch, pieces)
        with pytest.raises(KeyboardInterrupt):
            experiment.trace(config_of(**fields))
    before = len(done) - whole
    record = experiment.trace(config_of(**fields))
    assert 0 < before < whole == len(done) - whole
    assert_same_numbers(without_circumstances(record), without_circumstances(expected), tolerance=1e-6)


@pytest.mark.slow
def test_an_axis_that_was_solved_is_not_solved_again(config_of, monkeypatch):
    fields = {"stat": "csu", "align": True, "eval": False, "align_axes": "embed,mlp"}
    do, done = weights.weight_similarity, []
    monkeypatch.setattr(weights, "weight_similarity", lambda *given: done.append(0) or do(*given))
    expected = experiment.trace(config_of("whole", **fields))
    whole = len(done)
    solve, solved = weights._Descent._solve, []

    def solve_and_die(descent, *given):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(0)
        return solve(descent, *given)

    with monkeypatch.context() as patch:
        patch.setattr(weights._Descent, "_solve", solve_and_die)
        with pytest.raises(KeyboardInterrupt):
            experiment.trace(config_of(**fields))
    record = experiment.trace(config_of(**fields))
    assert len(done) - whole == whole > 2
    assert_same_numbers(without_circumstances(record), without_circumstances(expected), tolerance=1e-6)


@pytest.mark.slow
def test_finished_pairs_of_several_are_not_traced_again(config_of, family, monkeypatch):
    fields = {"stat": "csu", "permute": False, "align": False, "eval": False}
    config = config_of(**fields)
    del config.ft_model_id
    config.ft_model_ids = tuple(str(family.member(name)) for name in ("finetune", "independent"))
    computed = []
    compute = Csu.compute

    def compute_and_die(statistic, pair):
        computed.append(pair)
        if len(computed) == 2:
            raise KeyboardInterrupt
        return compute(statistic, pair)

    monkeypatch.setattr(Csu, "compute", compute_and_die)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(config)
    records = experiment.run(config)
    assert len(computed) == 3
    assert [record["verdict"]["verdict"] for record in records] == ["related", "undecided"]


@pytest.mark.slow
def test_a_run_that_writes_the_aligned_model_goes_on_after_it_was_stopped_behind_the_alignment(
    config_of, monkeypatch, tmp_path
):
    fields = {"stat": "csu", "eval": False, "save_aligned": str(tmp_path / "back")}
    compute, computed = Csu.compute, []

    def compute_and_die(statistic, pair):
        if pair.aligned and not computed.append(0) and len(computed) == 1:
            raise KeyboardInterrupt
        return compute(statistic, pair)

    monkeypatch.setattr(Csu, "compute", compute_and_die)
    with pytest.raises(KeyboardInterrupt):
        experiment.trace(config_of(**fields))
    assert not (tmp_path / "back").exists()
    experiment.trace(config_of(**fields))
    assert (tmp_path / "back" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["config", "files"])
def test_a_changed_run_starts_over_and_says_so(config_of, family, monkeypatch, change):
    with monkeypatch.context() as patch:
        dying_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            experiment.trace(config_of(stat="csu,cos"))
    if change == "files":
        weights = family.member("finetune") / "model.safetensors"
        os.utime(weights, ns=(time.time_ns(), time.time_ns()))
        record = experiment.trace(config_of(stat="csu,cos"))
    else:
        record = experiment.trace(config_of(stat="csu,cos", seed=1))
    assert any("started over" in note and change in note for note in record["notes"])


@pytest.mark.slow
def test_a_process_killed_at_a_random_moment_loses_nothing(config_of, tmp_path):
    """The run as a user starts it, killed by SIGKILL while it works, and started again."""
    config = config_of("killed", stat="csu,match,mode", memory="stream", num_tokens=4096)
    expected = experiment.trace(config_of("alive", stat="csu,match,mode", memory="stream", num_tokens=4096))
    arguments = [f"--config.{name}={config[name]}" for name in (
        "base_model_id", "ft_model_id", "dataset", "block_size", "num_tokens", "batch_size", "stat", "memory", "save",
        "permute", "align", "eval")]  # fmt: skip
    arguments += ["--mode.alphas=0.0,0.5,1.0", "--config.mesh.data=1", "--attn", "--emb"]
    arguments += ["--l2.num_perm=5", "--perm_mode_l2.num_perm=5"]
    program = "import runpy; from tracing_jax import run_cache; run_cache.HELD_SECONDS = 0; " + (
        "runpy.run_path('main.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, "--config=configs/mode.py", *arguments]
    root = Path(__file__).parents[1]
    folder = Path(config.save).with_suffix(".run") / RUN_CACHE
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(folder.rglob("*.json"))) < 3:
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert folder.exists()
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "continues an interrupted run" in done.stdout
    import json

    record = json.loads(Path(config.save).with_suffix(".json").read_text())
    assert_same_numbers(without_circumstances(record), without_circumstances(expected))
