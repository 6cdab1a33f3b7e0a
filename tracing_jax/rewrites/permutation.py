"""Permutations of units, on any pytree with an axis table, and the rewrites of a model that consist of them.

A permutation is `int32 p` with `new[i] = old[p[i]]`. On a nested axis p is a matrix, one permutation for each unit of
its parent axis, indexed after that axis was permuted: with p on `kv_heads` and r on `q_group`,
`new[i, j] = old[p[i], r[i, j]]`. `Permutations` maps axis names to such arrays; other axes stay as they are.
"""

import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import PERMUTABLE, SYMMETRY, AxisTable, LeafSpec, axis_table, kind_of
from tracing_jax.rewrites.rewrite import Read, Rewrite, Weights, generator, subtable
from tracing_jax.tree import Tree, map_named

Permutations = Mapping[str, Int[np.ndarray, "*_ _"]]

_Units = tuple[tuple[str, tuple[int, ...], int | None], ...]
"""Axes with their shapes, a nested one behind its parent's, and with the groups that stay together."""

Dims = tuple[tuple[int, int | None], ...]
"""Dimensions to permute, each with the dimension of its parent axis if it is nested."""


def random_permutations(key: PRNGKeyArray, table: AxisTable, kinds: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns a uniformly random permutation for every axis of the given kinds; each axis has its own key.

    It is uniform over those that keep the groups of the axis together, if it has groups.

    Raises:
      ValueError: a kind without an axis in this table, or one whose units may not be permuted.

    Example:
      >>> import jax
      >>> table = tj.table_from_axes({"w": ("units",)}, {"w": np.ones(5)})
      >>> p = tj.random_permutations(jax.random.key(0), table, ["units"])
      >>> sorted(p["units"].tolist())
      [0, 1, 2, 3, 4]
    """
    permutations = {axis: np.asarray(p) for axis, p in _drawn(key, _units_of(table, kinds)).items()}
    check_permutations(permutations, table)
    return permutations


def several_random_permutations(
    key: PRNGKeyArray, count: int, table: AxisTable, kinds: Iterable[str]
) -> list[dict[str, np.ndarray]]:
    """Returns what `random_permutations` gives for `fold_in(key, i)` of each i below `count`, in one compiled step."""
    stacked = jax.device_get(_several_drawn(key, count, _units_of(table, kinds)))
    return [{axis: p[i] for axis, p in stacked.items()} for i in range(count)]


def _units_of(table: AxisTable, kinds: Iterable[str]) -> _Units:
    return tuple((axis, table.unit_shape(axis), table.groups.get(axis)) for axis in table.axes_of_kind(kinds))


@functools.partial(jax.jit, static_argnames=("count", "units_of"))
def _several_drawn(key: PRNGKeyArray, count: int, units_of: _Units) -> dict[str, Int[Array, "N *_ _"]]:
    return jax.vmap(lambda i: _drawn(jax.random.fold_in(key, i), units_of))(jnp.arange(count))


def _drawn(key: PRNGKeyArray, units_of: _Units) -> dict[str, Int[Array, "*_ _"]]:
    """Returns uniformly random permutations of the last axis of each shape; each name has its own key."""
    found = {}
    for axis, shape, groups in units_of:
        axis_key = jax.random.fold_in(key, zlib.crc32(axis.encode()))
        if groups is not None:
            found[axis] = _drawn_in_groups(axis_key, groups, shape[-1])
            continue
        units = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
        found[axis] = jax.random.permutation(axis_key, units, axis=-1, independent=True)
    return found


def _drawn_in_groups(key: PRNGKeyArray, groups: int, units: int) -> Int[Array, " _"]:
    inside = jnp.broadcast_to(jnp.arange(units // groups, dtype=jnp.int32), (groups, units // groups))
    inside = jax.random.permutation(jax.random.fold_in(key, 0), inside, axis=-1, independent=True)
    order = jax.random.permutation(jax.random.fold_in(key, 1), jnp.arange(groups, dtype=jnp.int32))
    return (order[:, None] * (units // groups) + inside).ravel()


def identity(table: AxisTable, axes: Iterable[str]) -> dict[str, np.ndarray]:
    """Returns the identity permutations of the named axes."""
    shapes = {axis: table.unit_shape(axis) for axis in axes}
    return {axis: np.broadcast_to(np.arange(s[-1], dtype=np.int32), s).copy() for axis, s in shapes.items()}


def permute(params: Tree, permutations: Permutations, table: AxisTable) -> Tree:
    """Returns params with the units of every named axis permuted in every leaf that has it.

    Works on a whole tree and, with a restricted table, on one layer. Sharded leaves keep their sharding.

    Raises:
      ValueError: as `check_permutations`, or a leaf that the table does not have.

    Example:
      >>> params = {"in": np.arange(6).reshape(2, 3), "out": np.arange(3)}
      >>> table = tj.table_from_axes({"in": (None, "units"), "out": ("units",)}, params)
      >>> tj.permute(params, {"units": np.array([2, 0, 1])}, table)
      {'in': array([[2, 0, 1], [5, 3, 4]]), 'out': array([2, 0, 1])}
    """
    check_permutations(permutations, table)

    def moved(name: str, leaf: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        if name not in table.leaves:
            raise ValueError(f"leaf {name} is not in the axis table; add its row")
        return permute_leaf(leaf, table.leaves[name], permutations, table.parent_axis)

    return map_named(moved, params)


def permute_leaf(
    leaf: jax.Array | np.ndarray, spec: LeafSpec, permutations: Permutations, parent_axis: Mapping[str, str]
) -> jax.Array | np.ndarray:
    """Returns one leaf with its named axes permuted; a numpy leaf stays numpy, bit for bit."""
    dims, indices = unit_moves(spec, permutations, parent_axis)
    if not dims:
        return leaf
    if isinstance(leaf, np.ndarray):
        return take_units(leaf, dims, indices)
    return _take_on_device(leaf, dims, indices, leaf.sharding)


def unit_moves(
    spec: LeafSpec, permutations: Permutations, parent_axis: Mapping[str, str]
) -> tuple[Dims, list[np.ndarray]]:
    """Returns which dimensions of a leaf are permuted, in the order of `take_units`, and the indices of each.

    Dimensions instead of axis names: what is compiled for one layer then serves them all.
    """
    moves = [
        (dim, spec.axes.index(parent_axis[axis]) if axis in parent_axis else None, permutations[axis])
        for dim, axis in enumerate(spec.axes)
        if axis is not None and axis in permutations
    ]
    moves.sort(key=lambda move: move[1] is not None)  # nested axes are permuted after their parent
    return tuple((dim, parent) for dim, parent, _ in moves), [index for _, _, index in moves]


def take_units(
    x: jax.Array | np.ndarray, dims: Dims, indices: Sequence[jax.Array | np.ndarray]
) -> jax.Array | np.ndarray:
    """Returns `x` with its dimensions taken at the indices, one after another; for use under jit, and on the host."""
    xp = np if isinstance(x, np.ndarray) else jnp
    for (dim, parent), index in zip(dims, indices, strict=True):
        if parent is None:
            x = xp.take(x, index, axis=dim)
            continue
        shape = [1] * x.ndim
        shape[parent], shape[dim] = x.shape[parent], x.shape[dim]
        index = index if parent < dim else index.T
        x = xp.take_along_axis(x, index.reshape(shape), axis=dim)
    return x


def invert(permutations: Permutations, table: AxisTable) -> dict[str, np.ndarray]:
    """Returns the permutations that undo these, exactly: `compose(invert(p), p)` is the identity.

    Example:
      >>> table = tj.table_from_axes({"w": ("units",)}, {"w": np.ones(3)})
      >>> tj.invert({"units": np.array([2, 0, 1])}, table)["units"].tolist()
      [1, 2, 0]
    """
    inverse = {}
    for axis, p in permutations.items():
        parent = table.parent_axis.get(axis)
        if parent is not None and parent in permutations:
            p = p[np.argsort(permutations[parent])]
        inverse[axis] = np.argsort(p, axis=-1).astype(np.int32)
    return inverse


def compose(second: Permutations, first: Permutations, table: AxisTable) -> dict[str, np.ndarray]:
    """Returns the permutations that act like `first`, then `second`: `new[i] = old[first[second[i]]]`.

    Example:
      >>> table = tj.table_from_axes({"w": ("units",)}, {"w": np.ones(3)})
      >>> p = {"units": np.array([2, 0, 1])}
      >>> tj.compose(tj.invert(p, table), p, table)["units"].tolist()
      [0, 1, 2]
    """
    axes = list(first) + [axis for axis in second if axis not in first]
    complete = identity(table, axes)
    composed = {}
    for axis in axes:
        p, q = second.get(axis, complete[axis]), first.get(axis, complete[axis])
        parent = table.parent_axis.get(axis)
        if parent is None:
            composed[axis] = q[p]
            continue
        rows = q[second[parent]] if parent in second else q
        composed[axis] = np.take_along_axis(rows, p, axis=-1)
    return composed


def share_moved(permutations: Permutations) -> dict[str, float]:
    """Returns, for each kind of axis, the share of units that do not stay where they are."""
    moved: dict[str, list[np.ndarray]] = {}
    for axis, p in permutations.items():
        moved.setdefault(kind_of(axis), []).append((p != np.arange(p.shape[-1])).ravel())
    return {kind: float(np.concatenate(parts).mean()) for kind, parts in moved.items()}


def check_permutations(permutations: Permutations, table: AxisTable) -> None:
    """Checks every permutation against the table, on the host: a wrong index on a device would go unnoticed.

    Raises:
      ValueError: unknown axes, kinds that may not be permuted, wrong shapes, indices missing or doubled, groups torn
        apart; all at once.
    """
    lines = []
    for axis, p in permutations.items():
        if axis not in table.sizes:
            lines.append(f"{axis}: no such axis; the table has {', '.join(table.sizes)}")
            continue
        if _restricts(axis) or kind_of(axis) in table.fixed:
            lines.append(f"{axis}: its units may not be permuted; free are {', '.join(PERMUTABLE)}")
        shape = table.unit_shape(axis)
        if p.shape != shape or not np.issubdtype(p.dtype, np.integer):
            lines.append(f"{axis}: expected integers of shape {shape}, found {p.dtype} of {p.shape}")
        elif (np.sort(p, axis=-1) != np.arange(shape[-1])).any():
            lines.append(f"{axis}: not a permutation of 0..{shape[-1] - 1} (an index is missing, doubled or outside)")
        elif axis in table.groups and not _keeps_groups(p, table.groups[axis]):
            lines.append(f"{axis}: units of one group must stay together; there are {table.groups[axis]} groups")
    if lines:
        raise ValueError("permutations do not fit the axis table:\n  " + "\n  ".join(lines))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Permutation(Rewrite):
    """Units in another order: `new[i] = old[p[i]]`.

    Attributes:
      permutations: axis -> p, in the convention of this module.

    Example:
      >>> arch = tj.open("demo:base").arch
      >>> reversal = tj.Permutation({"layers/0/mlp": np.arange(arch.mlp_dim)[::-1]})
      >>> inverse = reversal.inverse(arch)
      >>> bool(inverse.permutations["layers/0/mlp"][0] == arch.mlp_dim - 1)
      True
    """

    name: ClassVar[str] = "permute"
    reorders_only: ClassVar[bool] = True
    permutations: Mapping[str, Int[np.ndarray, "*_ _"]]

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return []

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Permutation":
        table = axis_table(arch)
        kinds = {kind_of(axis) for axis in table.sizes}
        return cls(random_permutations(key, table, [kind for kind in PERMUTABLE if kind in kinds]))

    def data_problems(self, arch: Arch) -> list[str]:
        try:
            check_permutations(self.permutations, axis_table(arch))
        except ValueError as error:
            return [str(error)]
        return []

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        return _permuted(read(prefix), subtable(prefix, arch), self.permutations)

    def inverse(self, arch: Arch) -> "Permutation":
        return Permutation(invert(self.permutations, axis_table(arch)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Renaming(Rewrite):
    """Tokens have other ids; the files of the tokenizer and the ids in the configs must change with them.

    Attributes:
      ids: `new[i] = old[ids[i]]`: the row of the embedding that is at i afterwards.

    Example:
      >>> tj.rewrites.Renaming(np.array([1, 2, 0])).new_ids.tolist()
      [2, 0, 1]
    """

    name: ClassVar[str] = "rename"
    reorders_only: ClassVar[bool] = True
    ids: Int[np.ndarray, " V"]

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return []

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "Renaming":
        return cls.among(key, arch, np.arange(arch.vocab_size))

    @classmethod
    def among(cls, key: PRNGKeyArray, arch: Arch, ids: Int[np.ndarray, " N"]) -> "Renaming":
        """Returns a renaming that permutes these ids at random and leaves the others."""
        renamed = np.arange(arch.vocab_size, dtype=np.int32)
        renamed[ids] = generator(key, "vocab").permutation(ids)
        return cls(renamed)

    @staticmethod
    def composed(rewrites: Iterable[Rewrite]) -> Int[np.ndarray, " V"] | None:
        """Returns the new id of each token after all renamings among the rewrites; None if there is none."""
        new_ids = None
        for renaming in (rewrite for rewrite in rewrites if isinstance(rewrite, Renaming)):
            new_ids = renaming.new_ids if new_ids is None else renaming.new_ids[new_ids]
        return new_ids

    @property
    def new_ids(self) -> Int[np.ndarray, " V"]:
        """For each id of before the id that its token has afterwards."""
        return np.argsort(self.ids).astype(np.int32)

    def data_problems(self, arch: Arch) -> list[str]:
        fits = self.ids.shape == (arch.vocab_size,) and (np.sort(self.ids) == np.arange(arch.vocab_size)).all()
        return [] if fits else [f"ids are no permutation of the vocabulary's {arch.vocab_size}"]

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        return _permuted(read(prefix), subtable(prefix, arch), {"vocab": self.ids})

    def inverse(self, arch: Arch) -> "Renaming":
        return Renaming(self.new_ids)


def _permuted(weights: Weights, table: AxisTable, permutations: Permutations) -> Weights:
    return {
        name: weight.with_values(permute_leaf(weight.values, table.leaves[name], permutations, table.parent_axis))
        for name, weight in weights.items()
    }


def _keeps_groups(p: Int[np.ndarray, " _"], groups: int) -> bool:
    group_of = p.reshape(groups, -1) // (len(p) // groups)
    return bool((group_of == group_of[:, :1]).all())


def _restricts(axis: str) -> bool:
    # Axes that a caller named for a tree of their own have no entry in SYMMETRY and are free.
    return kind_of(axis) in SYMMETRY and kind_of(axis) not in PERMUTABLE


@functools.partial(jax.jit, static_argnames=("dims", "sharding"))
def _take_on_device(
    x: jax.Array, dims: Dims, indices: Sequence[jax.Array | np.ndarray], sharding: jax.sharding.Sharding
) -> jax.Array:
    # An eager take of a sharded array comes back replicated; here it keeps its place.
    return jax.lax.with_sharding_constraint(take_units(x, dims, indices), sharding)
