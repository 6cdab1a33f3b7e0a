"""Linear maps of activations: leaves that write an axis are multiplied by M along it, those that read it by M^-T.

Scaling of MLP units, any invertible mixing of a head's values, the maps of queries and keys that keep their products,
and the rotations of the residual stream (`residual_stream`) differ in the axis and in M alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Complex, Float, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import MAP_PARENT, AxisTable, LeafSpec, axis_table, kind_of
from tracing_jax.rewrites.rewrite import (
    Read,
    Rewrite,
    Weights,
    array_problems,
    generator,
    random_factors,
    subtable,
    zero_problems,
)

Maps = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Axis -> (M, M^-T). A vector or, on a nested axis, a matrix of one factor per unit denotes a diagonal M."""


def parent_of(axis: str) -> str | None:
    """Returns the axis each unit of which has a map of its own on this axis: kv heads for the dims of a head."""
    kind = MAP_PARENT.get(kind_of(axis))
    return None if kind is None else axis.removesuffix(kind_of(axis)) + kind


def apply_maps(weights: Weights, table: AxisTable, maps: Maps) -> Weights:
    """Returns the leaves of a subtree after the maps of their axes; `table` is that of the subtree."""
    result = dict(weights)
    for name, weight in weights.items():
        spec = table.leaves[name]
        for dim, (axis, role) in enumerate(zip(spec.axes, spec.roles, strict=True)):
            if axis is not None and axis in maps and role is not None:
                matrix = maps[axis][0 if role == "writes" else 1]
                result[name] = weight = weight.with_values(map_along(weight.float64, dim, spec, axis, matrix, table))
    return result


def map_along(x: Any, dim: int, spec: LeafSpec, axis: str, matrix: Any, table: AxisTable) -> Any:
    """Returns x with one dimension mapped: by a diagonal, by one matrix, or by one for each unit of the parent.

    Both are numpy arrays, or both JAX arrays, through which gradients pass.
    """
    xp = x.__array_namespace__()
    if kind_of(axis) not in MAP_PARENT:
        return x * _of_each_unit(matrix, x.ndim, dim, spec, table.parent_axis.get(axis))
    parent = parent_of(axis)
    if parent is None:
        return xp.moveaxis(xp.tensordot(matrix, x, (1, dim)), 0, dim)
    front = xp.moveaxis(x, (spec.axes.index(parent), dim), (0, 1))
    new = (matrix @ front.reshape(*front.shape[:2], -1)).reshape(front.shape)
    return xp.moveaxis(new, (0, 1), (spec.axes.index(parent), dim))


def _of_each_unit(factors: Any, ndim: int, dim: int, spec: LeafSpec, parent: str | None) -> Any:
    """Returns the factors of units in a shape that multiplies a leaf along the dimension of the units."""
    shape = [1] * ndim
    shape[dim] = factors.shape[-1]
    if parent is None:
        return factors.reshape(shape)
    at = spec.axes.index(parent)
    shape[at] = factors.shape[0]
    return (factors if at < dim else factors.T).reshape(shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class UnitScaling(Rewrite):
    """Each MLP unit's up-projection is multiplied by a factor, and its down-projection divided by what follows from it.

    With a gate a unit is linear in its up-projection, and factors have either sign. Without one they are positive, and
    exist for ReLU and its square, whose outputs grow by the factor and by its square.

    Attributes:
      factors: axis such as `layers/3/mlp` -> one factor per unit (`[expert, mlp]` in experts).

    Example:
      >>> arch = tj.open("demo:base").arch
      >>> scaling = tj.rewrites.UnitScaling({"layers/0/mlp": np.full(arch.mlp_dim, -2.0)})
      >>> float(scaling.inverse(arch).factors["layers/0/mlp"][0])
      -0.5
    """

    name: ClassVar[str] = "units"
    factors: Mapping[str, Float[np.ndarray, "*parent F"]]

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        if arch.clamped_glu:
            return ["its MLP units clip their up-projection and add one, so that they are not linear in it"]
        if scaling_degree(arch) is None:
            return [f"its MLP units have no gate, and {arch.activation} does not grow by a factor of what it gets"]
        return []

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "UnitScaling":
        table = axis_table(arch)
        drawn = {axis: random_factors(generator(key, axis), table.unit_shape(axis)) for axis in _axes(table, "mlp")}
        return cls(drawn if arch.gated else {axis: np.abs(factors) for axis, factors in drawn.items()})

    def data_problems(self, arch: Arch) -> list[str]:
        table = axis_table(arch)
        known = {axis: table.unit_shape(axis) for axis in _axes(table, "mlp")}
        lines = array_problems(self.factors, known, "one factor per unit") + zero_problems(self.factors)
        negative = [] if arch.gated else [axis for axis, factors in self.factors.items() if (factors < 0).any()]
        return lines + [f"{axis}: a negative factor, which units without a gate do not allow" for axis in negative]

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        mine = {axis: factors for axis, factors in self.factors.items() if axis.startswith(prefix)}
        degree = scaling_degree(arch)
        maps = {axis: (factors, factors ** -float(degree or 1)) for axis, factors in mine.items()}
        return apply_maps(read(prefix), subtable(prefix, arch), maps)

    def inverse(self, arch: Arch) -> "UnitScaling":
        return UnitScaling({axis: 1 / factors for axis, factors in self.factors.items()})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ValueMixing(Rewrite):
    """The values of each kv head are mixed by an invertible matrix, and the output projection undoes it.

    Attributes:
      matrices: axis such as `layers/3/v_dim` -> for each kv head the M of `v' = M v`.

    Example:
      >>> import jax
      >>> arch = tj.open("demo:base").arch
      >>> mixing = tj.rewrites.ValueMixing.random(jax.random.key(0), arch)
      >>> mixing.matrices["layers/0/v_dim"].shape == (arch.num_kv_heads, arch.head_dim, arch.head_dim)
      True
    """

    name: ClassVar[str] = "values"
    matrices: Mapping[str, Float[np.ndarray, "K H H"]]

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        gated = ["its heads are gated dim by dim, and a map does not commute with that"] if arch.head_gate else []
        normalised = ["its values are normalised, and a map does not commute with that"] if arch.value_norm else []
        return _clipped(arch, "values") + gated + normalised

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "ValueMixing":
        table = axis_table(arch)
        return cls(
            {
                axis: _random_invertible(generator(key, axis), *_head_sizes(table, axis))
                for axis in _axes(table, "v_dim")
            }
        )

    def data_problems(self, arch: Arch) -> list[str]:
        table = axis_table(arch)
        shapes = {axis: (K, H, H) for axis in _axes(table, "v_dim") for K, H in [_head_sizes(table, axis)]}
        lines = array_problems(self.matrices, shapes, "one matrix per kv head")
        singular = [
            axis for axis, m in self.matrices.items() if not lines and (np.linalg.matrix_rank(m) < m.shape[1]).any()
        ]
        return lines + [f"{axis}: a matrix that cannot be inverted" for axis in singular]

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        mine = {axis: matrix for axis, matrix in self.matrices.items() if axis.startswith(prefix)}
        maps = {axis: (matrix, np.linalg.inv(matrix).swapaxes(1, 2)) for axis, matrix in mine.items()}
        return apply_maps(read(prefix), subtable(prefix, arch), maps)

    def inverse(self, arch: Arch) -> "ValueMixing":
        return ValueMixing({axis: np.linalg.inv(matrix) for axis, matrix in self.matrices.items()})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class QueryKeyMaps(Rewrite):
    """Each pair of dims of a head's queries is rotated and scaled, its keys rotated alike and scaled inversely.

    The pairs are those of `AxisTable.pairs`, which rotary positions turn together: these are the maps that commute with
    them. Seen as a complex number, a pair of the queries is multiplied by z, and the same pair of the keys by
    1 / conj(z), so that their products stay. A general rotation of a head does not keep them.

    Attributes:
      factors: axis such as `layers/3/qk_dim` -> z for each kv head and pair; the queries of a kv head share it.

    Example:
      >>> import jax
      >>> arch = tj.open("demo:base").arch
      >>> maps = tj.rewrites.QueryKeyMaps.random(jax.random.key(0), arch)
      >>> maps.factors["layers/0/qk_dim"].shape == (arch.num_kv_heads, arch.head_dim // 2)
      True
    """

    name: ClassVar[str] = "queries"
    factors: Mapping[str, Complex[np.ndarray, "K H2"]]

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        if arch.latent is not None:
            return ["its queries and keys come from latents, the rotated part of keys is shared by the heads"]
        lines = _clipped(arch, "queries and keys")
        if arch.head_dim % 2:
            lines.append(f"its heads have {arch.head_dim} dims, which cannot be paired")
        if arch.qk_norm is not None or arch.rotated_norm:
            lines.append(
                "queries and keys are normalised between projection and rope, and a map does not commute with that"
            )
        return lines

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "QueryKeyMaps":
        table, factors = axis_table(arch), {}
        for axis in _axes(table, "qk_dim"):
            rng, (K, H) = generator(key, axis), _head_sizes(table, axis)
            sizes = np.exp(rng.uniform(-1, 1, (K, H // 2)) * np.log(_SPREAD))
            factors[axis] = sizes * np.exp(2j * np.pi * rng.uniform(size=(K, H // 2)))
        return cls(factors)

    def data_problems(self, arch: Arch) -> list[str]:
        table = axis_table(arch)
        shapes = {axis: (K, H // 2) for axis in _axes(table, "qk_dim") for K, H in [_head_sizes(table, axis)]}
        return array_problems(self.factors, shapes, "one complex number per kv head and pair") + zero_problems(
            self.factors
        )

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        mine, table = {axis: z for axis, z in self.factors.items() if axis.startswith(prefix)}, subtable(prefix, arch)
        maps = {axis: (pair_blocks(z, table), pair_blocks(1 / z.conj(), table)) for axis, z in mine.items()}
        return apply_maps(read(prefix), table, maps)

    def inverse(self, arch: Arch) -> "QueryKeyMaps":
        return QueryKeyMaps({axis: 1 / z for axis, z in self.factors.items()})


_SPREAD = 3.0
"""The largest factor of a random map in any direction; no condition number exceeds its square."""


def scaling_degree(arch: Arch) -> int | None:
    """Returns the power of a factor of the up-projection by which what an MLP unit writes grows; None if by none."""
    return 1 if arch.gated else {"relu": 1, "relu2": 2}.get(arch.activation)


def random_rotation(rng: np.random.Generator, size: int) -> Float[np.ndarray, "N N"]:
    """Returns an orthogonal matrix, uniform over all of them.

    Source: Mezzadri 2007 (arXiv math-ph/0609050): Q of a Gaussian matrix, with the signs of R's diagonal.
    """
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return q * np.sign(np.diag(r))


def _random_invertible(rng: np.random.Generator, K: int, H: int) -> np.ndarray:
    sizes = np.exp(rng.uniform(-1, 1, (K, H)) * np.log(_SPREAD))
    return np.stack([random_rotation(rng, H) * size @ random_rotation(rng, H) for size in sizes])


def pair_blocks(z: Any, table: AxisTable) -> Any:
    """Returns the matrices `[K H H]` that multiply the pairs of a head's dims, seen as complex numbers, by z `[K H2]`.

    z is a numpy or a JAX array; gradients pass through it.
    """
    first, second = (np.asarray(dims, np.int64) for dims in table.pairs)
    P = len(first)
    real, imaginary = np.zeros((2, P, 2 * P, 2 * P), z.real.dtype)
    real[range(P), first, first] = real[range(P), second, second] = 1
    imaginary[range(P), second, first], imaginary[range(P), first, second] = 1, -1
    xp = z.__array_namespace__()
    return xp.tensordot(z.real, xp.asarray(real), 1) + xp.tensordot(z.imag, xp.asarray(imaginary), 1)


def _axes(table: AxisTable, kind: str) -> list[str]:
    return [axis for axis in table.sizes if kind_of(axis) == kind]


def _head_sizes(table: AxisTable, axis: str) -> tuple[int, int]:
    parent = parent_of(axis)
    assert parent is not None
    return table.sizes[parent], table.sizes[axis]


def _clipped(arch: Arch, what: str) -> list[str]:
    return [] if arch.clip_qkv is None else [f"its {what} are clipped (clip_qkv), and a map does not commute with that"]
