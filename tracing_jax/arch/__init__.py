"""`Arch`: the architecture of one model, read from its Hugging Face config; what is not known is refused.

One decoder block with flags covers every family here. Each attribute of a config is either used, known to leave the
numbers unchanged, or an error: a setting that is skipped silently gives wrong numbers.
"""

from tracing_jax.arch.architecture import (
    OF_LAYERS,
    OTHERS,
    WEIGHTS_ONLY,
    Arch,
    LatentAttention,
    Reading,
    Router,
    UnsupportedModelError,
    head_problem,
    length_problem,
)
from tracing_jax.arch.config import (
    arch_from_config,
    change_config,
    has_field,
    negative_epsilon,
    read_arch,
    read_arch_and_notes,
    read_raw_config,
)
from tracing_jax.arch.families import SUPPORTED_FAMILIES
from tracing_jax.arch.mixers import DeltaNet, Heads, Mamba, StateMixer, is_attention, keys_of, mixer_kind
from tracing_jax.arch.multimodal import SUPPORTED_MULTIMODAL
from tracing_jax.arch.rope import SUPPORTED_ROPES, head_pairs

__all__ = [
    "OF_LAYERS",
    "OTHERS",
    "SUPPORTED_FAMILIES",
    "SUPPORTED_MULTIMODAL",
    "SUPPORTED_ROPES",
    "WEIGHTS_ONLY",
    "Arch",
    "DeltaNet",
    "Heads",
    "LatentAttention",
    "Mamba",
    "Reading",
    "Router",
    "StateMixer",
    "UnsupportedModelError",
    "arch_from_config",
    "change_config",
    "has_field",
    "head_pairs",
    "head_problem",
    "is_attention",
    "keys_of",
    "length_problem",
    "mixer_kind",
    "negative_epsilon",
    "read_arch",
    "read_arch_and_notes",
    "read_raw_config",
]
