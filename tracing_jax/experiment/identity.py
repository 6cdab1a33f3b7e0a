"""How many tensors of two checkpoints are identical, found before any statistic; it stops at the first difference."""

from collections.abc import Iterator

import numpy as np

from tracing_jax.checkpoint import Checkpoint
from tracing_jax.statistics import Identity

_CHUNK = 1 << 22  # weights read at a time, after a few have been compared
_FIRST = 1 << 14

_PARTS = {"embed": "embedding", "head": "head", "attn": "attention", "mlp": "MLPs"}


def identical_tensors(base: Checkpoint, ft: Checkpoint) -> Identity:
    """Returns how many tensors of the two checkpoints hold equal numbers, as stored.

    Tensors are those of the params, by name; one that only one model has, or has in another shape, counts as different.
    Most tensors of different models differ in their first numbers, and no more than these is read.
    """
    ours, theirs = base.leaf_layouts, ft.leaf_layouts
    by_part: dict[str, list[int]] = {}
    for name in dict.fromkeys([*ours, *theirs]):
        counts = by_part.setdefault(_part(name), [0, 0])
        counts[1] += 1
        if name in ours and name in theirs and ours[name].shape == theirs[name].shape:
            counts[0] += _equal(base, ft, name)
    equal, total = (sum(counts[i] for counts in by_part.values()) for i in (0, 1))
    return Identity(equal, total, {part: tuple(counts) for part, counts in by_part.items()})


def _part(name: str) -> str:
    words = name.split("/")
    if any("norm" in word for word in words) or words[-1] == "bias":
        return "norms and biases, which start alike in all models"
    return next((_PARTS[word] for word in words if word in _PARTS), "other")


def _equal(base: Checkpoint, ft: Checkpoint, name: str) -> bool:
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(_chunks(base, name), _chunks(ft, name)))


def _chunks(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    """Yields the numbers of a leaf, slice by slice of each tensor that it is made of."""
    for part in checkpoint.leaf_layouts[name].slices:
        index = [slice(0, size) for size in part.shape]
        if part.index:
            index[part.axis] = slice(*slice(part.start, part.stop).indices(part.shape[part.axis])[:2])
        first, stop = index[0].start, index[0].stop
        width = int(np.prod([i.stop - i.start for i in index[1:]], dtype=np.int64))
        rows = max(1, _FIRST // max(1, width))
        while first < stop:
            found = checkpoint.tensors.read(part.tensor, (slice(first, min(first + rows, stop)), *index[1:]))
            yield part.of_read(found).ravel()
            first, rows = first + rows, max(1, _CHUNK // max(1, width))
