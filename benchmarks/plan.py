"""What a streamed run reads and computes for a whole model, from the shapes alone: bytes, operations and their seconds.

Letters: L layers, F MLP units, D features.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from benchmarks.speed.reading import drop
from benchmarks.speed.timing import (
    best_seconds,
    block_flops_per_token,
    head_flops_per_token,
    match_flops_per_token,
    matmul,
    matmul_flops,
    row_gram_flops,
    seconds,
)
from tracing_jax.arch import Arch
from tracing_jax.checkpoint import Checkpoint
from tracing_jax.statistics.match import TAPS, Match

_MATMUL = 4096
_READ_BYTES = 2**30
_BUFFER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Step:
    """One step of a run on a whole pair.

    Attributes:
      read_bytes: of both models together.
      flops: floating-point operations; assignments have none and come on top.
    """

    name: str
    read_bytes: float
    flops: float
    note: str = ""


@dataclass(frozen=True)
class Rates:
    """What this machine does: a plain reading of files that are not in the page cache, and products in float32."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, step: Step) -> float:
        """Returns the seconds of a step whose reading and computing overlap: those of the slower."""
        return max(step.read_bytes / self.bytes_per_second, step.flops / self.flops_per_second)


def plan(model: Checkpoint, tokens: int, block_size: int, num_alphas: int) -> Iterator[Step]:
    """Yields the steps of `csu`, `match` on weights, `mode` and alignment of `embed` and `mlp` for two such models."""
    arch, sizes = model.arch, _leaf_bytes(model)
    L, F, D = arch.num_layers, arch.mlp_dim, arch.embed_dim
    # Which units are evidence is read from gate, up and down rows, before the rows that a statistic compares.
    units = 2 * _matching(sizes, "gate_proj", "up_proj", "down_proj", "mlp_norm")
    read = units + 2 * _matching(sizes, "up_proj")
    yield Step("csu", read, L * row_gram_flops(arch), f"and {L} assignments of {F} units")
    embeddings = min(arch.vocab_size, Match().max_tokens)
    flops = embeddings * match_flops_per_token(arch, len(TAPS))
    read = units + 2 * _matching(sizes, "gate_proj", "up_proj", "mlp_norm", "embed/")
    note = f"{embeddings:,} embeddings, and {len(TAPS) * L} assignments of {F} units"
    yield Step("match, weights", read, L * flops, note)
    # Both models pass once for the path, and ft once more for its own loss.
    per_token = L * block_flops_per_token(arch, block_size) + head_flops_per_token(arch)
    yield Step("mode", 3 * model.num_bytes, (num_alphas + 1) * tokens * per_token, f"{tokens:,} tokens")
    yield Step("alignment, one sweep", 4 * model.num_bytes, _sweep_flops(arch, sizes),
               f"features, then MLP units; and {L} assignments of {F} units, one of {D}")  # fmt: skip


def measured_rates(files: Sequence[Path]) -> Rates:
    """Returns the rates of this machine; the first GiB of the files is read from the disk."""
    drop(tuple(files[:1]))
    read = min(_READ_BYTES, files[0].stat().st_size)
    (product,) = best_seconds([matmul(_MATMUL, jnp.float32)])
    return Rates(read / seconds(lambda: _read(files[0], read)), matmul_flops(_MATMUL) / product)


def _read(file: Path, size: int) -> None:
    buffer = bytearray(_BUFFER_BYTES)
    handle = os.open(file, os.O_RDONLY)
    try:
        while size > 0:
            size -= os.readv(handle, [buffer])
    finally:
        os.close(handle)


def _leaf_bytes(model: Checkpoint) -> dict[str, int]:
    """Returns the size of every leaf by name, in the dtype it has on disk."""
    return {
        name: model.tensors.dtype(entry.slices[0].tensor).itemsize * _product(entry.shape)
        for name, entry in model.leaf_layouts.items()
    }


def _product(shape: Sequence[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _matching(sizes: Mapping[str, int], *parts: str) -> int:
    return sum(size for name, size in sizes.items() if any(part in name for part in parts))


def _sweep_flops(arch: Arch, sizes: Mapping[str, int]) -> float:
    """Returns the operations of the similarities of all features, and of the MLP units of every layer, once each."""
    values = sum(sizes.values()) / 2
    matrices = 3 if arch.gated else 2
    return 2.0 * arch.embed_dim * values + 2.0 * arch.num_layers * matrices * arch.embed_dim * arch.mlp_dim**2
