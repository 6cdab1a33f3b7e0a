"""Laws of the record: plain, strict, whole on disk, without secrets."""

import hashlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from enum import IntEnum
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracing_jax import record as record_lib
from tracing_jax.record import (
    HashingStoppedError,
    RunFiles,
    atomic_write,
    check_writable,
    commit,
    file_hashes,
    legacy_dict,
    plain,
    write_json,
    write_pickle,
)

ROOT = Path(__file__).parents[1]
TOKEN = "hf_" + "a1B2" * 9


def result(headline=None, log10_p=None):
    return {"headline": headline, "label": "a number", "log10_p": log10_p, "not_applicable": None}


def record(**changes):
    base = {
        "format": 1,
        "args": {"base": "a/b", "seed": 0},
        "commit": "abc",
        "statistics": {"mode": {"non_aligned": result(2.5), "aligned": result(1.5)}},
        "perplexity": {"base": {"perplexity": 12.0}, "ft": {"perplexity": 13}},
        "seconds": {"load": 1, "statistic": 2.5},
    }
    return base | changes


def exact_types(value):
    if isinstance(value, dict):
        return {type(value)} | set().union(*(exact_types(item) for pair in value.items() for item in pair))
    if isinstance(value, list):
        return {type(value)}.union(*map(exact_types, value))
    return {type(value)}


class Level(IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.int8(-3), -3),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (Level.HIGH, 3),
        (True, True),
        (jnp.bfloat16(1.5), 1.5),
        (jnp.array([[1, 2]], jnp.int32), [[1, 2]]),
        (jnp.array([0.25, jnp.inf], jnp.bfloat16), [0.25, "inf"]),
        (np.array([math.nan, -math.inf]), ["nan", "-inf"]),
        (np.array(["x"]), ["x"]),
        (np.zeros((0, 2)), []),
        (Path("a") / "b", "a/b"),
        ((1, (None, "x")), [1, [None, "x"]]),
        ("\udcff.bin", "?.bin"),
    ],
)
def test_plain_converts_to_builtin_types(value, expected):
    converted = plain(value)
    assert converted == expected
    assert exact_types(converted) == exact_types(expected)


def test_plain_reads_ml_collections():
    config = ml_collections.ConfigDict({"a": {"b": (1, 2)}, "rate": 0.5})
    config.missing = ml_collections.config_dict.placeholder(str)
    config.same = config.get_ref("rate")
    expected = {"a": {"b": [1, 2]}, "rate": 0.5, "missing": None, "same": 0.5}
    assert plain(config) == expected
    assert plain(ml_collections.FrozenConfigDict(config)) == expected
    assert dict in exact_types(plain(config)) <= {dict, list, str, int, float, type(None)}


@pytest.mark.parametrize(
    "value",
    [object(), b"x", {1}, 1j, np.array([1j]), np.array([None]), np.datetime64("2020-01-01"), jax.random.key(0)],
    ids=lambda value: type(value).__name__,
)
def test_plain_names_the_place_of_what_it_refuses(value):
    with pytest.raises(TypeError, match=r"record\.a\[1\]\.b is of type"):
        plain({"a": [0, {"b": value}]})


def test_plain_refuses_keys_that_are_no_strings():
    with pytest.raises(TypeError, match=r"record\.a has the key 3 of type int"):
        plain({"a": {3: "x"}})


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(TREES)
def test_plain_is_idempotent_and_survives_strict_json(tree):
    once = plain(tree)
    assert plain(once) == once
    assert json.loads(json.dumps(once, allow_nan=False).encode()) == once


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def test_json_file_is_strict_and_round_trips(tmp_path):
    full = record(notes=["nan: é", math.nan], perplexity=None)
    write_json(tmp_path / "r.json", full)
    read = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"), parse_constant=refuse_constant)
    assert read == plain(full)
    assert math.isnan(float(read["notes"][1]))


@pytest.mark.parametrize(
    "key", ["token", "HF_TOKEN", "hf-token", "use_auth_token", "api_key", "wandb_api_key", "password"]
)
def test_secret_keys_are_redacted(key):
    assert plain({"args": {key: "swordfish"}}) == {"args": {key: "[redacted]"}}
    assert plain({key: None}) == {key: None}


def test_counts_and_units_are_no_secrets():
    numbers = {"tokens": 3, "num_tokens": 4, "loss_nats_per_token": math.nan, "pad_token": "<pad>", "kv_heads": 2}
    assert plain(plain(numbers)) == numbers | {"loss_nats_per_token": "nan"}


def test_no_token_reaches_a_file(tmp_path):
    secret = record(args={"base": f"https://x:{TOKEN}@host", TOKEN: [Path(TOKEN), np.array([TOKEN])], "token": 12345})
    write_json(tmp_path / "r.json", secret)
    write_pickle(tmp_path / "r.p", secret)
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert TOKEN.encode() not in content
        assert b"12345" not in content
        assert b"https://x:[redacted]@host" in content


def test_pickle_loads_in_bare_python(tmp_path):
    args = {"alphas": np.linspace(0, 1, 3), "shape": (1, 2), "save": Path("x.p")}
    write_pickle(tmp_path / "r.p", record(args=args))
    code = "import pickle, sys; print(sorted(pickle.load(open(sys.argv[1], 'rb')).items()))"
    command = [sys.executable, "-S", "-I", "-c", code, tmp_path / "r.p"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    loaded = legacy_dict(record(args=args))
    assert shown.strip() == str(sorted(loaded.items()))
    assert exact_types(loaded) <= {dict, list, str, int, float, bool, type(None)}


def test_legacy_keys_and_their_meaning():
    assert legacy_dict(record()) == {
        "args": {"base": "a/b", "seed": 0},
        "commit": "abc",
        "non-aligned test stat": 2.5,
        "aligned test stat": 1.5,
        "base loss": 12.0,
        "ft loss": 13.0,
        "time": 3.5,
    }
    assert legacy_dict(record(seconds={"load": 1, "total": 4}))["time"] == 4.0
    assert legacy_dict(record(perplexity=None))["base loss"] is None
    assert isinstance(legacy_dict(record())["ft loss"], float)


def test_legacy_statistic_is_log10_p_where_there_is_one():
    sides = {"non_aligned": result(0.9, log10_p=-4312.7), "aligned": None}
    legacy = legacy_dict(record(statistics={"cos": sides}))
    assert legacy["non-aligned test stat"] == -4312.7
    assert legacy["aligned test stat"] is None


def test_legacy_statistics_are_named_where_several_ran():
    absent = {"not_applicable": "no gate", "headline": None, "log10_p": None}
    statistics = {
        "l2": {"non_aligned": result(3), "aligned": None},
        "mode": {"non_aligned": result(math.inf), "aligned": None},
        "glu": {"non_aligned": absent, "aligned": None},
    }
    legacy = legacy_dict(record(statistics=statistics))
    assert legacy["non-aligned test stat"] == {"l2": 3.0, "mode": math.inf, "glu": None}
    assert legacy["aligned test stat"] is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, step):
    file = tmp_path / "r.p"
    atomic_write(file, b"old")

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(KeyboardInterrupt):
            atomic_write(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["r.p"]
    atomic_write(file, b"new")
    assert file.read_bytes() == b"new"


def test_a_record_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "r.json", record())
    with pytest.raises(TypeError, match=r"record\.notes\[0\]"):
        write_json(tmp_path / "r.json", record(notes=[object()]))
    assert json.loads((tmp_path / "r.json").read_bytes()) == record()
    assert os.listdir(tmp_path) == ["r.json"]


def test_written_files_are_as_readable_as_the_umask_allows(tmp_path):
    old = os.umask(0o022)
    try:
        atomic_write(tmp_path / "r.p", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "r.p").stat().st_mode & 0o777 == 0o644


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    file = tmp_path / "r.bin"
    atomic_write(file, b"0" * 1_000_000)
    code = (
        "import itertools, sys\n"
        "from tracing_jax.record import atomic_write\n"
        "for i in itertools.count(1): atomic_write(sys.argv[1], str(i % 10).encode() * 1_000_000)"
    )
    for delay in (0.0, 0.013, 0.031):
        before = file.stat().st_mtime_ns
        writer = subprocess.Popen([sys.executable, "-c", code, file], cwd=ROOT)
        deadline = time.monotonic() + 20
        while file.stat().st_mtime_ns == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        content = file.read_bytes()
        assert file.stat().st_mtime_ns > before
        assert len(content) == 1_000_000
        assert len(set(content)) == 1


def test_run_files_share_the_stem():
    files = RunFiles.from_save("runs/v1.5.p")
    assert [str(path) for path in (files.pickle, files.json, files.png, files.html, files.folder)] == [
        "runs/v1.5.p",
        "runs/v1.5.json",
        "runs/v1.5.png",
        "runs/v1.5.html",
        "runs/v1.5.run",
    ]
    assert RunFiles.from_save("~/r.p").pickle == Path.home() / "r.p"


@pytest.mark.parametrize("save", ["", "results", "llama-v1.5", "runs/r.json", "gs://bucket/r.p"])
def test_run_files_refuse_what_is_no_pickle(save):
    with pytest.raises(ValueError, match=r"save=.* expected .*runs/results\.p"):
        RunFiles.from_save(save)


def test_check_writable_creates_the_folder_and_nothing_else(tmp_path):
    check_writable(tmp_path / "a" / "b" / "r.p")
    assert (tmp_path / "a" / "b").is_dir()
    assert not any((tmp_path / "a" / "b").iterdir())


def test_check_writable_refuses_folders_and_files_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(IsADirectoryError, match=r"is a folder.*results\.p"):
        check_writable(tmp_path)
    for path in (tmp_path / "file" / "r.p", tmp_path / "file" / "a" / "r.p"):
        with pytest.raises(NotADirectoryError, match=r"file is a file, expected a folder"):
            check_writable(path)


def test_a_link_stays_and_what_is_no_file_is_written_to(tmp_path):
    (tmp_path / "there").write_bytes(b"old")
    for name in ("there", "new"):
        link = tmp_path / f"link-{name}"
        link.symlink_to(tmp_path / name)
        check_writable(link)
        atomic_write(link, b"now")
        assert link.is_symlink()
        assert (tmp_path / name).read_bytes() == b"now"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(pipe)
        atomic_write(pipe, b"now")
        assert os.read(reader, 9) == b"now"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no such folder on this system")
def test_a_file_that_is_open_is_written_behind_what_it_has(tmp_path):
    with open(tmp_path / "out", "wb") as file:
        file.write(b"before ")
        file.flush()
        check_writable(f"/proc/self/fd/{file.fileno()}")
        atomic_write(f"/proc/self/fd/{file.fileno()}", b"after")
    assert (tmp_path / "out").read_bytes() == b"before after"


def test_check_writable_refuses_a_folder_without_permission(tmp_path, monkeypatch):
    def deny(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(record_lib.tempfile, "TemporaryFile", deny)
    with pytest.raises(PermissionError, match=r"no file can be created in .* \(Permission denied\)"):
        check_writable(tmp_path / "r.p")


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "record.py").write_text("x = 1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    sha = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert commit(tmp_path) == sha
    (tmp_path / "results.p").write_text("untracked")
    assert commit(tmp_path) == sha
    (tmp_path / "record.py").write_text("x = 2\n")
    assert commit(tmp_path) == f"{sha}-dirty"


def test_commit_without_a_checkout(tmp_path, monkeypatch):
    assert commit(tmp_path) == "not a git checkout"
    installed = tmp_path / "venv"
    installed.mkdir()
    (installed / "record.py").write_text("x = 1\n")
    (tmp_path / "other.py").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", "other.py")
    git(tmp_path, "commit", "-m", "another project")
    assert commit(installed) == "not a git checkout"
    monkeypatch.setenv("PATH", "")
    assert commit() == "not a git checkout"


def test_file_hashes(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "big.bin").write_bytes(content)
    (tmp_path / "empty").write_bytes(b"")
    hashes = file_hashes([tmp_path / "big.bin", tmp_path / "empty"])
    assert hashes == {
        "big.bin": hashlib.sha256(content).hexdigest(),
        "empty": hashlib.sha256(b"").hexdigest(),
    }


def test_file_hashes_are_those_of_the_content_whatever_a_blob_is_called(tmp_path):
    """A link into a folder `blobs` is no evidence of what the file holds, nor is a place in the Hub's cache."""
    blob = tmp_path / "models--org--name" / "blobs" / ("a" * 64)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "main"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    for content in (b"content", b"changed"):
        blob.write_bytes(content)
        expected = {"model.safetensors": hashlib.sha256(content).hexdigest()}
        assert file_hashes([snapshot / "model.safetensors"]) == expected


def test_file_hashes_of_large_files_and_those_that_are_stopped(tmp_path):
    content = np.random.default_rng(0).bytes(3 * 2**20 + 7)
    (tmp_path / "large").write_bytes(content)
    stop = threading.Event()
    assert file_hashes([tmp_path / "large"], stop) == {"large": hashlib.sha256(content).hexdigest()}
    stop.set()
    with pytest.raises(HashingStoppedError, match="large"):
        file_hashes([tmp_path / "large"], stop)


def test_file_hashes_refuse_two_files_of_one_name(tmp_path):
    with pytest.raises(ValueError, match=r"several files are named a\.bin"):
        file_hashes([tmp_path / "x" / "a.bin", tmp_path / "y" / "a.bin"])


def test_pickle_protocol_is_4(tmp_path):
    write_pickle(tmp_path / "r.p", record())
    assert (tmp_path / "r.p").read_bytes()[:2] == b"\x80\x04"
    assert pickle.loads((tmp_path / "r.p").read_bytes()) == legacy_dict(record())
