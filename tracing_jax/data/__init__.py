"""Text as blocks of token ids, with the number of UTF-8 bytes of the predicted tokens of each block.

Two models are compared on the same text. If they share a tokenizer they share the blocks; if not, the base's blocks
give the prefix of the text that they cover, and the other tokenizer encodes exactly that prefix:

    documents = read_documents("wikitext")
    base_blocks = token_blocks(documents, base_tokenizer, block_size=512, num_tokens=100_000)
    ft_blocks = token_blocks(documents.prefix(base_blocks.text_chars), ft_tokenizer, block_size=512)

Letters: N blocks, T positions per block, M tokens.
"""

from tracing_jax.data.blocks import (
    RANDOM,
    TokenBlocks,
    Tokenizer,
    ids_of_text,
    load_tokenizer,
    random_token_blocks,
    same_tokenizer,
    shared_tokens,
    token_blocks,
)
from tracing_jax.data.documents import (
    GENERATED_ENDING,
    GENERATED_FOLDER,
    NAMED_DATASETS,
    SAMPLE,
    Documents,
    read_documents,
    sample_documents,
)
from tracing_jax.data.pairing import PairedBlocks, paired_beginnings, paired_on_bytes, paired_one_to_one
from tracing_jax.data.unseen import IdPairs, unseen_tokens

__all__ = [
    "GENERATED_ENDING",
    "GENERATED_FOLDER",
    "NAMED_DATASETS",
    "RANDOM",
    "SAMPLE",
    "Documents",
    "IdPairs",
    "PairedBlocks",
    "TokenBlocks",
    "Tokenizer",
    "ids_of_text",
    "load_tokenizer",
    "paired_beginnings",
    "paired_on_bytes",
    "paired_one_to_one",
    "random_token_blocks",
    "read_documents",
    "same_tokenizer",
    "sample_documents",
    "shared_tokens",
    "token_blocks",
    "unseen_tokens",
]
