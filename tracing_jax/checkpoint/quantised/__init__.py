"""Quantised weights as floats: each format is a module, and a slice of a weight is dequantised as it is read.

What is found in the files decides; the config is asked for what they do not say. A format that is not known is refused
by its name: read as something else its numbers would be wrong without a sign of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from tracing_jax.checkpoint.derived_tensors import Derived, DerivedTensors
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.quantised.bitsandbytes import find_four_bit
from tracing_jax.checkpoint.quantised.found import Found
from tracing_jax.checkpoint.quantised.fp4 import find_mxfp4, find_nvfp4
from tracing_jax.checkpoint.quantised.int4 import AWQ_VERSIONS, GPTQ_BITS, find_gptq_or_awq
from tracing_jax.checkpoint.quantised.left_over import method_of, refuse_left_over, settings_of
from tracing_jax.checkpoint.quantised.mlx import find_mlx
from tracing_jax.checkpoint.quantised.pack_quantized import PACKED_BITS, find_packed
from tracing_jax.checkpoint.quantised.scale_names import refuse_unknown_scales
from tracing_jax.checkpoint.quantised.scaled import find_float8, find_int8, find_quanto, is_float8, refuse_lost_scales
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import counted, listed_and, shortened

__all__ = ["FORMATS", "IGNORED", "dequantised"]

Finder = Callable[[TensorStore, Mapping[str, Any]], Found]

_FINDERS: tuple[Finder, ...] = (
    find_gptq_or_awq, find_four_bit, find_mxfp4, find_nvfp4, find_packed, find_mlx, find_quanto, find_float8, find_int8
)  # fmt: skip

FORMATS = (
    "FP8 and MXFP8 (per tensor, per row, in blocks)", "int8 (bitsandbytes, compressed-tensors)",
    "quanto (8 bits)",
    f"GPTQ ({listed_and(GPTQ_BITS)} bits)",
    f"AWQ ({listed_and(AWQ_VERSIONS)})",
    "bitsandbytes NF4 and FP4, nested or not",
    f"compressed-tensors ({listed_and(PACKED_BITS)} bits)", "MXFP4 (gpt-oss, DeepSeek-V4, compressed-tensors)",
    "NVFP4 (compressed-tensors, ModelOpt)", "MLX (affine)",
)  # fmt: skip
"""What is dequantised, for people."""

IGNORED = "config.json has a quantization_config"
"""How the note begins on one of which nothing was found in the files."""

_QUANTISE_AS_THEY_RUN = ("bitnet",)
"""Methods under which plain weights are not those that the model computes with."""


def dequantised(store: TensorStore, config: Mapping[str, Any]) -> tuple[TensorStore, list[str]]:
    """Returns the tensors with quantised weights as floats, and a note on the format.

    Args:
      store: the tensors as they are stored.
      config: the content of the model's `config.json`.

    Raises:
      CheckpointError: a format that is not read, by its name, or parts of one that do not fit.
    """
    settings = settings_of(config)
    derived: dict[str, Derived] = {}
    used: set[str] = set()
    stored, notes = set(store.names()), []
    for find in _FINDERS:
        found = find(store, settings)
        new = found.derived.keys() - derived.keys() - used  # the scales of one format are tensors of another
        if new:
            how = counted(len(new), "weight is dequantised as it is", "weights are dequantised as they are")
            notes.append(f"{how} read: {found.format}")
        derived |= {name: found.derived[name] for name in new}
        used |= found.used
    used -= derived.keys()
    refuse_left_over(store, settings, derived.keys() | used, FORMATS)
    float8 = {name for name in stored & derived.keys() if is_float8(store.dtype(name))}
    refuse_unknown_scales(store, float8, used)
    refuse_lost_scales(store, float8, used)
    method = settings.get("quant_method")
    if not derived and method in _QUANTISE_AS_THEY_RUN:
        raise CheckpointError(
            f"quant_method {shortened(method)}: the model quantises these weights and its activations as it runs, "
            "which is not computed here; use a checkpoint without quantization_config if there is one"
        )
    if not derived:
        return store, [f"{IGNORED} ({method_of(settings)}), but no weight is quantised"] if settings else []
    return DerivedTensors(store, derived, used), notes
