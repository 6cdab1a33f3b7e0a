"""Similarity of the units of an axis, summed over the weights that have it.

Source: Ainsworth et al. 2023, Git Re-Basin (arXiv 2209.04836), section 3.2, which sums raw inner products. Here each
product is divided by the Frobenius norms of both weights: in a language model the embedding alone can outweigh all
blocks together, and gains of size one any matrix, so raw sums are dominated by one or two weights. A weight that is
zero in either model contributes 0.
"""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.axes import AxisTable
from tracing_jax.blocked_matmul import accumulate_matmul
from tracing_jax.matching.coordinate import Coordinate, InnerSimilarity, Similarity
from tracing_jax.rewrites import Dims, Permutations, take_units, unit_moves
from tracing_jax.tree import Tree, flatten, to_host

_NESTED_BYTES = 2**30
"""Maximum of the similarities of all nested units stored at once; Mixtral's experts would take 52 GB."""

Shared = Mapping[str, tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]
"""Axis -> (indices in base, indices in ft) of corresponding units, e.g. tokens that both vocabularies have."""


def normalised_rows(rows: Float[np.ndarray, "... D"]) -> Float[np.ndarray, "... D"]:
    """Returns the rows scaled to length one; zero rows stay zero."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


@dataclass(frozen=True)
class WeightPairs:
    """The weights of base and ft that can be compared, by leaf name.

    Attributes:
      base, ft: arrays, or leaves of known shape that are read when converted to an array.
      left_out: leaf name -> reason why it cannot be compared.
    """

    base: Mapping[str, Any]
    ft: Mapping[str, Any]
    table: AxisTable
    shared: Shared
    left_out: Mapping[str, str]

    def leaves_with_axes(self, axes: Collection[str]) -> list[str]:
        """Returns the names of the leaves that have any of these axes."""
        return [name for name in self.base if not set(axes).isdisjoint(self.table.leaves[name].axes)]

    def pair(self, name: str) -> tuple[Array, Array]:
        """Returns a leaf of base and of ft, on the device, cut to the units that both models share."""
        base, ft = jnp.asarray(self.base[name]), jnp.asarray(self.ft[name])
        for dim, axis in enumerate(self.table.leaves[name].axes):
            if axis is not None and axis in self.shared:
                in_base, in_ft = self.shared[axis]
                base, ft = jnp.take(base, in_base, axis=dim), jnp.take(ft, in_ft, axis=dim)
        return base, ft


def weight_pairs(base: Tree, ft: Tree, table: AxisTable, shared: Shared) -> WeightPairs:
    """Returns the leaves of base's table that both trees have with equal sizes, or equal once cut to shared units.

    Raises:
      ValueError: shared indices that are not pairs, or lie outside an axis; all at once.
    """
    base, ft = flatten(base), flatten(ft)
    left_out = {name: "not in base" if name in ft else "not in ft" for name in sorted(base.keys() ^ ft.keys())}
    lines: set[str] = set()
    for name in [name for name in base if name in ft]:
        sizes, sizes_ft = base[name].shape, ft[name].shape
        if len(sizes) != len(sizes_ft):
            left_out[name] = f"shape {sizes} in base, {sizes_ft} in ft"
            continue
        for axis, size, size_ft in zip(table.leaves[name].axes, sizes, sizes_ft, strict=True):
            if axis is not None and axis in shared:
                lines |= _problems(axis, shared[axis], size, size_ft)
            elif size != size_ft:
                left_out[name] = f"{size} units on {axis} in base, {size_ft} in ft"
    if lines:
        raise ValueError("shared units do not fit the models:\n  " + "\n  ".join(sorted(lines)))
    names = [name for name in base if name not in left_out]
    return WeightPairs({n: base[n] for n in names}, {n: ft[n] for n in names}, table, shared, left_out)


def scores(pairs: WeightPairs, names: Iterable[str], permutations: Permutations) -> dict[str, float]:
    """Returns for each leaf the inner product of base and permuted ft over their norms: 1 if equal up to scale."""
    found = {}
    for name in names:
        row = pairs.table.leaves[name]
        base, ft = pairs.pair(name)
        found[name] = _contract(
            _pairing(base.ndim, ()), base, ft, *unit_moves(row, permutations, pairs.table.parent_axis)
        )
    return {name: float(score) for name, score in to_host(found).items()}


def weight_similarity(
    pairs: WeightPairs, coordinate: Coordinate, permutations: Permutations, names: Iterable[str]
) -> Similarity:
    """Returns the similarity of the units of a coordinate in the named leaves, ft's other axes permuted.

    Its entries are the contribution of a pair to the sum of the leaves' `scores`. If a leaf has the axis twice, each
    dimension is compared with the other one under the current permutation, which is the gradient of that sum.
    """
    n = pairs.table.sizes[coordinate.axis]
    units, nested = jnp.zeros((n, n)), []
    for name in names:
        row = pairs.table.leaves[name]
        for dim in [dim for dim, axis in enumerate(row.axes) if axis == coordinate.axis]:
            inside = [d for d, axis in enumerate(row.axes) if axis is not None and axis == coordinate.nested]
            still = tuple(None if d in (dim, *inside) else axis for d, axis in enumerate(row.axes))
            moves = unit_moves(replace(row, axes=still), permutations, pairs.table.parent_axis)
            equation = _pairing(len(row.axes), (dim, *inside))
            if inside:
                nested.append(_NestedDimension(name, dim, equation, moves))
            else:
                units = _with_contraction(units, equation, dim, *pairs.pair(name), *moves)
                jax.block_until_ready(units)  # dispatch is asynchronous, and leaves would accumulate
    if coordinate.nested is None:
        return Similarity(to_host(units))
    return Similarity(to_host(units), _blocks(pairs, nested, n, pairs.table.sizes[coordinate.nested]))


class _NestedDimension(NamedTuple):
    """A dimension of a leaf that also has the nested axis, and the einsum that compares both."""

    name: str
    dim: int
    equation: str
    moves: tuple[Dims, list[np.ndarray]]


def _blocks(pairs: WeightPairs, dimensions: Sequence[_NestedDimension], n: int, size: int) -> InnerSimilarity:
    """Returns the similarity of the units inside any two units: computed at once, or block by block if large."""
    if 4 * (n * size) ** 2 <= _NESTED_BYTES:
        whole = jnp.zeros((n, size, n, size))
        for name, _, equation, moves in dimensions:
            whole = _added(whole, _contract(equation, *pairs.pair(name), *moves))
        found = to_host(whole)
        return lambda i, j: found[i, :, j]

    def block(i: int, j: int) -> np.ndarray:
        total = jnp.zeros((1, size, 1, size))
        for name, dim, equation, moves in dimensions:
            total = total + _contract(equation, *pairs.pair(name), *moves, dim, (i, j))
        return to_host(total)[0, :, 0]

    return block


@functools.partial(jax.jit, donate_argnames="total")
def _added(total: Float[Array, "..."], more: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the sum in the buffer of `total`."""
    return total + more


@functools.partial(jax.jit, static_argnames=("equation", "dim", "dims"), donate_argnames="total")
def _with_contraction(
    total: Float[Array, "n n"],
    equation: str,
    dim: int,
    base: Array,
    ft: Array,
    dims: Dims,
    indices: list[Array | np.ndarray],
) -> Float[Array, "n n"]:
    """Returns the sum with a contraction added that keeps the dimension `dim` of both."""
    norms = _norms(base, ft)
    base, ft = base.astype(jnp.float32), jnp.asarray(take_units(ft, dims, indices))

    def products(start: int | Int[Array, ""], width: int) -> Float[Array, "n w"]:
        some = jax.lax.dynamic_slice_in_dim(ft, start, width, dim).astype(jnp.float32)
        return jnp.einsum(equation, base, some, precision="highest") / norms

    return accumulate_matmul(total, products)


@functools.partial(jax.jit, static_argnames=("equation", "dims", "cut"))
def _contract(
    equation: str,
    base: Array,
    ft: Array,
    dims: Dims,
    indices: list[Array | np.ndarray],
    cut: int | None = None,
    units: tuple[int | Array, ...] = (),
) -> Float[Array, "..."]:
    """Returns the contraction over the norms of both; with `cut` only of one unit of each along that dimension."""
    norms = _norms(base, ft)
    base, ft = base.astype(jnp.float32), ft.astype(jnp.float32)
    if cut is not None:
        base, ft = (jax.lax.dynamic_slice_in_dim(x, i, 1, cut) for x, i in zip((base, ft), units, strict=True))
    ft = jnp.asarray(take_units(ft, dims, indices))
    return jnp.einsum(equation, base, ft, precision="highest") / norms


def _norms(base: Array, ft: Array) -> Float[Array, ""]:
    """Returns the product of the norms of both; infinity where one is 0."""
    base, ft = (jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum()) for x in (base, ft))
    return jnp.where(base * ft > 0, base * ft, jnp.inf)


def _pairing(rank: int, dims: tuple[int, ...]) -> str:
    """Returns the einsum of every unit of base with every unit of ft along `dims`: `abc,aBc->bB` for dims (1,)."""
    base = [chr(ord("a") + dim) for dim in range(rank)]
    ft = [letter.upper() if dim in dims else letter for dim, letter in enumerate(base)]
    return f"{''.join(base)},{''.join(ft)}->{''.join(base[d] for d in dims)}{''.join(ft[d] for d in dims)}"


def _problems(axis: str, pair: tuple[np.ndarray, np.ndarray], size: int, size_ft: int) -> set[str]:
    in_base, in_ft = pair
    if in_base.shape != in_ft.shape or in_base.ndim != 1 or not in_base.size:
        return {f"{axis}: expected two index vectors of one length above 0, found {in_base.shape} and {in_ft.shape}"}
    # On a device, indices out of range are clamped or filled silently.
    return {
        f"{axis}: indices run from {ids.min()} to {ids.max()} in {model}, expected 0 to {n - 1}"
        for model, ids, n in (("base", in_base, size), ("ft", in_ft, size_ft))
        if ids.min() < 0 or ids.max() >= n
    }
