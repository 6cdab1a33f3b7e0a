"""The 4-bit weights of bitsandbytes: values of a table (NF4 or FP4), and the largest magnitude of each block of them.

Source: Dettmers et al., QLoRA (arXiv 2305.14314), sections 3.1 and 3.2 (double quantisation: the magnitudes are
themselves 8-bit values of a table, in blocks, around a mean).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tracing_jax.checkpoint.quantised.found import Found, QuantisedError
from tracing_jax.checkpoint.quantised.packing import elements, words_of
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensors import TensorStore

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class FourBit:
    """A weight, stored as bytes of two values, the high four bits first, in the order of the flat weight.

    Attributes:
      store: the tensors of the file.
      name: of the bytes.
      shape: of the weight.
      block: values that share a magnitude.
      nested_block: magnitudes that share another; 0 where they are stored as they are.
      nested_offset: what is added to magnitudes of a nested weight.
    """

    store: TensorStore
    name: str
    shape: tuple[int, ...]
    block: int
    nested_block: int = 0
    nested_offset: float = 0.0
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = bounds_of(index, self.shape)
        rows, width = bounds[0], elements(self.shape[1:])
        flat = self._flat(rows.start * width, max(rows.start, rows.stop) * width)
        whole = flat.reshape(-1, *self.shape[1:])
        return np.ascontiguousarray(whole[(slice(None), *bounds[1:])])

    def _flat(self, start: int, stop: int) -> np.ndarray:
        found, within = words_of(slice(start, stop), 2)
        packed = self._read_flat(self.name, found)
        values = np.stack([packed >> 4, packed & 15], -1).reshape(-1)[within]
        table = self.store.read(f"{self.name}.quant_map").astype(np.float32)
        blocks, within = words_of(slice(start, stop), self.block)
        return table[values] * np.repeat(self._magnitudes(blocks), self.block)[within]

    def _magnitudes(self, blocks: slice) -> np.ndarray:
        stored = self._read_flat(f"{self.name}.absmax", blocks)
        if not self.nested_block:
            return stored.astype(np.float32)
        outer, within = words_of(blocks, self.nested_block)
        table = self.store.read(f"{self.name}.nested_quant_map").astype(np.float32)
        scales = self._read_flat(f"{self.name}.nested_absmax", outer).astype(np.float32)
        return table[stored] * np.repeat(scales, self.nested_block)[within] + np.float32(self.nested_offset)

    def _read_flat(self, name: str, span: slice) -> np.ndarray:
        """Reads a range of a tensor of one axis, or of one long axis; what is read is the range."""
        shape = self.store.shape(name)
        axis = max(range(len(shape)), key=lambda axis: shape[axis])
        return self.store.read(name, (*(slice(None),) * axis, span)).ravel()


def find_four_bit(store: TensorStore, settings: Mapping[str, Any]) -> Found:
    """Returns the weights that have a quantisation state of bitsandbytes.

    Raises:
      QuantisedError: the state cannot be read, or does not fit.
    """
    found, names = Found("bitsandbytes"), set(store.names())
    for state_name in [name for name in store.names() if _STATE in name]:
        name = state_name.partition(_STATE)[0]
        state = _state(store, state_name)
        parts = {f"{name}.{part}" for part in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")} & names
        nested = f"{name}.nested_absmax" in parts
        if f"{name}.absmax" not in parts or f"{name}.quant_map" not in parts or name not in names:
            raise QuantisedError(f"{name} lacks parts of its bitsandbytes state; download it again")
        shape = tuple(state["shape"])
        offset, outer = (state["nested_offset"], state["nested_blocksize"]) if nested else (0.0, 0)
        tensor = FourBit(store, name, shape, state["blocksize"], outer, offset)
        _check(store, tensor)
        found.add(name, tensor, state_name, *parts)
    return found


def _state(store: TensorStore, name: str) -> dict[str, Any]:
    try:
        state = json.loads(store.read(name).astype(np.uint8).tobytes())
        sizes = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        if not all(type(size) is int and 0 < size < 1 << 40 for size in sizes):
            raise ValueError("sizes")
        state["nested_offset"] = float(state.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise QuantisedError(
            f"{name} is no state of bitsandbytes ({type(error).__name__}); download it again"
        ) from None
    return state


def _check(store: TensorStore, tensor: FourBit) -> None:
    count = elements(tensor.shape)
    blocks = -(-count // tensor.block)
    wanted = {tensor.name: -(-count // 2), f"{tensor.name}.absmax": blocks, f"{tensor.name}.quant_map": 16}
    if tensor.nested_block:
        wanted |= {f"{tensor.name}.nested_absmax": -(-blocks // tensor.nested_block)}
        wanted |= {f"{tensor.name}.nested_quant_map": 256}
    for name, number in wanted.items():
        if elements(store.shape(name)) != number or max(store.shape(name), default=0) != number:
            raise QuantisedError(f"{name} has shape {store.shape(name)}, expected {number} values")
    if store.dtype(tensor.name) != np.uint8 or (
        tensor.nested_block and store.dtype(f"{tensor.name}.absmax") != np.uint8
    ):
        raise QuantisedError(f"{tensor.name} or its magnitudes are not stored as bytes")
