"""What a signature samples: layers, units and token strings, by a rule that the owner of the model cannot choose.

The rule has no secret and no option, so that everyone with the files of a model can draw the same sample:

* Layers: the middles of three equal parts of the depth.
* Units: those that count as evidence (`distinct_units`), in an order drawn from a key that is stretched from the
  SHA-256 hashes of the weight files. A change of one byte gives another draw, and each draw costs a twentieth of a
  second and 16 MiB, so that trying a billion of them costs years of computing.
* Heads: of each of three layers with attention, those that write something, in an order drawn from the same key.
* Tokens: of all strings of the vocabulary of at most 24 bytes those whose SHA-256 is smallest. Models of one
  vocabulary have the same, and of two vocabularies that overlap, the samples do so too.
"""

import hashlib
import heapq
import json
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

RULE = "tracing_jax-signature-2"
"""The name of the rule; another rule gets another name."""

EARLIER_RULE = "tracing_jax-signature-1"
"""That of the first version: more tokens, and no heads. Its units are the same, and its tokens begin with these."""

LAYERS, UNITS, TOKENS, EARLIER_TOKENS = 3, 64, 352, 512
"""The most layers, units of each, and token strings of a signature, and those of one of the first version."""

HEADS, HEAD_TOKENS = 16, 24
"""The most query heads of each layer, and the tokens, the first of the signature, on which their forms are kept."""

MOMENT_UNITS = 128
"""The most units of each layer whose responses to the weights of their layer are kept."""

MAX_STRING = 24
"""The most bytes of a sampled token string: the size of a signature is bounded."""

_SALT = EARLIER_RULE.encode()
_COST = 2**14  # scrypt: 16 MiB and a twentieth of a second


def sampled_layers(num_layers: int) -> list[int]:
    """Returns the sampled layers of a model of so many, in increasing order."""
    return sorted({(2 * i + 1) * num_layers // (2 * LAYERS) for i in range(LAYERS)})


def model_digest(files: Mapping[str, str]) -> str:
    """Returns the hash that identifies a model: of the sorted SHA-256 hashes of its weight files, whatever their names.

    Raises:
      ValueError: there are no files.
    """
    if not files:
        raise ValueError("a signature is drawn from the hashes of the weight files, and there are none")
    return hashlib.sha256(json.dumps(sorted(files.values())).encode()).hexdigest()


def drawing_key(digest: str) -> bytes:
    """Returns the key from which units are drawn: the hash of the model, stretched so that trying many costs much."""
    return hashlib.scrypt(digest.encode(), salt=_SALT, n=_COST, r=8, p=1, dklen=32)


def drawn_units(kept: Int[np.ndarray, " K"], key: bytes, layer: int, most: int) -> Int[np.ndarray, " U"]:
    """Returns at most so many of the units of a layer, in the order drawn; a smaller sample begins a larger one."""
    seed = hashlib.sha256(key + layer.to_bytes(4, "big")).digest()
    order = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "big"))).permutation(len(kept))
    return kept[order[:most]]


def sampled_tokens(vocabulary: Mapping[str, int], most: int) -> list[str]:
    """Returns at most so many of the strings, those of the smallest hash first."""
    salt = _SALT + b"\0"
    encoded = ((string, string.encode("utf-8", "surrogatepass")) for string in vocabulary)
    hashed = [(hashlib.sha256(salt + found).digest(), string) for string, found in encoded if len(found) <= MAX_STRING]
    return [string for _, string in heapq.nsmallest(most, hashed)]


def most_tokens(embed_dim: int, rule: str = RULE) -> int:
    """Returns how many strings a model of this width is sampled at by a rule.

    Fewer than half of its features, so that a sampled row of weights cannot be solved for even with the embeddings.
    """
    return max(1, min(EARLIER_TOKENS if rule == EARLIER_RULE else TOKENS, embed_dim // 2))
