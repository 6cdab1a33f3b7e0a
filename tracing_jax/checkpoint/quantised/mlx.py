"""The affine format of MLX: integers of 2 to 8 bits with a scale and a bias for each group of inputs.

Source: the documentation of `mlx.core.quantize`: a weight is `scale * q + bias`, and integers follow one another in the
bits of words of 32, lowest first. transformers calls the biases `qbiases`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tracing_jax.checkpoint.quantised.found import Found, QuantisedError
from tracing_jax.checkpoint.quantised.packing import period, scale_bounds, scale_of_each, unpacked, words_of
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import shortened

_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class MlxAffine:
    """A weight `[..., out, in]`, stored as words `[..., out, in * bits / 32]`.

    Attributes:
      store: the tensors of the file.
      name: of the words.
      scales: name of the scales `[..., out, in / group_size]`.
      biases: name of what is added, in their shape.
      bits: of a weight.
      group_size: inputs that share a scale.
    """

    store: TensorStore
    name: str
    scales: str
    biases: str
    bits: int
    group_size: int
    dtype: ClassVar[np.dtype] = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, words = self.store.shape(self.name)
        return (*lead, words * 32 // self.bits)

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = bounds_of(index, self.shape)
        *lead, inputs = bounds
        words, within = words_of(inputs, *period(self.bits))
        values = unpacked(self.store.read(self.name, (*lead, words)), self.bits, -1)[..., within]
        sizes = (*(1 for _ in lead), self.group_size)
        scales, biases = (
            scale_of_each(self.store.read(name, scale_bounds(bounds, sizes)).astype(np.float32), bounds, sizes)
            for name in (self.scales, self.biases)
        )
        return values.astype(np.float32) * scales + biases


def find_mlx(store: TensorStore, settings: Mapping[str, Any]) -> Found:
    """Returns the weights that are words of uint32 beside `scales` and `biases`.

    Raises:
      QuantisedError: the config does not say how many bits a weight has, or the shapes do not fit.
    """
    names, found = set(store.names()), Found("MLX")
    for name in [name for name in store.names() if name.endswith(".weight") and store.dtype(name) == np.uint32]:
        module = name.removesuffix(".weight")
        scales = f"{module}.scales"
        biases = next((b for b in (f"{module}.biases", f"{module}.qbiases") if b in names), None)
        if scales not in names or biases is None:
            continue
        bits, group_size = _bits_and_group(settings, module)
        *lead, words = store.shape(name) or (0,)
        inputs = words * 32 // bits
        wanted = (*lead, inputs // group_size)
        whole = words % period(bits)[1] == 0 and inputs % group_size == 0
        if not whole or not lead or not store.shape(scales) == store.shape(biases) == wanted:
            raise QuantisedError(
                f"{name} {store.shape(name)} and {scales} {store.shape(scales)} are no weight of {bits} bits in groups "
                f"of {group_size}, as config.json says"
            )
        found.add(name, MlxAffine(store, name, scales, biases, bits, group_size), scales, biases)
    return found


def _bits_and_group(settings: Mapping[str, Any], module: str) -> tuple[int, int]:
    """Returns the bits of a weight and the size of a group, which the config may give for a module of its own."""
    own = next((part for key, part in settings.items() if isinstance(part, Mapping) and _is_end(module, key)), settings)
    found = tuple(own.get(name, settings.get(name)) for name in ("bits", "group_size"))
    if found[0] not in _BITS or type(found[1]) is not int or found[1] < 1:
        raise QuantisedError(
            f"{module}.weight is stored as MLX does, and config.json says bits {shortened(found[0])} and group_size "
            f"{shortened(found[1])} of it: {', '.join(map(str, _BITS))} bits in groups are read"
        )
    return found  # type: ignore[return-value]


def _is_end(module: str, key: str) -> bool:
    """Returns whether a module is the one of this name, with or without what is in front of it."""
    return module == key or module.endswith(f".{key}") or key.endswith(f".{module}")
