"""Tokenizers, and text or random tokens as blocks of token ids, with their number of bytes."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from jaxtyping import Int, Int32, Int64

from tracing_jax.data.documents import Documents, Source
from tracing_jax.error_messages import shortened

if TYPE_CHECKING:
    import transformers

RANDOM = "random"
"""The data set of random tokens."""

Tokenizer: TypeAlias = "transformers.PreTrainedTokenizerBase"

# Tokenizers see at most so many characters at once, which bounds memory. The test splits of WikiText fit in one piece,
# so they are tokenised whole, as is usual where perplexities are reported.
_PIECE_CHARS = 1 << 21

# The files that tokenizers of language models are stored in. Without any of them some transformers classes (Qwen2,
# Gemma) silently build an empty tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"
)  # fmt: skip

_REMEMBERED_WORDS = 10_000
"""The default of tokenizers."""

_LETTERS_PER_TOKEN = 6  # of lines that are likely to be long enough for a block, in any tokens
_PROBE = "The 3 quick  foxes\tjumped,\n\n\tover 1,024 dogs' naïve Ωmega — 漢字かな, Привет, 🦊👩‍🚀!\r\n    x_1 == 0\n"


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids cut into blocks of equal length, each to be scored on its own.

    Attributes:
        tokens: Token ids. Position 0 is given, positions 1..T-1 are predicted.
        num_bytes: UTF-8 bytes of the text of each block's predicted tokens.
        text_chars: The blocks cover exactly so many characters from the start of the text.
        source: The documents' source, and bos (whether each block starts with the BOS token) and block_size (T).
    """

    tokens: Int32[np.ndarray, "N T"]
    num_bytes: Int64[np.ndarray, " N"]
    text_chars: int
    source: Source

    @property
    def sha256(self) -> str:
        """The hexadecimal digest of the tokens and of their shape."""
        return hashlib.sha256(f"{self.tokens.shape}".encode() + self.tokens.astype("<i4").tobytes()).hexdigest()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Returns the fast tokenizer stored in a checkpoint's folder; code in the folder is never run.

    Of a sentencepiece model without `tokenizer.json` transformers makes a fast tokenizer. Special tokens that are
    empty, as the first Llama conversions wrote them, are those that Llama's sentencepiece model has.

    Raises:
        FileNotFoundError: The folder holds no tokenizer.
        ValueError: transformers cannot load it, or only as a slow tokenizer, without character offsets.
    """
    folder = Path(folder).expanduser()
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{folder}: no tokenizer, expected one of {', '.join(_TOKENIZER_FILES)}: "
            "copy the files of the tokenizer the model was trained with into the folder"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **_in_place_of_empty(folder)
        )
    except Exception as error:  # the Rust reader raises plain Exception
        reason = shortened(error, 400)
        if "trust_remote_code" in str(error):
            reason = "it is made by code in the repository, which is never run"
        raise ValueError(f"{folder}: transformers cannot load this tokenizer: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: a slow tokenizer, expected a fast one: add its tokenizer.json to the folder")
    if len(tokenizer.get_vocab()) - len(tokenizer.get_added_vocab()) < 2:
        raise ValueError(
            f"{folder}: transformers makes an empty tokenizer of these files: add the tokenizer.json of this model"
        )
    return tokenizer


def _in_place_of_empty(folder: Path) -> dict[str, str | None]:
    """Returns the special tokens of Llama's vocabulary in place of those that a tokenizer's config leaves empty.

    None for those that the vocabulary lacks: as new tokens they would have ids that the model has no embedding for.
    """
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        vocabulary = (folder / "tokenizer.json").read_text("utf-8") if (folder / "tokenizer.json").is_file() else None
    except (OSError, ValueError):
        return {}
    if not isinstance(settings, dict) or (vocabulary is None and not (folder / "tokenizer.model").is_file()):
        return {}
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    known = {token for token in usual.values() if vocabulary is None or f'"{token}"' in vocabulary}
    return {name: token if token in known else None for name, token in usual.items() if settings.get(name) == ""}


def token_blocks(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    block_size: int,
    num_tokens: int | None = None,
    bos: Literal["auto"] | bool = "auto",
) -> TokenBlocks:
    """Returns the start of the text as whole blocks of tokens; what does not fill a block is left out.

    The text is tokenised without special tokens. A token's bytes run from the end of the token before it to its own
    end, so tokens that share a character never count it twice.

    Args:
        documents: The text.
        tokenizer: A fast tokenizer.
        block_size: T, the BOS token included.
        num_tokens: At most so many tokens are used, BOS tokens included. None: all.
        bos: Whether each block starts with the BOS token. "auto": if the tokenizer starts an encoded text with it.

    Raises:
        ValueError: There is no whole block, no position to predict, or no BOS token where one is asked for.
    """
    bos_id = bos_id_of(tokenizer, bos)
    width = block_size - (bos_id is not None)  # text tokens per block
    if block_size < 2 or (num_tokens is not None and num_tokens < block_size):
        raise ValueError(f"{block_size=}, {num_tokens=}: block_size must be 2 or more, num_tokens at least block_size")
    limit = None if num_tokens is None else num_tokens // block_size * width
    ids, end_chars = encode(documents.text, tokenizer, limit)
    used = len(ids) // width * width
    if used == 0:
        raise ValueError(
            f"{documents.source['dataset']}: the text has {len(ids)} tokens, a block of {block_size} needs {width}: "
            "give a longer text or a smaller block_size"
        )
    tokens, ends = ids[:used].reshape(-1, width), end_chars[:used].reshape(-1, width)
    text_chars = int(ends[-1, -1])
    ends = _byte_positions(documents.text[:text_chars])[ends]
    starts = ends[:, 0]  # the first token is given, the next starts where it ends
    if bos_id is not None:
        tokens = np.insert(tokens, 0, bos_id, axis=1)
        starts = np.insert(ends[:-1, -1], 0, 0)
    source = {**documents.source, "bos": bos_id is not None, "block_size": block_size}
    return TokenBlocks(tokens, ends[:, -1] - starts, text_chars, source)


def same_tokenizer(a: Tokenizer, b: Tokenizer) -> bool:
    """Returns whether both give every token the same id and split a probe text alike, so that blocks can be shared.

    Whether they add a BOS token does not matter: `token_blocks` decides that.
    """
    encodings = [tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"] for tokenizer in (a, b)]
    return encodings[0] == encodings[1] and a.get_vocab() == b.get_vocab()


def shared_tokens(a: Tokenizer, b: Tokenizer) -> tuple[Int32[np.ndarray, " M"], Int32[np.ndarray, " M"]]:
    """Returns the ids in a and in b of the tokens both have, paired by token string and sorted by it.

    The strings are those of the vocabularies, so tokenizers that spell a space differently share few tokens.
    """
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    shared = sorted(vocab_a.keys() & vocab_b.keys())
    ids_a, ids_b = ([vocab[token] for token in shared] for vocab in (vocab_a, vocab_b))
    return np.array(ids_a, np.int32), np.array(ids_b, np.int32)


def ids_of_text(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " n"]:
    """Returns the ids that a tokenizer gives for a text, each once.

    It gets paragraphs: a tokenizer can be made that reads long texts otherwise.
    """
    return np.unique(np.array([token for ids in _encoded(tokenizer, text.split("\n\n")) for token in ids], np.int32))


def spread_lines(text: str, count: int, length: int) -> list[str]:
    """Returns at most so many evenly spread lines of a text, all likely to have so many tokens."""
    lines = [line for line in text.splitlines() if len(line) >= _LETTERS_PER_TOKEN * length]
    return [lines[at] for at in np.unique(np.linspace(0, len(lines) - 1, count).astype(int))] if lines else []


def _encoded(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of each piece; one by one, as tokenizers use threads for several, which bars later forks."""
    with without_word_cache(tokenizer):
        return [tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in pieces]


@contextlib.contextmanager
def without_word_cache(tokenizer: Tokenizer) -> Iterator[None]:
    """Keeps a tokenizer from remembering the words of a text inside.

    What it remembers is not freed with it (tokenizers 0.23): of the package's text half a MiB for each tokenizer, which
    adds up in the worker of a zoo.
    """
    model = getattr(tokenizer, "backend_tokenizer", None)
    resize = getattr(getattr(model, "model", None), "_resize_cache", None)  # Unigram and BPE have it
    if resize is None:
        yield
        return
    resize(0)
    try:
        yield
    finally:
        resize(_REMEMBERED_WORDS)


def bos_id_of(tokenizer: Tokenizer, bos: Literal["auto"] | bool) -> int | None:
    """Returns the id that each block starts with, if any."""
    bos_id = tokenizer.bos_token_id
    if bos == "auto":
        bos = bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]
    if bos and bos_id is None:
        raise ValueError('bos=True, but the tokenizer has no BOS token: set bos to False or "auto"')
    return bos_id if bos else None


def encode(
    text: str, tokenizer: Tokenizer, limit: int | None
) -> tuple[Int32[np.ndarray, " M"], Int64[np.ndarray, " M"]]:
    """Returns the first `limit` token ids and the character position where each ends, never decreasing."""
    ids: list[int] = []
    ends: list[int] = []
    for start, piece in _pieces(text):
        # Not verbose: a text longer than the model's context is no mistake here.
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += encoded["input_ids"]
        ends += [start + end for _, end in encoded["offset_mapping"]]
        if limit is not None and len(ids) >= limit:
            break
    return np.array(ids[:limit], np.int32), np.maximum.accumulate(np.array(ends[:limit], np.int64))


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """Yields the text in pieces, cut after a line where possible, each with the position where it starts."""
    start = 0
    while start < len(text):
        end = start + _PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield start, text[start:end]
        start = end


def _byte_positions(text: str) -> Int64[np.ndarray, " positions"]:
    """Returns where each character starts in the text's UTF-8 bytes, and where the last one ends."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def random_token_blocks(
    ids: Int[np.ndarray, " M"], drawn: Int[np.ndarray, "N T"], tokenizer: Tokenizer, seed: int
) -> TokenBlocks:
    """Returns blocks of the tokens at the drawn places of a list; their bytes are those of the decoded tokens."""
    tokens = ids[drawn].astype(np.int32)
    texts = [str(tokenizer.decode(row)) for row in tokens[:, 1:]]
    num_bytes = np.array([len(text.encode("utf-8", "replace")) for text in texts], np.int64)
    source = {"dataset": RANDOM, "tokens": len(ids), "seed": seed, "bos": False, "block_size": tokens.shape[1]}
    return TokenBlocks(tokens, num_bytes, sum(map(len, texts)), source)
