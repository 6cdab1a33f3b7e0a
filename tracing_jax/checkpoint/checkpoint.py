"""The door: a local folder or a Hub id becomes a `Checkpoint`, whose weights are read when they are asked for."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tracing_jax.arch import Arch, read_arch
from tracing_jax.checkpoint.adapter import base_id, is_adapter, merged
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.finite import all_finite
from tracing_jax.checkpoint.hub import on_hub, resolve
from tracing_jax.checkpoint.layout import Layout, layout
from tracing_jax.checkpoint.tensor_layout import Entry, tensor_shapes
from tracing_jax.checkpoint.tensors import Index, TensorStore, open_tensors
from tracing_jax.tree import Tree, flatten, select, unflatten

# Constants that old checkpoints carry as tensors: Llama's frequencies and GPT-2's masks follow from the config.
_DERIVED = re.compile(r".*rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
_ROWS = 4096  # of the embedding, compared at a time
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open but not read. It is a `ParamSource` of numpy leaves in the dtype they have on disk.

    Attributes:
      id: what the user asked for; `revision` is the resolved commit of a Hub repository.
      folder: where config.json lies; `tokenizer_folder` differs for an adapter without a tokenizer of its own.
    """

    id: str
    revision: str | None
    folder: Path
    tokenizer_folder: Path
    arch: Arch
    tensors: TensorStore = field(repr=False)

    @cached_property
    def entries(self) -> Layout:
        """Leaf name -> how it lies in the files."""
        return layout(self.arch, self.tensors.names())

    def first_layers(self, count: int) -> "Checkpoint":
        """Returns the model of the first `count` layers, the embedding and the head; the whole if it has no more."""
        if count >= self.arch.num_layers:
            return self
        ropes, windows = self.arch.layer_ropes[:count], self.arch.layer_windows[:count]
        return replace(self, arch=replace(self.arch, num_layers=count, layer_ropes=ropes, layer_windows=windows))

    @property
    def num_bytes(self) -> int:
        """The size of all leaves, in the dtype they have on disk."""
        return sum(
            math.prod(entry.shape) * self.tensors.dtype(entry.pieces[0].tensor).itemsize
            for entry in self.entries.values()
        )

    def embed(self) -> Tree:
        """Returns the subtree `embed`, read now; a tied model's copy of it in the file must be the same."""
        part = self._read("embed/")
        self.check_tied_copy()
        return part

    def layer(self, index: int, only: Sequence[str] = ()) -> Tree:
        """Returns the subtree `layers/<index>`, or its leaves under the names in `only`, read now."""
        return self._read(f"layers/{index}/", only)

    def head(self) -> Tree:
        """Returns the subtree `head`, read now."""
        return self._read("head/")

    def leaf_slice(self, name: str, axis: int, span: slice) -> np.ndarray | None:
        """Returns a slice of a leaf, read now and nothing else; None if it does not lie by itself in the files."""
        entry = self.entries[name].cut(axis, span.start, span.stop)
        return None if entry is None else self._leaves({name: entry})[name]

    def _read(self, prefix: str, only: Sequence[str] = ()) -> Tree:
        return unflatten(self._leaves(self.part_entries(prefix, only)))

    def _leaves(self, entries: Mapping[str, Entry]) -> dict[str, np.ndarray]:
        broken: list[str] = []

        def read(tensor: str, index: Index) -> np.ndarray:
            part = self.tensors.read(tensor, index)
            if not all_finite(part):
                broken.append(tensor)
            return part

        leaves = {name: entry.to_leaf(read) for name, entry in entries.items()}
        self.refuse(broken)
        return leaves

    def part_entries(self, prefix: str, only: Sequence[str] = ()) -> dict[str, Entry]:
        """Returns the entries under `embed/`, `layers/<i>/` or `head/`, without the prefix: those in `only`, if any."""
        entries = {name.removeprefix(prefix): e for name, e in self.entries.items() if name.startswith(prefix)}
        return flatten(select(unflatten(entries), only))

    def refuse(self, broken: Sequence[str]) -> None:
        """Raises if there are any `broken` tensors: with weights that are no numbers."""
        if broken:
            raise CheckpointError(
                f"{self.id}: NaN or infinite weights in {', '.join(dict.fromkeys(broken))}; the checkpoint is damaged "
                "or its training diverged; no statistic of it means anything"
            )

    def check_tied_copy(self, start: int = 0, stop: int | None = None) -> None:
        """Makes sure that these rows of a tied model's copy of its embedding, if the file has one, are the same.

        Raises:
          CheckpointError: they are not.
        """
        if not self.arch.tied or "lm_head.weight" not in self.tensors.names():
            return
        embedding = self.entries["embed/embedding"].pieces[0].tensor
        stop = self.arch.vocab_size if stop is None else stop
        for row in range(start, stop, _ROWS):
            rows = (slice(row, min(row + _ROWS, stop)),)
            if not np.array_equal(self.tensors.read("lm_head.weight", rows), self.tensors.read(embedding, rows)):
                raise CheckpointError(
                    f"{self.id}: lm_head.weight differs from the embedding, but config.json says tie_word_embeddings: "
                    "true; set it to false if the head is meant to be its own"
                )


def open_checkpoint(model_id: str, cache_dir: str | None = None, in_ranges: bool = False) -> Checkpoint:
    """Returns the checkpoint of a local folder or Hub id (`org/name` or `org/name@revision`); reads no weights.

    LoRA adapter folders are merged onto their base as it is read.

    Args:
      model_id: of the model.
      cache_dir: where downloads are kept, see `resolve`.
      in_ranges: whether weights that are on the Hub, and not in its cache, stay there, and are read in ranges of bytes:
        for runs that look at a small part of them.

    Raises:
      CheckpointError: not found, not readable, or tensors missing, unexpected or of the wrong shape, all at once.
      UnsupportedModelError: the config asks for something this package does not compute.
    """
    found = resolve(model_id, cache_dir, weights=not in_ranges)
    folder, tokenizer_folder = found.folder, found.folder
    if is_adapter(folder):
        folder = resolve(base_id(found.folder), cache_dir).folder
        tokenizer_folder = found.folder if (found.folder / "tokenizer_config.json").exists() else folder
        arch = read_arch(folder)
        tensors = merged(open_tensors(folder), found.folder)
    else:
        arch = read_arch(folder)
        tensors = open_tensors(folder, on_hub(found)) if in_ranges else open_tensors(folder)
    checkpoint = Checkpoint(found.id, found.revision, folder, tokenizer_folder, arch, tensors)
    if problems := _problems(checkpoint):
        raise CheckpointError(*(f"{model_id}: {problem}" for problem in problems))
    return checkpoint


def _problems(checkpoint: Checkpoint) -> list[str]:
    store, names = checkpoint.tensors, set(checkpoint.tensors.names())
    wanted = tensor_shapes(checkpoint.entries.values())
    present = {name: shape for name, shape in wanted.items() if name in names}
    lines = [f"missing tensor {name} {shape}" for name, shape in wanted.items() if name not in names]
    lines += [
        f"wrong shape of {name}: {store.shape(name)}, config.json asks for {shape}"
        for name, shape in present.items()
        if store.shape(name) != shape
    ]
    lines += [
        f"dtype {store.dtype(name)} of {name} is not supported; convert to one of {', '.join(_DTYPES)}"
        for name in present
        if str(store.dtype(name)) not in _DTYPES
    ]
    lines += _mixed_dtypes(checkpoint, names)
    extra = sorted(name for name in names - set(wanted) if not _DERIVED.fullmatch(name))
    if checkpoint.arch.tied and "lm_head.weight" in extra:
        extra.remove("lm_head.weight")  # a copy of the embedding; checked when the embedding is read
    return lines + [f"unexpected tensor {name} {store.shape(name)}" for name in extra]


def _mixed_dtypes(checkpoint: Checkpoint, names: set[str]) -> list[str]:
    """Returns the leaves whose tensors differ in dtype."""
    lines = []
    for leaf, entry in checkpoint.entries.items():
        tensors = [piece.tensor for piece in entry.pieces if piece.tensor in names]
        dtypes = sorted({str(checkpoint.tensors.dtype(tensor)) for tensor in tensors})
        if len(dtypes) > 1:
            lines.append(f"the tensors of {leaf} ({tensors[0]} ...) are {' and '.join(dtypes)}; convert them to one")
    return lines
