"""How a leaf lies in the tensors of a checkpoint: whole, as a slice of one, or stacked from several.

GPT-2 keeps queries, keys and values in one tensor (three leaves), Mixtral may keep every expert in its own (one leaf).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tracing_jax.checkpoint.tensors import Index


@dataclass(frozen=True)
class Piece:
    """A tensor, or the slice of it that belongs to one leaf."""

    tensor: str
    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    axis: int = 0
    start: int = 0
    stop: int | None = None
    """The slice runs from `start` to `stop` on `axis`; all other axes are whole."""

    @property
    def index(self) -> Index:
        """The slice of the tensor; empty for the whole of it."""
        if (self.start, self.stop) == (0, None):
            return ()
        return (*(slice(None),) * self.axis, slice(self.start, self.stop))

    @property
    def extent(self) -> tuple[int, ...]:
        """The shape of the slice."""
        sizes = list(self.shape)
        sizes[self.axis] = len(range(*slice(self.start, self.stop).indices(sizes[self.axis])))
        return tuple(sizes)

    def cut(self, axis: int, start: int, stop: int) -> "Piece | None":
        """Returns the part from `start` to `stop` on one axis of the slice; None where that makes two cut axes."""
        if self.index and axis != self.axis:
            return None
        first = self.start if self.index else 0
        return replace(self, axis=axis, start=first + start, stop=first + stop)


@dataclass(frozen=True)
class Entry:
    """How one leaf lies in a checkpoint: `leaf = stack(pieces).reshape(unfolded).transpose(order)`."""

    pieces: tuple[Piece, ...]
    unfolded: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the leaf."""
        return tuple(self.unfolded[axis] for axis in self.order)

    def cut(self, axis: int, start: int, stop: int) -> "Entry | None":
        """Returns how units `start` to `stop` of one axis of the leaf lie in the checkpoint.

        None where they are no slice of each tensor: units of an axis that is folded into an outer one, say.
        """
        cut = self.order[axis]
        if (start, stop) == (0, self.unfolded[cut]):
            return self
        found = self._tensor_axis(cut)
        if found is None:
            return None
        tensor_axis, inner = found
        pieces = [piece.cut(tensor_axis, start * inner, stop * inner) for piece in self.pieces]
        sizes = tuple(stop - start if at == cut else size for at, size in enumerate(self.unfolded))
        return Entry(tuple(piece for piece in pieces if piece), sizes, self.order) if all(pieces) else None

    def _tensor_axis(self, cut: int) -> tuple[int, int] | None:
        """Returns the axis of a piece whose outermost factor is an unfolded axis, and the rows of one unit there."""
        stacked = (len(self.pieces),) if len(self.pieces) > 1 else ()
        before = math.prod(self.unfolded[:cut])
        outside = 1
        for axis, size in enumerate(stacked + self.pieces[0].extent):
            inside = axis >= len(stacked) and size % self.unfolded[cut] == 0
            if outside == before and inside and size > 1:
                return axis - len(stacked), size // self.unfolded[cut]
            outside *= size
        return None

    def to_leaf(self, read: Callable[[str, Index], np.ndarray]) -> np.ndarray:
        """Returns the leaf, a view of what `read(tensor, index)` gives where numpy can make one."""
        pieces = [read(piece.tensor, piece.index) for piece in self.pieces]
        whole = pieces[0] if len(pieces) == 1 else np.stack(pieces)
        return whole.reshape(self.unfolded).transpose(self.order)

    def to_pieces(self, leaf: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
        """Yields each piece with its part of the leaf, in the shape of the piece: the inverse of `to_leaf`."""
        whole = leaf.transpose(np.argsort(self.order))
        parts = [whole] if len(self.pieces) == 1 else whole.reshape(len(self.pieces), -1)
        for piece, part in zip(self.pieces, parts, strict=True):
            yield piece, part.reshape(piece.extent)


def tensor_shapes(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Returns tensor name -> shape of every tensor that the entries read."""
    return {piece.tensor: piece.shape for entry in entries for piece in entry.pieces}


def to_tensors(entries: Mapping[str, Entry], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the contiguous tensors in which these leaves lie, by tensor name; all leaves of a tensor must be there.

    Raises:
      ValueError: leaves of one tensor that differ in dtype.
    """
    found: dict[str, np.ndarray] = {}
    for name, leaf in leaves.items():
        for piece, part in entries[name].to_pieces(leaf):
            if not piece.index:
                found[piece.tensor] = np.ascontiguousarray(part)
                continue
            tensor = found.setdefault(piece.tensor, np.empty(piece.shape, part.dtype))
            if tensor.dtype != part.dtype:
                raise ValueError(f"{name} is {part.dtype}, the rest of {piece.tensor} {tensor.dtype}; cast them alike")
            tensor[piece.index] = part
    return found
