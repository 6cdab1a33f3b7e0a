"""How tools name the scales of a weight, and what is beside a weight that may be scales and is not known.

A name that is not known costs more than an error: weights of 8 bits without their scales are numbers like any others.
"""

from collections import defaultdict
from collections.abc import Collection

import ml_dtypes
import numpy as np

from tracing_jax.checkpoint.name_patterns import is_of_activations
from tracing_jax.checkpoint.quantised.found import QuantisedError
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import listed

_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_AFTER_NAME = ("_scale_inv", "_scale")
_OF_MODULE = ("scale", "qscale_weight")
"""Beside `weight`: DeepSeek-V4's name, and Mistral's."""

_MAY_BE_SCALES = ("scal", "absmax", "amax")


def scales_of(name: str, names: Collection[str]) -> str | None:
    """Returns the name of the scales of a tensor; None if it has none under a known name."""
    module = name.removesuffix("weight") if name.endswith(".weight") else None
    candidates = [name + ending for ending in _AFTER_NAME]
    candidates += [module + ending for ending in _OF_MODULE] if module else []
    return next((found for found in candidates if found in names), None)


def are_powers(dtype: np.dtype) -> bool:
    """Returns whether scales of this dtype are powers of two, stored as exponents (E8M0), perhaps as mere bytes."""
    return dtype in (_E8M0, np.uint8)


def scale_values(stored: np.ndarray) -> np.ndarray:
    """Returns scales as float32; bytes are exponents plus 127 (OCP Microscaling Formats, version 1.0: E8M0)."""
    return (stored.view(_E8M0) if stored.dtype == np.uint8 else stored).astype(np.float32)


def check_scales(store: TensorStore, scales: str) -> None:
    """Raises a `QuantisedError` if scales are integers other than bytes, which would be read as factors."""
    dtype = store.dtype(scales)
    if dtype != np.uint8 and dtype.kind in "iub":
        raise QuantisedError(f"{scales} is {dtype}: scales are floats, or bytes that hold exponents (E8M0)")


def refuse_unknown_scales(store: TensorStore, weights: Collection[str], known: Collection[str]) -> None:
    """Makes sure that no tensor beside weights of 8 bits may be their scales without being known as such.

    Args:
      store: the tensors.
      weights: names of the weights.
      known: names of the tensors that are understood.

    Raises:
      QuantisedError: names them.
    """
    parents: dict[str, str] = {}
    for name in weights:
        for parent in (name.rpartition(".")[0], name):
            parents[parent] = name
    found = defaultdict(list)
    for name in store.names():
        parent, _, last = name.rpartition(".")
        if parent not in parents or name in known or name in weights or is_of_activations(name):
            continue
        if any(part in last.lower() for part in _MAY_BE_SCALES):
            found[parents[parent]].append(name)
    if found:
        weight, beside = next(iter(found.items()))
        raise QuantisedError(
            f"{weight} is {store.dtype(weight)}, and beside it is {listed(beside, 3)}, which is no known name of "
            "scales: without them its numbers would be wrong; use the original checkpoint"
        )
