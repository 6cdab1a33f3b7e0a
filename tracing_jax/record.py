"""The record of a run: plain data, written atomically, and never with a secret in it.

A record holds only dict (with str keys), list, str, int, float, bool and None: what was asked (`args`), what ran
(`commit`, `versions`, `device`, `seed`, `models`, `tokens`), what came out (`disguised`, `permuted`, `alignment`,
`statistics`, `perplexity`), how long each step took (`seconds`) and what could not be done (`notes`).
`statistics[name]` has the stages `non_aligned` and `aligned`, each a result, or None where it was not run.
"""

import functools
import hashlib
import json
import os
import pickle
import re
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

RECORD_FORMAT = 1
REDACTED = "[redacted]"
NOT_A_CHECKOUT = "not a git checkout"

SMALLEST_CALIBRATED = -12.0
"""log10 of the smallest p-value that people are shown of a calibrated test, whose null is an assumption. It takes no
precedence over an exact test by being smaller still; a record has what was computed."""

_HF_TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{30,}")
# Counts such as `num_tokens` and units such as `loss_nats_per_token` are no secrets, so the names are spelt out.
_SECRET_KEY = re.compile(r"(?i)token|(?:.*_)?(?:(?:auth|access|api|hf|hub|secret)_(?:token|key)|password|secret)")
_HASHED_AT_ONCE = 2**20  # bytes
_HASHING_THREADS = 2  # more would take the cores from the statistics, which are computed meanwhile
_OPEN_FILE = re.compile(r"/dev/(std(out|err)|fd/\d+)|/proc/(self|\d+)/fd/\d+")
_PICKLE_SUFFIXES = (".p", ".pkl", ".pickle")


@dataclass(frozen=True)
class RunFiles:
    """The paths of everything one run writes: `results.p` and, beside it, the files that share its stem."""

    pickle: Path
    json: Path
    png: Path
    html: Path
    folder: Path

    @classmethod
    def from_save(cls, path: str | PurePath) -> "RunFiles":
        """The files of a run saved as `path`, such as `runs/results.p`.

        Raises:
            ValueError: the path is a URL, or its name does not end as a pickle's does.
        """
        if "://" in str(path):
            raise ValueError(f"save={str(path)!r} is a URL, expected a local path such as runs/results.p")
        save = Path(path).expanduser()
        if save.suffix not in _PICKLE_SUFFIXES:
            endings = ", ".join(_PICKLE_SUFFIXES)
            raise ValueError(f"save={str(path)!r} names no pickle, expected an ending of {endings}: try runs/results.p")
        return cls(save, *(save.with_suffix(suffix) for suffix in (".json", ".png", ".html", ".run")))


def check_writable(path: str | PurePath) -> None:
    """Creates the folder of `path` and makes sure that `atomic_write` can write there.

    Raises:
        IsADirectoryError: `path` is itself a folder.
        NotADirectoryError: one of its parents is a file.
        OSError: the folder cannot be created or written (`PermissionError`, full disk, read-only file system).
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) and not _is_stream(path) else Path(path)
    if _is_stream(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"cannot save to {path}: it cannot be written to; choose another path")
        return
    if path.is_dir():
        raise IsADirectoryError(f"cannot save to {path}: it is a folder, expected a file; try {path / 'results.p'}")
    if files := [parent for parent in path.parents if parent.exists() and not parent.is_dir()]:
        raise NotADirectoryError(f"cannot save to {path}: {files[0]} is a file, expected a folder; choose another path")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        problem = f"no file can be created in {path.parent} ({error.strerror})"
        raise OSError(error.errno, f"cannot save to {path}: {problem}; choose another path") from error


def _is_stream(path: str | PurePath) -> bool:
    """Whether something other than a file or a folder is there, such as a pipe, a terminal or a device."""
    if _OPEN_FILE.fullmatch(str(path)):  # standard output may be a file, in which more than this is written
        return Path(path).exists()
    return Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir())


def atomic_write(path: str | PurePath, content: bytes) -> None:
    """Writes `content` to `path` atomically: a reader, even after a kill, finds the old file or the new one.

    A link stays, and what it leads to is replaced. What is no file, such as a pipe, is written to.
    """
    if _is_stream(path):
        with open(path, "ab") as file:
            file.write(content)
        return
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # Not tempfile: its files are private to the user, and results are to be read as the umask allows.
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_file(path: str | Path) -> Path:
    """Returns the path of a record with its figure beside it, which can be written.

    Raises:
        ValueError, OSError: it does not end in .json, or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"{path}: expected a file that ends in .json; the figure is written beside it")
    check_writable(path)
    return path


def plain(value: Any, where: str = "record") -> Any:
    """`value` in builtin types only, fit for strict JSON, with secrets replaced by `[redacted]`.

    Arrays and scalars of numpy and JAX, tuples, paths and mappings are converted. NaN and the infinities, which JSON
    lacks, become the strings "nan", "inf" and "-inf", which `float` reads back. A value under a key such as
    `hf_token`, and whatever looks like a Hugging Face token, is redacted.

    Args:
        value: what to convert.
        where: the name of `value` in error messages.

    Raises:
        TypeError: something else is in it, or a key is not a string; the message names the place.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if np.isfinite(value) else str(float(value))
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, PurePath):
        return _text(str(value))
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "items")):
        return {_key(key, where): _entry(key, item, where) for key, item in value.items()}
    if hasattr(value, "__array__"):
        return plain(_listed(value, where), where)
    raise _not_plain(value, where)


def _text(text: str) -> str:
    # A lone surrogate (an undecodable byte of a file name) has no UTF-8 form.
    return _HF_TOKEN.sub(REDACTED, text.encode("utf-8", "replace").decode())


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}, expected a string")
    return _text(key)


def _entry(key: str, value: Any, where: str) -> Any:
    if _SECRET_KEY.fullmatch(key.replace("-", "_")) and not (value is None or isinstance(value, bool)):
        return REDACTED
    return plain(value, f"{where}.{key}")


def _listed(value: Any, where: str) -> Any:
    """Nested lists of Python numbers or strings from an array, or one of them from a scalar."""
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError) as error:  # a typed random key, or an array that spans other processes
        raise _not_plain(value, where) from error
    if array.dtype.kind in "biuU":
        return array.tolist()
    if array.dtype.kind == "f" or array.dtype.isbuiltin == 2:  # 2: registered by a library, as bfloat16 is
        return array.astype(np.float64).tolist()
    raise _not_plain(value, where)


def _not_plain(value: Any, where: str) -> TypeError:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return TypeError(f"{where} is of type {kind}, expected a number, string, list, mapping, array, path or None")


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its field `digest`, as compact JSON with sorted keys."""
    content = {key: value for key, value in plain(record).items() if key != "digest"}
    text = json.dumps(content, allow_nan=False, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def with_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its digest, by which a later change of it shows; it is no signature."""
    return {**record, "digest": record_digest(record)}


def write_json(path: str | PurePath, record: Mapping[str, Any]) -> None:
    """Writes `plain(record)` as strict JSON, atomically."""
    text = json.dumps(plain(record), allow_nan=False, ensure_ascii=False, indent=1)
    atomic_write(path, text.encode() + b"\n")


def write_pickle(path: str | PurePath, record: Mapping[str, Any]) -> None:
    """Writes `legacy_dict(record)` as a pickle of builtin types, which loads without this package."""
    atomic_write(path, pickle.dumps(legacy_dict(record), protocol=4))


def legacy_dict(record: Mapping[str, Any]) -> dict[str, Any]:
    """The seven fixed keys of the results pickle.

    A test statistic is one float, or a dict by name where several ran: log10 of the p-value where there is one, else
    the headline number; None where it was not run. `base loss` and `ft loss` are perplexities; `time` is in seconds.
    """
    record = plain(record)
    statistics = _asked_for(record)
    perplexity = record.get("perplexity") or {}
    return {
        "args": record["args"],
        "commit": record["commit"],
        "non-aligned test stat": _test_stat(statistics, "non_aligned"),
        "aligned test stat": _test_stat(statistics, "aligned"),
        "base loss": _float((perplexity.get("base") or {}).get("perplexity")),
        "ft loss": _float((perplexity.get("ft") or {}).get("perplexity")),
        "time": total_seconds(record["seconds"]),
    }


def _asked_for(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the statistics that were asked for, without those that are there for the verdict alone."""
    statistics, args = dict(record["statistics"]), record["args"]
    if args.get("verdict") != "auto" or {"auto", "all"} & set(args["stat"]):
        return statistics
    return {name: stages for name, stages in statistics.items() if name in args["stat"]}


def total_seconds(seconds: Mapping[str, Any]) -> float:
    """The wall time of a run: the entry `total` where there is one, else the sum of the steps."""
    return float(seconds["total"]) if "total" in seconds else sum(map(float, seconds.values()), 0.0)


def _test_stat(statistics: Mapping[str, Any], stage: str) -> Any:
    results = {name: stages.get(stage) for name, stages in statistics.items()}
    if not any(results.values()):
        return None
    numbers = {name: _float(_number(result)) for name, result in results.items()}
    return numbers if len(numbers) > 1 else next(iter(numbers.values()))


def _number(result: Mapping[str, Any] | None) -> Any:
    result = result or {}
    log10_p = result.get("log10_p")
    return result.get("headline") if log10_p is None else log10_p


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def commit(folder: str | PurePath = Path(__file__).parent) -> str:
    """The git commit of the checkout that tracks this package, with `-dirty` where a tracked file differs from it.

    It is "not a git checkout" for an installed package, even inside some other project's checkout, and without git.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        sha = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return NOT_A_CHECKOUT
    return f"{sha}-dirty" if changes else sha


def _git(folder: str | PurePath, *arguments: str) -> str:
    # A git hook sets GIT_DIR and its like, which would point at another repository; the lock is for those who write.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True, env=environment).stdout.strip()


class HashingStoppedError(Exception):
    """Hashing was stopped before its end."""


def file_hashes(paths: Iterable[str | PurePath], stop: threading.Event | None = None) -> dict[str, str]:
    """SHA-256 of each file's content by file name.

    Every file is read to its end. The Hub's cache names large files by their hash, but a name is no evidence of
    content: anyone who can write there can give it to other bytes, before or after a download. 27 GB took 72 seconds
    of one core, beside the work.

    Raises:
        ValueError: two files have one name.
        OSError: a file cannot be read.
        HashingStoppedError: `stop` was set meanwhile.
    """
    files = [Path(path) for path in paths]
    names = [file.name for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several files are named {', '.join(twice)}: hash the files of one model at a time")
    with ThreadPoolExecutor(max_workers=_HASHING_THREADS) as threads:
        return dict(zip(names, threads.map(functools.partial(_sha256, stop), files), strict=True))


def _sha256(stop: threading.Event | None, path: Path) -> str:
    digest, chunk = hashlib.sha256(), bytearray(_HASHED_AT_ONCE)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(chunk):
            if stop is not None and stop.is_set():
                raise HashingStoppedError(f"{path}: hashing was stopped")
            digest.update(memoryview(chunk)[:size])
    return digest.hexdigest()
