"""Facts for the record: the models, the text, the alignment, the software and the machine."""

import contextlib
import math
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tracing_jax.alignment import Alignment
from tracing_jax.arch import Arch
from tracing_jax.checkpoint import Checkpoint
from tracing_jax.distributed import is_main_process
from tracing_jax.experiment.inputs import RunInputs
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
_FORMATS = {".safetensors": "safetensors", ".bin": "PyTorch", ".gguf": "GGUF"}
_PACKAGES = (
    "tracing_jax", "jax", "jaxlib", "numpy", "scipy", "safetensors", "tokenizers", "transformers", "datasets"
)  # fmt: skip


def model_facts(checkpoint: Checkpoint, hashed: bool = True, stop: threading.Event | None = None) -> dict[str, Any]:
    """Returns what identifies a model: id, commit, shape, format, size and its files' hashes, if asked.

    Raises:
      HashingStoppedError: `stop` was set meanwhile.
    """
    weights = checkpoint.tensors.files()
    return {
        "id": checkpoint.id,
        "revision": checkpoint.revision,
        "family": checkpoint.arch.family,
        "parameters": sum(map(math.prod, _shapes(checkpoint))),
        "shape": shape_facts(checkpoint.arch),
        "format": _format(checkpoint),
        "bytes": sum(file.stat().st_size for file in weights if file.is_file()),
        # Only process 0 writes the record.
        "files": file_hashes(checkpoint.files(), stop) if hashed and is_main_process() else {},
    }


def _format(checkpoint: Checkpoint) -> str:
    """Returns how the weights are stored: `bfloat16 in safetensors`; quantised ones by the dtype they are read in."""
    dtypes = sorted({str(checkpoint.tensors.dtype(name)) for name in checkpoint.tensors.names()})
    files = sorted({_FORMATS.get(file.suffix, file.suffix) for file in checkpoint.tensors.files()})
    return " in ".join(filter(None, (" and ".join(dtypes), " and ".join(files))))


def _shapes(checkpoint: Checkpoint) -> Iterator[tuple[int, ...]]:
    """Yields the shapes of all weights: of the leaves, or of all tensors of a model that is read by these alone."""
    if checkpoint.arch.reading is None:
        yield from (layout.shape for layout in checkpoint.leaf_layouts.values())
    else:
        yield from (checkpoint.tensors.shape(name) for name in checkpoint.tensors.names())


@contextlib.contextmanager
def model_facts_in_background(
    models: Mapping[str, Checkpoint], hashed: bool
) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """Reads the facts of every model on a thread beside the work inside, and yields a function to wait for them.

    Hashing reads the files whole, and holds no lock that the work needs. It ends at once where the work fails.
    """
    stop = threading.Event()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hashes")
    found = {name: thread.submit(model_facts, model, hashed, stop) for name, model in models.items()}
    try:
        yield lambda: {name: facts.result() for name, facts in found.items()}
    finally:
        stop.set()
        thread.shutdown(cancel_futures=True)


def file_stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Returns the size and the time of change of each file, which are known without reading it."""
    return {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def shape_facts(arch: Arch) -> dict[str, Any]:
    """Returns how large a model is on each axis."""
    return {name: getattr(arch, name) for name in _SHAPE}


def token_facts(inputs: RunInputs) -> dict[str, Any] | None:
    """Returns where the text came from and the hash of base's tokens; None if the run read no text."""
    if inputs.text is None:
        return None
    blocks = inputs.text.base
    return {
        **blocks.source,
        "num_tokens": int(blocks.tokens.size),
        "num_blocks": len(blocks.tokens),
        "bytes": int(blocks.num_bytes.sum()),
        "sha256": blocks.sha256,
        "same_tokenizer": inputs.vocabularies.same,
        "shared_tokens": len(inputs.vocabularies.ids_base),
    }


def alignment_facts(alignment: Alignment) -> dict[str, Any]:
    """Returns everything about an alignment but its arrays."""
    names = [field.name for field in fields(alignment) if not field.name.endswith("rewrites")]
    # Where units were only permuted, `share_moved` has them by axis kind.
    rewrites = [] if alignment.reorders_only else [rewrite.name for rewrite in alignment.rewrites]
    facts = {"axes": sorted(alignment.share_moved), "rewrites": rewrites, "share_moved": alignment.share_moved}
    if alignment.base_rewrites:
        facts["base_rewrites"] = [rewrite.name for rewrite in alignment.base_rewrites]
    return facts | {name: getattr(alignment, name) for name in names}


def versions() -> dict[str, str]:
    """Returns the versions of the software that computes."""
    return {name: metadata.version(name) for name in _PACKAGES} | {"python": platform.python_version()}


def device_facts(mesh: Mesh) -> dict[str, Any]:
    """Returns what the run computed on."""
    device = mesh.devices.flat[0]
    return {"platform": device.platform, "kind": device.device_kind, "count": mesh.size, "mesh": dict(mesh.shape)}
