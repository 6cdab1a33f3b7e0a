"""The models of a possible merge, read leaf by leaf together: the child, its reference, and the other parents."""

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from tracing_jax.axes import AxisTable, LeafSpec, axis_table, kind_of
from tracing_jax.checkpoint import Checkpoint, fits_page_cache
from tracing_jax.merges.piece_buffers import PieceBuffers
from tracing_jax.sources import ParamSource, leaf
from tracing_jax.sources.lazy_leaves import leaf_slice

SLICE_BYTES = 2**25
"""A leaf of more bytes in float32 is read in slices on the axis that is outermost in the files."""

LayerSources = tuple[int, ...]
"""At i the layer of a model that layer i of the child is compared with."""


class TensorKey(NamedTuple):
    """The key of a tensor: its leaf, the layer of the child (None outside layers), the role, the expert if any."""

    name: str
    layer: int | None
    role: str
    expert: int | None = None

    def __str__(self) -> str:
        return self.name if self.expert is None else f"{self.name}[{self.expert}]"


class PiecePlan(NamedTuple):
    """A leaf of all models, or a slice of it, that is not read yet.

    Attributes:
      place: of the leaf.
      sources: each model with its name of the leaf, and whether it has one MLP for the experts of the child.
      axis: on which the leaf is sliced, into so many `slices`, of which this one is from `start` to `stop`.
      whole: the leaf of models that cannot be read in slices, by their places, for all its slices.
    """

    place: TensorKey
    sources: tuple[tuple[ParamSource, str, bool], ...]
    axis: int
    start: int
    stop: int
    slices: int
    whole: dict[int, np.ndarray]


class Piece(NamedTuple):
    """A leaf of all models, in the order of `read_together`, or a slice of it.

    Attributes:
      leaves: of all models.
      of_experts: whether its outermost axis is that of the experts.
      axis: on which the leaf is sliced, into so many `slices`; `start` is the first unit of this one.
    """

    leaves: tuple[np.ndarray, ...]
    of_experts: bool
    axis: int = 0
    start: int = 0
    slices: int = 1


class MergeError(ValueError):
    """Models whose shares cannot be estimated, with what to do."""


@dataclass(frozen=True)
class MergeModels:
    """The child, its possible parents, and the model that the parents were made from, if it is known.

    Shares are those of differences from a reference: the origin, or without one the first parent.

    Attributes:
      child: the model that may be a merge.
      parents: name -> model.
      origin: the common base of the parents; None if unknown.
      tokens: ids of the tokens that all vocabularies have, in each model that is `read_together`; None where all
        vocabularies are the same.
      layers: the layer that belongs to each layer of the child, in each other model that is `read_together`; None for
        layers in equal places.
    """

    child: ParamSource
    parents: Mapping[str, ParamSource]
    origin: ParamSource | None = None
    tokens: tuple[Int[np.ndarray, " S"], ...] | None = None
    layers: tuple[LayerSources, ...] | None = None
    _reading: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)
    """Held to read what is no slice of a file: sources need not be fit for several threads."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parents."""
        return tuple(self.parents)

    @functools.cached_property
    def read_together(self) -> tuple[ParamSource, ...]:
        """The child, the reference, and all other parents in their order."""
        parents = tuple(self.parents.values())
        return (self.child, *parents) if self.origin is None else (self.child, self.origin, *parents)

    @property
    def terms(self) -> int:
        """The number of differences from the reference that have a coefficient of their own."""
        return len(self.read_together) - 2

    def shares_of(self, coefficients: np.ndarray) -> np.ndarray:
        """Returns the shares `[..., K]` of the parents of coefficients `[..., terms]` of differences."""
        if self.origin is not None:
            return coefficients
        return np.concatenate([1.0 - coefficients.sum(-1, keepdims=True), coefficients], axis=-1)

    @functools.cached_property
    def left_out(self) -> dict[str, str]:
        """Leaf of the child -> why it is not compared."""
        found = {}
        for name, spec in self._table.leaves.items():
            wanted = self._shape(self._table, spec)
            for model, theirs in zip(self._others, self._names_in_others(name), strict=True):
                table = axis_table(model.arch)
                if theirs is None or theirs not in table.leaves:
                    found[name] = "not every model has it"
                elif (shape := self._shape(table, table.leaves[theirs])) != wanted:
                    if not (self._is_of_experts(spec) and shape == wanted[1:]):
                        found[name] = f"shapes {wanted} and {shape}"
                elif "vocab" in spec.axes and self.tokens is None and table.sizes["vocab"] != self._vocab:
                    found[name] = "vocabularies of different sizes, and not all tokenizers could be read"
        return found

    @functools.cached_property
    def from_dense(self) -> bool:
        """Whether the child has experts where another model has one MLP, with which each expert is compared."""
        for place in self.places():
            spec = self._table.leaves[place.name]
            if self._is_of_experts(spec):
                theirs = [
                    axis_table(m.arch).leaves[str(n)] for m, n in zip(self._others, self._names_in_others(place.name))
                ]
                return any(len(other.axes) < len(spec.axes) for other in theirs)
        return False

    def places(self) -> Iterator[TensorKey]:
        """Yields the key of each leaf that is compared."""
        for name in self._table.leaves:
            if name not in self.left_out:
                yield TensorKey(name, int(name.split("/")[1]) if name.startswith("layers/") else None, self.role(name))

    def role(self, name: str) -> str:
        """Returns the role of a leaf: embedding, attention, mlp, expert, router, norm or head."""
        if "norm" in name:
            return "norm"
        if name.startswith("embed/"):
            return "embedding"
        if name.startswith("head/"):
            return "head"
        if "/mlp/" in name:
            return "router" if "/router/" in name else "expert" if self.child.arch.num_experts else "mlp"
        return "attention"

    def shape(self, place: TensorKey) -> tuple[int, ...]:
        """Returns the shape of a leaf of the child."""
        return tuple(self._table.sizes[axis or ""] for axis in self._table.leaves[place.name].axes)

    def pieces(self, place: TensorKey) -> Iterator[Piece]:
        """Yields a leaf of all models; of a large leaf slices, one after another."""
        yield from map(self.piece, self.plans(place))

    def plans(self, place: TensorKey) -> Iterator[PiecePlan]:
        """Yields the pieces that a leaf is read in."""
        spec = self._table.leaves[place.name]
        paired = "vocab" in spec.axes and self.tokens is not None
        axis, sources = self._outermost_axis(place.name), self._sources(place)
        units = self._table.sizes[spec.axes[axis] or ""] if spec.axes else 1
        count = 1 if paired else min(units, 2 ** max(0, math.ceil(math.log2(self._bytes(spec) / SLICE_BYTES))))
        whole: dict[int, np.ndarray] = {}
        for start, stop in itertools.pairwise(map(int, np.linspace(0, units, count + 1).astype(int))):
            yield PiecePlan(place, sources, axis, start, stop, count, whole)

    def piece(self, plan: PiecePlan, buffers: PieceBuffers | None = None) -> Piece:
        """Reads a piece; several threads may, each with buffers of its own.

        Args:
          plan: of the piece.
          buffers: where slices are read; the next piece that is read there overwrites this one.
        """
        spec = self._table.leaves[plan.place.name]
        if plan.slices > 1:
            parts = (self._units(plan, i, *one, buffers) for i, one in enumerate(plan.sources))
            return Piece(tuple(parts), self._is_of_experts(spec), plan.axis, plan.start, plan.slices)
        with self._reading:
            leaves = [self._paired(i, spec, leaf(m, n)) for i, (m, n, _) in enumerate(plan.sources)]
        paired = (_of_each(own, len(leaves[0])) if dense else own for own, (_, _, dense) in zip(leaves, plan.sources))
        return Piece(tuple(paired), self._is_of_experts(spec))

    def _sources(self, place: TensorKey) -> tuple[tuple[ParamSource, str, bool], ...]:
        """Returns each model with its name of a leaf, and whether it has one MLP for the experts of the child."""
        is_of_experts = self._is_of_experts(self._table.leaves[place.name])
        names = (place.name, *map(str, self._names_in_others(place.name)))
        return tuple(
            (model, name, is_of_experts and self._is_dense(i, name))
            for i, (model, name) in enumerate(zip(self._unchecked, names))
        )

    def _units(
        self, plan: PiecePlan, at: int, model: ParamSource, name: str, dense: bool, buffers: PieceBuffers | None
    ) -> np.ndarray:
        """Returns units of a leaf of one model."""
        span = slice(plan.start, plan.stop)
        part = None
        if buffers is not None and not dense and isinstance(model, Checkpoint):
            part = buffers.read(at, model, name, plan.axis, span)
        if part is None:
            with self._reading:
                part = self._slice_of(plan, at, model, name, dense)
        if name.startswith("embed/") and isinstance(model, Checkpoint):
            model.check_tied_copy(span.start, span.stop)
        return part

    def _slice_of(self, plan: PiecePlan, at: int, model: ParamSource, name: str, dense: bool) -> np.ndarray:
        """Returns units of a leaf that may have to be read whole."""
        kept, span = plan.whole, slice(plan.start, plan.stop)
        if at not in kept:
            part = None if dense else leaf_slice(model, name, plan.axis, span)
            if part is not None:
                return np.asarray(part)
            kept[at] = np.asarray(leaf(model, name))
        whole = _of_each(kept[at], self.shape(plan.place)[0]) if dense else kept[at]
        found: np.ndarray = whole[(slice(None),) * plan.axis + (span,)]
        return found

    def refuse_nan(self, place: TensorKey) -> None:
        """Raises for a leaf that holds NaN or infinities in one of the models.

        Raises:
          CheckpointError, MergeError: always.
        """
        for model, name in zip(self.read_together, (place.name, *map(str, self._names_in_others(place.name)))):
            leaf(model, name)  # a checkpoint raises, and names the tensor
        raise MergeError(f"{place}: NaN or infinite weights, of which no share means anything")

    @functools.cached_property
    def _unchecked(self) -> tuple[ParamSource, ...]:
        """The models that are `read_together`, not searched for NaN as they are read: the sums show it.

        Where their files are larger than the memory, they are read past the page cache: in one pass nothing is found
        there.
        """
        fit = fits_page_cache(file for model in self.read_together if isinstance(model, Checkpoint)
                              for file in model.files())  # fmt: skip

        def unchecked(model: ParamSource) -> ParamSource:
            if not isinstance(model, Checkpoint):
                return model
            return replace(model if fit else model.past_cache(), refuses_nan=False)

        return tuple(map(unchecked, self.read_together))

    @functools.cached_property
    def _table(self) -> AxisTable:
        return axis_table(self.child.arch)

    @property
    def _others(self) -> Sequence[ParamSource]:
        return self.read_together[1:]

    @property
    def _vocab(self) -> int:
        return self.child.arch.vocab_size

    def _names_in_others(self, name: str) -> tuple[str | None, ...]:
        """Returns the name of the leaf in the reference and in each other parent."""
        if not name.startswith("layers/"):
            return (name,) * len(self._others)
        _, index, rest = name.split("/", 2)
        if self.layers is not None:
            return tuple(f"layers/{layers[int(index)]}/{rest}" for layers in self.layers)
        return tuple(name if int(index) < model.arch.num_layers else None for model in self._others)

    def _shape(self, table: AxisTable, spec: LeafSpec) -> tuple[int, ...]:
        """Returns the shape of a leaf; the vocabulary counts as one token, for tokens are paired."""
        return tuple(1 if axis == "vocab" else table.sizes[axis or ""] for axis in spec.axes)

    def _is_of_experts(self, spec: LeafSpec) -> bool:
        return bool(spec.axes) and kind_of(spec.axes[0] or "") == "expert"

    def _is_dense(self, model: int, name: str) -> bool:
        """Returns whether a model has one MLP for the experts of the child; `name` is that of its leaf."""
        axes = axis_table(self.read_together[model].arch).leaves[name].axes
        return not (axes and kind_of(axes[0] or "") == "expert")

    def _bytes(self, spec: LeafSpec) -> int:
        return 4 * math.prod(self._table.sizes[axis or ""] for axis in spec.axes)

    def _outermost_axis(self, name: str) -> int:
        """Returns the axis of a leaf of the child that is outermost in the files."""
        if not isinstance(self.child, Checkpoint):
            return 0
        return self.child.leaf_layouts[name].order.index(0) if self._table.leaves[name].axes else 0

    def _paired(self, model: int, spec: LeafSpec, found: object) -> np.ndarray:
        array = np.asarray(found)
        if "vocab" not in spec.axes or self.tokens is None:
            return array
        return array.take(self.tokens[model], axis=spec.axes.index("vocab"))


def _of_each(mlp: np.ndarray, experts: int) -> np.ndarray:
    """Returns the weights of one MLP as those of each of so many experts; nothing is copied."""
    return np.broadcast_to(mlp, (experts, *mlp.shape))
