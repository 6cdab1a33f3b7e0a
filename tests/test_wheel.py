"""The built wheel works by itself: outside the clone, in an environment where only its dependencies are installed."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_CLONE = Path(__file__).parents[1]


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory) -> Path:
    """The scripts of an environment that holds the wheel, and has of this one only the installed packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, _CLONE, cwd=folder)
    (wheel,) = folder.glob("tracing_jax-*.whl")
    _run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    _run(*pip, "--python", folder / "env", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site_packages,) = (folder / "env" / "lib").glob("python*/site-packages")
    # A path in a .pth file is searched, and the .pth files inside it are not read: an editable install stays out.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin"


def test_package_is_that_of_the_wheel(bin_folder, tmp_path):
    where = _run(bin_folder / "python", "-c", "import tracing_jax; print(tracing_jax.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(bin_folder.parent)


def test_the_text_of_the_package_is_in_the_wheel(bin_folder, tmp_path):
    code = "from tracing_jax.data import sample_documents; print(len(sample_documents().text.encode()))"
    assert 20_000 <= int(_run(bin_folder / "python", "-c", code, cwd=tmp_path)) <= 40_000


def test_compare_runs_outside_the_clone(bin_folder, tmp_path, family):
    models = (family.member("base"), family.member("finetune"))
    printed = _run(bin_folder / "tracing-jax", "compare", *models, "--save", tmp_path / "run.p", cwd=tmp_path)
    assert "RELATED  base and finetune" in printed
    assert {"run.p", "run.json", "run.png", "run.html"} <= {file.name for file in tmp_path.iterdir()}
