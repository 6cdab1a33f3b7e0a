"""The text of a run as both models read it: blocks of each one's tokens, and positions that correspond."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int

from tracing_jax import demo
from tracing_jax.data import (
    RANDOM,
    SAMPLE,
    Documents,
    PairedBlocks,
    TokenBlocks,
    paired_on_bytes,
    paired_one_to_one,
    random_token_blocks,
    read_documents,
    sample_documents,
    token_blocks,
)
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.forward import LEAST_BLOCKS
from tracing_jax.options import RunOptions
from tracing_jax.statistics import Vocabularies

DEMO_TRAINING = "demo-training"
"""The text that the demo's base and independent models were trained on."""

# No tokenizer averages more over a text; reading stops there, however large the data set is.
_MAX_CHARS_PER_TOKEN = 32


@dataclass(frozen=True)
class RunText:
    """The text of a run.

    Attributes:
      base: base's tokens.
      ft: the very same text as ft's tokens.
      paired: both block by block, with the positions at which they have read the same bytes.
    """

    base: TokenBlocks
    ft: TokenBlocks
    paired: PairedBlocks


def read_text(options: RunOptions, tokenizer_base: Any, tokenizer_ft: Any, vocabularies: Vocabularies) -> RunText:
    """Returns the text that the options name, tokenized by both tokenizers.

    Raises:
      ConfigError: random tokens are asked for, and the vocabularies share none.
      ValueError, OSError: the text cannot be read.
    """
    if options.dataset == RANDOM and not options.dataset_id:
        return _random_tokens(options, tokenizer_base, tokenizer_ft, vocabularies)
    documents = _documents(options)
    base = token_blocks(documents, tokenizer_base, block_size=options.block_size, num_tokens=options.num_tokens)
    if vocabularies.same:
        return RunText(base, base, paired_one_to_one(base.tokens, base.tokens))
    ft = token_blocks(documents.prefix(base.text_chars), tokenizer_ft, block_size=options.block_size)
    sizes = {"block_size": options.block_size, "num_tokens": options.num_tokens}
    return RunText(base, ft, paired_on_bytes(documents, tokenizer_base, tokenizer_ft, **sizes))


def read_learning_text(options: RunOptions, tokenizer: Any) -> Int[np.ndarray, "N T"]:
    """Returns the blocks that an alignment or a curve is learnt from: other text than that of the statistics.

    Raises:
      ConfigError: there is not enough of it.
      ValueError, OSError: the text cannot be read.
    """
    wanted, size = options.learned, options.block_size
    first = 0 if wanted.dataset else options.num_tokens // size
    total = first * size + wanted.num_tokens
    reading = replace(options, num_tokens=total)
    if wanted.dataset:
        reading = replace(
            reading, dataset=wanted.dataset, dataset_id=None, dataset_subset=None, dataset_split=None, text_column=None
        )
    blocks = token_blocks(_documents(reading), tokenizer, block_size=size, num_tokens=max(total, size)).tokens[first:]
    if len(blocks) < LEAST_BLOCKS:
        where = (
            f"learned.dataset={wanted.dataset}" if wanted.dataset else "the run's text, behind what statistics read,"
        )
        raise ConfigError(
            f"{where} has {len(blocks)} blocks of {size} tokens to learn from, expected at least {LEAST_BLOCKS}; "
            "set learned.dataset to a longer text, or a smaller block_size"
        )
    return blocks


def _random_tokens(options: RunOptions, tokenizer_base: Any, tokenizer_ft: Any, vocabularies: Vocabularies) -> RunText:
    """Returns tokens drawn uniformly from those that both models have, by string."""
    ids = (vocabularies.ids_base, vocabularies.ids_ft)
    shape = (options.num_tokens // options.block_size, options.block_size)
    if not len(ids[0]):
        raise ConfigError(f"dataset={RANDOM}: the vocabularies share no token; name a text instead")
    drawn = np.random.default_rng([options.seed, zlib.crc32(RANDOM.encode())]).integers(len(ids[0]), size=shape)
    base, ft = (
        random_token_blocks(of_model, drawn, tokenizer, options.seed)
        for of_model, tokenizer in zip(ids, (tokenizer_base, tokenizer_ft))
    )
    paired = paired_one_to_one(base.tokens, ft.tokens, "random tokens of both vocabularies, paired by string")
    return RunText(base, ft, paired)


def _documents(options: RunOptions) -> Documents:
    if options.dataset == "demo" and not options.dataset_id:
        return read_documents(str(demo.held_out_text()))
    if options.dataset == DEMO_TRAINING and not options.dataset_id:
        return read_documents(str(demo.training_text()))
    if options.dataset == SAMPLE and not options.dataset_id:
        return sample_documents()
    name = options.dataset_id or options.dataset
    assert name is not None, "checked before a model is opened"
    return read_documents(
        name,
        subset=options.dataset_subset,
        split=options.dataset_split,
        text_column=options.text_column,
        max_chars=_MAX_CHARS_PER_TOKEN * options.num_tokens,
        data_dir=options.data_dir,
    )
