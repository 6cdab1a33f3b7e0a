"""What goes wrong for a user ends in one message that says what to do, and nothing that was found is lost."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tracing_jax import cli, experiment
from tracing_jax.checkpoint import Checkpoint
from tracing_jax.data import read_documents
from tracing_jax.experiment import NotSavedError
from tracing_jax.report import summary

ROOT = Path(__file__).parents[1]


@pytest.fixture
def models(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return str(family.member("base")), str(family.member("finetune"))


def test_a_mistyped_folder_is_named_with_the_one_that_is_there(models):
    Path("models/bases").mkdir(parents=True)
    Path("models/base").mkdir()
    for typed in ("models/bsae", "./models/bsae"):
        with pytest.raises(SystemExit, match=r"^[^\n]*no folder[^\n]*did you mean models/bases?\?"):
            cli.main(["compare", typed, models[1], "--stat", "csu"])


@pytest.mark.parametrize("denied", ["model.safetensors", "config.json", ""])
def test_a_folder_or_file_without_permission_is_named_with_the_remedy(denied, models, monkeypatch):
    place, scandir, opened = Path(models[1], denied), os.scandir, open

    def refuse(path):
        if not isinstance(path, int) and Path(path) == place:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", lambda path=".": refuse(path) or scandir(path))
    monkeypatch.setattr("builtins.open", lambda path, *args, **kwargs: refuse(path) or opened(path, *args, **kwargs))
    monkeypatch.setattr(Checkpoint, "layer", None)  # no weight may be read before
    with pytest.raises(SystemExit, match=r"no permission to read.*chmod -R u\+rX") as ended:
        cli.main(["compare", *models, "--stat", "csu"])
    assert str(place) in str(ended.value)
    assert str(ended.value).splitlines()[0].endswith("or ask their owner")


@pytest.mark.parametrize(("argv", "message"), [
    (["--stat", "cus"], "did you mean csu"), (["--claim", "finetune"], "did you mean finetune-of"),
    (["--save", "x.json"], "names no pickle"), (["--stat", "mode", "--dataset", "nowhere.txt"], "nowhere.txt"),
    (["--fail_on", "relatd"], "did you mean related"),
])  # fmt: skip
def test_a_mistyped_option_is_named(argv, message, models):
    with pytest.raises(SystemExit, match=message) as ended:
        cli.main(["compare", *models, *argv])
    assert str(ended.value).startswith("error: ")
    assert ended.value.code == 2 or "nowhere" in message  # a file that is not there is no mistake in the command line


def test_a_mistyped_data_set_is_named_with_the_one_that_may_be_meant():
    with pytest.raises(ValueError, match=r"Did you mean wikitext\?"):
        read_documents("wikitex")


def test_an_id_of_the_hub_is_no_mistyped_name():
    with pytest.raises(ValueError, match=r"cannot read the Hub data set 'me/wikitext'(?s:.)*--dataset FILE") as raised:
        read_documents("me/wikitext")
    assert "Did you mean" not in str(raised.value)


def test_an_empty_text_is_named(models):
    Path("empty.txt").write_text("")
    with pytest.raises(SystemExit, match=r"empty\.txt"):
        cli.main(["compare", *models, "--stat", "mode", "--dataset", "empty.txt"])


def test_what_was_found_is_printed_where_it_cannot_be_written(models, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(experiment.ComputedRun, "save", full)
    with pytest.raises(SystemExit, match=r"the results could not be written.*No space left"):
        cli.main(["compare", *models, "--stat", "csu"])
    shown = capsys.readouterr().out
    assert "RELATED" in shown
    assert "Files" not in shown  # there are none
    assert issubclass(NotSavedError, OSError)


def test_control_c_ends_a_program_with_one_line(models, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    for stage in ("check_config", "compute"):
        with monkeypatch.context() as patched:
            patched.setattr(experiment, stage, interrupted)
            with pytest.raises(SystemExit) as ended:
                cli.main(["compare", *models, "--stat", "csu"])
        assert ended.value.code == 130
        assert len(capsys.readouterr().err.strip().splitlines()[-1:]) == 1


_INTERRUPTED = """
import sys
from tracing_jax.cli import absl_flags
def main(argv): raise KeyboardInterrupt
absl_flags.run_program(main, ["x"], print)
"""


def test_control_c_ends_the_programs_of_the_repository_too():
    done = subprocess.run([sys.executable, "-c", _INTERRUPTED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted")
    assert "Traceback" not in done.stderr


_PROCESS = """
import os, signal, sys, time
from tracing_jax.cli import process
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and passes that on
process._PATIENCE = 0.1
process.prepare_process()
def interrupt(): os.kill(os.getpid(), signal.SIGINT)
class Freed:
    def __del__(self): interrupt()
"""
_MOMENTS = {
    "in an import": "import interrupting",
    "as something is freed": "found = Freed()\ndel found\ntime.sleep(30)",
    "where it is swallowed": "try: interrupt()\nexcept BaseException: pass\ntime.sleep(30)",
    "while it works": "try:\n    interrupt()\nexcept KeyboardInterrupt: process.end_interrupted()",
}


@pytest.mark.parametrize("moment", _MOMENTS)
def test_control_c_ends_a_program_with_one_line_at_every_moment(moment, tmp_path):
    (tmp_path / "interrupting.py").write_text("from __main__ import interrupt\ninterrupt()\n")
    code = f"sys.path.append({str(tmp_path)!r})\n{_MOMENTS[moment]}"
    done = subprocess.run([sys.executable, "-c", _PROCESS + code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:11]) == (130, 1, "interrupted")


def test_control_c_shows_no_traceback_while_a_program_starts():
    heard = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; import tracing_jax.__main__; os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_reader_that_goes_away_changes_nothing_but_what_is_read():
    """As with `| head`: whatever the program still does is done, and its exit status is its own."""
    code = "print('x' * 10**6)\nprint('more', flush=True)\nprint('log', file=sys.stderr)\nsys.exit(3)"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        for stderr in (subprocess.PIPE, pipe):
            done = subprocess.run(
                [sys.executable, "-c", _PROCESS + code], cwd=ROOT, stdout=pipe, stderr=stderr, text=True, check=False
            )
            assert (done.returncode, done.stderr or "log\n") == (3, "log\n")


@pytest.mark.slow
def test_the_same_model_twice_is_said_and_eval_prints_its_perplexities(models, family, capsys):
    text = ["--dataset", str(family.text), "--num_tokens", "512", "--block_size", "64", "--mesh.data", "1"]
    cli.main(["compare", models[0], models[0], "--stat", "csu", "--eval", *text])
    shown = capsys.readouterr().out
    assert "IDENTICAL" in shown
    assert "base and ft are the same files" in shown
    found = json.loads(Path("runs/compare.json").read_text())["perplexity"]
    assert f"perplexity base {found['base']['perplexity']:.5g}" in " ".join(shown.split())
    assert shown.strip() == summary([json.loads(Path("runs/compare.json").read_text())])
