"""A description of the weights of a model -> its architecture and the layout of its leaves.

Letters: D features, F units of an MLP, E experts, V vocab.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tracing_jax.arch import Arch, Reading
from tracing_jax.checkpoint.derived_tensors import DerivedTensors
from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.hf_layouts import LeafLayouts
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensor_layout import LeafLayout, TensorSlice
from tracing_jax.checkpoint.tensors import TensorStore
from tracing_jax.checkpoint.weights_only.description import UNITS, Description, TensorLocation
from tracing_jax.checkpoint.weights_only.names import EXPERT, LAYER
from tracing_jax.error_messages import grouped

Axes = tuple[str | None, ...]


class Built(NamedTuple):
    """A model that is read by its weights alone."""

    arch: Arch
    tensors: TensorStore
    layouts: LeafLayouts


@dataclass(frozen=True)
class Alternate:
    """Every second row or column of a stored tensor."""

    store: TensorStore
    name: str
    axis: int
    first: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.store.shape(self.name)
        return (*shape[: self.axis], shape[self.axis] // 2, *shape[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype(self.name)

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = list(bounds_of(index, self.shape))
        at = bounds[self.axis]
        bounds[self.axis] = slice(2 * at.start, 2 * at.stop)
        found = self.store.read(self.name, tuple(bounds))
        return np.ascontiguousarray(found[(*(slice(None),) * self.axis, slice(self.first, None, 2))])


def build(found: Description, store: TensorStore, family: str) -> Built:
    """Returns the model of a description.

    Raises:
      CheckpointError: tensors that it names are missing, or do not fit each other; all at once.
    """
    builder = _Builder(found, store)
    for i, layer in enumerate(found.layers):
        builder.add_layer(i, layer)
    builder.add_matrices()
    builder.add_ends()
    if builder.problems:
        raise CheckpointError(*grouped(builder.problems))
    return builder.built(family)


class _Builder:
    def __init__(self, found: Description, store: TensorStore):
        self.found, self.store, self.problems = found, store, list[str]()
        self.ordered = sorted(store.names())
        self.names, self.layouts, self.axes = set(store.names()), dict[str, LeafLayout](), dict[str, Axes]()
        self.sizes: dict[str, int] = {"embed": found.width}
        self.derived: dict[str, Alternate] = {}
        self.experts: int | None = None

    def add_layer(self, i: int, layer: int) -> None:
        prefix = f"layers/{i}/"
        for name in UNITS:
            if part := self.found.parts.get(name):
                self._add_units(f"{prefix}mlp/{name}_proj", part, layer, prefix, reads=name != "down")
        for name, leaf in (("mlp_norm", "mlp_norm"), ("mlp_post_norm", "mlp_post_norm")):
            if part := self.found.parts.get(name):
                self._add_norm(prefix + leaf, part.tensor.replace(LAYER, str(layer)))

    def add_matrices(self) -> None:
        for matrix in self.found.matrices:
            shape = self.store.shape(matrix.tensor)
            leaf = f"layers/{matrix.position}/other/{matrix.tensor.replace('/', '.')}/kernel"
            order = (matrix.axis, 1 - matrix.axis)
            self._put(leaf, LeafLayout((TensorSlice(matrix.tensor, shape),), shape, order), ("embed", leaf))
            self.sizes[leaf] = shape[1 - matrix.axis]

    def add_ends(self) -> None:
        D, parts = self.found.width, self.found.parts
        for name, leaf in (("embedding", "embed/embedding"), ("head", "head/lm_head/kernel")):
            if (part := parts.get(name)) is None or not self._is_there(part.tensor):
                continue
            shape = self.store.shape(part.tensor)
            if len(shape) != 2 or D not in shape:
                self.problems.append(f"{part.tensor} has shape {list(shape)}, expected a row of {D} for each token")
                continue
            at = 1 if shape[1] == D else 0
            vocab = self.sizes.setdefault("vocab", shape[1 - at])
            if shape[1 - at] != vocab:
                self.problems.append(f"{part.tensor} has {shape[1 - at]} tokens, the embedding {vocab}")
            order = (1 - at, at) if name == "embedding" else (at, 1 - at)
            axes: Axes = ("vocab", "embed") if name == "embedding" else ("embed", "vocab")
            self._put(leaf, LeafLayout((TensorSlice(part.tensor, shape),), shape, order), axes)
        if part := parts.get("final_norm"):
            self._add_norm("head/norm", part.tensor)

    def built(self, family: str) -> Built:
        found, has = self.found, self.found.parts.__contains__
        reading = Reading(tuple(self.axes.items()), tuple(self.sizes.items()), tuple(found.unknown.items()))
        tied = not has("head")
        arch = Arch(
            family=family,
            vocab_size=self.sizes.get("vocab", 0),
            embed_dim=found.width,
            num_layers=len(found.layers),
            mlp_dim=max((size for axis, size in self.sizes.items() if axis.endswith("/mlp")), default=0),
            num_kv_heads=0,
            q_group=0,
            head_dim=0,
            tied=tied,
            norm_eps=1e-6,
            rope_frequencies=(),
            layer_ropes=(),
            layer_windows=(None,) * len(found.layers),
            norm=found.norm or "rms",
            pre_norms=has("mlp_norm"),
            post_norms=has("mlp_post_norm"),
            mlp_bias=any(name.endswith("_proj/bias") for name in self.axes),
            gated=has("gate"),
            num_experts=self.experts,
            has_head=has("head") or found.tied,
            reading=reading,
        )
        store = DerivedTensors(self.store, self.derived) if self.derived else self.store
        return Built(arch, store, self.layouts)

    def _put(self, leaf: str, layout: LeafLayout, axes: Axes) -> None:
        self.layouts[leaf], self.axes[leaf] = layout, axes

    def _is_there(self, name: str) -> bool:
        if name not in self.names:
            self.problems.append(f"{name} is not in the files")
        return name in self.names

    def _add_norm(self, leaf: str, tensor: str) -> None:
        for kind, name in (("scale", tensor), ("bias", _bias(tensor))):
            if kind == "bias" and name not in self.names:
                continue
            if self._is_there(name):
                shape = self.store.shape(name)
                if shape != (self.found.width,):
                    self.problems.append(f"{name} has shape {list(shape)}, expected {[self.found.width]}")
                self._put(f"{leaf}/{kind}", LeafLayout((TensorSlice(name, shape),), shape, (0,)), ("embed",))

    def _add_units(self, leaf: str, part: TensorLocation, layer: int, prefix: str, reads: bool) -> None:
        tensor = part.tensor.replace(LAYER, str(layer))
        names = self._of_experts(tensor) if EXPERT in tensor else [tensor]
        if not names or not all(map(self._is_there, names)):
            self.problems += [] if names else [f"{tensor}: no such tensors"]
            return
        shapes = {self.store.shape(name) for name in names}
        shape = shapes.pop()
        matrix = shape[-2:]
        if shapes or len(shape) not in (2, 3) or self.found.width not in matrix or (len(shape) == 3 and len(names) > 1):
            self.problems.append(f"{tensor} has shape {list(shape)}, expected {self.found.width} features on one axis")
            return
        features = matrix.index(self.found.width)
        if matrix[0] == matrix[1]:
            features = int(reads != self.found.in_out)
        outer = len(shape) - 2
        count = shape[0] if outer else len(names) if EXPERT in tensor else None
        slices = [self._half(name, shape, outer + 1 - features, part) for name in names]
        units = slices[0].extent[outer + 1 - features]
        sizes = (*(() if count is None else (count,)), *slices[0].extent[outer:])
        first = len(sizes) - 2
        read = (first + features, first + 1 - features)
        order = (*range(first), *(read if reads else read[::-1]))
        mlp, expert = f"{prefix}mlp", f"{prefix}expert"
        inner: Axes = ("embed", mlp) if reads else (mlp, "embed")
        self._put(
            f"{leaf}/kernel", LeafLayout(tuple(slices), sizes, order), inner if count is None else (expert, *inner)
        )
        self._sized(mlp, units, tensor)
        if count is not None:
            self._sized(expert, count, tensor)
            self.experts = count
        self._add_bias(leaf, names, part, units, reads, mlp if reads else "embed")

    def _add_bias(
        self, leaf: str, names: Sequence[str], part: TensorLocation, units: int, reads: bool, axis: str
    ) -> None:
        """Adds the bias of an MLP that every token passes, if its tensor has one beside it."""
        name = _bias(names[0])
        if EXPERT in part.tensor or name == names[0] or name not in self.names or len(self.store.shape(name)) != 1:
            return
        size = units if reads else self.found.width
        if self.store.shape(name)[0] != (2 * size if part.half and reads else size):
            return
        layout = self._half(name, self.store.shape(name), 0, part if reads else TensorLocation(name))
        self._put(f"{leaf}/bias", LeafLayout((layout,), (size,), (0,)), (axis,))

    def _half(self, name: str, shape: tuple[int, ...], axis: int, part: TensorLocation) -> TensorSlice:
        size = shape[axis] // 2
        if part.half in ("first", "second"):
            start = size if part.half == "second" else 0
            return TensorSlice(name, shape, axis, start, start + size)
        if part.half in ("even", "odd"):
            new = f"{name}[{part.half}]"
            self.derived[new] = Alternate(self.store, name, axis, int(part.half == "odd"))
            return TensorSlice(new, self.derived[new].shape)
        return TensorSlice(name, shape)

    def _sized(self, axis: str, size: int, tensor: str) -> None:
        if self.sizes.setdefault(axis, size) != size:
            self.problems.append(f"{tensor} has {size} units, the MLP's others {self.sizes[axis]}")

    def _of_experts(self, tensor: str) -> list[str]:
        before, after = tensor.split(EXPERT)
        start = bisect.bisect_left(self.ordered, before)
        beginning = itertools.takewhile(lambda name: name.startswith(before), self.ordered[start:])
        middles = [name[len(before) : len(name) - len(after)] for name in beginning if name.endswith(after)]
        found = [int(middle) for middle in middles if middle.isdigit()]
        return [f"{before}{number}{after}" for number in sorted(found)]


def _bias(tensor: str) -> str:
    return tensor.removesuffix("weight") + "bias" if tensor.endswith("weight") else tensor + "_bias"


def unused(built: Built) -> Mapping[str, int]:
    """Returns the tensors that no leaf is made of, with their numbers of weights."""
    used = {part.tensor.partition("[")[0] for layout in built.layouts.values() for part in layout.slices}
    return {
        name: int(np.prod(built.tensors.shape(name), dtype=np.int64))
        for name in built.tensors.names()
        if name.partition("[")[0] not in used
    }
