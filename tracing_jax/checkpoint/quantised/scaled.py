"""Weights of 8 bits with a scale for the tensor, for each row, or for each block: FP8 and int8.

Source: DeepSeek-V3 Technical Report (arXiv 2412.19437), section 3.3.2, whose `weight_scale_inv` is what a weight is
multiplied by; OCP Microscaling Formats 1.0 (MXFP8: 32 values share a power of two); compressed-tensors
(`weight_scale`); bitsandbytes' LLM.int8 (arXiv 2208.07339), whose `SCB` is the largest magnitude of each row, 127
steps.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from tracing_jax.checkpoint.derived_tensors import Cast
from tracing_jax.checkpoint.quantised.found import Found, QuantisedError
from tracing_jax.checkpoint.quantised.packing import block_sizes, scale_bounds, scale_of_each
from tracing_jax.checkpoint.quantised.scale_names import are_powers, check_scales, scale_values, scales_of
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import counted, listed, shortened

_FLOAT32 = np.dtype(np.float32)
_FLOAT8 = {
    np.dtype(kind)
    for kind in (
        ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2fnuz
    )
}  # fmt: skip


@dataclass(frozen=True)
class Scaled:
    """A stored tensor times its scales, in float32.

    Attributes:
      store: the tensors of the file.
      name: of the tensor.
      scales: of the tensor of its scales.
      sizes: how many units of the tensor share a scale on each axis.
      factor: multiplies all.
      zeros: of the tensor of what is subtracted first, in the shape of the scales; None if nothing is.
    """

    store: TensorStore
    name: str
    scales: str
    sizes: tuple[int, ...]
    factor: float = 1.0
    zeros: str | None = None
    dtype: ClassVar[np.dtype] = _FLOAT32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.store.shape(self.name)

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = bounds_of(index, self.shape)
        values = self.store.read(self.name, bounds).astype(np.float32)
        if self.zeros is not None:
            values = values - scale_of_each(self._of_blocks(self.zeros, bounds).astype(np.float32), bounds, self.sizes)
        scales = scale_values(self._of_blocks(self.scales, bounds)) * np.float32(self.factor)
        return values * scale_of_each(scales, bounds, self.sizes)

    def _of_blocks(self, name: str, bounds: Index) -> np.ndarray:
        """Returns the scales, or zeros, of the blocks of a slice, with an axis for each of the tensor."""
        shape = self.store.shape(name)
        # Scales of a row may lack the axis of the columns; those of a tensor may lack all.
        missing = len(self.shape) - len(shape)
        if shape and shape[0] == self.shape[0] and len(shape) == 1 and missing:
            return self.store.read(name, bounds[:1]).reshape(-1, *(1,) * missing)
        if missing:
            return self.store.read(name).reshape((1,) * missing + shape)
        return self.store.read(name, scale_bounds(bounds, self.sizes))


def is_float8(dtype: np.dtype) -> bool:
    """Returns whether a dtype is a float of eight bits."""
    return dtype in _FLOAT8


def find_float8(store: TensorStore, settings: Mapping[str, Any]) -> Found:
    """Returns the tensors of 8-bit floats with their scales; one without scales is what its values say.

    Raises:
      QuantisedError: scales that do not fit their tensor, or are of a dtype that scales do not have.
    """
    names = set(store.names())
    found = Found("FP8")
    for name in [name for name in store.names() if is_float8(store.dtype(name))]:
        if (scales := scales_of(name, names)) is None:
            found.derived[name] = Cast(store, name, _FLOAT32)
            continue
        check_scales(store, scales)
        block = settings.get("weight_block_size") or ()
        found.add(name, Scaled(store, name, scales, _sizes(store, name, scales, block)), scales)
    return found


def refuse_lost_scales(store: TensorStore, weights: Collection[str], used: Collection[str]) -> None:
    """Raises a `QuantisedError` if some matrices of 8-bit floats have scales and others have none: these are lost."""
    # Of experts in one tensor the name has no suffix. Scales of other formats can be 8-bit floats as well.
    matrices = [n for n in sorted(weights) if len(store.shape(n)) > 1 and "scale" not in n.rpartition(".")[2]]
    lost = [name for name in matrices if scales_of(name, used) is None]
    if lost and len(lost) < len(matrices):
        others = counted(len(matrices) - len(lost), "other has", "others have")
        raise QuantisedError(f"{listed(lost, 3)}: FP8 without scales, which {others}; download it again")


def find_int8(store: TensorStore, settings: Mapping[str, Any]) -> Found:
    """Returns the int8 weights of bitsandbytes and of compressed-tensors.

    Raises:
      QuantisedError: scales that do not fit their tensor, or weights in an order that only a GPU's library knows.
    """
    names = set(store.names())
    found = Found("int8")
    for name in [name for name in store.names() if store.dtype(name) == np.int8 and name.endswith(".weight")]:
        stem = name.removesuffix("weight")
        for scales, factor in ((f"{stem}SCB", 1 / 127), (f"{name}_scale", 1.0)):
            if scales in names and not are_powers(store.dtype(scales)):
                check_scales(store, scales)
                zeros = f"{name}_zero_point" if f"{name}_zero_point" in names else None
                if zeros and (store.shape(zeros) != store.shape(scales) or store.dtype(zeros) != np.int8):
                    raise QuantisedError(f"{zeros} {store.shape(zeros)} are no int8 of the shape of {scales}")
                _refuse_tiles(store, {f"{name}_format", f"{stem}weight_format"} & names)
                tensor = Scaled(store, name, scales, _sizes(store, name, scales, ()), factor, zeros)
                found.add(name, tensor, *({scales, f"{name}_format", f"{stem}weight_format", zeros or scales} & names))
    return found


def _refuse_tiles(store: TensorStore, formats: Collection[str]) -> None:
    """Raises a `QuantisedError` if bitsandbytes says of a weight that it is not stored row by row.

    Up to 0.44 it kept weights after a forward pass in tiles: 1 col32, 2 col_turing, 3 col_ampere; 0 is row by row.
    """
    for name in formats:
        value = np.ravel(store.read(name))
        if len(value) != 1 or int(value[0]) != 0:
            raise QuantisedError(
                f"{name} is {shortened(str(value.tolist()), 40)}: the weights are stored in tiles of a GPU's library, "
                "not row by row (0); save the model again before a forward pass, or with bitsandbytes 0.45 or later"
            )


def find_quanto(store: TensorStore, settings: Mapping[str, Any]) -> Found:
    """Returns the weights of 8 bits that quanto stores as `weight._data` and `weight._scale`.

    Raises:
      QuantisedError: scales that do not fit their tensor.
    """
    names, found = set(store.names()), Found("quanto")
    for data in [name for name in store.names() if name.endswith("._data")]:
        name = data.removesuffix("._data")
        scales = f"{name}._scale"
        is_known = store.dtype(data) == np.int8 or is_float8(store.dtype(data))
        if is_known and scales in names and f"{name}._shift" not in names:
            check_scales(store, scales)
            found.add(name, Scaled(store, data, scales, _sizes(store, data, scales, ())), data, scales)
    return found


def _sizes(store: TensorStore, name: str, scales: str, block: Sequence[int]) -> tuple[int, ...]:
    shape, scale_shape = store.shape(name), store.shape(scales)
    if len(scale_shape) == 1 and len(shape) > 1 and scale_shape[0] == shape[0]:
        return (1, *shape[1:])
    if all(size == 1 for size in scale_shape) and len(scale_shape) <= len(shape):
        return tuple(max(size, 1) for size in shape)
    sizes = block_sizes(shape, scale_shape, tuple(block)[-len(shape) :])
    if sizes is None:
        raise QuantisedError(f"{scales} {scale_shape} are no scales of blocks of {name} {shape}")
    return sizes
