"""main.py: flags and config become options, and an error of the user's ends with one message."""

import importlib
import os
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import main
from tracing_jax import experiment
from tracing_jax.dataclass_options import options_of
from tracing_jax.experiment import check_config, trace
from tracing_jax.options import RunOptions

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.py") if file.stem != "__init__")


def test_a_config_that_is_named_stays_and_the_default_is_mode():
    argv = ["main.py", "--config=configs/cos.py:demo", "--stat", "emb"]
    assert main.with_default_config(argv) == argv
    assert main.with_default_config(["main.py", "--stat", "cos"])[1:] == [
        f"--config={ROOT}/configs/mode.py",
        "--stat",
        "cos",
    ]
    beside = main.with_default_config(["main.py", "--base_model_id", "a"])
    assert beside[1:3] == [f"--config={ROOT}/configs/mode.py", "--verdict=auto"]


@pytest.mark.slow
def test_the_default_verdict_stands_beside_the_statistic_that_was_asked_for(family, tmp_path):
    """The pickle keeps the one number of that statistic."""
    asked = {
        "base_model_id": str(family.member("base")), "ft_model_id": str(family.member("disguised")), "stat": "emb",
        "verdict": "auto", "dataset": None, "align": True, "save": str(tmp_path / "x.p"), "mesh": {"data": 1},
    }  # fmt: skip
    record = trace(asked)
    assert record["verdict"]["verdict"] == "related"
    assert {"emb", "csu", "match"} <= set(record["statistics"])
    assert record["statistics"]["match"]["aligned"] is None
    kept = pickle.loads((tmp_path / "x.p").read_bytes())
    assert kept["non-aligned test stat"] == record["statistics"]["emb"]["non_aligned"]["headline"]
    assert isinstance(kept["aligned test stat"], float)
    assert trace({**asked, "verdict": "asked", "align": False, "save": None})["verdict"]["verdict"] == "not_asked"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_can_run_with_and_without_demo(name, tmp_path):
    for arg in ("", "demo"):
        config = importlib.import_module(f"configs.{name}").get_config(arg)
        config.save = str(tmp_path / "x.p")
        if not config.base_model_id:
            config.base_model_id = config.ft_model_id = "some/model"
        check_config(config)


def run(*argv, cwd=ROOT):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_short_flags_run_as_printed_from_anywhere(family, tmp_path):
    argv = f"""--base_model_id {family.member("base")} --ft_model_id {family.member("finetune")} --permute --align
        --dataset {family.text} --stat mode --attn --save results.p --config.block_size=64""".split()
    done = run(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "midpoint loss" in done.stdout
    saved = pickle.loads((tmp_path / "results.p").read_bytes())
    assert saved["args"]["mode"]["attn"] is saved["args"]["permute"] is saved["args"]["align"] is True
    assert saved["non-aligned test stat"] > saved["aligned test stat"]


def test_an_error_is_one_message_without_a_traceback(tmp_path):
    done = run("--base_model_id=/no/such/base", "--ft_model_id=/no/such/ft", f"--save={tmp_path}/results.p")
    assert done.returncode == 1
    assert "error: '/no/such/base' is no folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("argv", "message"), [
    (["--stats=mode"], "Unknown command line flag 'stats'. Did you mean: stat"),
    (["--config.match.max_token=3"], "match.max_token: there is no such option; did you mean match.max_tokens?"),
    (["--config.csh_blocks=3"], "--config.csh_blocks: that option is csh.blocks now"),
    (["--config.emb=True"], "--config.emb: that option is mode.emb or perm_mode_l2.emb now"),
    (["--config=configs/csh.py"], "a statistic needs no config of its own: --stat=csh"),
    (["--config=configs/comparr.py"], "there is no such file; did you mean configs/compare.py?"),
    (["--config.batch_size=many"], "batch_size"),
    (["--mode.alphas=0,half"], "--mode.alphas=0,half"),
    (["--stat=csx"], "did you mean csu?"),
    (["--no_compile_cache"], "--no_compile_cache: that option is --nocompile_cache now"),
    (["--config=configs/mode.py:nope"], "config file: ValueError: a config takes the argument demo"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_message(argv, message):
    done = run(*argv)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("line", "message"), [
    ("config.basemodel_id = 'A'", "basemodel_id: there is no such option; did you mean base_model_id?"),
    ("config.num_perm = 3", "num_perm: that option is l2.num_perm or perm_mode_l2.num_perm now"),
    ("config.match.form = 'weights'", "did you mean match.forms?"),
    ("config.batch_size = 'many'", "batch_size='many': expected a whole number"),
    ("print(confg)", "NameError: name 'confg' is not defined"),
])  # fmt: skip
def test_a_mistake_in_a_config_file_is_one_message(tmp_path, line, message):
    file = tmp_path / "mine.py"
    lines = ["from tracing_jax.cli.config_files import config_from", "from tracing_jax.options import RunOptions"]
    lines += ["def get_config():", " config = config_from(RunOptions())"]
    file.write_text("\n".join([*lines, f" {line}", " return config"]))
    done = run(f"--config={file}")
    assert done.returncode not in (0, 3)
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_version_is_that_of_the_package():
    code = "import sys, runpy; sys.modules['jax'] = sys.modules['numpy'] = None; sys.argv = ['main.py', '--version']; "
    done = subprocess.run([sys.executable, "-c", code + "runpy.run_path('main.py', run_name='__main__')"],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"tracing-jax {version('tracing_jax')}\n"), done.stderr


def test_help_lists_every_option_and_imports_nothing_heavy():
    code = "import sys, runpy; sys.modules['jax'] = sys.modules['numpy'] = None; sys.argv = ['main.py', '--help']; "
    done = subprocess.run([sys.executable, "-c", code + "runpy.run_path('main.py', run_name='__main__')"],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for found in options_of(RunOptions):
        assert f"--{found.name}" in done.stdout
        assert "".join(found.meaning.split()) in "".join(done.stdout.split())


@pytest.mark.slow
def test_the_package_runs_without_torch():
    code = "import sys; sys.modules['torch'] = None; import tracing_jax.experiment"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    assert experiment.run
