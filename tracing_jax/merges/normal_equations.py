"""Streamed normal equations: one pass over the files of all models together, in sums of bounded memory.

Letters: M models read together, C columns (the child's difference from the reference, those of the other parents, and
the reference itself), R row blocks, S sampled entries, U units, F features.
"""

import itertools
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float

from tracing_jax.merges.models import MergeModels, Piece, PiecePlan, TensorKey
from tracing_jax.merges.piece_buffers import PieceBuffers
from tracing_jax.merges.products import as_float32, change_of_columns, products

BLOCKS = 16
"""Row blocks of a tensor, which the jackknife leaves out one at a time."""
SAMPLED = 4096
"""Entries of a tensor that are kept, for the choice of a method; of the experts of a layer, all together."""
_AT_ONCE = 4
"""Pieces in memory: one that is summed, and those after it, which are read, so that the disk never waits."""
UNITS, FEATURES = 160, 512
"""Units of each MLP, and of their inputs, that are kept for the test by exchanging units."""


@dataclass(frozen=True)
class TensorSums:
    """What one pass keeps of a tensor.

    Attributes:
      place: its key.
      grams: products of all columns, summed over the entries of each row block.
      counts: entries of each row block.
      sample: the models' values of entries drawn at random.
      rounding: mean square of the error that rounding to its dtype leaves in an entry of the child, from the sample.
      dtype: of the child.
    """

    place: TensorKey
    grams: Float[np.ndarray, "R C C"]
    counts: Float[np.ndarray, " R"]
    sample: Float[np.ndarray, "S M"]
    rounding: float
    dtype: str = "float32"

    @property
    def gram(self) -> Float[np.ndarray, "C C"]:
        """The products summed over the tensor."""
        total: np.ndarray = self.grams.sum(0)
        return total


@dataclass
class NormalEquations:
    """All tensors; and, by layer, rows of the same units of an MLP in all models, `[M, U, F]` of each matrix."""

    dtype: str = "float32"
    """Of the child."""
    tensors: list[TensorSums] = field(default_factory=list)
    units: dict[int, list[Float[np.ndarray, "M U F"]]] = field(default_factory=dict)

    def samples_of(self, leaf: str) -> list[Float[np.ndarray, "S M"]]:
        """Returns the sampled entries of a leaf, of its experts one after another."""
        return [tensor.sample for tensor in self.tensors if tensor.place.name == leaf]


def read_sums(models: MergeModels, seed: int = 0) -> NormalEquations:
    """Returns the sums of all leaves that the models have in common, in one pass over the files."""
    found, tensors = NormalEquations(), dict[TensorKey, list[TensorSums]]()
    units: dict[int, dict[str, list[UnitSample]]] = {}
    for plan, piece in _pieces_in_order(models):
        place = plan.place
        for own in _sums_of(place, piece, seed):
            if not np.isfinite(own.grams).all():
                models.refuse_nan(place)
            tensors.setdefault(own.place, []).append(own)
        found.dtype = str(piece.leaves[0].dtype)
        if place.layer is not None and _describes_units(place):
            rows = _unit_rows(piece, models.shape(place), place, seed)
            units.setdefault(place.layer, {}).setdefault(place.name, []).append(rows)
    found.tensors = [_joined(pieces) for pieces in tensors.values()]
    found.units = {layer: [_assembled(pieces) for pieces in named.values()] for layer, named in units.items()}
    return found


def read_units(models: MergeModels, seed: int = 0) -> dict[int, list[Float[np.ndarray, "M U F"]]]:
    """Returns the units that `read_sums` keeps, and reads nothing else."""
    units: dict[int, dict[str, list[UnitSample]]] = {}
    for place in models.places():
        if place.layer is not None and _describes_units(place):
            pieces = units.setdefault(place.layer, {}).setdefault(place.name, [])
            pieces += [_unit_rows(piece, models.shape(place), place, seed) for piece in models.pieces(place)]
    return {layer: [_assembled(pieces) for pieces in named.values()] for layer, named in units.items()}


def columns_of(sample: Float[np.ndarray, "S M"]) -> Float[np.ndarray, "C S"]:
    """Returns the columns of entries given by model: child, reference, other parents."""
    values = np.asarray(sample, np.float64).T
    return np.concatenate([values[:1] - values[1], values[2:] - values[1], values[1:2]])


def rounding_variance(values: np.ndarray, dtype: np.dtype) -> float:
    """Returns the mean square of the rounding errors of values that were rounded to a dtype: spacing^2 / 12."""
    info = ml_dtypes.finfo(dtype)
    spacing = np.maximum(np.exp2(np.frexp(np.abs(values))[1] - 1.0), float(info.tiny)) * float(info.eps)
    return float(np.square(spacing).mean() / 12)


def rounded(values: Float[np.ndarray, "..."], dtype: str) -> Float[np.ndarray, "..."]:
    """Returns values as a checkpoint of this dtype has them, in float64."""
    wide = np.asarray(values, np.float32) if dtype == "bfloat16" else values  # as merging tools compute
    return wide.astype(np.dtype(dtype)).astype(np.float64)


def _pieces_in_order(models: MergeModels) -> Iterator[tuple[PiecePlan, Piece]]:
    """Yields all pieces of all leaves, each until the next one; those after it are read meanwhile.

    Sums are asked for by one thread. Those of bfloat16 XLA makes on several; numpy's calls on a chunk of another dtype
    are so short that threads would spend as long on waiting for Python's lock as they win.
    """
    plans = (plan for place in models.places() for plan in models.plans(place))
    slots = [PieceBuffers() for _ in range(_AT_ONCE)]
    pending: deque[tuple[PiecePlan, Future[Piece]]] = deque()
    with ThreadPoolExecutor(_AT_ONCE - 1, "read ahead") as readers:
        for plan, buffers in zip(plans, itertools.cycle(slots)):
            pending.append((plan, readers.submit(models.piece, plan, buffers)))
            if len(pending) == _AT_ONCE:  # one in each slot: the oldest is summed
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _in_file_order(leaves: Sequence[Any]) -> list[np.ndarray]:
    """Returns the leaves with their axes in the order that the child has them in memory."""
    arrays = [np.asarray(leaf) for leaf in leaves]
    order = tuple(int(axis) for axis in np.argsort([-stride for stride in arrays[0].strides], kind="stable"))
    return [np.ascontiguousarray(array.transpose(order)) for array in arrays]


def _sums_of(place: TensorKey, piece: Piece, seed: int) -> list[TensorSums]:
    arrays = _in_file_order(piece.leaves)
    generator = np.random.default_rng([seed, zlib.crc32(str(place).encode()), piece.start])
    if not (piece.of_experts and place.role == "expert"):  # a router has an entry for each expert as well
        return [_tensor_sums(place, arrays, -(-BLOCKS // piece.slices), -(-SAMPLED // piece.slices), generator)]
    E = len(arrays[0])  # experts are the outermost axis of files and of leaves
    sampled = max(64, SAMPLED // (E * piece.slices))
    return [
        _tensor_sums(place._replace(expert=piece.start + e), [a[e] for a in arrays], BLOCKS, sampled, generator)
        for e in range(E)
    ]


def _tensor_sums(
    place: TensorKey,
    arrays: Sequence[np.ndarray],
    blocks: int,
    sampled: int,
    generator: np.random.Generator,
) -> TensorSums:
    width = arrays[0].shape[-1] if arrays[0].ndim > 1 else 1
    flat = [array.reshape(-1) for array in arrays]
    rows = len(flat[0]) // width
    edges = [int(edge) * width for edge in np.linspace(0, rows, min(blocks, rows) + 1)]
    drawn = np.sort(generator.choice(len(flat[0]), min(sampled, len(flat[0])), replace=False, shuffle=False))
    sample = np.stack([as_float32(array[drawn]) for array in flat], axis=1)
    change = change_of_columns(columns_of(sample)) if np.isfinite(sample).all() else None
    grams = np.stack([products(flat, start, stop, change) for start, stop in itertools.pairwise(edges)])
    rounding = rounding_variance(sample[:, 0], flat[0].dtype)
    return TensorSums(place, grams, np.diff(edges).astype(float), sample, rounding, str(flat[0].dtype))


def _joined(pieces: Sequence[TensorSums]) -> TensorSums:
    """Returns a tensor of its slices, in as many blocks as it would have in one piece."""
    if len(pieces) == 1:
        return pieces[0]
    grams, counts = np.concatenate([own.grams for own in pieces]), np.concatenate([own.counts for own in pieces])
    first = np.linspace(0, len(grams), min(BLOCKS, len(grams)) + 1).astype(int)[:-1]
    entries = np.array([own.counts.sum() for own in pieces])
    return TensorSums(
        pieces[0].place,
        np.add.reduceat(grams, first),
        np.add.reduceat(counts, first),
        np.concatenate([own.sample for own in pieces]),
        float(np.array([own.rounding for own in pieces]) @ entries / entries.sum()),
        pieces[0].dtype,
    )


def _describes_units(place: TensorKey) -> bool:
    return place.role in ("mlp", "expert") and place.name.endswith(("up_proj/kernel", "gate_proj/kernel"))


class UnitSample(NamedTuple):
    """What a piece has of the rows of the units that are kept, and the axis on which the leaf is sliced."""

    values: Float[np.ndarray, "M U F"]
    axis: int


def _unit_rows(piece: Piece, shape: Sequence[int], place: TensorKey, seed: int) -> UnitSample:
    """Returns what some units of the MLP, of a mixture those of one expert, have for some features."""
    *experts, D, F = shape
    generator = np.random.default_rng([seed, place.layer or 0])  # the same units of gate and up
    chosen = [np.array([(seed + (place.layer or 0)) % E]) for E in experts]  # in turn, so that none is left out
    units = np.sort(generator.permutation(F)[:UNITS])
    chosen += [np.sort(generator.permutation(D)[:FEATURES]), units]
    here, size = chosen[piece.axis] - piece.start, piece.leaves[0].shape[piece.axis]
    chosen[piece.axis] = here[(here >= 0) & (here < size)]
    values = np.stack([as_float32(np.asarray(leaf)[np.ix_(*chosen)]) for leaf in piece.leaves])
    if experts:
        values = values.reshape(len(values), -1, values.shape[-1])  # none where another piece has the expert
    return UnitSample(values.swapaxes(1, 2), 2 if piece.axis < len(shape) - 1 else 1)


def _assembled(pieces: Iterable[UnitSample]) -> Float[np.ndarray, "M U F"]:
    found = list(pieces)
    return np.concatenate([rows.values for rows in found], axis=found[0].axis)
