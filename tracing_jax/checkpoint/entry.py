"""How a leaf lies in the tensors of a checkpoint: whole, as a slice of one, or stacked from several.

GPT-2 keeps queries, keys and values in one tensor (three leaves), Mixtral may keep every expert in its own (one leaf).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

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
            sizes = list(piece.shape)
            sizes[piece.axis] = len(range(*slice(piece.start, piece.stop).indices(sizes[piece.axis])))
            yield piece, part.reshape(sizes)


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
