"""Read bandwidth: a checkpoint layer by layer onto the devices, as streamed runs read, against its bytes in order."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from benchmarks.results import Row
from benchmarks.speed.timing import seconds
from tracing_jax.checkpoint import Checkpoint, open_checkpoint
from tracing_jax.sharding import make_mesh
from tracing_jax.sources import PrefetchingSource, sharded, subtrees

_BUFFER_BYTES = 16 * 2**20


def reading(folder: Path, repeats: int = 3) -> Iterator[Row]:
    """Yields the bandwidth with the files in the page cache, and with the cache dropped before each reading."""
    checkpoint = open_checkpoint(str(folder))
    files, size = checkpoint.tensors.files(), file_bytes(folder)
    plain_reading(files)
    for name, prepare in (("warm", lambda: None), ("cold", lambda: drop(files))):
        rounds = [(_after(prepare, lambda: _layers(checkpoint)), _after(prepare, lambda: plain_reading(files)))
                  for _ in range(repeats)]  # fmt: skip
        ours, theirs = (size / min(found) / 1e9 for found in zip(*rounds))
        yield Row("reading", f"layer by layer, {name}", ours, theirs, "GB/s", "a plain sequential read",
                  f"{size / 1e9:.2f} GB; ours checks for NaN")  # fmt: skip


def file_bytes(folder: Path) -> int:
    """Returns the bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def plain_seconds(folder: Path) -> float:
    """Returns the seconds of a plain reading of a checkpoint's files from the page cache."""
    files = tuple(sorted(folder.glob("*.safetensors")))
    plain_reading(files)
    return seconds(lambda: plain_reading(files))


def plain_reading(files: tuple[Path, ...]) -> int:
    """Reads all bytes of the files in order into one reused buffer, and returns how many there were."""
    buffer, total = bytearray(_BUFFER_BYTES), 0
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            while count := os.readv(handle, [buffer]):
                total += count
        finally:
            os.close(handle)
    return total


def _layers(checkpoint: Checkpoint) -> None:
    for _, subtree in subtrees(PrefetchingSource(sharded(checkpoint, make_mesh()))):
        jax.block_until_ready(subtree)


def drop(files: tuple[Path, ...]) -> None:
    """Asks the kernel to forget the pages of the files, which it does for those that are written back."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _after(prepare: Callable[[], object], function: Callable[[], object]) -> float:
    prepare()
    return seconds(function)
