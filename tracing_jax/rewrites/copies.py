"""Copies of MLP units and of kv heads that keep the function, and their removal.

What a unit writes can be shared out among copies of it, two units that read the same can write opposite values, and a
kv head that serves several queries can be repeated for each of them. Removal adds up what units of the same rows write.

Letters: F MLP units, N units added, K kv heads, E experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from tracing_jax.arch import Arch, has_field
from tracing_jax.axes import AxisTable, LeafSpec, axis_table, kind_of
from tracing_jax.rewrites.expansion import ALIGNED
from tracing_jax.rewrites.rewrite import Read, Rewrite, Weights, generator, subtable

NEGLIGIBLE = 1e-2
"""The largest difference, relative to a unit's rows, between copies of a unit: rounding to bfloat16 leaves 2^-8."""

_Change = Callable[[np.ndarray, LeafSpec, str], np.ndarray]
"""A leaf, its spec and its axis of MLP units -> the leaf after."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class UnitSplitting(Rewrite):
    """Copies of MLP units are appended, and what a unit writes is shared out between itself and its copies.

    Attributes:
      sources: axis such as `layers/3/mlp` -> the units that are copied (`[expert, N]` in experts), N in every layer.
      shares: axis -> the factor of what each copy writes; its unit keeps one minus the sum of those of its copies.

    Example:
      >>> import jax
      >>> arch = tj.open("demo:base").arch
      >>> splitting = tj.rewrites.UnitSplitting.random(jax.random.key(0), arch)
      >>> splitting.arch_after(arch).mlp_dim > arch.mlp_dim
      True
    """

    name: ClassVar[str] = "split"
    sources: Mapping[str, Int[np.ndarray, "*parent N"]]
    shares: Mapping[str, Float[np.ndarray, "*parent N"]]

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return _width_problems(arch)

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "UnitSplitting":
        """Returns the splitting of an eighth of the units into two, shares between 1/4 and 3/4."""
        sources, shares = {}, {}
        for axis, shape in _unit_axes(axis_table(arch)).items():
            rng = generator(key, axis)
            step = math.gcd(shape[-1], ALIGNED)
            sources[axis] = _some_units(rng, shape, step * max(1, shape[-1] // (8 * step)))
            shares[axis] = rng.uniform(0.25, 0.75, sources[axis].shape)
        return cls(sources, shares)

    def data_problems(self, arch: Arch) -> list[str]:
        axes = _unit_axes(axis_table(arch))
        lines = _source_problems(self.sources, axes)
        if self.shares.keys() != self.sources.keys() or any(
            self.shares[axis].shape != self.sources[axis].shape for axis in self.sources
        ):
            lines.append("shares: expected one for each unit that is copied")
        return lines

    def arch_after(self, arch: Arch) -> Arch:
        return replace(arch, mlp_dim=arch.mlp_dim + _added(self.sources))

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        table = subtable(prefix, arch)

        def changed(x: np.ndarray, spec: LeafSpec, axis: str) -> np.ndarray:
            units = _units_last(x, spec, axis, table)
            sources, shares = self.sources[axis], self.shares[axis]
            copies = _taken(units, sources)
            if _role(spec, axis) == "reads":
                kept = np.ones(units.shape[: sources.ndim - 1] + units.shape[-1:])
                _subtract_at(kept, sources, shares)
                units, copies = units * _of_each_unit(kept, units), copies * _of_each_unit(shares, copies)
            return _units_back(np.concatenate([units, copies], axis=-1), spec, axis)

        return _on_units(read(prefix), table, changed)

    def inverse(self, arch: Arch) -> "UnitGrouping":
        groups = {axis: np.concatenate([_own(units, arch), units], axis=-1) for axis, units in self.sources.items()}
        return UnitGrouping(groups, _ones(groups), arch.mlp_dim)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class CancellingUnits(Rewrite):
    """Pairs of MLP units are appended that read the same and write opposite values, so that they add nothing.

    Attributes:
      sources: axis such as `layers/3/mlp` -> the units whose rows each pair reads with (`[expert, N]` in experts).
      writers: axis -> the units whose down rows the pairs write, one with their sign and one with the opposite.

    Example:
      >>> import jax
      >>> arch = tj.open("demo:base").arch
      >>> pairs = tj.rewrites.CancellingUnits.random(jax.random.key(0), arch)
      >>> (pairs.arch_after(arch).mlp_dim - arch.mlp_dim) % 2
      0
    """

    name: ClassVar[str] = "cancel"
    sources: Mapping[str, Int[np.ndarray, "*parent N"]]
    writers: Mapping[str, Int[np.ndarray, "*parent N"]]

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return _width_problems(arch)

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "CancellingUnits":
        """Returns pairs as many as a sixteenth of the units, each with rows of one unit and down rows of another."""
        sources, writers = {}, {}
        for axis, shape in _unit_axes(axis_table(arch)).items():
            rng = generator(key, axis)
            step = max(1, math.gcd(shape[-1], ALIGNED) // 2)
            count = step * max(1, shape[-1] // (16 * step))
            sources[axis], writers[axis] = (_some_units(rng, shape, count) for _ in range(2))
        return cls(sources, writers)

    def data_problems(self, arch: Arch) -> list[str]:
        axes = _unit_axes(axis_table(arch))
        lines = _source_problems(self.sources, axes) + _source_problems(self.writers, axes)
        if not lines and _added(self.sources) != _added(self.writers):
            lines.append("writers: expected one for each pair")
        return lines

    def arch_after(self, arch: Arch) -> Arch:
        return replace(arch, mlp_dim=arch.mlp_dim + 2 * _added(self.sources))

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        table = subtable(prefix, arch)

        def changed(x: np.ndarray, spec: LeafSpec, axis: str) -> np.ndarray:
            units = _units_last(x, spec, axis, table)
            reads = _role(spec, axis) == "reads"
            pairs = _taken(units, (self.writers if reads else self.sources)[axis])
            new = np.concatenate([units, pairs, -pairs if reads else pairs], axis=-1)
            return _units_back(new, spec, axis)

        return _on_units(read(prefix), table, changed)

    def inverse(self, arch: Arch) -> "UnitGrouping":
        groups = {}
        for axis, units in self.sources.items():
            pairs = np.broadcast_to(arch.mlp_dim + np.arange(units.shape[-1]), units.shape)
            groups[axis] = np.concatenate([_own(units, arch), pairs, pairs], axis=-1)
        return UnitGrouping(groups, _ones(groups), arch.mlp_dim)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class UnitGrouping(Rewrite):
    """MLP units that read the same become one, which writes what they wrote together.

    Attributes:
      groups: axis such as `layers/3/mlp` -> the group of each unit (`[expert, F]` in experts). Those below `units` are
        the units after; what the others write must add up to nothing. A group without members is a zero unit.
      factors: axis -> the up rows of each unit, and its bias there, are those of the group's first member times this.
      units: how many there are after.

    Raises:
      ValueError: when it is applied, if units of one group do not read the same, or what is dropped writes something.
    """

    name: ClassVar[str] = "group"
    groups: Mapping[str, Int[np.ndarray, "*parent F"]]
    factors: Mapping[str, Float[np.ndarray, "*parent F"]]
    units: int = field(metadata={"static": True})

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return _width_problems(arch)

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "UnitGrouping":
        """Raises ValueError: which units read the same depends on the weights."""
        raise ValueError("no grouping can be drawn at random: which units read the same depends on the weights")

    def data_problems(self, arch: Arch) -> list[str]:
        axes = _unit_axes(axis_table(arch))
        lines = [f"{axis}: expected a group for each unit of it" for axis in axes.keys() ^ self.groups.keys()]
        lines += [
            f"{axis}: expected {axes[axis]}, found groups {self.groups[axis].shape}, factors {self.factors[axis].shape}"
            for axis in axes.keys() & self.groups.keys() & self.factors.keys()
            if {self.groups[axis].shape, self.factors[axis].shape} != {axes[axis]}
        ]
        return lines if self.units > 0 else [*lines, "no unit would be left"]

    def arch_after(self, arch: Arch) -> Arch:
        return replace(arch, mlp_dim=self.units)

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        table = subtable(prefix, arch)

        def changed(x: np.ndarray, spec: LeafSpec, axis: str) -> np.ndarray:
            units = _units_last(x, spec, axis, table)
            groups, factors = self.groups[axis], self.factors[axis]
            if groups.ndim == 1:
                new = self._grouped(units, groups, factors, _role(spec, axis), prefix)
            else:
                rows = zip(units, groups, factors, strict=True)
                new = np.stack([self._grouped(*row, _role(spec, axis), prefix) for row in rows])
            return _units_back(new, spec, axis)

        return _on_units(read(prefix), table, changed)

    def _grouped(
        self, x: np.ndarray, groups: np.ndarray, factors: np.ndarray, role: str | None, prefix: str
    ) -> np.ndarray:
        """Returns the leaf of the units after; `x` is `[..., F]`."""
        count = max(self.units, int(groups.max()) + 1)
        if role == "reads":
            new = np.zeros((*x.shape[:-1], count))
            np.add.at(np.moveaxis(new, -1, 0), groups, np.moveaxis(x * factors, -1, 0))
            dropped = np.abs(new[..., self.units :]).max(initial=0.0)
            largest = np.abs(x[..., groups >= self.units]).max(initial=0.0)
            if dropped > NEGLIGIBLE * largest:
                raise ValueError(f"cannot group units of {prefix}mlp: units that would be dropped write something")
            return new[..., : self.units]
        factors = factors if role == "writes" else np.ones_like(factors)
        first = np.full(count, -1)
        first[groups[::-1]] = np.arange(len(groups))[::-1]
        expected = x[..., first[groups]] * factors
        if np.abs(x - expected).max(initial=0.0) > NEGLIGIBLE * np.abs(x).max(initial=0.0):
            raise ValueError(f"cannot group units of {prefix}mlp: units of one group do not read the same")
        return np.where(first >= 0, x[..., first], 0.0)[..., : self.units]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KvRepetition(Rewrite):
    """Every kv head is repeated, and its queries are dealt out to the copies.

    Attributes:
      times: how often; queries per kv head must be a multiple of it.

    Example:
      >>> arch = tj.open("demo:base").arch
      >>> after = tj.rewrites.KvRepetition(2).arch_after(arch)
      >>> (after.num_kv_heads, after.q_group) == (2 * arch.num_kv_heads, arch.q_group // 2)
      True
    """

    name: ClassVar[str] = "repeat"
    times: int = field(metadata={"static": True})

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        if not has_field(arch, "num_kv_heads"):
            return ["its config has no field for the number of kv heads"]
        if lines := KvGrouping.unsupported(arch):
            return lines
        return [] if arch.q_group > 1 else ["each kv head has one query head, so that it cannot be shared out"]

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "KvRepetition":
        """Returns the repetition after which each kv head has one query head."""
        return cls(arch.q_group)

    def data_problems(self, arch: Arch) -> list[str]:
        fits = self.times > 0 and arch.q_group % self.times == 0
        return [] if fits else [f"{arch.q_group} queries per kv head are no multiple of {self.times}"]

    def arch_after(self, arch: Arch) -> Arch:
        return replace(arch, num_kv_heads=arch.num_kv_heads * self.times, q_group=arch.q_group // self.times)

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        table, weights = subtable(prefix, arch), read(prefix)
        for name, weight in weights.items():
            kinds = [axis and kind_of(axis) for axis in table.leaves[name].axes]
            if "kv_heads" not in kinds:
                continue
            x, at = np.asarray(weight.values), kinds.index("kv_heads")
            if "q_group" in kinds:  # the axis behind it
                shape = (*x.shape[:at], x.shape[at] * self.times, x.shape[at + 1] // self.times, *x.shape[at + 2 :])
                weights[name] = weight.with_values(x.reshape(shape))
            else:
                weights[name] = weight.with_values(np.repeat(x, self.times, axis=at))
        return weights

    def inverse(self, arch: Arch) -> "KvGrouping":
        groups = np.repeat(np.arange(arch.num_kv_heads), self.times)
        return KvGrouping(dict.fromkeys(_kv_axes(arch), groups), arch.num_kv_heads)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class KvGrouping(Rewrite):
    """Kv heads with equal keys and values become one, which serves the queries of all.

    Attributes:
      groups: axis such as `layers/3/kv_heads` -> for each kv head which of those after it is part of; as many each.
      heads: how many there are after.

    Raises:
      ValueError: when it is applied, if the heads of a group do not have the same keys and values.
    """

    name: ClassVar[str] = "ungroup"
    groups: Mapping[str, Int[np.ndarray, " K"]]
    heads: int = field(metadata={"static": True})

    @classmethod
    def unsupported(cls, arch: Arch) -> list[str]:
        return [] if arch.global_attn is None else ["its layers have heads of two sizes"]

    @classmethod
    def random(cls, key: PRNGKeyArray, arch: Arch) -> "KvGrouping":
        """Raises ValueError: which kv heads are the same depends on the weights."""
        raise ValueError("no grouping can be drawn at random: which kv heads are the same depends on the weights")

    def data_problems(self, arch: Arch) -> list[str]:
        expected = _kv_axes(arch)
        lines = [f"{axis}: expected a group for each kv head" for axis in expected ^ self.groups.keys()]
        if self.heads < 1 or arch.num_kv_heads % self.heads:
            return [*lines, f"{arch.num_kv_heads} kv heads are no multiple of {self.heads}"]
        wanted = np.repeat(np.arange(self.heads), arch.num_kv_heads // self.heads)
        return lines + [
            f"{axis}: expected each of {self.heads} groups to have {arch.num_kv_heads // self.heads} of its kv heads"
            for axis, groups in self.groups.items()
            if not np.array_equal(np.sort(groups), wanted)
        ]

    def arch_after(self, arch: Arch) -> Arch:
        times = arch.num_kv_heads // self.heads
        return replace(arch, num_kv_heads=self.heads, q_group=arch.q_group * times)

    def apply(self, prefix: str, read: Read, arch: Arch) -> Weights:
        table, weights = subtable(prefix, arch), read(prefix)
        for name, weight in weights.items():
            spec = table.leaves[name]
            axis = next((axis for axis in spec.axes if axis and kind_of(axis) == "kv_heads"), None)
            if axis is None:
                continue
            at = spec.axes.index(axis)
            order = np.argsort(self.groups[axis], kind="stable")
            x = np.take(np.asarray(weight.values), order, axis=at)
            split = x.reshape(*x.shape[:at], self.heads, -1, *x.shape[at + 1 :])
            if "q_group" in [other and kind_of(other) for other in spec.axes]:  # the axis behind it
                shape = (*x.shape[:at], self.heads, -1, *x.shape[at + 2 :])
                weights[name] = weight.with_values(split.reshape(shape))
                continue
            first = np.take(split, 0, axis=at + 1)
            largest = np.abs(x.astype(np.float64)).max(initial=0.0)
            if np.abs(split.astype(np.float64) - np.expand_dims(first, at + 1)).max(initial=0.0) > NEGLIGIBLE * largest:
                raise ValueError(f"cannot group kv heads: those of a group differ in {prefix}{name}")
            weights[name] = weight.with_values(first)
        return weights


def _unit_axes(table: AxisTable) -> dict[str, tuple[int, ...]]:
    """Returns the axes of MLP units, each with its shape, that of its parent first."""
    found: dict[str, tuple[int, ...]] = {}
    for axis, size in table.sizes.items():
        if kind_of(axis) == "mlp":
            parent = table.parent_axis.get(axis)
            found[axis] = (size,) if parent is None else (table.sizes[parent], size)
    return found


def _width_problems(arch: Arch) -> list[str]:
    if not has_field(arch, "mlp_dim"):
        return ["its config has no field for the number of MLP units"]
    axes = _unit_axes(axis_table(arch))
    of_one_width = not arch.layer_mlp_dims and arch.shared_mlp_dim is None
    if of_one_width and axes and {shape[-1] for shape in axes.values()} == {arch.mlp_dim}:
        return []
    return ["its layers have MLPs of different widths"]


def _own(units: np.ndarray, arch: Arch) -> np.ndarray:
    """Returns the number of each unit there was, as many times as there are experts."""
    return np.broadcast_to(np.arange(arch.mlp_dim), (*units.shape[:-1], arch.mlp_dim))


def _ones(groups: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {axis: np.ones(members.shape) for axis, members in groups.items()}


def _some_units(rng: np.random.Generator, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Returns `count` different units of an axis, or of each parent."""
    if len(shape) == 1:
        return rng.permutation(shape[0])[:count]
    return np.stack([rng.permutation(shape[1])[:count] for _ in range(shape[0])])


def _source_problems(sources: Mapping[str, np.ndarray], axes: Mapping[str, tuple[int, ...]]) -> list[str]:
    lines = [f"{axis}: expected units of it, as for every layer" for axis in axes.keys() ^ sources.keys()]
    for axis in axes.keys() & sources.keys():
        units, shape = sources[axis], axes[axis]
        if units.shape[:-1] != shape[:-1] or not np.issubdtype(units.dtype, np.integer):
            lines.append(f"{axis}: expected whole numbers {(*shape[:-1], 'N')}, found {units.shape}")
        elif units.size and not 0 <= units.min() <= units.max() < shape[-1]:
            lines.append(f"{axis}: units {units.min()} to {units.max()}, it has {shape[-1]}")
    if len({units.shape[-1] for units in sources.values()}) > 1:
        lines.append("units: expected as many in every layer")
    return lines


def _added(sources: Mapping[str, np.ndarray]) -> int:
    return next((int(units.shape[-1]) for units in sources.values()), 0)


def _role(spec: LeafSpec, axis: str) -> str | None:
    return spec.roles[spec.axes.index(axis)]


def _on_units(weights: Weights, table: AxisTable, changed: _Change) -> Weights:
    """Returns the leaves with those that have an axis of MLP units changed."""
    for name, weight in weights.items():
        spec = table.leaves[name]
        for axis in spec.axes:
            if axis is not None and kind_of(axis) == "mlp":
                weights[name] = weight.with_values(changed(weight.float64, spec, axis))
    return weights


def _units_last(x: np.ndarray, spec: LeafSpec, axis: str, table: AxisTable) -> np.ndarray:
    """Returns the leaf with its units last, and those of the parent axis, if there is one, first."""
    x = np.moveaxis(x, spec.axes.index(axis), -1)
    parent = table.parent_axis.get(axis)
    assert parent is None or spec.axes.index(parent) == 0, "experts come first"
    return x


def _units_back(x: np.ndarray, spec: LeafSpec, axis: str) -> np.ndarray:
    return np.moveaxis(x, -1, spec.axes.index(axis))


def _taken(units: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Returns these units of the last axis, `[..., N]`; where the indices are `[E, N]`, each expert's own."""
    if indices.ndim == 1:
        return units[..., indices]
    return np.stack([own[..., i] for own, i in zip(units, indices, strict=True)])


def _subtract_at(kept: np.ndarray, sources: np.ndarray, shares: np.ndarray) -> None:
    if sources.ndim == 1:
        np.subtract.at(kept, sources, shares)
    else:
        for row, units, share in zip(kept, sources, shares, strict=True):
            np.subtract.at(row, units, share)


def _of_each_unit(factors: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Returns the factors of units in a shape that multiplies a leaf whose units are last."""
    if factors.ndim == 1:
        return factors
    return factors.reshape(factors.shape[0], *(1,) * (like.ndim - 2), factors.shape[1])


def _kv_axes(arch: Arch) -> set[str]:
    """Returns the axes of the kv heads of a model; layers without attention have none."""
    return {axis for axis in axis_table(arch).sizes if kind_of(axis) == "kv_heads"}
