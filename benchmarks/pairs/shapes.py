"""Shapes of published models by name, as the configs that transformers reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import transformers

_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "bfloat16",
}
_LLAMA3 = _LLAMA | {"rope_theta": 500000.0, "max_position_embeddings": 8192, "vocab_size": 128256}
_MISTRAL = _LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}


def _sizes(vocab: int, embed: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": _LLAMA | _sizes(512, 64, 160, 4, 4, 2),
    "llama3.2-1b": _LLAMA3 | _sizes(128256, 2048, 8192, 16, 32, 8) | {"tie_word_embeddings": True},
    "llama2-7b": _LLAMA | _sizes(32000, 4096, 11008, 32, 32, 32),
    "llama2-13b": _LLAMA | _sizes(32000, 5120, 13824, 40, 40, 40),
    "llama2-70b": _LLAMA | _sizes(32000, 8192, 28672, 80, 64, 8),
    "llama3.1-405b": _LLAMA3 | _sizes(128256, 16384, 53248, 126, 128, 8),
    "llama3-8b": _LLAMA3 | _sizes(128256, 4096, 14336, 32, 32, 8),
    "mistral-7b": _MISTRAL | _sizes(32000, 4096, 14336, 32, 32, 8),
}
"""Shape name -> config. `llama3.2-1b` and `llama3.1-405b` have the plain rope of Llama 3, which changes no
size and no cost.

Source: the `config.json` of meta-llama/Llama-2-*-hf, Meta-Llama-3-8B, Llama-3.1-405B, Llama-3.2-1B and
mistralai/Mistral-7B-v0.1.
"""


def config_of(shape: str, num_layers: int | None = None) -> "transformers.PretrainedConfig":
    """Returns the config of a shape by name, or of a `config.json` by path, with this many layers if given.

    Raises:
      ValueError: no such shape and no such file.
    """
    from transformers import AutoConfig

    if shape in SHAPES:
        facts = dict(SHAPES[shape])
        config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    elif Path(shape).is_file():
        config = AutoConfig.from_pretrained(Path(shape), trust_remote_code=False)
    else:
        raise ValueError(f"shape {shape!r}: neither a file nor one of {', '.join(SHAPES)}")
    if num_layers is not None:
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
        config.num_hidden_layers = num_layers
    return config
