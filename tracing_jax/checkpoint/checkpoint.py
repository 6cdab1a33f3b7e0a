"""`Checkpoint`: a model whose files are open, and whose weights are read when they are asked for."""

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.fitting import tied_names
from tracing_jax.checkpoint.hf_layouts import LeafLayouts, leaf_layouts
from tracing_jax.checkpoint.tensor_layout import LeafLayout
from tracing_jax.checkpoint.tensors import TensorStore, all_finite, past_cache_of
from tracing_jax.checkpoint.weights_only.names import sizes_of_components
from tracing_jax.tree import Tree, flatten, select, unflatten

_ROWS_PER_READ = 4096  # of the embedding, compared at a time


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open but not read. It is a `ParamSource` of numpy leaves in the dtype they have on disk.

    Attributes:
      id: what the user asked for; `revision` is the resolved commit of a Hub repository.
      folder: that contains config.json; `tokenizer_folder` differs for an adapter without a tokenizer of its own.
      notes: what was done so that the files could be read, and what of them is left out.

    Example:
      >>> checkpoint = tj.open("demo:base")
      >>> sorted(checkpoint.layer(0)["mlp"])  # read now
      ['down_proj', 'gate_proj', 'up_proj']
    """

    id: str
    revision: str | None
    folder: Path
    tokenizer_folder: Path
    arch: Arch
    tensors: TensorStore = field(repr=False)
    notes: tuple[str, ...] = ()
    found_layouts: LeafLayouts | None = field(default=None, repr=False)
    """The layouts of a model that is read by its weights alone, where they follow from no family."""
    refuses_nan: bool = field(default=True, repr=False)
    """Whether weights are searched for NaN and infinities as they are read; false for callers that would see them."""

    @cached_property
    def leaf_layouts(self) -> LeafLayouts:
        """Leaf name -> its layout in the files."""
        if self.found_layouts is not None:
            return {name: self.found_layouts[name] for name in axis_table(self.arch).leaves}
        return leaf_layouts(self.arch, self.tensors.names())

    @property
    def reading(self) -> str:
        """A hash of what is read of the tensors: the architecture, and which of their slices make each leaf."""
        facts = repr((self.arch, sorted(self.leaf_layouts.items())))
        return hashlib.sha256(facts.encode()).hexdigest()

    def first_layers(self, count: int) -> "Checkpoint":
        """Returns the model of the first `count` layers, the embedding and the head; the whole if it has no more."""
        if count >= self.arch.num_layers:
            return self
        return replace(self, arch=self.arch.with_layers(range(count)))

    def components(self) -> dict[str, int]:
        """Returns the components that the files hold besides the language model, such as `vision`: their weights."""
        names = self.tensors.names()
        return sizes_of_components({name: math.prod(self.tensors.shape(name)) for name in names})

    def past_cache(self) -> "Checkpoint":
        """Returns the model, its files read past the page cache where they can be."""
        return replace(self, tensors=past_cache_of(self.tensors))

    def files(self) -> tuple[Path, ...]:
        """Returns the files that the model was made of: config.json, if it has one, and those of its tensors."""
        config = self.folder / "config.json"
        return (*([config] if config.is_file() else []), *self.tensors.files())

    @property
    def num_bytes(self) -> int:
        """The size of all leaves, in the dtype they have on disk."""
        return sum(
            math.prod(layout.shape) * self.tensors.dtype(layout.slices[0].tensor).itemsize
            for layout in self.leaf_layouts.values()
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

    def leaf_slice(self, name: str, axis: int, *spans: slice) -> np.ndarray | None:
        """Returns slices of a leaf on one of its axes, joined; nothing else is read.

        None if they are not slices of the tensors in the files.
        """
        whole = self.leaf_layouts[name]  # a span may end behind the leaf, as that of an array may
        layouts = [whole.narrow(axis, *span.indices(whole.shape[axis])[:2]) for span in spans]
        found = [layout for layout in layouts if layout is not None]
        if len(found) < len(layouts):
            return None
        broken: list[str] = []
        parts = self._arrays(found, broken)
        self.refuse(broken)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

    def _read(self, prefix: str, only: Sequence[str] = ()) -> Tree:
        broken: list[str] = []
        leaves = {
            name: self._arrays([layout], broken)[0] for name, layout in self.layouts_of_subtree(prefix, only).items()
        }
        self.refuse(broken)
        return unflatten(leaves)

    def _arrays(self, layouts: Sequence[LeafLayout], broken: list[str]) -> list[np.ndarray]:
        """Reads leaves, or slices of them, at once; tensors that hold NaN or infinities are added to `broken`."""
        requests = [(part.tensor, part.index) for layout in layouts for part in layout.slices]
        arrays = self.tensors.read_many(requests)
        if self.refuses_nan:
            broken += [tensor for (tensor, _), array in zip(requests, arrays) if not all_finite(array)]
        remaining = iter(arrays)
        return [layout.to_leaf(list(itertools.islice(remaining, len(layout.slices)))) for layout in layouts]

    def layouts_of_subtree(self, prefix: str, only: Sequence[str] = ()) -> dict[str, LeafLayout]:
        """Returns the layouts under `embed/`, `layers/<i>/` or `head/`, without the prefix: those in `only`, if any."""
        layouts = {n.removeprefix(prefix): layout for n, layout in self.leaf_layouts.items() if n.startswith(prefix)}
        return flatten(select(unflatten(layouts), only))

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
        names = self.tensors.names()
        if self.found_layouts is not None or not self.arch.tied:
            return
        embedding, head = tied_names(self.arch, names)
        if head not in names:
            return
        stop = self.arch.vocab_size if stop is None else stop
        for row in range(start, stop, _ROWS_PER_READ):
            rows = (slice(row, min(row + _ROWS_PER_READ, stop)),)
            if not np.array_equal(self.tensors.read(head, rows), self.tensors.read(embedding, rows)):
                raise CheckpointError(
                    f"{self.id}: {head} differs from the embedding, but config.json says tie_word_embeddings: "
                    "true; set it to false if the head is meant to be its own"
                )
