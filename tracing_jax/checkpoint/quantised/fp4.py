"""Weights of 4-bit floats (E2M1) with a scale for each block of a row: MXFP4 and NVFP4.

Source: OCP Microscaling Formats 1.0 (MXFP4: 32 values share a power of two); gpt-oss model card (arXiv 2508.10925) for
its tensors `blocks` and `scales`; NVIDIA's description of NVFP4 (16 values share an E4M3 scale, and all a float32). Of
the two layouts of NVFP4 the one of compressed-tensors stores the global scale as its reciprocal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tracing_jax.checkpoint.quantised.found import Found, QuantisedError
from tracing_jax.checkpoint.quantised.packing import FP4, unpacked, words_of
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

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, groups, _ = self.store.shape(self.blocks)
        return (*lead, groups * 32, rows)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16)

    def read(self, index: Index = ()) -> np.ndarray:
        *lead, inner, rows = bounds_of(index, self.shape)
        groups, within = words_of(inner, 32)
        blocks = self.store.read(self.blocks, (*lead, rows, groups))
        exponents = self.store.read(self.scales, (*lead, rows, groups)).astype(np.int32) - 127
        values = np.ldexp(FP4[unpacked(blocks, 4, -1)], exponents[..., None])
        flat = values.reshape(*values.shape[:-2], values.shape[-2] * 32)[..., within]
        return np.ascontiguousarray(flat.swapaxes(-1, -2)).astype(self.dtype)


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

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, half = self.store.shape(self.packed)
        return (*lead, half * 2)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

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
    """Returns the tensors that are stored as `NAME_blocks` and `NAME_scales`.

    Raises:
      QuantisedError: the two do not fit.
    """
    names, found = set(store.names()), Found("MXFP4")
    for blocks in [name for name in names if name.endswith("_blocks")]:
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        if scales not in names:
            continue
        shape = store.shape(blocks)
        if len(shape) < 3 or shape[-1] != 16 or store.shape(scales) != shape[:-1]:
            raise QuantisedError(f"{blocks} {shape} and {scales} {store.shape(scales)} are no MXFP4 tensor")
        found.add(name, Mxfp4(store, blocks, scales), blocks, scales)
    return found


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
            *lead, half = store.shape(packed)
            if store.shape(scales) != (*lead, half // 8) or half % 8:
                raise QuantisedError(f"{scales} {store.shape(scales)} are no scales of {packed} {(*lead, half)}")
            tensor = Nvfp4(store, packed, scales, overall, is_reciprocal)
            found.add(name, tensor, *{packed, scales, overall} - {name})
    return found
