"""The architecture: which package may import which, and what importing may not do."""

import ast
import functools
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
    "dataclass_options": "",
    "options": "dataclass_options",
    "tree": "",
    "record": "",
    "progress": "",
    "distributed": "",
    "run_cache": "record distributed",
    "error_messages": "",
    "host_memory": "",
    "arch": "error_messages",
    "axes": "arch tree",
    "models": "arch axes tree",
    "sharding": "axes tree",
    "rewrites": "dataclass_options arch axes tree",
    "interpolation": "axes tree",
    "sources": "progress arch rewrites interpolation sharding axes tree",
    "checkpoint": "options error_messages distributed host_memory sources models sharding axes arch tree",
    "data": "error_messages",
    "blocked_matmul": "",
    "forward": "progress blocked_matmul run_cache arch axes data rewrites tree models sources interpolation sharding",
    "matching": "progress run_cache blocked_matmul rewrites axes tree",
    "alignment": "progress run_cache data matching rewrites forward models sources sharding axes arch tree",
    "statistics": (
        "options progress run_cache data arch matching forward interpolation sources rewrites sharding axes record tree"
    ),
    "claims": "arch axes checkpoint forward sources statistics tree",
    "library": "options progress record error_messages arch data matching sources statistics tree",
    "report": "record",
    "merges": "error_messages arch axes tree rewrites sharding sources checkpoint data matching alignment statistics"
    " record report",
    "generation": "progress record distributed arch data models forward sources checkpoint sharding tree",
    "demo": "progress models checkpoint forward rewrites sources sharding arch axes data tree",
}
_ANY_LOWER = ("experiment", "zoo", "cli", "api")
_ORDER = (*_LAYERS, *_ANY_LOWER)


def _package_of(module: Path) -> str:
    return module.relative_to(_PACKAGE).parts[0].removesuffix(".py")


def _is_program(module: Path) -> bool:
    """Says whether a module is run and never imported, like main.py: it may import everything."""
    return module.name == "__main__.py"


def _prints(module: Path) -> bool:
    return _is_program(module) or _package_of(module) == "cli"


@functools.cache
def _nodes(module: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(module.read_text("utf-8"))))


def _imported(module: Path) -> Iterator[str]:
    """Yields the full names of what a module imports, wherever in it the import stands."""
    for node in _nodes(module):
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


@pytest.mark.slow
def test_modules_import_only_what_their_package_may():
    for module in _MODULES:
        package, imported = _package_of(module), _imported_packages(module)
        if package == "__init__":
            allowed = set()
        elif _is_program(module):
            allowed = set(_ORDER)
        else:
            assert package in _ORDER, f"{module} is in no layer; add its package to the table"
            allowed = set(_LAYERS[package].split()) if package in _LAYERS else set(_ORDER[: _ORDER.index(package)])
        assert imported <= allowed, f"{module} imports {sorted(imported - allowed)}"


@pytest.mark.parametrize("library", ["flax", "torch", "tensorflow", "pickle5", "dill", "cloudpickle"])
def test_library_is_imported_nowhere(library):
    assert not _importers_of(library)


def test_configs_end_where_a_run_begins():
    """What is below takes options."""
    assert _importers_of("ml_collections") == {"cli", "experiment", "zoo"}


def test_nothing_prints_or_evaluates():
    for module in _MODULES:
        calls = [node for node in _nodes(module) if isinstance(node, ast.Call)]
        called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        forbidden = {"eval", "exec", "breakpoint"} | (set() if _prints(module) else {"print"})
        assert not called & forbidden, module


_WRAPPERS = {
    "InMemory", "PrefetchingSource", "MappedSource", "RewrittenSource", "Submodel", "OneMlp", "MlpsAsLayers",
    "LazyLeaf", "InterpolatedModel", "InterpolatedSubtree",
}  # fmt: skip


def test_which_source_it_is_is_asked_only_in_the_module_that_defines_it():
    """Elsewhere `is_resident`, `leaf` and the like answer what a caller needs to know of a source."""
    defined = set()
    for module in _MODULES:
        own = {node.name for node in _nodes(module) if isinstance(node, ast.ClassDef)} & _WRAPPERS
        defined |= own
        for node in _nodes(module):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {getattr(inner, "id", getattr(inner, "attr", None)) for inner in ast.walk(node.args[1])}
                assert not asked & (_WRAPPERS - own), f"{module}:{node.lineno}"
    assert defined == _WRAPPERS


def test_no_module_is_called_utils():
    assert not {module.stem for module in _MODULES} & {"utils", "util", "helpers", "common", "misc"}


_IMPORT_ALL = """
import importlib, pkgutil, sys, tracing_jax
import tracing_jax.experiment
slow = {"matplotlib", "optax", "orbax", "scipy.optimize", "scipy.stats"} & set(sys.modules)
assert not slow, f"every run would wait for the import of {slow}, which few need"
for module in pkgutil.walk_packages(tracing_jax.__path__, "tracing_jax."):
    importlib.import_module(module.name)
from jax._src import xla_bridge
assert not xla_bridge._backends, f"importing initialised {list(xla_bridge._backends)}"
heavy = {"torch", "tensorflow", "transformers", "datasets"} & set(sys.modules)
assert not heavy, f"importing took {heavy} along"
"""


@pytest.mark.slow
def test_importing_touches_no_device():
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], cwd=_PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout
