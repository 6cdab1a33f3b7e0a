"""A model id leads to one complete folder, or to an error that says what to do."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import Repo, commit, serve
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save, save_file

from tracing_jax import cli
from tracing_jax.checkpoint import hub
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.experiment.models import open_model

TEXTS = {"config.json": b"{}", "tokenizer.json": b"{}", "merges.txt": b""}
BOTH = {"model.safetensors": b"s" * 99, "pytorch_model.bin": b"b" * 99}
JUNK = {
    "README.md": b"#",
    "model.gguf": b"g",
    "consolidated.safetensors": b"c",
    "original/model.safetensors": b"o",
    "optimizer.pt": b"p",
    "training_args.bin": b"t",
}
SHARDS = {f"model-0000{i}-of-00002.safetensors": bytes(i) for i in (1, 2)}
INDEX = {"model.safetensors.index.json": json.dumps({"weight_map": dict(enumerate(SHARDS))}).encode()}
STALE = {"model-00001-of-00003.safetensors": b"stale"}
STRAY = {"adapter_model.safetensors": b"a"}
TOKEN = "hf_" + "x" * 34
REPOS = {
    "org/both": Repo({"main": TEXTS | BOTH | JUNK, "refs/pr/1": TEXTS | {"model.safetensors": b"pr"}}),
    "shards": Repo({"main": TEXTS | SHARDS | INDEX | STALE}),
    "org/bin": Repo({"main": TEXTS | {"pytorch_model.bin": b"b", "training_args.bin": b"t"} | STRAY}),
    "org/gguf": Repo({"main": {"a/model-Q4.gguf": b"g", "a/model-Q8.gguf": b"h", "README.md": b"#"}}),
    "org/lora": Repo({"main": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"}}),
    "org/gated": Repo({"main": TEXTS | BOTH}, gated=True),
    "org/texts": Repo({"main": TEXTS}),
    "org/empty": Repo({"main": {"config.json": b"{}", "model.gguf": b"g"}}),
}
ASK = """
import json, sys
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.hub import resolve
for model_id in sys.argv[1:]:
    try:
        found = resolve(model_id)
        print(json.dumps([str(found.folder), found.id, found.revision]))
    except CheckpointError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture(scope="module")
def server():
    with serve(REPOS, TOKEN) as running:
        yield running


def ask(url: str, home: Path, *model_ids: str, program: str = ASK, **env: str) -> list:
    """Answers of `resolve` in a fresh process: huggingface_hub reads its environment once, when it is imported."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env = clean | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"} | env
    command = [sys.executable, "-c", program, *model_ids]
    result = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def files(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.slow
def test_downloads_one_weight_format_and_no_junk_then_works_from_cache(server, tmp_path):
    ids = ("org/both", "shards", "org/bin", "org/lora", "org/both@refs/pr/1")
    found = ask(server.url, tmp_path, *ids)
    assert [files(folder) for folder, _, _ in found] == [
        {*TEXTS, "model.safetensors"},
        {*TEXTS, *SHARDS, *INDEX},
        {*TEXTS, "pytorch_model.bin"},
        {"adapter_config.json", "adapter_model.safetensors"},
        {*TEXTS, "model.safetensors"},
    ]
    revisions = ["main"] * 4 + ["refs/pr/1"]
    assert [rest for _, *rest in found] == [[i, commit(i.partition("@")[0], r)] for i, r in zip(ids, revisions)]
    assert Path(found[-1][0], "model.safetensors").read_bytes() == b"pr"

    del server.requests[:]
    assert ask(server.url, tmp_path, *ids) == found
    assert server.downloads() == []

    del server.requests[:]
    assert ask(server.url, tmp_path, *ids, HF_HUB_OFFLINE="1") == found
    assert server.requests == []


@pytest.mark.slow
def test_one_gguf_file_of_a_repository_is_downloaded(server, tmp_path):
    (folder, _, revision), missing = ask(server.url, tmp_path, "org/gguf/a/model-Q4.gguf", "org/gguf/nowhere.gguf")
    assert files(folder) == {"model-Q4.gguf"}
    assert revision == commit("org/gguf", "main")
    assert "'org/gguf' has no file 'nowhere.gguf'" in missing


@pytest.mark.slow
def test_gated_model_says_how_to_get_access_and_opens_with_token(server, tmp_path):
    (message,) = ask(server.url, tmp_path / "a", "org/gated")
    assert "gated" in message
    assert f"{server.url}/org/gated" in message
    assert "HF_TOKEN" in message
    del server.requests[:]
    ((folder, *_),) = ask(server.url, tmp_path / "b", "org/gated", HF_TOKEN=TOKEN)
    assert "model.safetensors" in files(folder)
    sent = {("/cdn/" in path, authorization) for _, path, authorization in server.requests if "gated" in path}
    assert sent == {(False, f"Bearer {TOKEN}"), (True, None)}


@pytest.mark.slow
def test_errors_name_the_remedy(server, tmp_path):
    missing, revision, empty, invalid = ask(server.url, tmp_path, "org/nothing", "org/both@v9", "org/empty", "a/b/c/d")
    assert "neither a folder" in missing
    assert str(Path(__file__).parents[1]) in missing
    assert f"{server.url}/org/nothing" in missing
    assert "'org/both' has no revision 'v9'" in revision
    assert "no weights" in empty
    assert "config.json" in empty.partition("holds")[2]
    assert "neither a folder" in invalid


@pytest.mark.slow
def test_models_that_cannot_be_read_are_known_without_their_weights(server, tmp_path):
    del server.requests[:]
    ids = ("org/both", "org/gguf/a/model-Q4.gguf", "org/nothing", "org/both@v9", "org/gated", "org/texts", "a/b/c.gguf")
    program = ASK.replace("import resolve", "import hub_problem as resolve").replace(
        "[str(found.folder), found.id, found.revision]", "found"
    )
    good, file, missing, revision, gated, texts, nowhere = ask(server.url, tmp_path, *ids, program=program)
    assert (good, file) == (None, None)
    assert "neither a folder" in missing
    assert "no revision 'v9'" in revision
    assert "gated" in gated
    assert "'org/texts' has no weights (*.safetensors" in texts
    assert "neither a folder" in nowhere
    assert not [path for path in server.downloads() if path.endswith((".safetensors", ".bin", ".gguf"))]
    at_once = "import time; time.sleep = lambda seconds: None" + program  # between the tries of huggingface_hub
    assert ask("http://127.0.0.1:9", tmp_path / "b", "org/both", program=at_once) == [None]


@pytest.mark.slow
def test_unreachable_or_forbidden_network_is_told_apart(tmp_path):
    (unreachable,) = ask("http://127.0.0.1:9", tmp_path, "org/both")
    (forbidden,) = ask("http://127.0.0.1:9", tmp_path, "org/both", HF_HUB_OFFLINE="1")
    assert "ConnectError" in unreachable
    assert "HF_HUB_OFFLINE" in forbidden


def test_a_bare_name_is_a_folder_that_is_not_here_first(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise LocalEntryNotFoundError("nothing")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=rf"^no folder 'nope' here \({tmp_path}\)\. As a model of the Hub: "):
        hub.resolve("nope")
    with pytest.raises(CheckpointError, match=r"^'org/nope' is not"):
        hub.resolve("org/nope")
    (tmp_path / "nopes").mkdir()
    with pytest.raises(CheckpointError, match=r"^no folder 'nope' here; did you mean nopes\? As a model of the Hub: '"):
        open_model("nope")


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./no-such-folder", "~/no-such-folder", "~nobody-here/x", "../no-such-folder"]
)
def test_a_path_never_goes_to_the_hub(path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match="no folder"):
        hub.resolve(path)


def test_local_folder_needs_config_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "org" / "run@7"
    folder.mkdir(parents=True)
    (folder / "training_args.bin").touch()
    with pytest.raises(CheckpointError, match=r"no config\.json .*no weights .*holds training_args\.bin"):
        hub.resolve("org/run@7")
    (folder / "config.json").touch()
    (folder / "model.safetensors").touch()
    assert hub.resolve("org/run@7") == hub.CheckpointFolder(Path("org/run@7"), "org/run@7", None)
    with pytest.raises(CheckpointError, match="a file"):
        hub.resolve("org/run@7/config.json")


def ranged(server, home: Path, code: str) -> dict:
    """What `code` leaves in `said`, in a fresh process that has read `org/big` in ranges and knows its `weights`."""
    program = f"""
import json, sys
import numpy as np
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.hub import on_hub, resolve
said = {{}}
store = on_hub(resolve("org/big", weights=False))("model.safetensors")
weights = np.arange(600 * 64, dtype=np.float32).reshape(600, 64)
{code}
print(json.dumps(said))
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env = clean | {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"stderr": done.stderr}


READ_ROWS = """
rows = [(slice(i, i + 1),) for i in range(0, 600, 9)]
found = store.read_many([("w", row) for row in rows])
assert all(np.array_equal(array, weights[row]) for array, row in zip(found, rows))
assert np.array_equal(store.read("w", (slice(None), slice(3, 5))), weights[:, 3:5])
said["files"] = len(store.files())
"""


@pytest.fixture
def big():
    """A Hub with one model of 600 rows."""
    weights = save({"w": np.arange(600 * 64, dtype=np.float32).reshape(600, 64)})
    with serve({"org/big": Repo({"main": {"config.json": b"{}", "model.safetensors": weights}})}) as running:
        yield running


@pytest.mark.slow
def test_ranges_are_read_several_at_a_time_and_again_where_they_fail(big, tmp_path):
    big.seconds, big.failures = 0.05, ["", "", "", "busy", "busy", "cut", "expired"]
    found = ranged(big, tmp_path, READ_ROWS)
    assert found["files"] == 0
    assert "/cdn/" not in found["stderr"]  # an address that may be signed
    assert 8 <= big.at_once[1] <= 16
    asked = [path for method, path, _ in big.requests if method == "GET" and path.startswith("/org/big/resolve")]
    downloads = [path for path in big.downloads() if path == "model.safetensors"]
    assert len(downloads) == 2 + 67 + 600 + 4  # header, rows, columns, and what failed once more
    assert len(asked) < 40  # the address that the Hub redirects to is asked directly until it has expired


@pytest.mark.slow
def test_a_hub_that_stays_broken_is_an_error_without_its_addresses(big, tmp_path):
    big.failures = ["", "", "", *["cut"] * 4]  # the config and the header, in two requests, are read
    code = """
try:
    store.read("w", (slice(0, 1),))
except CheckpointError as error:
    said["error"] = str(error)
"""
    assert "broke off 4 times" in (error := ranged(big, tmp_path, code)["error"])
    assert "http" not in error


@pytest.mark.slow
def test_a_server_that_ignores_ranges_is_not_read_in_ranges_but_downloaded_once(big, tmp_path):
    big.honours_ranges = False
    found = ranged(big, tmp_path, READ_ROWS)
    assert found["files"] == 1
    assert "ignores requests for a range of bytes" in found["stderr"]
    assert [path for path in big.downloads() if path == "model.safetensors"] == ["model.safetensors"] * 2


@pytest.mark.slow
def test_first_look_reads_ranges_of_the_hub_and_finds_what_it_finds_in_a_folder(family, tmp_path):
    members = {name: family.member(name) for name in ("base", "finetune")}
    repos = {
        f"org/{name}": Repo({"main": {file.name: file.read_bytes() for file in folder.iterdir()}})
        for name, folder in members.items()
    }
    local = screened(tmp_path / "local.p", *map(str, members.values()))
    with serve(repos, TOKEN) as server:
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        remote = screened(tmp_path / "remote.p", "org/base", "org/finetune", NO_PROXY="*", **env)
        assert remote["statistics"] == local["statistics"]
        assert remote["verdict"]["verdict"] == "undecided"  # it has read a part
        read = sum(side["bytes"] for side in local["statistics"]["screen"]["non_aligned"]["read"].values())
        sizes = [(folder / "model.safetensors").stat().st_size for folder in members.values()]
        assert read < server.sent < read + 2**16 < sum(sizes)  # beside the weights, two headers
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        assert all(token is None for _, path, token in server.requests if "/cdn/" in path)


@pytest.mark.slow
def test_a_screen_of_a_suspect_on_the_hub_reads_ranges_and_downloads_no_weights(family, tmp_path):
    deep = tmp_path / "suspect"  # the two layers of a fine-tune four times: three of eight are read
    shutil.copytree(family.member("finetune"), deep)
    tensors = load_file(deep / "model.safetensors")
    for name in [name for name in tensors if ".layers." in name]:
        for i in (2, 4, 6):
            moved = re.sub(r"layers\.(\d+)", lambda at, i=i: f"layers.{int(at[1]) + i}", name)
            tensors[moved] = tensors[name]
    save_file(tensors, deep / "model.safetensors")
    config = json.loads((deep / "config.json").read_text())
    layers = {"num_hidden_layers": 8} | ({"layer_types": config["layer_types"] * 4} if "layer_types" in config else {})
    (deep / "config.json").write_text(json.dumps(config | layers))
    cli.main(["signature", str(deep), "-o", str(tmp_path / "library.signature.safetensors"), "--name", "base"])
    scan = [
        sys.executable,
        "-m",
        "tracing_jax",
        "scan",
        "org/suspect",
        "--library",
        str(tmp_path),
        "--screen",
        "--json",
    ]
    repo = Repo({"main": {file.name: file.read_bytes() for file in deep.iterdir()}})
    with serve({"org/suspect": repo}, TOKEN) as server:
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
        found = json.loads(run(scan, env | {"NO_PROXY": "*"}).stdout)
        assert found["read"] == "layers 1, 4, 6 of 8"
        assert found["candidates"][0]["verdict"] == "related"
        assert 0 < server.sent < 0.5 * (deep / "model.safetensors").stat().st_size
        assert not list((tmp_path / "home").rglob("*.safetensors"))


def screened(save: Path, base: str, ft: str, **env: str) -> dict:
    """The record of `main.py --stat=screen` in a process of its own."""
    flags = ["--stat=screen", "--config.screen.share=0.5", f"--base_model_id={base}", f"--ft_model_id={ft}"]
    run([sys.executable, "main.py", *flags, f"--save={save}"], env)
    return json.loads(save.with_suffix(".json").read_text())


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    """A program that succeeds, run in the repository."""
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done
