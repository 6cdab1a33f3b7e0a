"""One safetensors file, whose tensors are read from the offsets in its header into memory of the caller's choice.

The format: 8 bytes that hold the length of the header, the header (JSON), then the tensors' bytes, each in C order. The
header is untrusted: `safetensors_header` checks it. The bytes are read rather than mapped, so that pages of the file
never count as memory of the process.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tracing_jax.checkpoint.direct_reading import read_past_cache
from tracing_jax.checkpoint.errors import CheckpointError, damaged
from tracing_jax.checkpoint.foreign_files import content_of
from tracing_jax.checkpoint.reused_memory import empty
from tracing_jax.checkpoint.safetensors_header import MAX_HEADER_BYTES, HeaderError, StoredTensor, read_header

Index = tuple[slice, ...]

Target = tuple[int, memoryview]
"""A position in a file, in bytes, and the memory that the bytes from there on are read into."""


class SafetensorsFile:
    """A lazy `TensorStore` over one safetensors file, its header read once."""

    _is_past_cache = False

    def __init__(self, path: Path):
        """Opens the file.

        Raises:
            CheckpointError: It is damaged, or holds tensors of a dtype that is not read.
        """
        self._path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(size - 8, MAX_HEADER_BYTES):
                other = content_of(path)
                raise CheckpointError(f"{path}: {other}" if other else damaged(path, "a safetensors file"))
            text = file.read(header_bytes)
        try:
            tensors = read_header(text)
        except HeaderError as error:
            what = f"{path}: {error}" if error.is_unsupported else damaged(path, f"a safetensors file ({error})")
            raise CheckpointError(what) from None
        self._take_tensors(tensors, header_bytes)
        expected = 8 + header_bytes + max((found.stop for found in tensors.values()), default=0)
        if expected != size:
            raise CheckpointError(damaged(path, f"{expected} bytes by its header"))

    def _take_tensors(self, tensors: Mapping[str, StoredTensor], header_bytes: int) -> None:
        self._tensors, self._data_start = tensors, 8 + header_bytes

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of the tensor `name`."""
        return self._tensors[name].dtype

    def files(self) -> tuple[Path, ...]:
        """The file itself."""
        return (self._path,)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A copy of the tensor `name`, or of its slice; other parts of the file are not touched."""
        return self.read_many([(name, index)])[0]

    def read_many(self, requests: Sequence[tuple[str, Index]]) -> list[np.ndarray]:
        """What `read` returns for each (name, index)."""
        found, targets = [], []
        for name, index in requests:
            extent = [max(0, bound.stop - bound.start) for bound in bounds_of(index, self._tensors[name].shape)]
            found.append(empty(extent, self._tensors[name].dtype))
            targets += self._targets(found[-1], name, index)
        self._fill(targets)
        return found

    def read_into(self, out: np.ndarray, name: str, index: Index = ()) -> None:
        """Writes what `read` returns into `out`, a contiguous array of its shape and dtype."""
        self._fill(self._targets(out, name, index))

    def past_cache(self) -> "SafetensorsFile":
        """Returns the file, its tensors read past the page cache where the file system can; see `direct_reading`."""
        found = copy.copy(self)
        found._is_past_cache = True
        return found

    def _targets(self, out: np.ndarray, name: str, index: Index) -> list[Target]:
        """Returns the contiguous ranges of the file that make up a slice, with the parts of `out` that they fill."""
        if not out.size:
            return []
        stored = self._tensors[name]
        shape, itemsize, data = stored.shape, stored.dtype.itemsize, self._data_start + stored.start
        memory, first, targets = out.reshape(-1).view(np.uint8).data, 0, []
        for start, size in _runs(shape, bounds_of(index, shape)):
            targets.append((data + start * itemsize, memory[first : first + size * itemsize]))
            first += size * itemsize
        return targets

    def _fill(self, targets: Sequence[Target]) -> None:
        """Reads the bytes at each position of the file into the memory beside it."""
        if self._is_past_cache:
            targets = read_past_cache(self._path, targets)
        with self._path.open("rb", buffering=0) as file:
            for start, memory in targets:
                file.seek(start)
                while memory:
                    count = file.readinto(memory)  # at most 2 GiB at a time
                    if not count:
                        raise CheckpointError(damaged(self._path, "what its header declares, as it did at first"))
                    memory = memory[count:]


def bounds_of(index: Index, shape: Sequence[int]) -> Index:
    """The slices of every axis in plain numbers, none of them missing, negative or overlong.

    Raises:
        IndexError: More slices than axes, or steps.
    """
    if len(index) > len(shape) or any(axis.step not in (None, 1) for axis in index):
        raise IndexError(f"expected at most {len(shape)} slices with steps of one, got {index}")
    whole = (slice(None),) * (len(shape) - len(index))
    return tuple(slice(*axis.indices(size)[:2]) for axis, size in zip(index + whole, shape, strict=True))


def _runs(shape: Sequence[int], bounds: Index) -> Iterator[tuple[int, int]]:
    """Yields start and size, in items, of the contiguous runs that make up a slice of an array in C order."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    cut = [axis for axis, bound in enumerate(bounds) if bound != slice(0, shape[axis])]
    last = cut[-1] if cut else 0
    if not shape:
        yield 0, 1
        return
    size = (bounds[last].stop - bounds[last].start) * strides[last]
    for leading in itertools.product(*(range(bound.start, bound.stop) for bound in bounds[:last])):
        start = sum(at * stride for at, stride in zip(leading, strides)) + bounds[last].start * strides[last]
        yield start, size
