"""Tokenizers of any vocabulary size (bytes, merges learnt from the demo's text, unused tokens), and text."""

import functools
import json
from pathlib import Path

from tracing_jax import demo
from tracing_jax.record import atomic_write

_LEARNT = 4096  # more merges than that would take longer to learn, and no benchmark needs them
_PIECES = 200  # of the demo's text
_BYTES = 256


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a byte-level BPE tokenizer with exactly this many tokens, as transformers does.

    Raises:
      ValueError: fewer tokens than there are bytes.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if vocab_size < _BYTES:
        raise ValueError(f"vocab_size {vocab_size}: a byte-level tokenizer needs {_BYTES} tokens or more")
    facts = json.loads(_learnt(min(vocab_size, _LEARNT)))
    vocab = facts["model"]["vocab"]
    vocab |= {f"<unused_{i}>": i for i in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer.from_str(json.dumps(facts))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False).save_pretrained(folder)


@functools.cache
def _learnt(vocab_size: int) -> str:
    seen, _ = demo.split(demo.base_text(), _PIECES)
    return demo.train_tokenizer(demo.DemoSizes(vocab_size=vocab_size), seen).to_str()


def write_text(file: Path) -> Path:
    """Writes 400,000 characters of the demo's text, if they are not there, and returns the file."""
    if not file.exists():
        seen, held_out = demo.split(demo.base_text(), _PIECES)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, "".join(seen + held_out).encode())
    return file
