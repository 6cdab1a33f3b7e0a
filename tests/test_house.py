"""The rules of the house: who may import whom, and what importing may not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tracing_jax

_PACKAGE = Path(tracing_jax.__file__).parent
_MODULES = sorted(_PACKAGE.rglob("*.py"))

# In order: a room may import only rooms above it, and of those the ones named.
_ROOMS = {
    "tree": "",
    "record": "",
    "processes": "",
    "progress": "record processes",
    "door": "",
    "arch": "",
    "axes": "arch tree",
    "models": "arch tree",
    "sharding": "axes tree",
    "symmetry": "arch axes tree",
    "interpolate": "axes tree",
    "source": "arch symmetry interpolate sharding axes tree",
    "checkpoint": "source models sharding axes arch tree",
    "data": "",
    "adding": "",
    "forward": "progress arch axes data symmetry tree models source interpolate sharding",
    "activations": "arch tree models source sharding",
    "grams": "adding progress activations arch data tree models source sharding",
    "matching": "progress adding symmetry axes tree",
    "alignment": "progress data matching symmetry forward grams models source sharding axes arch tree",
    "statistics": "progress data activations arch matching forward grams interpolate source symmetry sharding axes "
    "record tree",
    "report": "record",
    "sampling": "record processes arch data models source checkpoint sharding tree",
    "demo": "models checkpoint forward symmetry source arch axes data tree",
}
_EVERYTHING_ABOVE = ("experiment", "zoo")
_ORDER = (*_ROOMS, *_EVERYTHING_ABOVE)


def _room(module: Path) -> str:
    return module.relative_to(_PACKAGE).parts[0].removesuffix(".py")


def _is_door(module: Path) -> bool:
    """Says whether a module is run and never imported, like main.py: it may import every room, and print."""
    return module.name == "__main__.py"


def _imported(module: Path) -> Iterator[str]:
    """Yields the full names of what a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported_rooms(module: Path) -> set[str]:
    own = (name.split(".") for name in _imported(module) if name.split(".")[0] == "tracing_jax")
    return {parts[1] for parts in own} - {_room(module)}


def _importers_of(library: str) -> set[str]:
    return {_room(module) for module in _MODULES if any(name.split(".")[0] == library for name in _imported(module))}


def test_rooms_stand_in_order():
    for room, allowed in _ROOMS.items():
        above = _ORDER[: _ORDER.index(room)]
        assert set(allowed.split()) <= set(above), room


@pytest.mark.parametrize("module", _MODULES, ids=lambda module: str(module.relative_to(_PACKAGE)))
def test_module_imports_only_what_its_room_may(module):
    room = _room(module)
    if room == "__init__":
        assert not set(_imported_rooms(module))
        return
    if _is_door(module):
        assert _imported_rooms(module) <= set(_ORDER)
        return
    assert room in _ORDER, f"{module} is in no room of the house; give it a place in the table"
    allowed = set(_ROOMS[room].split()) if room in _ROOMS else set(_ORDER[: _ORDER.index(room)])
    assert _imported_rooms(module) <= allowed


def test_flax_is_imported_only_by_the_models():
    assert _importers_of("flax") == {"models"}


@pytest.mark.parametrize("library", ["torch", "tensorflow", "pickle5", "dill", "cloudpickle"])
def test_library_is_imported_nowhere(library):
    assert not _importers_of(library)


def test_nothing_prints_or_evaluates():
    for module in _MODULES:
        calls = [node for node in ast.walk(ast.parse(module.read_text("utf-8"))) if isinstance(node, ast.Call)]
        called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        forbidden = {"eval", "exec", "breakpoint"} | (set() if _is_door(module) else {"print"})
        assert not called & forbidden, module


def test_no_room_is_called_utils():
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
