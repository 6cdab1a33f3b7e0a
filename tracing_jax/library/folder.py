"""A library: a folder of signature files with an index, here or as a data set repository of the Hub.

A file that is dropped into the folder belongs to it at once. The index lists the files with their hashes, so that a
change is seen; `indexed` brings it up to date.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

from tracing_jax.error_messages import listed
from tracing_jax.library.signature import Signature
from tracing_jax.library.signature_file import MAX_BYTES, SUFFIX, read_signature
from tracing_jax.record import atomic_write

INDEX = "index.json"
_LARGEST_INDEX = 2**26  # bytes: of a hundred thousand signatures
_ON_HUB = re.compile(r"(?:(https?://[^/]+)/datasets/|hf://datasets/)?([\w.-]+/[\w.-]+?)/?(?:(?:@|/tree/)([\w./-]+))?")


@dataclass(frozen=True)
class Checked:
    """The files of a library, as they were found.

    Attributes:
      names: the files that can be read.
      problems: files that cannot be read, that changed since they were listed, or that are missing.
      new: files that the index did not list.
      same: groups of files of one model: of the same weight files, or the same units.
    """

    names: tuple[str, ...]
    problems: tuple[str, ...]
    new: tuple[str, ...]
    same: tuple[tuple[str, ...], ...]


def library_folder(where: str, download_dir: str | None = None) -> Path:
    """Returns the folder of a library; one on the Hub is downloaded, its signature files alone.

    Args:
      where: a folder, `org/name` or `org/name@revision` of a data set repository, or its address.
      download_dir: of downloads; by default that of huggingface_hub.

    Raises:
      ValueError: there is no such folder or repository.
    """
    local = Path(where).expanduser()
    if local.is_dir():
        return local
    found = _ON_HUB.fullmatch(where)
    if local.exists() or where.startswith((".", "/", "~")) or found is None:
        if "://" in where:
            raise ValueError(
                f"library {where}: not the address of a data set, {constants.ENDPOINT}/datasets/org/name; "
                "download the files of another place into a folder, and name that"
            )
        here = "" if local.exists() else f"no folder {where!r} here; "
        raise ValueError(
            f"library {where}: {here}expected a folder of *{SUFFIX} files, or org/name of a data set on the Hub"
        )
    host, repo, revision = found.groups()
    if host and host != constants.ENDPOINT:
        raise ValueError(
            f"library {where}: {host} is not the Hub, which is {constants.ENDPOINT}; set HF_ENDPOINT to another, or "
            f"name {repo} of this one"
        )
    try:
        _check_sizes(repo, revision)
        return Path(
            snapshot_download(
                repo,
                repo_type="dataset",
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=[f"*{SUFFIX}", INDEX],
                ignore_patterns=["*/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"library {where}: no such folder here, and not to be had from the Hub: {reason}") from None


def _check_sizes(repo: str, revision: str | None) -> None:
    """Checks the sizes of a repository's files, so that a large file of the right name cannot fill the disk.

    Without a network nothing is asked: what is in the cache counts.

    Raises:
      ValueError: a file is too large to be a signature, or there is none.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    except HTTPError as error:
        if isinstance(error, HfHubHTTPError):
            raise
        return
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
    limits = {name: MAX_BYTES for name in sizes if name.endswith(SUFFIX)}
    if not limits:
        raise ValueError(f"library {repo}: none of its files at the top ends in {SUFFIX}")
    large = [name for name, limit in (limits | {INDEX: _LARGEST_INDEX}).items() if sizes.get(name, 0) > limit]
    if large:
        raise ValueError(
            f"library {repo}: more than {MAX_BYTES:,} bytes, no signatures: {listed(map(_escaped, large))}"
        )


def read_library(folder: Path) -> dict[str, Signature]:
    """Returns name -> signature of every signature file in a folder, by name.

    Raises:
      ValueError: there is none, or a file cannot be read; all such files at once.
    """
    found, problems = {}, []
    for path in _files(folder):
        try:
            found[_name(path)] = read_signature(path)
        except ValueError as error:
            problems.append(_escaped(str(error)))
    if problems:
        raise ValueError("\n  ".join([f"library {folder}: move away what is no signature", *problems]))
    if not found:
        raise ValueError(f"library {folder}: no file ends in {SUFFIX}; `tracing-jax library add` puts one there")
    return found


def add_to_library(folder: Path, paths: list[Path]) -> list[str]:
    """Copies signature files into a folder, which is made if need be, lists them in its index, and returns their names.

    Raises:
      ValueError: one is no signature, or another of its name is there; then nothing is copied.
    """
    contents: dict[Path, bytes] = {}
    for path in paths:
        read_signature(path)
        target = folder / f"{_name(path)}{SUFFIX}"
        content = path.read_bytes()
        known = contents.get(target, target.read_bytes() if target.exists() else None)
        if known is not None and known != content:
            raise ValueError(f"{target.name} is in the library, of other content; rename {path} or remove the old one")
        contents[target] = content
    folder.mkdir(parents=True, exist_ok=True)
    for target, content in contents.items():
        atomic_write(target, content)
    indexed(folder)
    return [_name(target) for target in contents]


def indexed(folder: Path, *, write: bool = True) -> Checked:
    """Reads every file of a library, compares it with the index, and writes the index anew of those that are right.

    A file that changed since it was listed keeps its old entry, so that the change is reported until the file, or its
    entry, is removed.

    Args:
      folder: of the library.
      write: whether the index is brought up to date; not in a download, which is not ours to change.
    """
    index, fresh = _index(folder), {}
    names, problems, new = [], [], []
    by_digest: dict[str, list[str]] = {}
    by_units: dict[str, list[str]] = {}
    for path in _files(folder):
        name = _name(path)
        try:
            signature = read_signature(path)
        except ValueError as error:
            problems.append(_escaped(str(error)))
            continue
        entry = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "model": signature.model,
                 "digest": signature.digest, "family": signature.facts.get("family")}  # fmt: skip
        listed = index.get(name)
        if listed is not None and listed.get("sha256") != entry["sha256"]:
            problems.append(f"{name}: changed since it was listed in {INDEX}")
            fresh[name] = listed
        else:
            fresh[name] = entry
        if listed is None:
            new.append(name)
        names.append(name)
        by_digest.setdefault(signature.digest, []).append(name)
        rows = b"".join(found.tobytes() for layer in signature.layers for found in layer.readings.values())
        by_units.setdefault(hashlib.sha256(rows).hexdigest(), []).append(name)
    problems += [f"{_escaped(name)}: listed in {INDEX}, and missing" for name in sorted(index.keys() - fresh.keys())
                 if not (folder / f"{name}{SUFFIX}").exists()]  # fmt: skip
    if write and fresh != index:
        atomic_write(folder / INDEX, (json.dumps(fresh, indent=1, sort_keys=True) + "\n").encode())
    groups = {tuple(group) for group in (*by_digest.values(), *by_units.values()) if len(group) > 1}
    return Checked(tuple(names), tuple(problems), tuple(new), tuple(sorted(groups)))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())


def _name(path: Path) -> str:
    return _escaped(path.name.removesuffix(SUFFIX).removesuffix(".safetensors"))


def _escaped(name: str) -> str:
    """Returns a name of which nothing but text reaches a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _index(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    path = folder / INDEX
    if not path.exists():
        return {}
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_INDEX + 1)
        if len(content) > _LARGEST_INDEX:
            raise ValueError(f"{path}: larger than {_LARGEST_INDEX:,} bytes; remove it, and it is made again")
        found = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError(f"{path}: not JSON; remove it, and it is made again") from None
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ValueError(f"{path}: expected file -> entry; remove it, and it is made again")
    return found
