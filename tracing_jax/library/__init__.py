"""Signatures of models, libraries of them, and the scan of a model for its relatives in a library.

A signature is a small file of responses of sampled MLP units. One is made with `make_signature`, compared with a model
that was read once (`read_suspect`) by `compare`.
"""

from tracing_jax.library.comparison import Evidence, Match, compare
from tracing_jax.library.readings import Vocabulary, vocabulary_of
from tracing_jax.library.signature import (
    MAX_BYTES,
    SUFFIX,
    Signature,
    make_signature,
    read_signature,
    to_bytes,
    write_signature,
)
from tracing_jax.library.suspect import Suspect, read_suspect

__all__ = [
    "MAX_BYTES",
    "SUFFIX",
    "Evidence",
    "Match",
    "Signature",
    "Suspect",
    "Vocabulary",
    "compare",
    "make_signature",
    "read_signature",
    "read_suspect",
    "to_bytes",
    "vocabulary_of",
    "write_signature",
]
