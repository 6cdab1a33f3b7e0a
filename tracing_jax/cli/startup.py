"""What a program does before it runs: it sets up OpenBLAS, XLA and its cache, and keeps PyTorch from being imported.

It also lets the C library keep memory that is free again, where there is much of it.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import marshal
import os
import platform
import re
import sys
import types
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tracing_jax.host_memory import free_memory

_CPU_FACTS = Path("/proc/cpuinfo")

_LARGE = 2**30
"""Bytes of files from which on computing takes longer than compiling."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")

_PLENTY = 2**34
"""Bytes of free memory from which on what arrays leave is kept: of streamed 7B models 2 to 3 GiB."""
_MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_ARENA_MAX": (-8, 1)}
"""Parameters of malloc in glibc, by their numbers in malloc.h: no array has a mapping of its own, up to 2 GiB at the
end are not given back, and all threads share."""

_QUICK_TO_COMPILE = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
_KNOW_THESE = ("0.10.2",)  # versions of jaxlib that were tried: a flag that XLA does not know ends the process


def prepare_libraries(arguments: Sequence[str] = ()) -> None:
    """Sets up OpenBLAS, XLA and malloc for this program; to be called before numpy is imported.

    Args:
      arguments: of the program, among which are the models.
    """
    _let_idle_blas_threads_sleep()
    if not _name_much_data(arguments):
        _compile_for_cpus_quickly()
    keep_freed_memory()


def _name_much_data(arguments: Sequence[str]) -> bool:
    """Returns whether files and folders among the arguments are large together, or one may be a model of the Hub.

    Those that a YAML list of models names count too.
    """
    values = [argument.rpartition("=")[2] for argument in arguments]
    models = [v for a, v in zip(arguments, values) if not a.startswith("-") or "model_id" in a]
    for value in [value for value in values if value.endswith((".yaml", ".yml"))]:
        listed = _words(Path(value))
        values, models = [*values, *listed], [*models, *listed]
    unknown = (_HUB_ID.fullmatch(model) and not os.path.exists(model) for model in models)
    return any(unknown) or sum(_size(Path(value)) for value in values if value and os.path.exists(value)) > _LARGE


def _words(path: Path) -> list[str]:
    """Returns what stands in a short text file between blanks and signs of YAML; nothing where it cannot be read."""
    try:
        text = path.read_text("utf-8") if path.stat().st_size < 2**20 else ""
    except (OSError, UnicodeDecodeError):
        return []
    return [word.rstrip(":") for word in re.findall(r"[^\s'\",\[\]{}]+", text)]


def _size(path: Path) -> int:
    """Returns the bytes of a file, or of the files of a folder; 0 where it cannot be read, which is said later."""
    try:
        files = path.iterdir() if path.is_dir() else (path,)
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0


def keep_freed_memory() -> None:
    """Makes malloc keep the memory of arrays that are gone, where more than `_PLENTY` is free.

    By default each array of a streamed layer gets pages that are new to the process, which the kernel fills with zeros:
    a quarter of the processor time of a comparison of 7B models. What the user has set by variables of glibc holds.

    Source: mallopt(3); for other C libraries nothing is done.
    """
    if os.name != "posix" or any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    free, library = free_memory(), ctypes.CDLL(None)
    if free is not None and free > _PLENTY and hasattr(library, "gnu_get_libc_version"):
        for parameter, value in _MALLOPT.values():
            library.mallopt(parameter, value)


def _compile_for_cpus_quickly() -> None:
    """Makes XLA compile for CPUs in two thirds of the time, where the installed one is known to have such settings.

    Records of three pairs are equal in every digit. Products with a transposed matrix are slower, by a half of the time
    of a pass back through a layer of a 7B model. What the user has set holds.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if metadata.version("jaxlib") in _KNOW_THESE:
        flags = (flag for flag in _QUICK_TO_COMPILE if flag.partition("=")[0] not in given)
        os.environ["XLA_FLAGS"] = " ".join([given, *flags]).strip()


def _let_idle_blas_threads_sleep() -> None:
    """Makes the threads of OpenBLAS, which numpy and JAX use, sleep as soon as they have nothing to do.

    By default an idle one goes on asking for work for 2^26 cycles. Of many small decompositions each then costs ten
    times its own time where XLA, or another program, has use for the cores: a quarter of a run on small models. What
    the user has set holds.

    Source: OpenBLAS's documentation of its runtime variables. This one is the binary logarithm of a number of cycles,
    and 4 is the least.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


def keep_compiled_programs() -> None:
    """Makes JAX keep every compiled program of this process, and of those that it starts, in a folder of the user.

    Half the time of a run on small models is compilation.

    What the user has set by JAX's own variables (`JAX_COMPILATION_CACHE_DIR`, `JAX_ENABLE_COMPILATION_CACHE` and
    others) holds.
    """
    settings: dict[str, str | float] = {
        "JAX_COMPILATION_CACHE_DIR": str(cache_folder()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.0,  # most programs are small, and there are hundreds of them
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
    }
    for name, value in settings.items():
        if name in os.environ:
            continue
        os.environ[name] = str(value)
        if "jax" in sys.modules:  # it read the variables when it was imported
            sys.modules["jax"].config.update(name.lower(), value)


def cache_folder() -> Path:
    """Returns the folder for programs compiled on this kind of machine, under `~/.cache` or `XDG_CACHE_HOME`.

    Programs for a CPU use the instructions of the one that compiled them, and nodes that share a home may differ.
    """
    instructions = ""
    if _CPU_FACTS.exists():
        lines = _CPU_FACTS.read_text(errors="replace").splitlines()
        instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(instructions.encode()).hexdigest()[:8]
    return _cache_root() / "xla" / f"{platform.machine()}-{kind}"


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tracing_jax"


def import_transformers_without_torch() -> None:
    """Imports transformers such that it takes PyTorch for absent, in this whole process.

    transformers imports PyTorch along with a config, which takes seconds, and nothing in this package needs it. Where
    it, or transformers, is imported already, nothing is changed. A program may call this, a library may not: others in
    the process may need models of transformers.
    """
    if {"torch", "transformers"} & set(sys.modules):
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, and a search finds nothing
    try:
        _keep_list_of_models()
        from transformers.utils.import_utils import is_torch_available

        is_torch_available()  # it remembers the answer
    finally:
        del sys.modules["torch"]


def _keep_list_of_models() -> None:
    """Makes transformers use a list of its models that an earlier run kept; else it reads 3,000 source files, twice.

    It does so whenever it is imported, for the names that it and its subpackage of models have. The module that does is
    imported before the package, in a package of the same name that has nothing else, and what it finds is kept.
    """
    spec, name = importlib.util.find_spec("transformers"), "create_import_structure_from_path"
    if spec is None or not spec.submodule_search_locations:
        return
    package = types.ModuleType("transformers")
    package.__path__ = list(spec.submodule_search_locations)
    package.__dict__["__version__"] = version = metadata.version("transformers")
    sys.modules["transformers"] = package
    try:
        import_utils = importlib.import_module("transformers.utils.import_utils")
    except ImportError:  # of a future version, whose modules need more of the package
        for module in [module for module in sys.modules if module.startswith("transformers.")]:
            del sys.modules[module]
        return
    finally:
        del sys.modules["transformers"]
    scan: Callable[[Any], Any] | None = getattr(import_utils, name, None)
    models = Path(package.__path__[0]) / "models"
    if scan is None or not models.is_dir():
        return
    file = _cache_root() / f"transformers-{version}-{models.stat().st_mtime_ns:x}.{sys.implementation.cache_tag}"
    found = functools.cache(lambda: scan(models) if "dev" in version else _kept(file, lambda: scan(models)))
    same = {models, models / "__init__.py"}
    setattr(import_utils, name, lambda path: found() if Path(path) in same else scan(path))


def _kept(file: Path, compute: Callable[[], Any]) -> Any:
    """Returns what is in a file of plain data; where there is none, or it is damaged, computes it and writes the file.

    Without a place to write nothing is kept.
    """
    try:
        return marshal.loads(file.read_bytes())
    except (OSError, EOFError, ValueError, TypeError):
        found = compute()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_bytes(marshal.dumps(found))
        part.replace(file)
    return found
