"""Rotary positions: the frequencies that a config asks for, and configs from which they cannot be known."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tracing_jax.arch.architecture import Arch, UnsupportedModelError

SUPPORTED_ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


class Rope(NamedTuple):
    """One rope."""

    frequencies: tuple[float, ...]  # R/2 inverse frequencies, rounded to float32 as transformers does
    amplitude: float = 1.0
    positions: int | None = None  # the longest text for which the frequencies hold; None: any


NO_ROPE: dict[str, Any] = {"rope_frequencies": (), "layer_ropes": ()}
"""The fields of `Arch` for a model without a rope."""


def ropes(config: Any, head_dim: int, *, partial: bool = False) -> dict[str, Any]:
    """Returns the fields of `Arch` for the distinct ropes of a model and for which one each layer uses.

    Args:
      config: of the model.
      head_dim: H.
      partial: whether its family can rotate only the first dims of each head.
    """
    parameters = config.rope_parameters or {}
    layers = config.num_hidden_layers
    if "rope_type" in parameters:
        return fields_of([_rope(parameters, config, head_dim, partial)], (0,) * layers)
    kinds = sorted(set(config.layer_types))
    if missing := [kind for kind in kinds if not parameters.get(kind)]:
        raise UnsupportedModelError(f"rope_parameters lack an entry for {', '.join(missing)}: found {parameters}")
    found = [rope_of(config, kind, head_dim, partial=partial) for kind in kinds]
    return fields_of(found, tuple(kinds.index(kind) for kind in config.layer_types))


def rope_of(config: Any, kind: str, head_dim: int, *, partial: bool = False) -> Rope:
    """Returns the rope of layers of one type; the arguments are those of `ropes`."""
    return _rope(config.rope_parameters[kind], config, head_dim, partial)


def fields_of(found: Sequence[Rope], layers: tuple[int, ...]) -> dict[str, Any]:
    """Returns the fields of `Arch` for these ropes and for which one each layer uses."""
    amplitudes = tuple(rope.amplitude for rope in found)
    return {
        "rope_frequencies": tuple(rope.frequencies for rope in found),
        "layer_ropes": layers,
        "rope_amplitudes": amplitudes if set(amplitudes) != {1.0} else (),
        "rope_positions": min((rope.positions for rope in found if rope.positions is not None), default=None),
    }


def without_rope(fields: Mapping[str, Any], layers: Sequence[bool]) -> dict[str, Any]:
    """Returns the fields of a model with one rope, which some of its layers do not use."""
    (frequencies,) = fields["rope_frequencies"]
    if all(layers):
        return dict(fields)
    still = Rope((0.0,) * len(frequencies))
    amplitude = fields["rope_amplitudes"][0] if fields["rope_amplitudes"] else 1.0
    return fields_of(
        [still, Rope(frequencies, amplitude, fields["rope_positions"])], tuple(int(bool(uses)) for uses in layers)
    )


def _rope(parameters: dict[str, Any], config: Any, head_dim: int, partial: bool) -> Rope:
    """Returns the rope that these parameters ask for.

    Source: RoFormer (arXiv 2104.09864) eq. 15; `linear` divides the frequencies by a factor (arXiv 2306.15595);
    `llama3` divides only the slow ones, with a linear blend between (The Llama 3 Herd of Models, and the code released
    with 3.1), and so does `yarn` (arXiv 2309.00071), which scales the scores as well; `longrope` divides each by a
    factor of its own (arXiv 2402.13753); `proportional` leaves the slowest of all dims unrotated. `dynamic` and
    `longrope` have others for texts longer than those trained on.
    """
    kind, theta = parameters["rope_type"], parameters.get("rope_theta")
    if kind not in SUPPORTED_ROPES:
        raise UnsupportedModelError(f"rope type {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPES)}")
    if theta is None:
        raise UnsupportedModelError(f"rope_theta is not set in {parameters}")
    share = parameters.get("partial_rotary_factor")
    if kind == "proportional" and not partial:
        return _proportional(float(theta), head_dim, 1.0 if share is None else float(share), parameters)
    if not partial and kind == "default":
        share = None  # not read: see `rope_notes`
    if (share not in (1, 1.0, None) and not partial) or kind == "proportional":
        raise UnsupportedModelError(f"partial_rotary_factor {share} with rope type {kind} is not supported")
    dim = int(head_dim * (1.0 if share is None else share))
    if dim % 2 or not 0 < dim <= head_dim:
        raise UnsupportedModelError(f"a rope on {dim} of {head_dim} dims of a head is not supported")
    return _scaled(_inverse(float(theta), dim), parameters, config)


def rope_notes(config: Any, partial: bool) -> list[str]:
    """Returns a note if a config gives a share of rotated dims that models of its family do not read.

    With other ropes than the default one transformers reads it for every family.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    every = [parameters] if "rope_type" in parameters else list(parameters.values())
    ropes_of = [one for one in every if isinstance(one, Mapping) and one.get("rope_type") == "default"]
    shares = [one.get("partial_rotary_factor") for one in ropes_of]
    if partial or all(share in (1, 1.0, None) for share in shares):
        return []
    return [f"{config.model_type} rotates all dims of a head: partial_rotary_factor changes nothing"]


def frequencies(theta: float, dim: int) -> tuple[float, ...]:
    """Returns the inverse frequencies of a rope on so many dims that nothing is done to."""
    return tuple(float(f) for f in _inverse(theta, dim))


def _inverse(theta: float, dim: int) -> np.ndarray:
    return np.float32(1.0) / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


def _proportional(theta: float, head_dim: int, share: float, parameters: Mapping[str, Any]) -> Rope:
    """Returns a rope on all dims, of which the slow ones beyond a share have the frequency 0."""
    rotated = int(share * head_dim // 2)
    if not 0 <= rotated <= head_dim // 2:
        raise UnsupportedModelError(f"partial_rotary_factor {share} is no share of {head_dim} dims")
    inverse = _inverse(theta, head_dim) / np.float32(parameters.get("factor") or 1.0)
    inverse[rotated:] = 0
    return Rope(tuple(float(f) for f in inverse))


def _scaled(inverse: np.ndarray, parameters: dict[str, Any], config: Any) -> Rope:
    kind, amplitude, positions = parameters["rope_type"], 1.0, None
    if kind == "linear":
        inverse = inverse / np.float32(parameters["factor"])
    if kind == "llama3":
        inverse = _llama3(inverse, parameters)
    if kind == "dynamic":
        positions = config.max_position_embeddings
    if kind == "yarn":
        inverse, amplitude = _yarn(inverse, parameters, config)
    if kind == "longrope":
        positions = parameters["original_max_position_embeddings"]
        inverse, amplitude = _longrope(inverse, parameters), _longrope_amplitude(parameters, config)
    return Rope(tuple(float(f) for f in inverse.astype(np.float32)), float(amplitude), positions)


def _llama3(inverse: np.ndarray, parameters: dict[str, Any]) -> np.ndarray:
    factor, low, high = (parameters[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * inverse / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast, kept; 0: slow, divided
    return (1 - blend) * inverse / factor + blend * inverse


def _yarn(inverse: np.ndarray, parameters: dict[str, Any], config: Any) -> tuple[np.ndarray, float]:
    trained, dim = parameters["original_max_position_embeddings"], 2 * len(inverse)
    factor = _factor(parameters, config)

    def index(turns: float) -> float:  # of the frequency that makes so many turns within the length trained on
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(parameters["rope_theta"]))

    low, high = index(float(parameters.get("beta_fast") or 32)), index(float(parameters.get("beta_slow") or 1))
    if config.rope_parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    blend = np.clip((np.arange(len(inverse), dtype=np.float32) - low) / (high - low), 0, 1)  # 0: fast, kept
    return inverse / np.float32(factor) * blend + inverse * (1 - blend), _yarn_amplitude(parameters, factor)


def _yarn_amplitude(parameters: Mapping[str, Any], factor: float) -> float:
    if (given := parameters.get("attention_factor")) is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    both = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(float(both[0])) / scale(float(both[1])) if both[0] and both[1] else scale(1.0)


def _longrope(inverse: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    short = np.asarray(parameters["short_factor"], np.float32)
    if short.shape != inverse.shape:
        raise UnsupportedModelError(f"short_factor has {short.size} numbers, the rope has {inverse.size} frequencies")
    return np.float32(1.0) / (short / inverse)


def _longrope_amplitude(parameters: Mapping[str, Any], config: Any) -> float:
    if (given := parameters.get("attention_factor")) is not None:
        return float(given)
    factor, trained = _factor(parameters, config), parameters["original_max_position_embeddings"]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))


def _factor(parameters: Mapping[str, Any], config: Any) -> float:
    """Returns how much longer texts may be than those that the model was trained on."""
    if (given := parameters.get("factor")) is not None:
        return float(given)
    return float(config.max_position_embeddings / parameters["original_max_position_embeddings"])


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Returns the slope of each head.

    Source: Press et al. 2022 (arXiv 2108.12409): a geometric sequence for a power of two; other numbers of heads take
    every second slope of twice as many for the rest.
    """
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-8.0 * (2 * i + 1) / (2 * whole)) for i in range(heads - whole)]
    return tuple(slopes)


def mpt_slopes(heads: int) -> tuple[float, ...]:
    """Returns the slope of each head of MPT.

    Source: the code released with MPT-7B: of the next power of two, every second slope from the second on, then the
    others, as many as there are heads.
    """
    whole = 1 << (heads - 1).bit_length()
    slopes = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    return tuple(slopes if whole == heads else (slopes[1::2] + slopes[::2])[:heads])


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
