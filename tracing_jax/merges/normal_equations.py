"""Streamed normal equations: one pass over the files of all models together, in float64 sums of bounded memory.

Letters: M models read together, C columns (the child's difference from the reference, those of the other parents, and
the reference itself), R row blocks, S sampled entries, U units, F features.
"""

import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from tracing_jax.merges.models import MergeModels, Place

BLOCKS = 16
"""Row blocks of a tensor, which the jackknife leaves out one at a time."""
SAMPLED = 4096
"""Entries of a tensor that are kept, for the choice of a method; of the experts of a layer, all together."""
UNITS, FEATURES = 160, 512
"""Units of each MLP, and of their inputs, that are kept for the test by exchanging units."""
_CHUNK = 2**15  # entries; all columns of it fit a core's cache


@dataclass(frozen=True)
class TensorSums:
    """What one pass keeps of a tensor.

    Attributes:
      place: where it stands.
      grams: products of all columns, summed over the entries of each row block.
      counts: entries of each row block.
      sample: the models' values of entries drawn at random.
      rounding: mean square of the error that rounding to its dtype leaves in an entry of the child, from the sample.
    """

    place: Place
    grams: Float[np.ndarray, "R C C"]
    counts: Float[np.ndarray, " R"]
    sample: Float[np.ndarray, "S M"]
    rounding: float

    @property
    def gram(self) -> Float[np.ndarray, "C C"]:
        """The products summed over the tensor."""
        total: np.ndarray = self.grams.sum(0)
        return total


@dataclass
class Sums:
    """All tensors; and, by layer, rows of the same units of an MLP in all models, `[M, U, F]` of each matrix."""

    dtype: str = "float32"
    """Of the child."""
    tensors: list[TensorSums] = field(default_factory=list)
    units: dict[int, list[Float[np.ndarray, "M U F"]]] = field(default_factory=dict)


def read_sums(models: MergeModels, seed: int = 0) -> Sums:
    """Returns the sums of all leaves that the models have in common, in one pass over the files."""
    found = Sums()
    with ThreadPoolExecutor(2, "sums") as pool, ThreadPoolExecutor(1, "read ahead") as reader:
        for place, leaves in _ahead(models, reader):
            found.tensors += _sums_of(place, leaves, pool, seed)
            found.dtype = str(leaves[0].dtype)
            if place.layer is not None and _describes_units(place):
                found.units.setdefault(place.layer, []).append(_unit_rows(leaves, place, seed))
    found.tensors = _joined(found.tensors)
    return found


def columns_of(sample: Float[np.ndarray, "S M"]) -> Float[np.ndarray, "C S"]:
    """Returns the columns of entries given by model: child, reference, other parents."""
    values = np.asarray(sample, np.float64).T
    return np.concatenate([values[:1] - values[1], values[2:] - values[1], values[1:2]])


def as_float32(array: np.ndarray) -> np.ndarray:
    """Returns an array in float32; bfloat16 by its bits, several times as fast as by a cast."""
    if array.dtype == ml_dtypes.bfloat16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def rounding_variance(values: np.ndarray, dtype: np.dtype) -> float:
    """Returns the mean square of the rounding errors of values that were rounded to a dtype: spacing^2 / 12."""
    info = ml_dtypes.finfo(dtype)
    spacing = np.maximum(np.exp2(np.frexp(np.abs(values))[1] - 1.0), float(info.tiny)) * float(info.eps)
    return float(np.square(spacing).mean() / 12)


def _ahead(models: MergeModels, reader: ThreadPoolExecutor) -> Iterator[tuple[Place, tuple[np.ndarray, ...]]]:
    """Yields (place, leaf of each model); the next one is read meanwhile, and at most two are in memory."""
    parts = ((place, leaves) for place in models.places() for leaves in models.leaves(place))
    pending = reader.submit(next, parts, None)
    while (found := pending.result()) is not None:
        pending = reader.submit(next, parts, None)
        yield found


def _in_file_order(leaves: Sequence[Any]) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Returns the leaves with their axes in the order that the child has them in memory, and that order."""
    arrays = [np.asarray(leaf) for leaf in leaves]
    order = tuple(int(axis) for axis in np.argsort([-stride for stride in arrays[0].strides], kind="stable"))
    return [np.ascontiguousarray(array.transpose(order)) for array in arrays], order


def _sums_of(place: Place, leaves: Sequence[Any], pool: ThreadPoolExecutor, seed: int) -> list[TensorSums]:
    arrays, _ = _in_file_order(leaves)
    if place.role != "expert":
        return [_tensor_sums(place, arrays, SAMPLED, pool, seed)]
    E = len(arrays[0])  # experts are the outermost axis of files and of leaves
    return [
        _tensor_sums(place._replace(expert=e), [a[e] for a in arrays], max(64, SAMPLED // E), pool, seed)
        for e in range(E)
    ]


def _tensor_sums(
    place: Place, arrays: Sequence[np.ndarray], sampled: int, pool: ThreadPoolExecutor, seed: int
) -> TensorSums:
    width = arrays[0].shape[-1] if arrays[0].ndim > 1 else 1
    flat = [array.reshape(-1) for array in arrays]
    rows = len(flat[0]) // width
    edges = [int(edge) * width for edge in np.linspace(0, rows, min(BLOCKS, rows) + 1)]
    grams = np.stack(list(pool.map(lambda i: _gram(flat, edges[i], edges[i + 1]), range(len(edges) - 1))))
    generator = np.random.default_rng([seed, zlib.crc32(str(place).encode())])
    drawn = np.sort(generator.choice(len(flat[0]), min(sampled, len(flat[0])), replace=False, shuffle=False))
    sample = np.stack([as_float32(array[drawn]) for array in flat], axis=1)
    return TensorSums(
        place, grams, np.diff(edges).astype(float), sample, rounding_variance(sample[:, 0], flat[0].dtype)
    )


def _gram(flat: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    M = len(flat)
    total = np.zeros((M, M))
    for at in range(start, stop, _CHUNK):
        span = slice(at, min(at + _CHUNK, stop))
        columns = np.empty((M, span.stop - at))
        columns[-1] = as_float32(flat[1][span])
        for column, array in zip(columns, (flat[0], *flat[2:])):
            np.subtract(as_float32(array[span]), columns[-1], out=column)
        total += columns @ columns.T
    return total


def _joined(tensors: list[TensorSums]) -> list[TensorSums]:
    """Returns the tensors, slices of one joined to as many blocks as they have together."""
    found: dict[Place, TensorSums] = {}
    for own in tensors:
        if other := found.get(own.place):
            found[own.place] = TensorSums(
                own.place,
                np.concatenate([other.grams, own.grams]),
                np.concatenate([other.counts, own.counts]),
                np.concatenate([other.sample, own.sample]),
                (other.rounding + own.rounding) / 2,
            )
        else:
            found[own.place] = own
    return list(found.values())


def _describes_units(place: Place) -> bool:
    return place.role in ("mlp", "expert") and place.name.endswith(("up_proj/kernel", "gate_proj/kernel"))


def _unit_rows(leaves: Sequence[Any], place: Place, seed: int) -> Float[np.ndarray, "M U F"]:
    """Returns what some units of the MLP, of a mixture those of one expert, have for some features."""
    arrays = [np.asarray(leaf) for leaf in leaves]
    generator = np.random.default_rng([seed, place.layer or 0])  # the same units of gate and up
    if arrays[0].ndim == 3:
        expert = int(generator.integers(len(arrays[0])))
        arrays = [array[expert] for array in arrays]
    D, F = arrays[0].shape
    units = np.sort(generator.permutation(F)[:UNITS])
    features = np.sort(generator.permutation(D)[:FEATURES])
    return np.stack([as_float32(array[np.ix_(features, units)]).T for array in arrays])
