"""One safetensors file, whose tensors are read from the offsets in its header into memory of the caller's choice.

The format: 8 bytes that hold the length of the header, the header (JSON), then the tensors' bytes, each in C order. The
safetensors package checks the header; the bytes are read rather than mapped, so that pages of the file never count as
memory of the process.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tracing_jax.checkpoint.errors import CheckpointError, damaged

Index = tuple[slice, ...]

Target = tuple[int, memoryview]
"""A position in a file, in bytes, and the memory that the bytes from there on are read into."""

NO_QUANTISED = "only unquantised weights (float64, float32, float16, bfloat16) are read; use the original checkpoint"
_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format


class SafetensorsFile:
    """A lazy `TensorStore` over one safetensors file, its header read once."""

    def __init__(self, path: Path):
        """Opens the file.

        Raises:
            CheckpointError: It is damaged, or holds tensors of a dtype that is not read.
        """
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise CheckpointError(_why_unreadable(path, error)) from error
        self._path = path
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            self._take_header(path, json.loads(file.read(header_bytes)), header_bytes)

    def _take_header(self, path: PurePath, header: dict[str, Any], header_bytes: int) -> None:
        header.pop("__metadata__", None)
        unknown = sorted(name for name, tensor in header.items() if tensor["dtype"] not in _DTYPES)
        if unknown:
            kinds = ", ".join(sorted({header[name]["dtype"] for name in unknown}))
            raise CheckpointError(
                f"{path}: {len(unknown)} tensors of dtype {kinds}, {unknown[0]!r} first; {NO_QUANTISED}"
            )
        self._shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
        self._dtypes = {name: _DTYPES[tensor["dtype"]] for name, tensor in header.items()}
        self._starts = {name: 8 + header_bytes + tensor["data_offsets"][0] for name, tensor in header.items()}

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._shapes))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        """Stored dtype of the tensor `name`."""
        return self._dtypes[name]

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
            extent = [max(0, bound.stop - bound.start) for bound in _bounds(index, self._shapes[name])]
            found.append(np.empty(extent, self._dtypes[name]))
            targets += self._targets(found[-1], name, index)
        self._fill(targets)
        return found

    def read_into(self, out: np.ndarray, name: str, index: Index = ()) -> None:
        """Writes what `read` returns into `out`, a contiguous array of its shape and dtype."""
        self._fill(self._targets(out, name, index))

    def _targets(self, out: np.ndarray, name: str, index: Index) -> list[Target]:
        """Returns the contiguous ranges of the file that make up a slice, with the parts of `out` that they fill."""
        if not out.size:
            return []
        shape, itemsize = self._shapes[name], self._dtypes[name].itemsize
        memory, first, targets = out.reshape(-1).view(np.uint8).data, 0, []
        for start, size in _runs(shape, _bounds(index, shape)):
            targets.append((self._starts[name] + start * itemsize, memory[first : first + size * itemsize]))
            first += size * itemsize
        return targets

    def _fill(self, targets: Sequence[Target]) -> None:
        """Reads the bytes at each position of the file into the memory beside it."""
        with self._path.open("rb", buffering=0) as file:
            for start, memory in targets:
                file.seek(start)
                while memory:
                    count = file.readinto(memory)  # at most 2 GiB at a time
                    if not count:
                        raise CheckpointError(damaged(self._path, "what its header promises, as it did at first"))
                    memory = memory[count:]


def _bounds(index: Index, shape: Sequence[int]) -> Index:
    """The slices of every axis in plain numbers, none of them missing, negative or overlong."""
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


def _why_unreadable(path: Path, error: SafetensorError) -> str:
    """Distinguishes a truncated file from an unsupported one by the size that its header implies."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(header_size, size, MAX_HEADER_BYTES)))
            expected = 8 + header_size + max(t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return damaged(path, f"a safetensors file ({error})")
    if expected == size:
        return f"{path}: {error}; {NO_QUANTISED}"
    return damaged(path, f"{expected} bytes by its header")
