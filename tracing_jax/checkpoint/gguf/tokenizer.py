"""The tokenizer that the metadata of a GGUF file describes, as the files of a Hugging Face tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tracing_jax.error_messages import shortened

_KEYS = {
    "tokenizer_type": "model", "pre_tokenizer_type": "pre", "tokens": "tokens", "scores": "scores", "merges": "merges",
    "token_type": "token_type", "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id", "pad_token_id": "padding_token_id", "add_prefix_space": "add_space_prefix",
}  # fmt: skip


def write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> str | None:
    """Writes `tokenizer.json` and `tokenizer_config.json` into a folder; returns why it could not, or None.

    The tokenizer is the one that transformers makes of the same metadata.
    """
    found = {
        name: metadata[f"tokenizer.ggml.{key}"] for name, key in _KEYS.items() if f"tokenizer.ggml.{key}" in metadata
    }
    found = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in found.items()}
    if "tokens" not in found:
        return "the file holds no tokenizer"
    if problem := _problem(found):
        return problem
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
    except ImportError:
        return "this version of transformers makes no tokenizer of a GGUF file without torch"
    try:
        tokenizer, _ = convert_gguf_tokenizer(str(metadata["general.architecture"]), found)
        special = _special_tokens(found)
        if _starts_with_bos(metadata, found) and "bos_token" in special:
            _start_with(tokenizer, special["bos_token"], found["bos_token_id"])
        tokenizer.save(str(folder / "tokenizer.json"))
    except Exception as error:  # of a damaged vocabulary the Rust code raises plain Exception
        return f"transformers makes no tokenizer of its vocabulary: {shortened(error, 400)}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return None


def _problem(found: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a vocabulary; the Rust code that takes it ends the program over some of this."""
    tokens, merges = found["tokens"], found.get("merges", [])
    if not isinstance(tokens, list) or not isinstance(merges, list):
        return "its tokens or merges are no lists"
    known = set(tokens)
    for merge in merges:
        left, space, right = str(merge).partition(" ")
        if not (space and {left, right, left + right} <= known):
            return f"its merge {shortened(repr(merge))} is not of its tokens"
    return None


def _special_tokens(found: Mapping[str, Any]) -> dict[str, str]:
    ids = {name: found.get(f"{name}_id") for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    tokens = found["tokens"]
    return {name: tokens[i] for name, i in ids.items() if isinstance(i, int) and 0 <= i < len(tokens)}


def _starts_with_bos(metadata: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Returns whether a text begins with BOS: as the file says, and where it does not, for sentencepiece."""
    return bool(metadata.get("tokenizer.ggml.add_bos_token", found.get("tokenizer_type") == "llama"))


def _start_with(tokenizer: Any, bos: str, bos_id: int) -> None:
    from tokenizers import processors

    template = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    byte_level = isinstance(tokenizer.post_processor, processors.ByteLevel)
    parts = [processors.ByteLevel(trim_offsets=False), template] if byte_level else [template]
    tokenizer.post_processor = processors.Sequence(parts)
