"""GGUF files, as llama.cpp reads them: tensors dequantised as they are read, config and tokenizer from metadata."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tracing_jax.arch import Arch
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.gguf.config import config_of, plain_config
from tracing_jax.checkpoint.gguf.families import GGUF_ARCHITECTURES
from tracing_jax.checkpoint.gguf.header import GgufHeader, read_gguf_header
from tracing_jax.checkpoint.gguf.names import with_hf_names
from tracing_jax.checkpoint.gguf.tensors import GgufFile
from tracing_jax.checkpoint.gguf.tokenizer import write_tokenizer
from tracing_jax.checkpoint.tensors import TensorStore, joined_stores
from tracing_jax.checkpoint.whole_folder import whole_folder

__all__ = ["GGUF_ARCHITECTURES", "GgufModel"]

_FORMAT = 3  # raise when the files that are made of metadata change


class GgufModel:
    """A model in one GGUF file, or in several shards of which the first has the metadata."""

    def __init__(self, paths: Sequence[Path]):
        """Reads the headers.

        Raises:
          CheckpointError: they are damaged, or hold a type of tensor that is not read.
        """
        self._paths = tuple(paths)
        headers = [read_gguf_header(path) for path in paths]
        self._metadata = headers[0].metadata
        tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
        self._header = GgufHeader(self._metadata, tensors)
        self._store = joined_stores([GgufFile(path, header) for path, header in zip(paths, headers)])

    @property
    def stored(self) -> TensorStore:
        """The tensors under the names of llama.cpp."""
        return self._store

    def description(self, of_any_family: bool = False) -> tuple[Path, list[str]]:
        """Returns a folder with the config and the tokenizer of the model, and notes; it is made once, in the cache.

        Args:
          of_any_family: whether the config of a family that is not supported is made of its metadata as they are.

        Raises:
          CheckpointError: the metadata cannot be read as a config.
        """
        stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        key = hashlib.sha256(json.dumps([_FORMAT, stamps, of_any_family]).encode()).hexdigest()[:16]
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tracing_jax" / "gguf"
        folder = root / f"{self._paths[0].stem}-{key}"
        if not folder.exists():
            self._write(folder, of_any_family)
        notes = [f"{self._paths[0].name}: config and tokenizer are made of its metadata, in {folder}"]
        why = folder / "no_tokenizer.txt"
        return folder, notes + ([why.read_text("utf-8")] if why.exists() else [])

    def tensors(self, arch: Arch) -> TensorStore:
        """Returns the tensors under the names and in the layout of transformers."""
        return with_hf_names(self._store, str(self._metadata["general.architecture"]), arch)

    def _write(self, folder: Path, of_any_family: bool) -> None:
        try:
            config = plain_config(self._metadata) if of_any_family else config_of(self._header, self._small_tensor)
        except CheckpointError as error:
            raise type(error)(*(f"{self._paths[0]}: {problem}" for problem in error.problems)) from None
        with whole_folder(folder, is_cache=True) as work:
            (work / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
            if why := write_tokenizer(work, self._metadata):
                (work / "no_tokenizer.txt").write_text(why, encoding="utf-8")

    def _small_tensor(self, name: str) -> np.ndarray:
        if max(self._store.shape(name)) > 1 << 16:
            raise CheckpointError(f"{name} has shape {self._store.shape(name)}, expected a factor per frequency")
        return self._store.read(name).astype(np.float32)
