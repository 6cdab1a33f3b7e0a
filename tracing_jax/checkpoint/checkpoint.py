"""`open_checkpoint`: a local folder or a Hub id becomes a `Checkpoint`, whose weights are read when asked for."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from absl import logging

from tracing_jax.arch import Arch, read_arch
from tracing_jax.checkpoint.adapter import base_id, is_adapter, merged
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.hf_layouts import LeafLayouts, leaf_layouts
from tracing_jax.checkpoint.hub import CheckpointFolder, on_hub, resolve
from tracing_jax.checkpoint.tensor_layout import LeafLayout, tensor_shapes
from tracing_jax.checkpoint.tensors import TensorStore, all_finite, open_tensors
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

    @cached_property
    def leaf_layouts(self) -> LeafLayouts:
        """Leaf name -> its layout in the files."""
        return leaf_layouts(self.arch, self.tensors.names())

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
        layouts = [self.leaf_layouts[name].narrow(axis, span.start, span.stop) for span in spans]
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
            name: self._arrays([layout], broken)[0] for name, layout in self.layouts_of_part(prefix, only).items()
        }
        self.refuse(broken)
        return unflatten(leaves)

    def _arrays(self, layouts: Sequence[LeafLayout], broken: list[str]) -> list[np.ndarray]:
        """Reads leaves, or slices of them, at once; tensors that hold NaN or infinities are added to `broken`."""
        requests = [(part.tensor, part.index) for layout in layouts for part in layout.slices]
        arrays = self.tensors.read_many(requests)
        broken += [tensor for (tensor, _), array in zip(requests, arrays) if not all_finite(array)]
        remaining = iter(arrays)
        return [layout.to_leaf(list(itertools.islice(remaining, len(layout.slices)))) for layout in layouts]

    def layouts_of_part(self, prefix: str, only: Sequence[str] = ()) -> dict[str, LeafLayout]:
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
        if not self.arch.tied or "lm_head.weight" not in self.tensors.names():
            return
        embedding = self.leaf_layouts["embed/embedding"].slices[0].tensor
        stop = self.arch.vocab_size if stop is None else stop
        for row in range(start, stop, _ROWS):
            rows = (slice(row, min(row + _ROWS, stop)),)
            if not np.array_equal(self.tensors.read("lm_head.weight", rows), self.tensors.read(embedding, rows)):
                raise CheckpointError(
                    f"{self.id}: lm_head.weight differs from the embedding, but config.json says tie_word_embeddings: "
                    "true; set it to false if the head is meant to be its own"
                )


def open_checkpoint(
    model_id: str, cache_dir: str | None = None, in_ranges: bool = False, adapter_base: str | None = None
) -> Checkpoint:
    """Returns the checkpoint of a local folder or Hub id (`org/name` or `org/name@revision`); reads no weights.

    A LoRA adapter is merged into its base as that is read. The base is the local folder or Hub repository that the
    adapter's config names, which is logged.

    Args:
      model_id: of the model.
      cache_dir: where downloads are kept, see `resolve`.
      in_ranges: whether weights that are on the Hub, and not in its cache, stay there, and are read in ranges of bytes:
        for runs that look at a small part of them.
      adapter_base: the base to merge an adapter into, whatever its config names; of no effect on other models.

    Raises:
      CheckpointError: not found, not readable, or tensors missing, unexpected or of the wrong shape, all at once.
      UnsupportedModelError: the config asks for something this package does not compute.
    """
    found = resolve(model_id, cache_dir, weights=not in_ranges)
    folder, tokenizer_folder = found.folder, found.folder
    if is_adapter(folder):
        folder = _resolve_base(found, cache_dir, adapter_base).folder
        tokenizer_folder = found.folder if (found.folder / "tokenizer_config.json").exists() else folder
        arch = read_arch(folder)
        tensors = merged(open_tensors(folder), found.folder)
    else:
        arch = read_arch(folder)
        tensors = open_tensors(folder, on_hub(found, cache_dir)) if in_ranges else open_tensors(folder)
    checkpoint = Checkpoint(found.id, found.revision, folder, tokenizer_folder, arch, tensors)
    if problems := _problems(checkpoint):
        raise CheckpointError(*(f"{model_id}: {problem}" for problem in problems))
    return checkpoint


def _resolve_base(adapter: CheckpointFolder, cache_dir: str | None, given: str | None) -> CheckpointFolder:
    """Returns the folder of an adapter's base, and logs which model that is and where it is read from."""
    model_id, source = (given, "as given") if given else (base_id(adapter.folder), "named by its adapter_config.json")
    try:
        base = resolve(model_id, cache_dir)
    except CheckpointError as error:
        reasons = (f"{adapter.id}: its base model {model_id}, {source}: {problem}" for problem in error.problems)
        raise CheckpointError(*reasons) from error
    where = f"commit {base.revision} of the Hub" if base.revision else f"folder {base.folder.resolve()}"
    logging.info("%s: a LoRA adapter, merged into %s (%s), read from %s", adapter.id, model_id, source, where)
    return base


def _problems(checkpoint: Checkpoint) -> list[str]:
    store, names = checkpoint.tensors, set(checkpoint.tensors.names())
    wanted = tensor_shapes(checkpoint.leaf_layouts.values())
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
    for leaf, layout in checkpoint.leaf_layouts.items():
        tensors = [part.tensor for part in layout.slices if part.tensor in names]
        dtypes = sorted({str(checkpoint.tensors.dtype(tensor)) for tensor in tensors})
        if len(dtypes) > 1:
            lines.append(f"the tensors of {leaf} ({tensors[0]} ...) are {' and '.join(dtypes)}; convert them to one")
    return lines
