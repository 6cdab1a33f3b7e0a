"""The architecture: which package may import which, and what importing may not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tracing_jax

_PACKAGE = Path(tracing_jax.__file__).parent
_MODULES = sorted(_PACKAGE.rglob("*.py"))

# Layers, lowest first: a package may import only packages of lower layers, and of those the ones named.
_LAYERS = {
    "tree": "",
    "record": "",
    "distributed": "",
    "run_cache": "record distributed",
    "arch": "",
    "axes": "arch tree",
    "models": "arch axes tree",
    "sharding": "axes tree",
    "rewrites": "arch axes tree",
    "interpolation": "axes tree",
    "sources": "arch rewrites interpolation sharding axes tree",
    "checkpoint": "sources models sharding axes arch tree",
    "data": "",
    "blocked_matmul": "",
    "forward": "blocked_matmul run_cache arch axes data rewrites tree models sources interpolation sharding",
    "matching": "run_cache blocked_matmul rewrites axes tree",
    "alignment": "run_cache data matching rewrites forward models sources sharding axes arch tree",
    "statistics": "run_cache data arch matching forward interpolation sources rewrites sharding axes record tree",
    "report": "record",
    "generation": "record distributed arch data models forward sources checkpoint sharding tree",
    "demo": "models checkpoint forward rewrites sources arch axes data tree",
}
_ANY_LOWER = ("experiment", "cli", "zoo")
_ORDER = (*_LAYERS, *_ANY_LOWER)


def _package_of(module: Path) -> str:
    return module.relative_to(_PACKAGE).parts[0].removesuffix(".py")


def _is_program(module: Path) -> bool:
    """Says whether a module is run and never imported, like main.py: it may import everything, and print."""
    return module.name == "__main__.py"


def _imported(module: Path) -> Iterator[str]:
    """Yields the full names of what a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported_packages(module: Path) -> set[str]:
    own = (name.split(".") for name in _imported(module) if name.split(".")[0] == "tracing_jax")
    return {parts[1] for parts in own} - {_package_of(module)}


def _importers_of(library: str) -> set[str]:
    return {
        _package_of(module) for module in _MODULES if any(name.split(".")[0] == library for name in _imported(module))
    }


def test_layers_are_ordered():
    for package, allowed in _LAYERS.items():
        lower = _ORDER[: _ORDER.index(package)]
        assert set(allowed.split()) <= set(lower), package


@pytest.mark.parametrize("module", _MODULES, ids=lambda module: str(module.relative_to(_PACKAGE)))
def test_module_imports_only_what_its_package_may(module):
    package = _package_of(module)
    if package == "__init__":
        assert not set(_imported_packages(module))
        return
    if _is_program(module):
        assert _imported_packages(module) <= set(_ORDER)
        return
    assert package in _ORDER, f"{module} is in no layer; add its package to the table"
    allowed = set(_LAYERS[package].split()) if package in _LAYERS else set(_ORDER[: _ORDER.index(package)])
    assert _imported_packages(module) <= allowed


@pytest.mark.parametrize("library", ["flax", "torch", "tensorflow", "pickle5", "dill", "cloudpickle"])
def test_library_is_imported_nowhere(library):
    assert not _importers_of(library)


def test_nothing_prints_or_evaluates():
    for module in _MODULES:
        calls = [node for node in ast.walk(ast.parse(module.read_text("utf-8"))) if isinstance(node, ast.Call)]
        called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        forbidden = {"eval", "exec", "breakpoint"} | (set() if _is_program(module) else {"print"})
        assert not called & forbidden, module


def test_no_module_is_called_utils():
    assert not {module.stem for module in _MODULES} & {"utils", "util", "helpers", "common", "misc"}


_IMPORT_ALL = """
import importlib, pkgutil, tracing_jax
for module in pkgutil.walk_packages(tracing_jax.__path__, "tracing_jax."):
    importlib.import_module(module.name)
import sys
from jax._src import xla_bridge
assert not xla_bridge._backends, f"importing initialised {list(xla_bridge._backends)}"
heavy = {"torch", "tensorflow", "transformers", "datasets"} & set(sys.modules)
assert not heavy, f"importing took {heavy} along"
"""


def test_importing_touches_no_device():
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], cwd=_PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
