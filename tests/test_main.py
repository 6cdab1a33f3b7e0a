"""The door: flags become a config, and what a user can mend ends with one message."""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import main
from tracing_jax import experiment
from tracing_jax.experiment.validation import check_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.py") if file.stem not in ("__init__", "common"))


@pytest.mark.parametrize(("argv", "config"), [
    ([], "mode"),
    (["--base_model_id", "A", "--ft_model_id", "B"], "mode"),
    (["--stat", "cos"], "cos"),
    (["--stat=emb", "--permute"], "emb"),
    (["--stat=mode,cos"], "mode"),
    (["--stat", "nonsense"], "mode"),
    (["--stat=common"], "mode"),
    (["--stat=../tests/conftest"], "mode"),
])  # fmt: skip
def test_without_a_config_the_statistic_selects_it(argv, config):
    assert main.with_default_config(["main.py", *argv]) == ["main.py", f"--config={ROOT}/configs/{config}.py", *argv]


def test_a_config_that_is_named_stays():
    argv = ["main.py", "--config=configs/cos.py:demo", "--stat", "emb"]
    assert main.with_default_config(argv) == argv


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid_with_and_without_demo(name, tmp_path):
    module = importlib.import_module(f"configs.{name}")
    assert f"configs/{name}.py" in module.__doc__
    for arg in ("", "demo"):
        config = module.get_config(arg)
        config.save = str(tmp_path / "x.p")
        if not config.base_model_id:
            config.base_model_id = config.ft_model_id = "some/model"
        check_config(config)


def test_a_misspelt_argument_of_a_config_is_refused():
    for name in CONFIGS:
        with pytest.raises(ValueError, match="demoo"):
            importlib.import_module(f"configs.{name}").get_config("demoo")


def run(*argv, cwd=ROOT):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_the_short_flags_run_as_printed_from_anywhere(family, tmp_path):
    argv = f"""--base_model_id {family.member("base")} --ft_model_id {family.member("finetune")} --permute --align
        --dataset {family.text} --stat mode --attn --save results.p --config.block_size=64""".split()
    done = run(*argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "midpoint loss" in done.stdout
    saved = pickle.loads((tmp_path / "results.p").read_bytes())
    assert saved["args"]["attn"] is saved["args"]["permute"] is saved["args"]["align"] is True
    assert saved["non-aligned test stat"] > saved["aligned test stat"]


def test_an_error_is_one_message_without_a_traceback(tmp_path):
    done = run("--base_model_id=/no/such/base", "--ft_model_id=/no/such/ft", f"--save={tmp_path}/results.p")
    assert done.returncode == 1
    assert "error: '/no/such/base' is no folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_flag_is_refused():
    done = run("--stats=mode")
    assert done.returncode != 0
    assert "stats" in done.stderr


def test_the_package_runs_without_torch():
    code = "import sys; sys.modules['torch'] = None; import tracing_jax.experiment"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
    assert experiment.run
