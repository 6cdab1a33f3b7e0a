"""Signatures of models, libraries of them, and the scan of a model for its relatives in a library.

A signature is a small file of responses of sampled MLP units. One is made with `make_signature`, compared with a model
that was read once (`read_suspect`) by `compare`.
"""

from tracing_jax.library.comparison import SignatureMatch, SignatureTest, compare
from tracing_jax.library.drawing import model_digest
from tracing_jax.library.folder import Checked, add_to_library, indexed, library_folder, read_library
from tracing_jax.library.readings import Vocabulary, vocabulary_of
from tracing_jax.library.scan import Candidate, Scan, scan
from tracing_jax.library.signature import Signature, is_same, make_signature
from tracing_jax.library.signature_file import MAX_BYTES, SUFFIX, read_signature, to_bytes, write_signature
from tracing_jax.library.suspect import Suspect, read_suspect

__all__ = [
    "MAX_BYTES",
    "SUFFIX",
    "Candidate",
    "Checked",
    "Scan",
    "Signature",
    "SignatureMatch",
    "SignatureTest",
    "Suspect",
    "Vocabulary",
    "add_to_library",
    "compare",
    "indexed",
    "is_same",
    "library_folder",
    "make_signature",
    "model_digest",
    "read_library",
    "read_signature",
    "read_suspect",
    "scan",
    "to_bytes",
    "vocabulary_of",
    "write_signature",
]
