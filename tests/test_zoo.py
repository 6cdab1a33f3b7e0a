"""Zoos: lists of models, names and pairs, who may work on a pair, and what a stop or a change does to what is done."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests import foreign_layouts as layouts
from tracing_jax.checkpoint import open_checkpoint, save_checkpoint
from tracing_jax.cli import zoo as cli_zoo
from tracing_jax.cli.zoo import ZooOptions
from tracing_jax.experiment import check_config, signing
from tracing_jax.experiment.inputs import open_inputs
from tracing_jax.experiment.models import open_model
from tracing_jax.options import ZOO, RunOptions
from tracing_jax.sources import InMemory, in_memory
from tracing_jax.zoo import (
    ModelList,
    ZooFolder,
    launching,
    leases,
    make_plan,
    proposing,
    read_models,
    read_plan,
    root_of,
)
from tracing_jax.zoo.launching import left_to_do, status, write_plan
from tracing_jax.zoo.plan import Proposal
from tracing_jax.zoo.proposing import proposed, write_left_out
from tracing_jax.zoo.report import write_report
from tracing_jax.zoo.report.contents import contents_of
from tracing_jax.zoo.slurm import batches, script
from tracing_jax.zoo.worker import trace_pairs

ROOT = Path(__file__).parent.parent
LISTS = sorted((ROOT / "configs" / "models").glob("*.yaml"))


def pairs_of(*models) -> ModelList:
    """The first model with each of the others."""
    return ModelList(models, tuple((models[0], model) for model in models[1:]))


def listed(tmp_path, content, form=None) -> ModelList:
    file = tmp_path / "models.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return read_models(file, form)


def test_each_form_makes_its_pairs(tmp_path):
    assert listed(tmp_path, ["a", "b", "c"]).pairs == (("a", "b"), ("a", "c"), ("b", "c"))
    split = {"base_models": ["a", "b"], "ft_models": ["c", "d"]}
    assert listed(tmp_path, split).pairs == (("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"))
    assert len(listed(tmp_path, split, "all").pairs) == 6
    in_step = {"models_1": ["a", "a"], "models_2": ["b", "c"]}
    assert listed(tmp_path, in_step, "specified").pairs == (("a", "b"), ("a", "c"))
    tree = listed(tmp_path, {"tree": {"a": {"b": "c", "d": ["e", {"f": None}]}, "g": None}})
    assert tree.parents == {"a": None, "b": "a", "c": "b", "d": "a", "e": "d", "f": "d", "g": None}
    assert len(tree.pairs) == 21


@pytest.mark.parametrize(
    ("content", "form", "expected_message"),
    [
        ("a: [b", None, "not YAML"),
        ("", None, "expected a list of model ids"),
        ({"models": ["a"], "tree": {}}, None, "expected a list of models, or a mapping"),
        (["a", "b"], "split", "asks for base_models and ft_models"),
        (["a", "a"], None, "names a twice"),
        (["a"], None, "make no pair"),
        ({"models_1": ["a"], "models_2": ["b", "c"]}, None, "in step"),
        ({"tree": {"a": {"b": "a"}}}, None, "a is in it twice"),
        ({"tree": {"a": 3}}, None, "expected names of models, found 3"),
        ([1, "a"], None, "expected a list of model ids"),
    ],
)
def test_what_is_no_list_is_refused_with_the_file(tmp_path, content, form, expected_message):
    with pytest.raises(ValueError, match=r"models\.yaml: .*") as caught:
        listed(tmp_path, content, form)
    assert expected_message in str(caught.value)


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_shipped_lists_are_read(file):
    assert read_models(file).pairs


def test_published_llama_zoo_has_its_published_counts():
    models = read_models(ROOT / "configs/models/llama7b.yaml")
    assert (len(models.models), len(models.pairs), len({root_of(models.parents, m) for m in models.models})) == (
        21,
        210,
        7,
    )
    assert sum(pair.related for pair in make_plan(models, RunOptions(stat=("csu",))).pairs) == 69
    split = read_models(ROOT / "configs/models/llama7b_split.yaml")
    assert set(split.models) == set(models.models)


ids = st.text("ab/.-@:é ", min_size=1, max_size=8)


@given(st.lists(ids, min_size=2, max_size=8, unique=True))
def test_every_model_and_pair_has_a_name_of_its_own_fit_for_a_file(models):
    plan = make_plan(pairs_of(*models), RunOptions(stat=("csu",)))
    assert len(set(plan.names.values())) == len(models)
    assert len(plan.by_name) == len(models) - 1
    for name in plan.by_name:
        assert "/" not in name
        assert not name.startswith(".")
        assert len(name.encode()) < 200


@pytest.fixture
def folder(tmp_path) -> ZooFolder:
    """Three pairs of four models that need not exist."""
    plan = make_plan(pairs_of("org/a", "org/b", "org/c", "org/d"), RunOptions(stat=("csu",)))
    found = ZooFolder(tmp_path / "zoo")
    found.path.mkdir()
    plan.write(found.path)
    return found


def finish(folder, name, options=None):
    """Leaves what a worker leaves that traced a pair."""
    pair = folder.plan.by_name[name]
    folder.record_file(pair).parent.mkdir(exist_ok=True)
    folder.begin(pair, {})
    options = options or folder.plan.options_of(pair, folder.path)
    folder.record_file(pair).write_text(json.dumps({"args": options.as_dict()}))


def test_plan_comes_back_as_it_was_written(folder):
    models = ModelList(("a", "b"), (("a", "b"),), {"a": None, "b": "a"})
    config = RunOptions(stat=("mode",)).on_demo()
    plan = make_plan(models, config)
    plan.write(folder.path)
    again = read_plan(folder.path)
    assert again == plan
    pair = again.pairs[0]
    assert pair.related
    fields = again.options_of(pair, folder.path).as_dict()
    same = {
        name: value for name, value in config.as_dict().items() if name not in ("base_model_id", "ft_model_id", "save")
    }
    assert {name: fields[name] for name in same} == same


@pytest.mark.slow
def test_record_counts_for_its_config_and_its_files_alone(folder, tmp_path):
    pair = folder.plan.pairs[0]
    assert folder.state(pair).state == "missing"
    finish(folder, pair.name)
    assert folder.state(pair).state == "done"
    assert folder.record(pair) is not None
    changed = replace(folder.plan.options_of(pair, folder.path), seed=7)
    finish(folder, pair.name, changed)
    assert (folder.state(pair).state, folder.record(pair)) == ("missing", None)
    assert "config has changed: seed" in folder.state(pair).error
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"1")
    finish(folder, pair.name)
    stamp = weights.stat()
    record = folder.record_file(pair).read_text()
    folder.begin(pair, {str(weights): [stamp.st_size, stamp.st_mtime_ns]})
    assert folder.state(pair).state == "missing"  # what came out of other files is gone
    folder.record_file(pair).write_text(record)
    assert folder.state(pair).state == "done"
    weights.write_bytes(b"22")
    assert "file has changed" in folder.state(pair).error


@pytest.mark.slow
def test_pairs_are_traced_once_and_what_fails_stops_no_other(folder, monkeypatch):
    traced = []
    monkeypatch.setattr("tracing_jax.zoo.worker.open_models", lambda config: ())

    def trace(config):
        traced.append(config.ft_model_id)
        if config.ft_model_id == "org/c":
            raise RuntimeError("its third shard\nis a picture of a cat")
        (Path(config.save).with_suffix(".json")).write_text(json.dumps({"args": config.as_dict()}))

    for _ in range(2):
        trace_pairs(folder, folder.plan.by_name, trace)
    assert traced == ["org/b", "org/c", "org/d"]  # a failure is not tried again by workers of the same launch
    assert {name: found.state for name, found in folder.states().items()} == {
        "a--b": "done",
        "a--c": "failed",
        "a--d": "done",
    }
    assert folder.states()["a--c"].error == "RuntimeError: its third shard"
    assert "its third shard" in status(folder)
    assert "2 done, 0 running, 1 failed, 0 missing" in status(folder)
    assert left_to_do(folder) == ["a--c"]
    folder.clear_errors(["a--c"])
    trace_pairs(folder, folder.plan.by_name, trace)
    assert traced == ["org/b", "org/c", "org/d", "org/c"]


def test_pair_of_a_running_worker_is_left_to_it(folder):
    pair = folder.plan.pairs[0]
    other = ZooFolder(folder.path)
    with folder.leased(pair) as mine:
        assert mine
        held = json.loads((folder.path / "pairs" / f"{pair.name}.lease.json").read_text())
        assert held["pid"] == os.getpid()
        assert folder.leased_by(os.getpid()) == [pair]
        assert other.state(pair).state == "running"
        assert pair.name not in left_to_do(other)
        assert _leases_in_another_process(other, pair.name) == "False"
    assert folder.state(pair).state == "missing"
    assert _leases_in_another_process(other, pair.name) == "True"


def _leases_in_another_process(folder, name):
    code = f"""
from tracing_jax.zoo import ZooFolder
folder = ZooFolder({str(folder.path)!r})
with folder.leased(folder.plan.by_name[{name!r}]) as mine:
    print(mine)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_worker_that_was_killed_is_missed_and_its_pair_is_free(folder):
    pair = folder.plan.pairs[0]
    code = f"""
import os, signal
from tracing_jax.zoo import ZooFolder
folder = ZooFolder({str(folder.path)!r})
with folder.leased(folder.plan.pairs[0]):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -9
    found = folder.state(pair)
    assert found.state == "failed"
    assert "without an error message" in found.error
    with folder.leased(pair) as mine:
        assert mine


def test_worker_elsewhere_counts_as_ended_when_its_heartbeat_stops(folder):
    pair = folder.plan.pairs[0]
    lease = folder.path / "pairs" / f"{pair.name}.lease.json"
    _write_lease(lease)
    assert folder.state(pair).state == "running"
    long_ago = time.time() - 1000
    os.utime(lease, (long_ago, long_ago))
    assert folder.state(pair).state == "failed"
    with folder.leased(pair) as mine:
        assert mine
        assert time.time() - lease.stat().st_mtime < 60


def test_plan_is_not_replaced_while_another_is_worked_on(folder, tmp_path):
    models = [tmp_path / name for name in ("x", "y")]
    other = make_plan(ModelList(("org/a", "org/z"), (("org/a", "org/z"),)), RunOptions(stat=("csu",)))
    with (
        folder.leased(folder.plan.pairs[0]),
        pytest.raises(ValueError, match="another list or config is being traced"),
    ):
        write_plan(folder, other)
    write_plan(folder, other)
    assert list(folder.plan.by_name) == ["a--z"]
    missing = make_plan(
        ModelList(tuple(map(str, models)), ((str(models[0]), str(models[1])),)), RunOptions(stat=("csu",))
    )
    with pytest.raises(ValueError, match=r"(?s)these models cannot be read:.*/x: .*/y: "):
        write_plan(folder, missing)


def test_the_list_of_pairs_left_out_is_that_of_the_plan_in_the_folder(folder, monkeypatch):
    """A launch that is refused reads no model and changes no file; a plan of all pairs has no such list."""
    given, file = folder.plan, folder.path / "left_out.csv"

    def keeps_the_first(plan, *_):
        proposal = Proposal(len(plan.pairs), len(plan.pairs) - 1, 0, 0)
        return replace(plan, pairs=plan.pairs[:1], proposal=proposal), [(pair, "why") for pair in plan.pairs[1:]]

    monkeypatch.setattr(launching, "proposed", keeps_the_first)
    write_plan(folder, given, by_scan=True)
    rows = file.read_text().splitlines()
    assert len(rows) == len(given.pairs) > 1
    other = make_plan(pairs_of("org/a", "org/y", "org/z"), RunOptions(stat=("csu",)))
    with folder.leased(given.pairs[0]):
        write_plan(folder, given, by_scan=True)
        monkeypatch.setattr(launching, "proposed", lambda *_: pytest.fail("models are read"))
        for plan, by_scan in ((other, True), (given, False)):
            with pytest.raises(ValueError, match="another list or config is being traced"):
                write_plan(folder, plan, by_scan=by_scan)
        assert file.read_text().splitlines() == rows
    for name in ("adapter_base", "base_layout", "ft_layout"):
        one = make_plan(pairs_of("org/a", "org/b"), RunOptions(stat=("csu",), **{name: "org/x"}))
        with pytest.raises(ValueError, match=f"{name}: what is said of one model would hold for those of all pairs"):
            write_plan(folder, one)
    part = make_plan(pairs_of("org/a", "org/b"), RunOptions(stat=("csu",), component="vision"))
    with pytest.raises(ValueError, match="--candidates=all"):
        write_plan(folder, part, by_scan=True)
    write_plan(folder, given)
    assert not file.exists()
    assert read_plan(folder.path) == given


def test_models_of_the_hub_are_asked_for_before_a_zoo_is_written(folder, monkeypatch):
    problems = {"org/a": None, "org/b": "'org/b' is gated", "org/c": None}
    monkeypatch.setattr(launching, "hub_problem", problems.get)
    plan = make_plan(pairs_of("org/a", "org/b", "org/c"), RunOptions(stat=("csu",)))
    with pytest.raises(ValueError, match=r"(?s)cannot be read:.*org/b: 'org/b' is gated.*--skip_unreadable"):
        write_plan(folder, plan)
    write_plan(folder, plan, skip_unreadable=True)
    assert list(folder.plan.by_name) == ["a--c"]


def test_models_that_cannot_be_read_are_left_out_on_request(folder, tmp_path):
    """Their pairs are gone, the report lists them, and what was made from one counts as made from its parent."""
    gone, only = (str(tmp_path / name) for name in ("gone", "only"))
    tree = {"org/a": {gone: ["org/b", "org/c"]}}
    plan = make_plan(listed(tmp_path, {"tree": tree}), RunOptions(stat=("csu",)))
    with pytest.raises(ValueError, match=r"(?s)cannot be read:.*/gone: .*--skip_unreadable"):
        write_plan(folder, plan)
    write_plan(folder, plan, skip_unreadable=True)
    assert list(folder.plan.by_name) == ["a--b", "a--c", "b--c"]
    assert folder.plan == read_plan(folder.path)
    assert folder.plan.parents == {"org/a": None, "org/b": "org/a", "org/c": "org/a"}
    assert all(pair.related for pair in folder.plan.pairs)
    assert f"left out, {gone}: '{gone}' is no folder" in status(folder)
    contents = contents_of(folder)
    assert contents.as_dict()["left_out"] == [{"id": gone, "why": f"{gone!r} is no folder; expected a folder"}]
    page = write_report(folder).read_text("utf-8")
    assert "Models left out" in page
    assert gone in page
    with pytest.raises(ValueError, match="no pair is left"):
        write_plan(folder, make_plan(pairs_of("org/a", only), RunOptions(stat=("csu",))), skip_unreadable=True)


def test_script_asks_slurm_for_what_was_asked_for(folder):
    text = script(
        folder, 12, {"partition": "gpu", "time": 30, "array_parallelism": 4, "ntasks_per_node": 8, "mem": None}
    )
    for line in ("--array=0-11%4", "--partition=gpu", "--time=30", "--ntasks-per-node=8", "--requeue"):
        assert f"#SBATCH {line}" in text
    assert "--kill-on-bad-exit=1" in text
    assert "--mem" not in text
    assert batches(list("abcde"), 2) == [("a", "b"), ("c", "d"), ("e",)]
    with pytest.raises(ValueError, match="Unavailable parameter"):
        script(folder, 1, {"queue": "gpu"})


def _write_lease(file, **holder):
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"worker": "Slurm job 7_1", "host": "elsewhere", "pid": 1, "token": "old"} | holder))
    return file


def _of_workers_at_once(function, count=8):
    """Results of workers that start at the same moment."""
    start = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: (start.wait(), function())[1], range(count)))


@pytest.mark.parametrize("stale", [False, True], ids=["free", "stale"])
def test_of_workers_that_lease_a_pair_at_once_one_gets_it(stale, tmp_path, monkeypatch):
    read = leases.read_lease
    monkeypatch.setattr(leases, "read_lease", lambda file: (read(file), time.sleep(0.01))[0])  # all find it stale
    for i in range(20):
        file = tmp_path / "pairs" / f"{i}.lease.json"
        file.parent.mkdir(exist_ok=True)
        if stale:
            os.utime(_write_lease(file), (0, 0))
        (token,) = filter(None, _of_workers_at_once(lambda file=file: leases.take_lease(file)))
        assert read(file).holder["token"] == token
    assert len(list((tmp_path / "pairs").iterdir())) == 20


def test_worker_that_could_not_renew_its_lease_leaves_that_of_its_successor_alone(tmp_path):
    file = tmp_path / "pair.lease.json"
    with leases.leased(file) as mine:
        assert mine
        assert leases.take_lease(file) is None
        os.utime(file, (0, 0))  # suspended for long
        successor = leases.take_lease(file)
        assert successor
    assert leases.read_lease(file).holder["token"] == successor
    assert list(tmp_path.iterdir()) == [file]


def test_takeover_that_was_killed_halfway_blocks_the_pair_for_a_while_only(tmp_path):
    file = _write_lease(tmp_path / "pair.lease.json")
    right = tmp_path / f".{file.name}.old"
    right.touch()
    os.utime(file, (0, 0))
    assert leases.take_lease(file) is None
    os.utime(right, (0, 0))
    assert leases.take_lease(file) is None
    assert leases.take_lease(file)


def test_lease_of_a_requeued_job_is_taken_over_at_once_and_of_its_other_processes_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    holder = {"worker": "Slurm job 7", "host": socket.gethostname(), "pid": os.getppid(), "restarts": 0}
    file = _write_lease(tmp_path / "pair.lease.json", **holder)
    assert leases.take_lease(file) is None
    _write_lease(file, **holder | {"host": "elsewhere"})
    assert leases.take_lease(file) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert leases.take_lease(file)


# Pairs of a large zoo.


@pytest.mark.slow
def test_signatures_propose_the_pairs_of_relatives_and_what_they_found_is_kept(family, tmp_path, monkeypatch):
    members = [str(family.member(name)) for name in ("base", "finetune", "disguised", "independent")]
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(members))
    plan = make_plan(read_models(tmp_path / "models.yaml"), RunOptions(stat=("csu",), dataset=None))
    found, left = proposed(plan, tmp_path / "zoo")
    assert [pair.name for pair in found.pairs] == ["base--finetune", "base--disguised", "finetune--disguised"]
    assert (found.proposal.asked, found.proposal.left_out, found.proposal.unsigned) == (6, 3, {})
    with monkeypatch.context() as patched:
        patched.setattr(proposing, "FEWEST_DIVIDED", 2)
        assert proposed(plan, tmp_path / "parallel", workers=2) == (found, left)
    write_left_out(tmp_path / "zoo", left, found)
    left_out = (tmp_path / "zoo" / "left_out.csv").read_text().splitlines()
    assert left_out[1:] == [f"{name},independent,no trace in signatures," for name in ("base", "finetune", "disguised")]
    found.write(tmp_path / "zoo")
    assert read_plan(tmp_path / "zoo") == found
    page = write_report(ZooFolder(tmp_path / "zoo")).read_text("utf-8")
    assert "3 of 6 pairs were not compared" in page
    for name in ("signature_of", "scan"):
        monkeypatch.setattr(proposing, name, lambda *_, name=name: pytest.fail(f"{name} again"))
    assert proposed(plan, tmp_path / "zoo") == (found, left)
    for name, function in (("base.scan", "scan"), ("base.signed", "signature_of")):  # as an earlier version left them
        file = tmp_path / "zoo" / "models" / f"{name}.json"
        state = json.loads(file.read_text())
        del state["rule"]
        file.write_text(json.dumps(state))
        with pytest.raises(pytest.fail.Exception, match=f"{function} again"):
            proposed(plan, tmp_path / "zoo")


@pytest.mark.slow
def test_a_zoo_without_any_trace_is_an_answer(family, tmp_path, capsys):
    """Nothing is compared, nothing fails, and the page says which pairs were left out."""
    members = [str(family.member(name)) for name in ("base", "independent")]
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(members))
    listed = str(tmp_path / "models.yaml")
    zoo = ZooOptions(save=str(tmp_path / "zoo"), models=listed, executor="local", candidates="scan")
    cli_zoo.launch(zoo, RunOptions(stat=("csu",), dataset=None))
    printed = capsys.readouterr().out
    assert "0 pairs" in printed
    assert "left out: 1 of 1 pairs" in printed
    page = (tmp_path / "zoo" / "report.html").read_text("utf-8")
    assert "1 of 1 pairs were not compared" in page
    assert "2 models in none" in page


@pytest.mark.slow
def test_signatures_propose_both_parents_of_an_equal_merge_and_the_pair_that_tells_them_apart(family, tmp_path):
    base, other = (in_memory(open_checkpoint(str(family.member(name)))) for name in ("base", "independent"))
    mean = jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, base.params, other.params)
    save_checkpoint(tmp_path / "merge", InMemory(base.arch, mean), family.member("base"))
    models = (str(family.member("base")), str(family.member("independent")), str(tmp_path / "merge"))
    plan = make_plan(ModelList(models, tuple(itertools.combinations(models, 2))), RunOptions(stat=("csu",)))
    found, _ = proposed(plan, tmp_path / "zoo")
    assert [pair.name for pair in found.pairs] == ["base--independent", "base--merge", "independent--merge"]
    assert (found.proposal.left_out, found.proposal.closing) == (0, 1)


@pytest.mark.slow
def test_models_read_by_their_weights_alone_are_proposed_or_keep_all_their_pairs(tmp_path, monkeypatch):
    """One of a layout without MLPs that a signature can sample ends no launch; none is downloaded into `cache_dir`."""
    tensors = layouts.baichuan(0)
    written = {"base": tensors, "child": layouts.noisy_copy(tensors), "other": layouts.baichuan(2)}
    models = [str(layouts.write(tmp_path / name, layouts.baichuan, found)) for name, found in written.items()]
    models.append(str(layouts.write(tmp_path / "mixer", layouts.mamba, layouts.mamba(0))))
    options = RunOptions(stat=("csu",), cache_dir=str(tmp_path / "cache"))
    plan = make_plan(ModelList(tuple(models), tuple(itertools.combinations(models, 2))), options)
    folders = set()
    for module in (proposing, signing):
        monkeypatch.setattr(module, "open_model", lambda *a, **k: folders.update(a[1:]) or open_model(*a, **k))
    found, _ = proposed(plan, tmp_path / "zoo")
    assert folders == {None}
    assert [pair.name for pair in found.pairs] == ["base--child", "base--mixer", "child--mixer", "other--mixer"]
    assert list(found.proposal.unsigned) == [models[-1]]
    assert "no gate" in found.proposal.unsigned[models[-1]]


def test_pairs_are_proposed_where_the_list_has_many_for_each_model(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(launching, "write_plan", lambda *given: asked.append(given[3]))
    for count, candidates in ((41, "auto"), (42, "auto"), (42, "all"), (3, "scan")):
        (tmp_path / "models.yaml").write_text(yaml.safe_dump([f"m{i}" for i in range(count)]))
        zoo = ZooOptions(save=str(tmp_path), models=str(tmp_path / "models.yaml"), candidates=candidates)
        cli_zoo._plan(ZooFolder(tmp_path), zoo, RunOptions(stat=("csu",)))
    assert asked == [False, True, False, True]


def test_where_a_tokenizer_cannot_be_read_the_tests_without_a_text_are_the_answer(family, tmp_path):
    bare = shutil.copytree(family.member("finetune"), tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    pair = {"base_model_id": str(family.member("base")), "ft_model_id": str(bare), "save": None}
    found = open_inputs(check_config(replace(ZOO, **pair)))
    assert found.text is None
    assert "no tokenizer of" in found.not_applicable["jsd"]
    assert not {"match", "csu", "l2"} & found.not_applicable.keys()
    beside = open_inputs(check_config(replace(ZOO, **pair, stat=("auto", "jsd"))))
    assert "no tokenizer of" in beside.not_applicable["jsd"]
    with pytest.raises((ValueError, FileNotFoundError)):
        open_inputs(check_config(replace(ZOO, **pair, stat=("jsd",))))
