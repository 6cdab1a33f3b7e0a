"""Orbax cache of converted trees: a checkpoint loaded once is restored, sharded, instead of converted again."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, NamedSharding

from tracing_jax.axes import axis_table
from tracing_jax.checkpoint.checkpoint import Checkpoint
from tracing_jax.checkpoint.device_loading import on_mesh
from tracing_jax.sharding import leaf_spec
from tracing_jax.sources import InMemory, in_memory
from tracing_jax.tree import Tree, unflatten

_FORMAT = 1  # raise when leaf names or layouts change: older caches are then left alone


def load(checkpoint: Checkpoint, mesh: Mesh, cache_dir: str | None = None) -> InMemory:
    """Returns the model with all weights on the mesh, in the dtype they have on disk.

    With `cache_dir` the converted tree is kept there in Orbax format, under a name that changes with the files it was
    made from, and restored by the next run.

    Raises:
      CheckpointError: NaN or infinite weights.
    """
    if cache_dir is None:
        return in_memory(on_mesh(checkpoint, mesh), f"loading {checkpoint.id}")
    import orbax.checkpoint as ocp  # takes seconds to import, and few runs need it

    folder = Path(cache_dir).expanduser().absolute() / _key(checkpoint)
    with ocp.StandardCheckpointer() as orbax:
        if folder.exists():
            logging.info("restoring %s from %s", checkpoint.id, folder)
            return InMemory(checkpoint.arch, orbax.restore(folder, _abstract(checkpoint, mesh)))
        model = in_memory(on_mesh(checkpoint, mesh), f"loading {checkpoint.id}")
        logging.info("caching %s in %s", checkpoint.id, folder)
        orbax.save(folder, model.params)
    return model


def _key(checkpoint: Checkpoint) -> str:
    """Returns a folder name that stands for the files' names, sizes and times of change, and for our layout."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.tensors.files()]
    facts = json.dumps([_FORMAT, sorted(files), repr(checkpoint.arch)])
    return f"{checkpoint.id.rstrip('/').split('/')[-1]}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def _abstract(checkpoint: Checkpoint, mesh: Mesh) -> Tree:
    table = axis_table(checkpoint.arch)
    leaves = {}
    for name, entry in checkpoint.entries.items():
        sharding = NamedSharding(mesh, leaf_spec(table.leaves[name], table, mesh))
        dtype = jnp.dtype(checkpoint.tensors.dtype(entry.pieces[0].tensor))
        leaves[name] = jax.ShapeDtypeStruct(entry.shape, dtype, sharding=sharding)
    return unflatten(leaves) | ({} if any(name.startswith("head/") for name in leaves) else {"head": {}})
