"""The exception of reading a checkpoint, and the message for a damaged file."""

from pathlib import Path

from tracing_jax.arch import UnsupportedModelError
from tracing_jax.error_messages import joined


class CheckpointError(ValueError):
    """Everything that is wrong with a checkpoint, one problem each, raised before any weight is read.

    Example:
      >>> (tmp / "config.json").write_bytes((tj.open("demo:base").folder / "config.json").read_bytes()) > 0
      True
      >>> try:
      ...     tj.open(tmp)
      ... except tj.CheckpointError as error:
      ...     "no weights" in str(error)
      True
    """

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return joined(self.problems)


class MisfitError(CheckpointError):
    """Tensors that are not those of the model that the config describes.

    Attributes:
      is_whole: whether nothing is lost all the same, so that the weights can be compared by what the files say: tensors
        that the config does not ask for, others in place of those that it asks for, or another number of tokens.
    """

    def __init__(self, *problems: str, is_whole: bool):
        super().__init__(*problems)
        self.is_whole = is_whole


class UnsupportedMetadataError(CheckpointError, UnsupportedModelError):
    """The metadata of a GGUF file describe a model that is not supported."""


def damaged(path: Path, expected: str) -> str:
    """Message that `path` does not hold what was `expected`: what it holds instead, and what to do."""
    with path.open("rb") as file:
        is_pointer = file.read(40).startswith(b"version https://git-lfs")
    if is_pointer:
        return f"{path}: a git-lfs pointer, the weights were never fetched; run `git lfs pull` in {path.parent}"
    return f"{path}: truncated or corrupt: expected {expected}, found {path.stat().st_size} bytes; download it again"
