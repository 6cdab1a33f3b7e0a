"""What a record says of the models, the text, the alignment, the software and the machine."""

import math
import platform
from collections.abc import Iterable
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tracing_jax.alignment import Alignment
from tracing_jax.arch import Arch
from tracing_jax.checkpoint import Checkpoint
from tracing_jax.distributed import is_main_process
from tracing_jax.experiment.opening import Opened
from tracing_jax.record import file_hashes

_SHAPE = (
    "num_layers",
    "embed_dim",
    "mlp_dim",
    "num_kv_heads",
    "q_group",
    "head_dim",
    "num_experts",
    "vocab_size",
    "tied",
)
_PACKAGES = (
    "tracing_jax", "jax", "jaxlib", "numpy", "scipy", "safetensors", "tokenizers", "transformers", "datasets"
)  # fmt: skip


def model_facts(checkpoint: Checkpoint, hashed: bool = True) -> dict[str, Any]:
    """Returns what identifies a model: id, commit, shape, size and, unless they are left unread, its files' hashes."""
    files = [checkpoint.folder / "config.json", *checkpoint.tensors.files()]
    return {
        "id": checkpoint.id,
        "revision": checkpoint.revision,
        "family": checkpoint.arch.family,
        "parameters": sum(math.prod(entry.shape) for entry in checkpoint.entries.values()),
        "shape": shape_facts(checkpoint.arch),
        # The first of several processes writes the record.
        "files": file_hashes(files) if hashed and is_main_process() else {},
    }


def file_stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Returns the size and the time of change of each file, which are known without reading it."""
    return {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def shape_facts(arch: Arch) -> dict[str, Any]:
    """Returns how large a model is on each axis."""
    return {name: getattr(arch, name) for name in _SHAPE}


def token_facts(opened: Opened) -> dict[str, Any] | None:
    """Returns where the text came from and the hash of base's tokens; None if the run read no text."""
    blocks = opened.blocks_base
    if blocks is None:
        return None
    return {
        **blocks.source,
        "num_tokens": int(blocks.tokens.size),
        "num_blocks": len(blocks.tokens),
        "bytes": int(blocks.num_bytes.sum()),
        "sha256": blocks.sha256,
        "same_tokenizer": opened.vocabularies.same,
        "shared_tokens": len(opened.vocabularies.ids_base),
    }


def alignment_facts(alignment: Alignment) -> dict[str, Any]:
    """Returns everything about an alignment but its arrays."""
    names = [field.name for field in fields(alignment) if field.name not in ("permutations", "rewrites")]
    facts = {"axes": sorted(alignment.share_moved), "rewrites": [rewrite.name for rewrite in alignment.rewrites]}
    return facts | {name: getattr(alignment, name) for name in names}


def versions() -> dict[str, str]:
    """Returns the versions of the software that computes."""
    return {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def device_facts(mesh: Mesh) -> dict[str, Any]:
    """Returns what the run computed on."""
    device = mesh.devices.flat[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": mesh.size, "mesh": dict(mesh.shape)}
