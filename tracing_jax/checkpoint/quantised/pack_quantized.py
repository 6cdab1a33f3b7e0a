"""The `pack-quantized` layout of compressed-tensors: integers of 2 to 8 bits in words of int32.

Source: its `pack_to_int32`: integers follow one another in the bits of words, lowest first, without gaps. A weight is
`scale * (q - zero)`, for groups of inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tracing_jax.checkpoint.quantised.found import Found, QuantisedError
from tracing_jax.checkpoint.quantised.int4 import expect_shape, groups_of, require
from tracing_jax.checkpoint.quantised.packing import (
    block_sizes,
    period,
    scale_bounds,
    scale_of_each,
    unpacked,
    words_of,
)
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import listed_and

PACKED_BITS = (2, 3, 4, 5, 6, 7, 8)
"""That are read."""


@dataclass(frozen=True)
class Packed:
    """A weight `[out, in]` of compressed-tensors, stored as words `[out, in * bits / 32]`, offset by half the range.

    Attributes:
      store: the tensors of the file.
      name: of the weight, with which those of its parts begin.
      shape: of the weight.
      bits: of a weight.
      sizes: how many units share a scale on each axis, where there is no `g_idx`.
      has_zeros: whether there are zero points.
      has_groups: whether `g_idx` gives the group of each input.
    """

    store: TensorStore
    name: str
    shape: tuple[int, int]
    bits: int
    sizes: tuple[int, ...]
    has_zeros: bool
    has_groups: bool = False
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = rows, columns = bounds_of(index, self.shape)
        words, within = words_of(columns, *period(self.bits))
        values = unpacked(self.store.read(f"{self.name}_packed", (rows, words)), self.bits, 1)[:, within]
        groups = (rows, slice(None)) if self.has_groups else scale_bounds(bounds, self.sizes)
        scales = self._of_inputs(self.store.read(f"{self.name}_scale", groups).astype(np.float32), bounds)
        # Stored zero points are offset as the weights are; without them the zero is the middle of the range.
        zeros = self._of_inputs(self._zeros(groups), bounds) if self.has_zeros else 1 << (self.bits - 1)
        return scales * (values - zeros).astype(np.float32)

    def _of_inputs(self, of_groups: np.ndarray, bounds: Index) -> np.ndarray:
        if self.has_groups:
            return of_groups[:, groups_of(self.store, f"{self.name}_g_idx", bounds[1], of_groups.shape[1])]
        return scale_of_each(of_groups, bounds, self.sizes)

    def _zeros(self, groups: Index) -> np.ndarray:
        name = f"{self.name}_zero_point"
        if self.store.dtype(name) != np.int32:
            return self.store.read(name, groups).astype(np.int32) + (1 << (self.bits - 1))
        words, within = words_of(groups[0], *period(self.bits))
        return unpacked(self.store.read(name, (words, groups[1])), self.bits, 0)[within]


def find_packed(store: TensorStore, settings: Mapping[str, Any]) -> Found:
    """Returns the weights that compressed-tensors stores as `weight_packed` words of int32.

    Raises:
      QuantisedError: parts that are missing or do not fit.
    """
    found, names, stated = Found("compressed-tensors"), set(store.names()), _stated_bits(settings)
    for packed in [name for name in store.names() if name.endswith(".weight_packed")]:
        if store.dtype(packed) != np.int32:
            continue
        name = packed.removesuffix("_packed")
        require(names, name, ("_scale", "_shape"))
        rows, columns = (int(size) for size in store.read(f"{name}_shape").ravel()[:2])
        words = store.shape(packed)[1]
        bits = next((b for b in PACKED_BITS if _words(columns, b) == words and (not stated or b in stated)), None)
        sizes = block_sizes((rows, columns), store.shape(f"{name}_scale"))
        if bits is None or sizes is None or store.shape(packed)[0] != rows:
            raise QuantisedError(
                f"{packed} {store.shape(packed)} does not hold {(rows, columns)} integers of "
                f"{listed_and(stated or PACKED_BITS)} bits"
            )
        zeros = f"{name}_zero_point"
        if zeros in names and store.dtype(zeros) == np.int32:
            expect_shape(store, zeros, (_words(rows, bits) or 0, store.shape(f"{name}_scale")[1]))
        parts = {name + part for part in ("_packed", "_scale", "_shape", "_zero_point", "_g_idx")} & names
        has_groups = f"{name}_g_idx" in names and _is_set(store, f"{name}_g_idx", columns)
        tensor = Packed(store, name, (rows, columns), bits, sizes, zeros in names, has_groups)
        found.add(name, tensor, *parts)
    return found


def _stated_bits(settings: Mapping[str, Any]) -> list[Any]:
    """Returns the bits that the config gives to weights: old versions packed some numbers of bits with gaps."""
    groups = settings.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    return [found["num_bits"] for found in weights if isinstance(found, dict) and found.get("num_bits") is not None]


def _words(count: int, bits: int) -> int | None:
    """Returns how many words hold so many integers; None where they end within the words that go together."""
    per_period, words = period(bits)
    return -(-count // per_period) * words if words == 1 or count % per_period == 0 else None


def _is_set(store: TensorStore, name: str, columns: int) -> bool:
    """Returns whether `g_idx` gives groups: all are -1 where inputs are in their order."""
    expect_shape(store, name, (columns,))
    return columns > 0 and bool((store.read(name, (slice(0, 1),)) != -1).all())
