"""The tensors of a GGUF file, dequantised slice by slice: rows and blocks that a slice does not touch are not read."""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.gguf.header import GgufHeader
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of

_PLAIN = {
    GGMLQuantizationType.F64: np.dtype("<f8"),
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    GGMLQuantizationType.I8: np.dtype("i1"),
    GGMLQuantizationType.I16: np.dtype("<i2"),
    GGMLQuantizationType.I32: np.dtype("<i4"),
    GGMLQuantizationType.I64: np.dtype("<i8"),
}


class GgufFile:
    """A lazy `TensorStore` over one GGUF file, under the names that llama.cpp gives; quantised tensors are float32."""

    def __init__(self, path: Path, header: GgufHeader):
        """Takes the tensors of a header.

        Raises:
          CheckpointError: a type that the gguf package does not dequantise.
        """
        self._path, self._tensors = path, header.tensors
        for kind in {tensor.kind for tensor in self._tensors.values()} - _PLAIN.keys():
            try:
                dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            except NotImplementedError:
                raise CheckpointError(f"{path}: tensors of type {kind.name} cannot be dequantised here") from None

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return _PLAIN.get(self._tensors[name].kind, np.dtype(np.float32))

    def files(self) -> tuple[Path, ...]:
        return (self._path,)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A copy of the tensor `name`, or of its slice; of quantised rows only the blocks that it touches are read."""
        tensor = self._tensors[name]
        *rows, columns = bounds_of(index, tensor.shape)
        block, size = GGML_QUANT_SIZES[tensor.kind]
        first, last = columns.start // block, -(-columns.stop // block)
        shape = (*tensor.shape[:-1], tensor.row_bytes)
        if 0 in shape:
            return np.zeros([max(0, bound.stop - bound.start) for bound in (*rows, columns)], self.dtype(name))
        stored = np.memmap(self._path, np.uint8, "r", tensor.start, shape)
        blocks = np.ascontiguousarray(stored[(*rows, slice(first * size, last * size))])
        if tensor.kind in _PLAIN:
            return blocks.view(_PLAIN[tensor.kind])
        if not blocks.size:
            return np.zeros((*blocks.shape[:-1], max(0, columns.stop - columns.start)), np.float32)
        with np.errstate(all="ignore"):  # scales of damaged files may be NaN, which is found when they are used
            values = dequantize(blocks, tensor.kind)
        return np.ascontiguousarray(values[..., columns.start - first * block : columns.stop - first * block])

    def read_many(self, requests: Sequence[tuple[str, Index]]) -> list[np.ndarray]:
        return [self.read(name, index) for name, index in requests]

    def read_into(self, out: np.ndarray, name: str, index: Index = ()) -> None:
        out[...] = self.read(name, index)
