"""Blocks of random tokens, for models to be compared where no text favours either."""

import numpy as np
from jaxtyping import Int

from tracing_jax.data.blocks import TokenBlocks, Tokenizer

RANDOM = "random"


def random_token_blocks(
    ids: Int[np.ndarray, " M"], drawn: Int[np.ndarray, "N T"], tokenizer: Tokenizer, seed: int
) -> TokenBlocks:
    """Returns blocks of the tokens at the drawn places of a list; their bytes are those of the decoded tokens."""
    tokens = ids[drawn].astype(np.int32)
    texts = [str(tokenizer.decode(row)) for row in tokens[:, 1:]]
    num_bytes = np.array([len(text.encode("utf-8", "replace")) for text in texts], np.int64)
    source = {"dataset": RANDOM, "tokens": len(ids), "seed": seed, "bos": False, "block_size": tokens.shape[1]}
    return TokenBlocks(tokens, num_bytes, sum(map(len, texts)), source)
