"""The same text as two models read it, and the positions at which both have read the same bytes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from tracing_jax.data.blocks import Tokenizer, bos_id_of, encode, spread_lines, without_word_cache
from tracing_jax.data.documents import Documents

_ON_BYTES = "tokens of the two tokenizers that end on the same byte of the same text"


@dataclass(frozen=True)
class PairedBlocks:
    """Blocks that two models read side by side.

    Attributes:
        base, ft: Token ids for base and for ft; block n of both begins the same text.
        at_base, at_ft: P pairs of positions in each block, one of base and one of ft, that have read the same bytes.
        valid: Which of the P are pairs; the others fill up.
        how: How the positions were paired, for the record.
    """

    base: Int32[np.ndarray, "N T"]
    ft: Int32[np.ndarray, "N T2"]
    at_base: Int32[np.ndarray, "N P"]
    at_ft: Int32[np.ndarray, "N P"]
    valid: Bool[np.ndarray, "N P"]
    how: str

    @property
    def num_pairs(self) -> int:
        """The number of paired positions."""
        return int(self.valid.sum())

    @property
    def is_whole(self) -> bool:
        """Whether every position of base is paired with the same position of ft."""
        whole = np.arange(self.base.shape[1])
        same = [at.shape == self.base.shape and (at == whole).all() for at in (self.at_base, self.at_ft)]
        return bool(self.valid.all() and all(same))

    def sampled(self, count: int, generator: np.random.Generator) -> "PairedBlocks":
        """Returns the same blocks with about `count` of their pairs, never more, drawn evenly from all blocks."""
        per_block = min(self.valid.shape[1], max(1, count // len(self.valid)))
        order = np.argsort(generator.random(self.valid.shape) - self.valid, axis=1)[:, :per_block]  # pairs come first
        at_base, at_ft, valid = (np.take_along_axis(a, order, axis=1) for a in (self.at_base, self.at_ft, self.valid))
        if len(valid) > count:
            valid = valid & (generator.permutation(len(valid)) < count)[:, None]
        return PairedBlocks(self.base, self.ft, at_base, at_ft, valid, f"{int(valid.sum())} sampled: {self.how}")


def paired_one_to_one(
    base: Int32[np.ndarray, "N T"],
    ft: Int32[np.ndarray, "N T"],
    how: str = "the same token ids, position by position",
) -> PairedBlocks:
    """Returns blocks in which position t of base goes with position t of ft."""
    at = np.broadcast_to(np.arange(base.shape[1], dtype=np.int32), base.shape)
    return PairedBlocks(base, ft, at, at, np.ones(base.shape, bool), how)


def paired_on_bytes(
    documents: Documents, tokenizer_base: Tokenizer, tokenizer_ft: Tokenizer, *, block_size: int, num_tokens: int
) -> PairedBlocks:
    """Returns the text in blocks of base's tokens, each also as ft's tokens, paired where tokens end on the same byte.

    A causal model's state at a position follows from the bytes read so far, and both have then read the same.

    Raises:
        ValueError: The text has no whole block, or no two tokens end on the same byte.
    """
    bos = [bos_id_of(tokenizer, "auto") for tokenizer in (tokenizer_base, tokenizer_ft)]
    width = block_size - (bos[0] is not None)
    ids, ends = encode(documents.text, tokenizer_base, num_tokens // block_size * width)
    count = len(ids) // width
    if not count:
        raise ValueError(f"{documents.source['dataset']}: no whole block of {block_size} tokens; give a longer text")
    rows_base, ends_base = ids[: count * width].reshape(count, width), ends[: count * width].reshape(count, width)
    starts = np.concatenate([[0], ends_base[:-1, -1]])
    rows_ft, pairs = [], []
    for start, own_ends in zip(starts, ends_base):
        theirs, their_ends = encode(documents.text[start : own_ends[-1]], tokenizer_ft, None)
        rows_ft.append(theirs)
        pairs.append(_on_the_same_byte(own_ends - start, their_ends))
    at_base, at_ft = (_padded([pair[side] + (bos[side] is not None) for pair in pairs]) for side in (0, 1))
    valid = np.arange(at_base.shape[1]) < np.array([len(pair[0]) for pair in pairs])[:, None]
    if not valid.any():
        raise ValueError(f"{documents.source['dataset']}: no token of one tokenizer ends where one of the other does")
    base, ft = _with_bos(rows_base, bos[0]), _with_bos(_padded(rows_ft), bos[1])
    return PairedBlocks(base, ft, at_base, at_ft, valid, _ON_BYTES)


def paired_beginnings(
    text: str, tokenizer_base: Tokenizer, tokenizer_ft: Tokenizer, count: int, length: int
) -> PairedBlocks | None:
    """Returns the first tokens of evenly spread lines of a text, paired where tokens end on the same byte.

    Lines are encoded one by one: tokenizers use threads for several, which bars later forks.

    Args:
        text: The text.
        tokenizer_base: A fast tokenizer.
        tokenizer_ft: Another.
        count: The most blocks.
        length: Of each block, in tokens of either tokenizer.

    Returns:
        The blocks; None if no line is long enough.
    """
    with without_word_cache(tokenizer_base), without_word_cache(tokenizer_ft):
        lines = [
            tuple(encode(line, tokenizer, length) for tokenizer in (tokenizer_base, tokenizer_ft))
            for line in spread_lines(text, 2 * count, length)
        ]
    lines = [sides for sides in lines if all(len(ids) == length for ids, _ in sides)][:count]
    if not lines:
        return None
    base, ft = (np.stack([sides[side][0] for sides in lines]) for side in (0, 1))
    if (base == ft).all() and all((sides[0][1] == sides[1][1]).all() for sides in lines):
        return paired_one_to_one(base, ft)
    pairs = [_on_the_same_byte(sides[0][1], sides[1][1]) for sides in lines]
    at_base, at_ft = (_padded([pair[side] for pair in pairs]) for side in (0, 1))
    valid = np.arange(at_base.shape[1]) < np.array([len(pair[0]) for pair in pairs])[:, None]
    return PairedBlocks(base, ft, at_base, at_ft, valid, _ON_BYTES)


def _on_the_same_byte(ends: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the last positions that end at each end that both have; tokens inside one character share its end."""
    last = [len(e) - 1 - np.unique(e[::-1], return_index=True)[1] for e in (ends, others)]
    shared = np.intersect1d(ends[last[0]], others[last[1]], assume_unique=True)
    return tuple(at[np.isin(e[at], shared)] for e, at in zip((ends, others), last))  # type: ignore[return-value]


def _padded(rows: list[np.ndarray]) -> Int32[np.ndarray, "N T"]:
    """Returns the rows as one array, padded with 0 on the right: no earlier position attends to the padding."""
    padded = np.zeros((len(rows), max(1, *(len(row) for row in rows))), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def _with_bos(rows: np.ndarray, bos_id: int | None) -> Int32[np.ndarray, "N T"]:
    return rows if bos_id is None else np.insert(rows, 0, bos_id, axis=1)
