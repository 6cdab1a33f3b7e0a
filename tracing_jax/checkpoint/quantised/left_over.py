"""What a config says of how its weights are quantised, and the tensors of a quantiser that no format here reads.

An integer is no weight by itself: read as one, without the scales that some tool stores under some name, its numbers
would be wrong without a sign of it.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from tracing_jax.checkpoint.name_patterns import is_table
from tracing_jax.checkpoint.quantised.found import QuantisedError
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.error_messages import counted, listed, shortened

_SETTINGS = ("quantization_config", "compression_config", "quantization")
_INSIDE = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where multimodal models keep the config of their language model."""

# How quantisers name what they store beside or instead of a weight.
_PARTS = (
    ".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".quant_map", ".SCB",
    ".codes", ".codebooks", ".Qidxs", ".W_q", ".weight_scale_2", "_blocks", ".trellis", ".weight_zero_point",
)  # fmt: skip

_BY_NAME = {
    r"\.weight\._(data|shift)(\..+)?": "quanto", r"\.q_(weight|scale|groups|perm|invperm)": "EXL2",
    r"\.(trellis|suh|svh)": "EXL3", r"\.W_q": "HQQ", r"\.Qidxs": "QuIP#", r"\.codebooks": "AQLM",
    r"\.(centroids\.weight|indices)": "VPTQ", r"\.B": "Marlin", r"[._]weight_qdata": "torchao",
    r"\.weight\.bitmask|\.bitmask": "compressed-tensors (sparse)", r"\.dense_weights|\.row_offsets": "SpQR",
}  # fmt: skip
"""Ends of the names of tensors -> the method that stores such, where the config does not say."""


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what a config says of how the weights are quantised; as in transformers, that of a text config counts.

    The key `quantization` is that of MLX, whose method has no other name.
    """
    for name in _SETTINGS:
        if isinstance(found := config.get(name), Mapping):
            return {"quant_method": "MLX", **found} if name == "quantization" else found
    inside = (settings_of(part) for name in _INSIDE if isinstance(part := config.get(name), Mapping))
    return next(filter(None, inside), {})


def method_of(settings: Mapping[str, Any]) -> str | None:
    """Returns the name of the method that a config gives, with its format if that has one; None if it gives none."""
    method = settings.get("quant_method") or settings.get("quant_type")
    kinds = ("format", "checkpoint_format", "packing_format", "mode")
    kind = next((settings[name] for name in kinds if settings.get(name)), None)
    return shortened(f"{method} ({kind})" if method and kind else method) if method or kind else None


def refuse_left_over(
    store: TensorStore, settings: Mapping[str, Any], known: Collection[str], formats: Collection[str]
) -> None:
    """Raises a `QuantisedError` if a quantiser has stored what is not known, by the name of its method.

    Args:
      store: the tensors as they are stored.
      settings: what the config says.
      known: the tensors that are dequantised, or used up for that.
      formats: that are read.
    """
    left = [name for name in store.names() if name not in known and (name.endswith(_PARTS) or _is_packed(store, name))]
    if not left:
        return
    named = (method for end, method in _BY_NAME.items() if any(re.search(f"({end})$", name) for name in left))
    found = method_of(settings) or next((f"{method}, by their names" for method in named), None)
    kinds = listed(sorted({str(store.dtype(name)) for name in left}))
    what = counted(len(left), "tensor is of weights", "tensors are of weights")
    raise QuantisedError(
        f"{what} that are quantised in a way that is not read, such as {listed(left, 3)} ({kinds}); the method is "
        f"{found or 'unknown, for config.json does not say, or the file is damaged'}; read are {', '.join(formats)}; "
        "use the original checkpoint"
    )


def _is_packed(store: TensorStore, name: str) -> bool:
    """Returns whether a tensor is a matrix of integers, which are codes or packed bits of weights."""
    dtype, shape = store.dtype(name), store.shape(name)
    if dtype.kind not in "iu" or is_table(name):
        return False
    # Integers of eight bytes save nothing: they are indices, if they are not called a weight.
    is_matrix = len(shape) > 1 and min(shape[-2:]) > 1 and dtype.itemsize < 8
    return is_matrix or name.endswith("weight")
