"""Weights of 4-bit floats (E2M1) with a scale for each block of a row: MXFP4 and NVFP4.

Source: OCP Microscaling Formats 1.0 (MXFP4: 32 values share a power of two); gpt-oss model card (arXiv 2508.10925) for
its tensors `blocks` and `scales`; for weights whose rows are packed as they are, `mxfp4-pack-quantized` of
compressed-tensors, and the experts of DeepSeek-V4, whose bytes are stored as int8; NVIDIA's description of NVFP4 (16
values share an E4M3 scale, and all a float32). Of the two layouts of NVFP4 the one of compressed-tensors stores the
global scale as its reciprocal.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from tracing_jax.checkpoint.quantised.found import Found, QuantisedError
from tracing_jax.checkpoint.quantised.packing import FP4, unpacked, words_of
from tracing_jax.checkpoint.quantised.scale_names import are_powers, scale_values, scales_of
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensors import TensorStore


@dataclass(frozen=True)
class Mxfp4:
    """Experts `[..., in, out]` of gpt-oss, stored as blocks `[..., out, groups, 16]` and scales `[..., out, groups]`.

    Every value is exact in bfloat16 where the scale is neither tiny nor huge.
    """

    store: TensorStore
    blocks: str
    scales: str
    dtype: ClassVar[np.dtype] = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, groups, _ = self.store.shape(self.blocks)
        return (*lead, groups * 32, rows)

    def read(self, index: Index = ()) -> np.ndarray:
        *lead, inner, rows = bounds_of(index, self.shape)
        groups, within = words_of(inner, 32)
        blocks = self.store.read(self.blocks, (*lead, rows, groups))
        scales = scale_values(self.store.read(self.scales, (*lead, rows, groups)))
        values = FP4[unpacked(blocks, 4, -1)] * scales[..., None]
        flat = values.reshape(*values.shape[:-2], values.shape[-2] * 32)[..., within]
        return np.ascontiguousarray(flat.swapaxes(-1, -2)).astype(self.dtype)


@dataclass(frozen=True)
class Mxfp4Rows:
    """A weight `[..., out, in]`, stored as bytes `[..., out, in / 2]` and scales `[..., out, in / 32]`."""

    store: TensorStore
    packed: str
    scales: str
    dtype: ClassVar[np.dtype] = np.dtype(ml_dtypes.bfloat16)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, half = self.store.shape(self.packed)
        return (*lead, half * 2)

    def read(self, index: Index = ()) -> np.ndarray:
        *lead, columns = bounds_of(index, self.shape)
        groups, within = words_of(columns, 32)
        packed = self.store.read(self.packed, (*lead, slice(groups.start * 16, groups.stop * 16))).view(np.uint8)
        scales = scale_values(self.store.read(self.scales, (*lead, groups)))
        values = FP4[unpacked(packed, 4, -1)] * np.repeat(scales, 32, -1)
        return np.ascontiguousarray(values[..., within]).astype(self.dtype)


@dataclass(frozen=True)
class Nvfp4:
    """A weight `[out, in]` of which two values share a byte, 16 a scale, and all another.

    Attributes:
      store: the tensors of the file.
      packed: name of the bytes `[out, in / 2]`.
      scales: name of the E4M3 scales `[out, in / 16]`.
      overall: name of the float32 scale.
      is_reciprocal: whether values are divided by it.
    """

    store: TensorStore
    packed: str
    scales: str
    overall: str
    is_reciprocal: bool
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, half = self.store.shape(self.packed)
        return (*lead, half * 2)

    def read(self, index: Index = ()) -> np.ndarray:
        *lead, columns = bounds_of(index, self.shape)
        groups, within = words_of(columns, 16)
        packed = self.store.read(self.packed, (*lead, slice(groups.start * 8, groups.stop * 8)))
        scales = self.store.read(self.scales, (*lead, groups)).astype(np.float32)
        overall = self.store.read(self.overall).astype(np.float32).reshape(-1)[0]
        scales = scales / overall if self.is_reciprocal else scales * overall
        values = FP4[unpacked(packed, 4, -1)]
        return np.ascontiguousarray((values * np.repeat(scales, 16, -1))[..., within])


def find_mxfp4(store: TensorStore, settings: Mapping[str, Any]) -> Found:
    """Returns the tensors that are stored as `NAME_blocks` and `NAME_scales`, or as packed rows with exponents.

    Raises:
      QuantisedError: blocks and scales do not fit.
    """
    names, found = set(store.names()), Found("MXFP4")
    for blocks in [name for name in names if name.endswith("_blocks")]:
        name = blocks.removesuffix("_blocks")
        if (scales := f"{name}_scales") not in names:
            continue
        shape = store.shape(blocks)
        if len(shape) < 3 or shape[-1] != 16 or store.shape(scales) != shape[:-1]:
            raise QuantisedError(f"{blocks} {shape} and {scales} {store.shape(scales)} are no MXFP4 tensor")
        if store.dtype(blocks) != np.uint8 or not are_powers(store.dtype(scales)):
            raise QuantisedError(f"{blocks} or {scales} are not stored as bytes, as MXFP4 is")
        found.add(name, Mxfp4(store, blocks, scales), blocks, scales)
    _add_rows(store, names, found)
    return found


def _add_rows(store: TensorStore, names: set[str], found: Found) -> None:
    for packed in [name for name in names if name.endswith((".weight", ".weight_packed"))]:
        if store.dtype(packed) not in (np.uint8, np.int8):
            continue
        name = packed.removesuffix("_packed")
        scales = scales_of(name, names)
        if scales is None or f"{name}_global_scale" in names or not are_powers(store.dtype(scales)):
            continue
        if store.shape(scales) == _scales_shape(store, packed, 32):
            found.add(name, Mxfp4Rows(store, packed, scales), packed, scales)


def _scales_shape(store: TensorStore, packed: str, block: int) -> tuple[int, ...] | None:
    """Returns the shape of the scales of blocks of values of which a byte holds two; None if they are no rows."""
    shape = store.shape(packed)
    return (*shape[:-1], shape[-1] * 2 // block) if len(shape) > 1 and shape[-1] * 2 % block == 0 else None


def find_nvfp4(store: TensorStore, settings: Mapping[str, Any]) -> Found:
    """Returns the weights of NVFP4, in the layout of compressed-tensors or of ModelOpt.

    Raises:
      QuantisedError: scales that do not fit.
    """
    names, found = set(store.names()), Found("NVFP4")
    for scales in [name for name in names if name.endswith(".weight_scale")]:
        name = scales.removesuffix("_scale")
        for packed, overall, is_reciprocal in (
            (f"{name}_packed", f"{name}_global_scale", True),
            (name, f"{name}_scale_2", False),
        ):
            if not {packed, overall} <= names or store.dtype(packed) != np.uint8:
                continue
            if store.shape(scales) != _scales_shape(store, packed, 16):
                raise QuantisedError(
                    f"{scales} {store.shape(scales)} are no scales of {packed} {store.shape(packed)} in NVFP4"
                )
            for part in (scales, overall):
                if store.dtype(part).kind in "iub" or not math.prod(store.shape(part)):
                    raise QuantisedError(f"{part} is {store.dtype(part)} {store.shape(part)}, no scales of NVFP4")
            tensor = Nvfp4(store, packed, scales, overall, is_reciprocal)
            found.add(name, tensor, *{packed, scales, overall} - {name})
    return found
