"""Signatures of models by their ids, and models read for a scan."""

from collections.abc import Iterable

from tracing_jax.checkpoint import Checkpoint
from tracing_jax.experiment.models import open_model
from tracing_jax.library import Signature, Suspect, make_signature, model_digest, read_suspect, vocabulary_of
from tracing_jax.library.suspect import head_strings_of
from tracing_jax.record import file_hashes
from tracing_jax.sources import PrefetchingSource


def signature_of(
    model_id: str, download_dir: str | None = None, name: str | None = None, layout: str | None = None
) -> Signature:
    """Returns the signature of a folder, a Hub id or a member of the demo family; its files are hashed.

    Args:
      model_id: of the model.
      download_dir: where downloads are kept.
      name: what the model is called in the signature; by default its id.
      layout: a file that says where the parts of a model are stored that is read by its weights alone.

    Raises:
      CheckpointError, UnsupportedModelError, OSError, ValueError: the model cannot be read, or has no units to sample.
    """
    model = open_model(model_id, download_dir, layout=layout)
    return make_signature(
        model,
        vocabulary_of(model.tokenizer_folder, model.arch.vocab_size),
        model_id=name or model_id,
        files=file_hashes(model.tensors.files()),
        revision=model.revision,
    )


def digest_of(model: Checkpoint) -> str:
    """Returns the hash that identifies the weight files of a model, as signatures have it; they are read whole.

    Raises:
      OSError: a file cannot be read.
    """
    return model_digest(file_hashes(model.tensors.files()))


def suspect_of(model: Checkpoint, signatures: Iterable[Signature], *, screen: bool = False) -> Suspect:
    """Returns a model read once, to be compared with these signatures; if `screen`, a part of it.

    Raises:
      ValueError: its units cannot be read.
    """
    signatures = list(signatures)
    strings = sorted({token for signature in signatures for token in signature.tokens})
    vocabulary = vocabulary_of(model.tokenizer_folder, model.arch.vocab_size)
    source = model if screen else PrefetchingSource(model)
    return read_suspect(source, vocabulary, strings, screen=screen, head_strings=head_strings_of(signatures))
