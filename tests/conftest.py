"""Test session set-up: eight simulated CPU devices, and shapes checked at run time in annotated functions."""

import hashlib
import mmap
import os
import sys
from importlib import metadata
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch and numpy: workers on every core would wait for each other
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import filelock
import hypothesis
import jax
import jaxlib
import numpy as np
import pytest
import type_checks

# Where Python is told to keep no bytecode, as in many containers, every process would compile every module anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

jax.config.update("jax_num_cpu_devices", 8)
hypothesis.settings.register_profile("untimed", deadline=None)  # a law does not depend on how busy the machine is
hypothesis.settings.load_profile("untimed")
type_checks.install("tracing_jax")


_QUICK_TO_COMPILE = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
"""Settings of XLA with which tiny programs compile in half of the CPU time (jaxlib 0.10)."""


def pytest_configure(config):
    """Compiles without most optimizations: half of the time would be compilation of tiny programs.

    Tests that are marked `optimized`, and runs of all tests, compile as users do. Programs once compiled are kept for
    the workers, for programs that tests start, and for the next run.
    """
    fast = config.option.markexpr in ("not slow", "slow and not (torch or optimized)", "torch and not optimized")
    jax.config.update("jax_disable_most_optimizations", fast)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(fast)
    if fast:  # read when the first array is made; programs that tests start inherit them
        given = os.environ.get("XLA_FLAGS", "")  # in a worker these are there already
        flags = [f"--{name}={value}" for name, value in _QUICK_TO_COMPILE.items() if name not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *filter(_xla_accepts, flags)]).strip()
    for name, value in {
        "jax_compilation_cache_dir": str(config.rootpath / ".pytest_cache" / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def _xla_accepts(flag):
    """Returns whether the installed XLA has this flag: one that it does not know ends the process."""
    name = flag.removeprefix("--").partition("=")[0].encode()
    for library in Path(jaxlib.__file__).parent.glob("libjax_common*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(name) >= 0
    return False


def pytest_runtest_setup(item):
    """Skips what is marked `torch` where torch is not installed."""
    if item.get_closest_marker("torch"):
        pytest.importorskip("torch")


@pytest.fixture
def drawn():
    """Has figures drawn as users get them, which is most of the time of a run on tiny models."""


@pytest.fixture(autouse=True)
def _blank_figures(request, monkeypatch):
    """Leaves figures blank unless a test asks for `drawn`; which panels they would have is computed all the same."""
    figures = sys.modules.get("tracing_jax.report.figures")
    if figures is None or "drawn" in request.fixturenames:
        return

    def of_run(record):
        blank = figures._encoded(np.zeros((1, 1, 3), np.uint8))
        return figures.RunImages(blank, dict.fromkeys(figures._groups_of_run(record), blank))

    monkeypatch.setattr(figures, "images_of_run", of_run)
    monkeypatch.setattr(figures, "_drawn", lambda figure: np.zeros((*map(int, figure.bbox.size[::-1]), 3), np.uint8))


@pytest.fixture(scope="session")
def family(pytestconfig):
    """A family like the demo's, trained in seconds: base, finetune, disguised, independent.

    It is kept for the next run, until a line of the package or a version of what trains it changes.
    """
    from tracing_jax import demo

    recipe = demo.DemoSizes(
        vocab_size=400, embed_dim=32, num_layers=2, mlp_dim=64, num_heads=4, num_kv_heads=2, block_size=64,
        batch_size=16, base_steps=200, finetune_steps=40, base_pieces=100, finetune_pieces=60,
    )  # fmt: skip
    versions = [f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "numpy", "optax", "transformers")]
    code = hashlib.sha256("\n".join(versions).encode())
    for file in sorted(Path(demo.__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    root = pytestconfig.rootpath / ".pytest_cache" / "family" / code.hexdigest()[:16]
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / "family.lock"):  # one worker trains it, the others wait
        return demo.family(str(root), recipe)


@pytest.fixture
def quick_config(family, tmp_path):
    """Returns a function that makes a config of a quick run on the family, with everything moved along the path."""
    from tracing_jax.cli.config_files import to_config
    from tracing_jax.options import RunOptions

    def make(name="out", ft="finetune", base="base", **fields):
        config = to_config(RunOptions(stat=("mode",)))
        config.base_model_id, config.ft_model_id = str(family.member(base)), str(family.member(ft))
        config.dataset, config.block_size, config.num_tokens, config.batch_size = str(family.text), 64, 1024, 8
        config.mesh.data, config.mode.alphas = 1, (0.0, 0.5, 1.0)
        config.mode.attn = config.mode.emb = config.perm_mode_l2.attn = config.perm_mode_l2.emb = True
        config.save = str(tmp_path / name / "results.p")
        config.update(fields)
        return config

    return make
