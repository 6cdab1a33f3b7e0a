"""Linear maps of the activations on an axis: leaves that write the axis take M, those that read it M^-T.

A stretch of MLP units, any invertible mixing of a head's values, and the maps of queries and keys that commute with
rotary positions differ in the axis and in M alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Complex, Float, PRNGKeyArray

from tracing_jax.arch import Arch
from tracing_jax.axes import MAPPED, AxisTable, Leaf, kind_of
from tracing_jax.rewrites.rewrite import Part, Read, Rewrite, rows_of, stream, table_of

Maps = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Axis -> (M, M^-T). A vector or, on a nested axis, a matrix of one factor per unit stands for a diagonal M."""


def holder_of(axis: str) -> str | None:
    """Returns the axis whose units have a map each on this one: kv heads for the dims of a head."""
    kind = MAPPED.get(kind_of(axis))
    return None if kind is None else axis.removesuffix(kind_of(axis)) + kind


def mapped(part: Part, table: AxisTable, maps: Maps) -> Part:
    """Returns a part after the maps of its axes; `table` has the rows of the part."""
    result = dict(part)
    for name, weight in part.items():
        row = table.leaves[name]
        for dim, (axis, side) in enumerate(zip(row.axes, row.sides, strict=True)):
            if axis is not None and axis in maps and side is not None:
                matrix = maps[axis][0 if side == "writes" else 1]
                result[name] = weight = weight.having(_along(weight.exact, dim, row, axis, matrix, table))
    return result


def _along(x: np.ndarray, dim: int, row: Leaf, axis: str, matrix: np.ndarray, table: AxisTable) -> np.ndarray:
    """Returns x with one dimension mapped: by a diagonal, by one matrix, or by one for each unit of the holder."""
    if kind_of(axis) not in MAPPED:
        return x * _spread(matrix, x.ndim, dim, row, table.within.get(axis))
    holder = holder_of(axis)
    if holder is None:
        return np.moveaxis(np.tensordot(matrix, x, (1, dim)), 0, dim)
    held = np.moveaxis(x, (row.axes.index(holder), dim), (0, 1))
    new = (matrix @ held.reshape(*held.shape[:2], -1)).reshape(held.shape)
    return np.moveaxis(new, (0, 1), (row.axes.index(holder), dim))


def _spread(factors: np.ndarray, ndim: int, dim: int, row: Leaf, holder: str | None) -> np.ndarray:
    """Returns the factors of units in a shape that multiplies a leaf along the dimension of the units."""
    shape = [1] * ndim
    shape[dim] = factors.shape[-1]
    if holder is None:
        return factors.reshape(shape)
    at = row.axes.index(holder)
    shape[at] = factors.shape[0]
    return (factors if at < dim else factors.T).reshape(shape)


@dataclass(frozen=True, eq=False)
class UnitScaling(Rewrite):
    """Each MLP unit's up-projection is multiplied by a factor, of either sign, and its down-projection divided by it.

    Attributes:
      factors: axis such as `layers/3/mlp` -> one factor per unit (`[expert, mlp]` where experts hold the units).
    """

    name: ClassVar[str] = "units"
    factors: Mapping[str, Float[np.ndarray, "*holder F"]]

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        table = table_of(arch)
        # Only a unit with a gate is linear in its up-projection.
        ungated = [axis for axis in _axes(table, "mlp") if all(map(_is_linear_on(axis), table.leaves.values()))]
        return ["its MLP units have no gate, so that they are not linear in their weights"] if ungated else []

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "UnitScaling":
        table = table_of(arch)
        axes = _axes(table, "mlp")
        return cls({axis: random_factors(stream(key, axis), _shape(table, axis)) for axis in axes})

    def misfits(self, arch: Arch) -> list[str]:
        table = table_of(arch)
        known = {axis: _shape(table, axis) for axis in _axes(table, "mlp")}
        return misfits(self.factors, known, "one factor per unit") + zeros(self.factors)

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        maps = {axis: (factors, 1 / factors) for axis, factors in self.factors.items() if axis.startswith(prefix)}
        return mapped(read(prefix), rows_of(prefix, arch), maps)

    def inverse(self, arch: Arch) -> "UnitScaling":
        return UnitScaling({axis: 1 / factors for axis, factors in self.factors.items()})


@dataclass(frozen=True, eq=False)
class ValueMixing(Rewrite):
    """The values of each kv head are mixed by an invertible matrix, and the output projection undoes it.

    Attributes:
      matrices: axis such as `layers/3/v_dim` -> for each kv head the M of `v' = M v`.
    """

    name: ClassVar[str] = "values"
    matrices: Mapping[str, Float[np.ndarray, "K H H"]]

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        return _clipped(arch, "values")

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "ValueMixing":
        table = table_of(arch)
        return cls({axis: _random_invertible(stream(key, axis), *_held(table, axis)) for axis in _axes(table, "v_dim")})

    def misfits(self, arch: Arch) -> list[str]:
        table = table_of(arch)
        shapes = {axis: (K, H, H) for axis in _axes(table, "v_dim") for K, H in [_held(table, axis)]}
        lines = misfits(self.matrices, shapes, "one matrix per kv head")
        singular = [
            axis for axis, m in self.matrices.items() if not lines and (np.linalg.matrix_rank(m) < m.shape[1]).any()
        ]
        return lines + [f"{axis}: a matrix that cannot be inverted" for axis in singular]

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        mine = {axis: matrix for axis, matrix in self.matrices.items() if axis.startswith(prefix)}
        maps = {axis: (matrix, np.linalg.inv(matrix).swapaxes(1, 2)) for axis, matrix in mine.items()}
        return mapped(read(prefix), rows_of(prefix, arch), maps)

    def inverse(self, arch: Arch) -> "ValueMixing":
        return ValueMixing({axis: np.linalg.inv(matrix) for axis, matrix in self.matrices.items()})


@dataclass(frozen=True, eq=False)
class QueryKeyMaps(Rewrite):
    """Each pair (h, h + H/2) of a head's queries is turned and stretched, and its keys turned alike and shrunk.

    These are the maps that commute with rotary positions: seen as a complex number, a pair of the queries is multiplied
    by z, and the same pair of the keys by 1 / conj(z), so that their products stay. A general rotation of a head does
    not keep them.

    Attributes:
      factors: axis such as `layers/3/qk_dim` -> z for each kv head and pair; the queries of a kv head share it.
    """

    name: ClassVar[str] = "queries"
    factors: Mapping[str, Complex[np.ndarray, "K H2"]]

    @classmethod
    def absent(cls, arch: Arch) -> list[str]:
        lines = _clipped(arch, "queries and keys")
        if arch.head_dim % 2:
            lines.append(f"its heads have {arch.head_dim} dims, which are no pairs")
        if arch.qk_norm is not None:
            lines.append(
                "queries and keys are normalised between projection and rope, and a map does not commute with that"
            )
        return lines

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "QueryKeyMaps":
        table, factors = table_of(arch), {}
        for axis in _axes(table, "qk_dim"):
            rng, (K, H) = stream(key, axis), _held(table, axis)
            sizes = np.exp(rng.uniform(-1, 1, (K, H // 2)) * np.log(_SPREAD))
            factors[axis] = sizes * np.exp(2j * np.pi * rng.uniform(size=(K, H // 2)))
        return cls(factors)

    def misfits(self, arch: Arch) -> list[str]:
        table = table_of(arch)
        shapes = {axis: (K, H // 2) for axis in _axes(table, "qk_dim") for K, H in [_held(table, axis)]}
        return misfits(self.factors, shapes, "one complex number per kv head and pair") + zeros(self.factors)

    def part(self, prefix: str, read: Read, arch: Arch) -> Part:
        mine = {axis: z for axis, z in self.factors.items() if axis.startswith(prefix)}
        maps = {axis: (_blocks(z), _blocks(1 / z.conj())) for axis, z in mine.items()}
        return mapped(read(prefix), rows_of(prefix, arch), maps)

    def inverse(self, arch: Arch) -> "QueryKeyMaps":
        return QueryKeyMaps({axis: 1 / z for axis, z in self.factors.items()})


_SPREAD = 3.0
"""Random maps stretch no direction more than so often, nor shrink one: no condition number exceeds its square."""


def random_factors(rng: np.random.Generator, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Returns factors between 1/4 and 4, uniform in their logarithm, of either sign."""
    return 4.0 ** rng.uniform(-1, 1, shape) * rng.choice([-1.0, 1.0], shape)


def random_rotation(rng: np.random.Generator, size: int) -> Float[np.ndarray, "N N"]:
    """Returns an orthogonal matrix, uniform over all of them.

    Source: Mezzadri 2007 (arXiv math-ph/0609050): Q of a Gaussian matrix, with the signs of R's diagonal.
    """
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return q * np.sign(np.diag(r))


def misfits(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], what: str) -> list[str]:
    """Returns where named arrays have other names or shapes than expected, or hold what is not finite."""
    lines = [
        f"{name}: no such place in this model; it has {', '.join(expected)}" for name in found if name not in expected
    ]
    for name in found.keys() & expected.keys():
        if found[name].shape != expected[name]:
            lines.append(f"{name}: expected {what}, {expected[name]}, found {found[name].shape}")
        elif not np.isfinite(found[name]).all():
            lines.append(f"{name}: holds NaN or infinity")
    return lines


def zeros(factors: Mapping[str, np.ndarray]) -> list[str]:
    """Returns which factors cannot be divided by."""
    return [f"{name}: a factor of zero" for name, array in factors.items() if (array == 0).any()]


def _random_invertible(rng: np.random.Generator, K: int, H: int) -> np.ndarray:
    sizes = np.exp(rng.uniform(-1, 1, (K, H)) * np.log(_SPREAD))
    return np.stack([random_rotation(rng, H) * size @ random_rotation(rng, H) for size in sizes])


def _blocks(z: Complex[np.ndarray, "K H2"]) -> Float[np.ndarray, "K H H"]:
    """Returns the matrices that multiply the pairs (h, h + H/2), seen as complex numbers, by z."""
    real, imaginary = (np.eye(z.shape[1]) * x[:, None, :] for x in (z.real, z.imag))
    return np.block([[real, -imaginary], [imaginary, real]])


def _axes(table: AxisTable, kind: str) -> list[str]:
    return [axis for axis in table.sizes if kind_of(axis) == kind]


def _shape(table: AxisTable, axis: str) -> tuple[int, ...]:
    holder = table.within.get(axis)
    return (table.sizes[axis],) if holder is None else (table.sizes[holder], table.sizes[axis])


def _held(table: AxisTable, axis: str) -> tuple[int, int]:
    holder = holder_of(axis)
    assert holder is not None
    return table.sizes[holder], table.sizes[axis]


def _is_linear_on(axis: str) -> Any:
    return lambda row: axis not in row.axes or row.sides[row.axes.index(axis)] is not None


def _clipped(arch: Arch, what: str) -> list[str]:
    return [] if arch.clip_qkv is None else [f"its {what} are clipped (clip_qkv), and a map does not commute with that"]
