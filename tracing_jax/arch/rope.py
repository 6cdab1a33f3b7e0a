"""Rotary positions: the frequencies that a config asks for, and configs from which they cannot be known."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tracing_jax.arch.architecture import Arch, UnsupportedModelError

SUPPORTED_ROPES = ("default", "linear", "llama3")


def ropes(config: Any, head_dim: int) -> tuple[tuple[tuple[float, ...], ...], tuple[int, ...]]:
    """Returns the distinct ropes of a model and, for each layer, which one it uses."""
    parameters = config.rope_parameters or {}
    layers = config.num_hidden_layers
    if "rope_type" in parameters:
        return (_frequencies(parameters, head_dim),), (0,) * layers
    kinds = sorted(set(config.layer_types))
    if missing := [kind for kind in kinds if not parameters.get(kind)]:
        raise UnsupportedModelError(f"rope_parameters lack an entry for {', '.join(missing)}: found {parameters}")
    ropes = tuple(_frequencies(parameters[kind], head_dim) for kind in kinds)
    return ropes, tuple(kinds.index(kind) for kind in config.layer_types)


def _frequencies(parameters: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Returns the H/2 inverse frequencies of a rope, rounded to float32 as transformers does.

    Source: RoFormer (arXiv 2104.09864) eq. 15; `linear` divides them by a factor (arXiv 2306.15595); `llama3` divides
    only the slow ones, with a linear blend between (The Llama 3 Herd of Models, and the code released with 3.1).
    """
    kind, theta = parameters["rope_type"], parameters.get("rope_theta")
    if kind not in SUPPORTED_ROPES:
        raise UnsupportedModelError(f"rope type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPES)}")
    if theta is None:
        raise UnsupportedModelError(f"rope_theta is not set in {parameters}")
    if parameters.get("partial_rotary_factor", 1.0) not in (1, 1.0, None):
        raise UnsupportedModelError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported")
    base = np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    inverse = np.float32(1.0) / base
    if kind == "linear":
        inverse = inverse / np.float32(parameters["factor"])
    if kind == "llama3":
        inverse = _llama3(inverse, parameters)
    return tuple(float(f) for f in inverse.astype(np.float32))


def _llama3(inverse: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * inverse / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast, kept; 0: slow, divided
    return (1 - blend) * inverse / factor + blend * inverse


def head_pairs(arch: Arch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the first and the second dims of the pairs of a head that rotary positions turn together.

    Dims that stay as they are are paired by halves; all are, in a model without a rope.
    """
    R, H = arch.rotary_dim, arch.head_dim
    step, first = (2, 1) if arch.rope_interleaved else (1, R // 2)
    rotated, middle = tuple(range(0, R if arch.rope_interleaved else R // 2, step)), (H - R) // 2
    return (*rotated, *range(R, R + middle)), (*(i + first for i in rotated), *range(R + middle, R + 2 * middle))


def rope_is_absent(raw: Mapping[str, Any], thetas: Mapping[str | None, str]) -> str | None:
    """Returns why a rope cannot be known, or None: only old Llama files may leave theta out, where it was 10000.

    Args:
      raw: the config file, before transformers fills in defaults.
      thetas: for each layer type with a rope of its own (None: one for all) the attribute that older files name it by.
    """
    parameters = raw.get("rope_parameters") or {}
    absent = []
    for layer_type, old_name in thetas.items():
        rope = parameters if layer_type is None else parameters.get(layer_type) or {}
        if raw.get(old_name) is None and rope.get("rope_theta") is None:
            absent.append(old_name if layer_type is None else f"{old_name} (of {layer_type} layers)")
    if not absent or (absent == ["rope_theta"] and _predates_rope_theta(raw)):
        return None
    return (
        f"no rope in this config: {' and '.join(absent)} not set, nor in rope_parameters; a default would silently "
        'change the numbers; add the model\'s own, e.g. "rope_theta": 10000.0'
    )


def _predates_rope_theta(raw: Mapping[str, Any]) -> bool:
    # Llama's theta was the constant 10000 before transformers 4.33 made it a setting.
    version = re.match(r"(\d+)\.(\d+)", str(raw.get("transformers_version")))
    if raw["model_type"] != "llama" or "rope_theta" in raw or "rope_parameters" in raw or version is None:
        return False
    return (int(version[1]), int(version[2])) < (4, 33)
