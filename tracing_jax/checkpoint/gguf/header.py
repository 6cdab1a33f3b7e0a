"""The header of a GGUF file, checked: metadata by key, and the place of every tensor.

Source: the GGUF specification of ggml (docs/gguf.md), versions 2 and 3. The header is untrusted: nothing is allocated
before the bytes that it declares are known to be in the file.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tracing_jax.checkpoint.errors import CheckpointError, damaged
from tracing_jax.error_messages import shortened

_SCALARS = {
    0: ("<B", np.uint8), 1: ("<b", np.int8), 2: ("<H", np.uint16), 3: ("<h", np.int16), 4: ("<I", np.uint32),
    5: ("<i", np.int32), 6: ("<f", np.float32), 7: ("<?", np.bool_), 10: ("<Q", np.uint64), 11: ("<q", np.int64),
    12: ("<d", np.float64),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


class GgufTensor(NamedTuple):
    """A tensor of a file: its shape with the innermost axis last, its type, and where its bytes begin."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int

    @property
    def row_bytes(self) -> int:
        """The bytes of a row: the elements along the last axis."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself, and its tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Returns the header of a GGUF file.

    Raises:
      CheckpointError: it is no GGUF file, or of another version, damaged, or has a type of tensor that is not known.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            return _Reader(memory).header()
    except CheckpointError as error:
        raise CheckpointError(*(f"{path}: {problem}" for problem in error.problems)) from None
    except (struct.error, ValueError, OSError, LookupError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(damaged(path, f"a GGUF file ({shortened(error)})")) from None


class _Reader:
    """Reads the values of a header one after another."""

    def __init__(self, memory: mmap.mmap):
        self._memory, self._at = memory, 0

    def header(self) -> GgufHeader:
        if self._bytes(4) != b"GGUF":
            raise CheckpointError("not a GGUF file by its first bytes; download it again")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version {version}, expected 2 or 3, little-endian; convert it with llama.cpp")
        num_tensors, num_values = self._count("<Q", 16), self._count("<Q", 13)
        metadata = {}
        for _ in range(num_values):
            key = self._string()
            metadata[key] = self._value(self._scalar("<I"))
        places = [self._tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            raise CheckpointError(f"general.alignment is {shortened(alignment)}, expected a small positive number")
        data = -(-self._at // alignment) * alignment
        tensors = {name: GgufTensor(shape, kind, data + offset) for name, shape, kind, offset in places}
        self._check(tensors, len(places))
        return GgufHeader(metadata, tensors)

    def _check(self, tensors: Mapping[str, GgufTensor], count: int) -> None:
        if len(tensors) < count:
            raise CheckpointError("two tensors of one name; do not trust this file")
        for name, tensor in tensors.items():
            if tensor.start + tensor.nbytes > len(self._memory):
                size, end = len(self._memory), tensor.start + tensor.nbytes
                raise CheckpointError(
                    f"truncated or corrupt: {shortened(name)} ends at byte {end} of {size}; download it again"
                )

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dims = self._string(), self._scalar("<I")
        if not 1 <= dims <= _MAX_DIMS:
            raise CheckpointError(f"{shortened(name)} has {dims} axes, expected 1 to {_MAX_DIMS}; download it again")
        shape = tuple(self._scalar("<Q") for _ in range(dims))[::-1]
        number, offset = self._scalar("<I"), self._scalar("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise CheckpointError(f"{shortened(name)} is of GGUF type {number}, which the gguf package lacks") from None
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise CheckpointError(f"{shortened(name)} has rows of {shape[-1]}, which {kind.name} does not divide")
        return name, shape, kind, offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind][0])
        inner = self._scalar("<I")
        if inner == _STRING:
            return [self._string() for _ in range(self._count("<Q", 8))]
        if inner == _ARRAY:
            raise CheckpointError("an array of arrays in its metadata, which no model needs; download it again")
        dtype = np.dtype(_SCALARS[inner][1])
        count = self._count("<Q", dtype.itemsize)
        return np.frombuffer(self._bytes(count * dtype.itemsize), dtype)

    def _count(self, form: str, least_bytes: int) -> int:
        """Returns a number of items, of which each has at least so many bytes, so that all can be in the file."""
        count = self._scalar(form)
        if count * least_bytes > len(self._memory):
            raise ValueError(f"{count} items of at least {least_bytes} bytes")
        return count

    def _string(self) -> str:
        return self._bytes(self._scalar("<Q")).decode("utf-8", errors="replace")

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack(form, self._bytes(struct.calcsize(form)))
        return value

    def _bytes(self, count: int) -> bytes:
        if count > len(self._memory) - self._at:
            raise ValueError(f"{count} bytes at {self._at}, beyond its end")
        found = self._memory[self._at : self._at + count]
        self._at += count
        return found
