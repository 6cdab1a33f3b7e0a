"""Tokens that a tokenizer never gives, whatever the text: in training their rows get no data.

A tokenizer's text is valid Unicode, whose UTF-8 bytes are never C0, C1 or F5 to FF. Tokens for these bytes exist in
most vocabularies all the same, since all 256 bytes have one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from tracing_jax.data.blocks import Tokenizer

UNREACHABLE, RESERVED, PADDING = "unreachable tokens", "reserved tokens", "rows without a token"
"""Names of the groups. Rows of one group are initialised alike; those of two groups need not be."""

IdPairs = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]
"""Ids in base and in ft of the same tokens."""

_INVALID_BYTES = (0xC0, 0xC1, *range(0xF5, 0x100))  # The Unicode Standard, table 3-7
_RESERVED = re.compile(r"(?i)[<\[]\|?(reserved|unused|dummy|placeholder|special|control)[a-z_ -]*\d+\|?[>\]]")


def unseen_tokens(base: Tokenizer, ft: Tokenizer, num_base: int, num_ft: int) -> dict[str, IdPairs]:
    """Returns group -> the ids of tokens that neither tokenizer ever gives, paired by string, without empty groups.

    * `unreachable tokens`: those of bytes that no UTF-8 text holds; in vocabularies with byte fallback also those of
      characters that have a token of their own; and those that no merge of a BPE makes.
    * `reserved tokens`: special tokens that are numbered, such as `<|reserved_special_token_7|>` or `<unused7>`.
    * `rows without a token`: rows of the embedding that no string belongs to in either vocabulary, paired by id.

    Args:
      base: the tokenizer of base.
      ft: that of ft.
      num_base: the number of embedding rows of base; ids beyond are left out.
      num_ft: that of ft.
    """
    vocabularies = [tokenizer.get_vocab() for tokenizer in (base, ft)]
    groups = {}
    for name, found in ((UNREACHABLE, _unreachable), (RESERVED, _reserved)):
        shared = sorted(found(base) & found(ft))
        ids = np.array([[vocab[token] for vocab in vocabularies] for token in shared], np.int32).reshape(-1, 2)
        groups[name] = ids[(ids < (num_base, num_ft)).all(axis=1)]
    named = [*vocabularies[0].values(), *vocabularies[1].values()]
    rows = np.setdiff1d(np.arange(min(num_base, num_ft), dtype=np.int32), np.array(named, np.int32))
    groups[PADDING] = np.stack([rows, rows], axis=1)
    return {name: (ids[:, 0], ids[:, 1]) for name, ids in groups.items() if len(ids)}


def _unreachable(tokenizer: Tokenizer) -> set[str]:
    """Returns the tokens of the tokenizer's own vocabulary that no text can give."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = settings["model"], {token["content"] for token in settings.get("added_tokens") or []}
    tokens = set(tokenizer.get_vocab()) - added
    if "ByteLevel" in _types_in([settings.get("pre_tokenizer"), settings.get("decoder")]):
        unreachable = {chr(byte) for byte in _INVALID_BYTES}  # a byte-level vocabulary writes these bytes so
    elif model.get("byte_fallback"):
        # A space is left out: whether it is spelled as it is, or as ▁, is up to a normalizer.
        spelled = {byte for byte in range(0x80) if chr(byte) in tokens and byte != 0x20}
        unreachable = {f"<0x{byte:02X}>" for byte in {*_INVALID_BYTES, *spelled}}
    else:
        return set()
    return (unreachable | _unmerged(model, tokens)) & tokens


def _unmerged(model: Mapping[str, Any], tokens: set[str]) -> set[str]:
    """Returns the tokens of a BPE model that are neither single symbols nor made by a merge."""
    if model.get("type") != "BPE" or model.get("ignore_merges") or not model.get("merges"):
        return set()
    merged = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]}
    unk, fallback = model.get("unk_token"), re.compile(r"<0x[0-9A-F]{2}>")
    return {t for t in tokens - merged if len(t) > 1 and t != unk and not fallback.fullmatch(t)}


def _reserved(tokenizer: Tokenizer) -> set[str]:
    return {token for token in tokenizer.get_vocab() if _RESERVED.fullmatch(token)}


def _types_in(settings: Any) -> Iterator[str]:
    """Yields the types of the parts of a tokenizer's settings."""
    if isinstance(settings, Mapping):
        if "type" in settings:
            yield settings["type"]
        yield from _types_in(list(settings.values()))
    if isinstance(settings, list):
        for part in settings:
            yield from _types_in(part)
