"""The tensors of a base model with those of a LoRA adapter merged in as they are read.

Letters: r rank; A is [r, in], B is [out, r]. W is [out, in], but [in, out] for embeddings and under `fan_in_fan_out`
(GPT-2). Source: Hu et al., LoRA (2021), section 4.1: W + scaling * B A; Liu et al., DoRA (2024), equation 5: each row
of that, divided by its length and multiplied by a trained magnitude. Meng et al., PiSSA (2024), equations 2 to 4, and
Büyükakyüz, OLoRA (2024), section 3.2: W less the first product of the factors takes the place of W.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from tracing_jax.checkpoint.errors import CheckpointError
from tracing_jax.checkpoint.safetensors_file import Index, bounds_of
from tracing_jax.checkpoint.tensors import TensorStore, past_cache_of


@dataclass(frozen=True)
class LowRank:
    """The low-rank update of one weight: its factors' names in the adapter, and how they enter.

    Attributes:
      a, b: the names.
      scaling: of their product.
      transposed: whether the weight is [in, out].
      magnitude: the name of the lengths of the rows (DoRA).
      subtracted: gives of a weight [out, in] the first factors, whose product was subtracted from it before training.
    """

    a: str
    b: str
    scaling: float
    transposed: bool
    magnitude: str | None = None
    subtracted: "Callable[[Float64[np.ndarray, 'O I']], Factors] | None" = None


Factors = tuple[Float32[np.ndarray, "O r"], Float32[np.ndarray, "r I"]]
"""B and A."""


def pissa(weight: Float64[np.ndarray, "O I"], rank: int, scaling: float) -> Factors:
    """Returns factors of the part of a weight along its largest singular values, whatever the scaling."""
    del scaling
    is_wide = weight.shape[0] <= weight.shape[1]
    import scipy.linalg  # slow to import, and few adapters need it

    short = weight if is_wide else weight.T
    n = len(short)
    vectors = scipy.linalg.eigh(short @ short.T, subset_by_index=(max(0, n - rank), n - 1))[1]
    product = vectors.astype(np.float32), (vectors.T @ short).astype(np.float32)
    return product if is_wide else (product[1].T, product[0].T)


def olora(weight: Float64[np.ndarray, "O I"], rank: int, scaling: float) -> Factors:
    """Returns the first columns of Q and first rows of R, times the scaling, of the decomposition Q R of a weight."""
    q = np.linalg.qr(weight[:, :rank])[0]
    return q.astype(np.float32), (scaling * q.T @ weight).astype(np.float32)


@dataclass(frozen=True)
class Updates:
    """What an adapter does to the tensors of its base, by their names there.

    Attributes:
      low_rank: weights that get a low-rank update.
      replaced: tensors in whose place one of the adapter is read.
      added: biases to which a tensor of the adapter is added, times a number.
      rows: embeddings of which some rows are replaced: the tensor of the adapter, and the rows' indices.
    """

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    added: dict[str, tuple[str, float]] = field(default_factory=dict)
    rows: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)

    def touches(self, name: str) -> bool:
        """Returns whether a tensor is not that of the base."""
        return any(name in part for part in (self.low_rank, self.replaced, self.added, self.rows))


class MergedTensors:
    """A `TensorStore` of the base, changed by an adapter: in float32, then cast back to the base's dtype."""

    def __init__(self, base: TensorStore, adapter: TensorStore, updates: Updates, files: Sequence[Path]):
        """Takes what was planned.

        Args:
          base: the tensors of the base.
          adapter: those of the adapter.
          updates: what is done with them.
          files: others that decide the weights, such as the adapter's config, whose scaling does.
        """
        self._base, self._adapter, self._updates, self._own_files = base, adapter, updates, tuple(files)
        self._subtracted: dict[str, Factors] = {}  # found when first needed: as many numbers as the adapter has

    def names(self) -> tuple[str, ...]:
        return self._base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        # One in the place of an embedding or a head may have more rows: those of added tokens.
        replaced = self._updates.replaced.get(name)
        return self._base.shape(name) if replaced is None else self._adapter.shape(replaced)

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(name)

    def files(self) -> tuple[Path, ...]:
        return tuple(sorted((*self._base.files(), *self._adapter.files(), *self._own_files)))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        updates = self._updates
        if (update := updates.low_rank.get(name)) is None:
            weight = self._unmerged(name, index)
        elif update.magnitude is None:
            weight = self._unmerged(name, index).astype(np.float32) + self._delta(update, index)
        else:
            weight = self._rescaled(name, update, index)
        if name in updates.added:
            theirs, scaling = updates.added[name]
            added = self._adapter.read(theirs, index).astype(np.float32)
            weight = weight.astype(np.float32) + np.float32(scaling) * added
        if name in updates.rows:
            weight = self._with_rows(name, weight, index)
        return weight.astype(self.dtype(name), copy=False)

    def read_many(self, requests: Sequence[tuple[str, Index]]) -> list[np.ndarray]:
        return [self.read(name, index) for name, index in requests]

    def read_into(self, out: np.ndarray, name: str, index: Index = ()) -> None:
        if self._updates.touches(name):
            out[...] = self.read(name, index)
        else:
            self._base.read_into(out, name, index)

    def past_cache(self) -> TensorStore:
        return MergedTensors(past_cache_of(self._base), self._adapter, self._updates, self._own_files)

    def _unmerged(self, name: str, index: Index) -> np.ndarray:
        if name in self._updates.replaced:
            return self._adapter.read(self._updates.replaced[name], index)
        weight = self._base.read(name, index)
        update = self._updates.low_rank.get(name)
        if update is None or update.subtracted is None:
            return weight
        rows, columns = _of_factors(update, index)
        if name not in self._subtracted:
            whole = self._base.read(name).astype(np.float64)
            if not np.isfinite(whole).all():
                raise CheckpointError(f"{name}: some numbers of the base are not finite; download the base again")
            self._subtracted[name] = update.subtracted(whole.T if update.transposed else whole)
        b, a = self._subtracted[name]
        first = b[rows] @ a[:, columns]
        return (weight.astype(np.float32) - (first.T if update.transposed else first)).astype(weight.dtype)

    def _delta(self, update: LowRank, index: Index) -> Float32[np.ndarray, "rows columns"]:
        """The slice of scaling * B A, from those rows of B and columns of A alone."""
        rows, columns = _of_factors(update, index)
        a = self._adapter.read(update.a, (slice(None), columns)).astype(np.float32)
        b = self._adapter.read(update.b, (rows,)).astype(np.float32)
        delta = np.float32(update.scaling) * (b @ a)
        return delta.T if update.transposed else delta

    def _rescaled(self, name: str, update: LowRank, index: Index) -> Float32[np.ndarray, "rows columns"]:
        """The slice of a DoRA weight; the lengths of its outputs need all of their inputs."""
        assert update.magnitude is not None
        bounds = bounds_of(index, self.shape(name))
        out, inputs = (1, 0) if update.transposed else (0, 1)
        whole = tuple(bounds[axis] if axis == out else slice(None) for axis in range(2))
        weight = self._unmerged(name, whole).astype(np.float32) + self._delta(update, whole)
        magnitude = self._adapter.read(update.magnitude, (bounds[out],)).astype(np.float32)
        factor = magnitude / np.sqrt(np.square(weight).sum(axis=inputs))
        part = (slice(None), bounds[1]) if inputs == 1 else (bounds[0], slice(None))
        return weight[part] * np.expand_dims(factor, inputs)

    def _with_rows(self, name: str, weight: np.ndarray, index: Index) -> np.ndarray:
        theirs, indices = self._updates.rows[name]
        rows, columns = bounds_of(index, self.shape(name))
        inside = (indices >= rows.start) & (indices < rows.stop)
        changed = weight.astype(np.float32)
        changed[indices[inside] - rows.start] = self._adapter.read(theirs, (slice(None), columns))[inside]
        return changed


def _of_factors(update: LowRank, index: Index) -> tuple[slice, slice]:
    """Returns the rows of B and the columns of A whose product is a slice of the update."""
    rows, columns = (*index, slice(None), slice(None))[:2]
    return (columns, rows) if update.transposed else (rows, columns)
