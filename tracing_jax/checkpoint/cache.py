"""Orbax cache of converted trees: a checkpoint loaded once is restored, sharded, instead of converted again.

An entry is a folder with the tree, as Orbax writes it, and a manifest of the sizes of its files. It is written under
another name and renamed when it is complete, so that workers that share a cache need no lock.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, NamedSharding

from tracing_jax.axes import axis_table
from tracing_jax.checkpoint.checkpoint import Checkpoint
from tracing_jax.checkpoint.device_loading import ShardedCheckpoint
from tracing_jax.distributed import all_agree, broadcast_one, is_main_process
from tracing_jax.sharding import leaf_spec
from tracing_jax.sources import InMemory, in_memory
from tracing_jax.tree import Tree, unflatten

_FORMAT = 2  # raise when leaf names or layouts change: older entries are then left alone
_PARAMS, _MANIFEST = "params", "manifest.json"


def load(checkpoint: Checkpoint, mesh: Mesh, cache_dir: str | None = None) -> InMemory:
    """Returns the model with all weights on the mesh, in the dtype they have on disk.

    With `cache_dir` the converted tree is kept there in Orbax format and restored by the next run, on whatever mesh. An
    entry belongs to one model, commit and state of its files; one that is damaged is replaced.

    Raises:
      CheckpointError: NaN or infinite weights.
    """
    if cache_dir is None:
        return _converted(checkpoint, mesh)
    entry = Path(cache_dir).expanduser().absolute() / _key(checkpoint)
    if broadcast_one(entry.exists()):
        params = _restored(entry, checkpoint, mesh)
        if all_agree(params is not None):
            logging.info("restored %s from %s", checkpoint.id, entry)
            return InMemory(checkpoint.arch, params)
        logging.warning("%s: damaged or incomplete, so it is written again", entry)
        _discard(entry)
    model = _converted(checkpoint, mesh)
    _write(entry, model.params)
    return model


def _converted(checkpoint: Checkpoint, mesh: Mesh) -> InMemory:
    return in_memory(ShardedCheckpoint(checkpoint, mesh), f"loading {checkpoint.id}")


def _key(checkpoint: Checkpoint) -> str:
    """Returns a folder name for these weights: their repository and commit, files, dtypes, architecture and layouts.

    Files count by name, size and time of change. Weights that are read from the Hub in ranges have no files here.
    """
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files()]
    repository = checkpoint.id.partition("@")[0] if checkpoint.revision else None
    dtypes = {name: str(_dtype(checkpoint, name)) for name in checkpoint.leaf_layouts}
    facts = [_FORMAT, repository, checkpoint.revision, sorted(files), dtypes, checkpoint.reading]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    label = re.sub(r"[^A-Za-z0-9._-]", "-", Path(checkpoint.id.partition("@")[0]).name).strip(".")
    return f"{label or 'model'}-{digest}"


def _dtype(checkpoint: Checkpoint, leaf: str) -> jnp.dtype:
    return jnp.dtype(checkpoint.tensors.dtype(checkpoint.leaf_layouts[leaf].slices[0].tensor))


def _restored(entry: Path, checkpoint: Checkpoint, mesh: Mesh) -> Tree | None:
    """Returns the tree of an entry; None if it is not complete or cannot be read."""
    if not broadcast_one(_is_complete(entry)):
        return None
    import orbax.checkpoint as ocp  # takes seconds to import, and few runs need it

    try:
        with ocp.StandardCheckpointer() as orbax:
            return orbax.restore(entry / _PARAMS, _abstract(checkpoint, mesh))
    except Exception as error:  # Orbax, TensorStore and the file system have no common class of errors
        logging.warning("%s: cannot be restored (%s)", entry, type(error).__name__)
        return None


def _abstract(checkpoint: Checkpoint, mesh: Mesh) -> Tree:
    """Returns the shape, dtype and sharding of every leaf."""
    table = axis_table(checkpoint.arch)
    leaves = {}
    for name, layout in checkpoint.leaf_layouts.items():
        sharding = NamedSharding(mesh, leaf_spec(table.leaves[name], table, mesh))
        leaves[name] = jax.ShapeDtypeStruct(layout.shape, _dtype(checkpoint, name), sharding=sharding)
    return unflatten(leaves) | ({} if any(name.startswith("head/") for name in leaves) else {"head": {}})


def _write(entry: Path, params: Tree) -> None:
    """Writes an entry, unless another worker has written it first."""
    import orbax.checkpoint as ocp

    work = entry.with_name(f".{entry.name}.{broadcast_one(secrets.token_hex(8))}")
    try:
        if is_main_process():
            work.mkdir(parents=True)
        broadcast_one(None)  # all processes write into the folder that the main process has made
        with ocp.StandardCheckpointer() as orbax:
            orbax.save(work / _PARAMS, params)
        if is_main_process():
            (work / _MANIFEST).write_text(json.dumps(_file_sizes(work / _PARAMS)), encoding="utf-8")
            _publish(work, entry)
    finally:
        if is_main_process():
            shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, entry: Path) -> None:
    try:
        os.rename(work, entry)
    except OSError:
        if not entry.is_dir():
            raise
        logging.info("%s: another worker has written it meanwhile", entry)
    else:
        logging.info("cached in %s", entry)


def _discard(entry: Path) -> None:
    """Removes an entry; it is renamed first, so that no other worker restores a part of it."""
    if is_main_process():
        away = entry.with_name(f".{entry.name}.{secrets.token_hex(8)}.damaged")
        with contextlib.suppress(FileNotFoundError):  # another worker was faster
            os.rename(entry, away)
        shutil.rmtree(away, ignore_errors=True)


def _is_complete(entry: Path) -> bool:
    try:
        return json.loads((entry / _MANIFEST).read_bytes()) == _file_sizes(entry / _PARAMS)
    except (OSError, ValueError):
        return False


def _file_sizes(folder: Path) -> dict[str, int]:
    """Returns the size in bytes of every file below a folder, by its path from there."""
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
