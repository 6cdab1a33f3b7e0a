"""The rewrites that align one layer of ft to base's: which units and heads are paired, and the maps on them.

Units are compared by what is invariant under scaling: their gate, and the directions of the weights that write and read
them. Heads by what is invariant under value mixing and maps of queries and keys: the products of values and output, and
of queries and keys, frequency by frequency. Letters: K kv heads, G queries of each, H head dim, F mlp, n other axes.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Complex, Float, Num

from tracing_jax.alignment.float64_leaves import Leaves, after, own_table, stacked, units_first
from tracing_jax.alignment.procrustes import AdjacentWeights, mixing_matrices, positive_factors, scale_factors
from tracing_jax.arch import Arch
from tracing_jax.axes import MAP_PARENT, AxisRole, AxisTable, kind_of
from tracing_jax.matching import Similarity, assign, coordinates, solve
from tracing_jax.rewrites import Permutation, QueryKeyMaps, Rewrite, UnitScaling, ValueMixing, scaling_degree


@dataclass
class BlockMaps:
    """The rewrites that align layers of ft to base, by axis.

    Attributes:
      permutations: as in `Permutation`; applied before the others.
      factors, values, queries: as in `UnitScaling`, `ValueMixing` and `QueryKeyMaps`.
      left_out: axis -> why some of it was not mapped.
    """

    permutations: dict[str, np.ndarray] = field(default_factory=dict)
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    queries: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def rewrites(self) -> list[Rewrite]:
        """The rewrites in order, those without data left out."""
        found: list[tuple[dict[str, np.ndarray], Rewrite]] = [
            (self.permutations, Permutation(self.permutations)),
            (self.factors, UnitScaling(self.factors)),
            (self.values, ValueMixing(self.values)),
            (self.queries, QueryKeyMaps(self.queries)),
        ]
        return [rewrite for data, rewrite in found if data]

    def add(self, other: "BlockMaps") -> None:
        """Adds the rewrites of another layer."""
        for name in ("permutations", "factors", "values", "queries", "left_out"):
            getattr(self, name).update(getattr(other, name))


def block_maps(base: Leaves, ft: Leaves, prefix: str, arch: Arch, kinds: Collection[str]) -> BlockMaps:
    """Returns the rewrites that align one layer of ft to base's; its features are aligned already.

    Args:
      base: the leaves of base's layer.
      ft: the leaves of ft's layer.
      prefix: of both.
      arch: base's facts.
      kinds: of rewrites that may be used, see `applicability.KINDS`.
    """
    table = own_table(arch, prefix)
    found = BlockMaps()
    permuted = [axis for axis in table.sizes if kind_of(axis) in kinds and axis != "embed"]
    # Only the features have to be aligned before latents are; heads are compared by what they read of latents.
    for axis in [axis for axis in permuted if kind_of(axis) in _LATENTS]:
        found.permutations[axis] = assign(_latent_similarity(base, ft, table, axis))
    ft = after(ft, prefix, found.rewrites, arch)
    for coordinate in coordinates(table, [axis for axis in permuted if kind_of(axis) not in _LATENTS]):
        similarity = _SIMILARITY[kind_of(coordinate.axis)](base, ft, table, coordinate.axis, "scaling" in kinds)
        found.permutations |= solve(coordinate, _of_units(similarity) if coordinate.nested is None else similarity)
    heads_and_units = {axis: p for axis, p in found.permutations.items() if kind_of(axis) not in _LATENTS}
    ft = after(ft, prefix, [Permutation(heads_and_units)], arch)
    for axis in table.sizes:
        lead = [table.parent_axis[axis]] if axis in table.parent_axis else []
        heads = [other for other in table.sizes if kind_of(other) == MAP_PARENT.get(kind_of(axis))]
        if kind_of(axis) == "mlp" and "scaling" in kinds:
            of_base, of_ft = (_adjacent(layer, table, axis, lead) for layer in (base, ft))
            degree = None if arch.gated else scaling_degree(arch)
            found.factors[axis] = (
                scale_factors(of_base, of_ft) if degree is None else positive_factors(of_base, of_ft, degree)
            )
        if kind_of(axis) == "v_dim" and "values" in kinds:
            found.values[axis], degenerate = mixing_matrices(
                *(_adjacent(layer, table, axis, heads) for layer in (base, ft))
            )
            if degenerate:
                found.left_out[axis] = f"kv heads {degenerate} have values of too low rank for a mixing matrix"
        if kind_of(axis) == "qk_dim" and "queries" in kinds:
            found.queries[axis] = scale_factors(
                *(_paired(_adjacent(layer, table, axis, heads), table) for layer in (base, ft))
            )
    return found


def _of_units(similarity: Similarity) -> Similarity:
    """Returns the similarity of units whose nested units keep their order."""
    if (inner := similarity.nested) is None:
        return similarity
    n = len(similarity.units)
    held = [[np.trace(inner(i, j)) for j in range(n)] for i in range(n)]
    return Similarity(similarity.units + np.asarray(held))


def _latent_similarity(base: Leaves, ft: Leaves, table: AxisTable, axis: str) -> Float[np.ndarray, "n n"]:
    """Returns the cosines of the weights that write the units of a latent, times the gains of its norm."""
    found = []
    for layer in (base, ft):
        writes, gain = stacked(layer, table, axis, "writes"), stacked(layer, table, axis, None)
        assert writes is not None
        assert gain is not None
        found.append(_unit_vectors(writes) * np.sign(gain))
    return found[0] @ found[1].T


def _unit_similarity(base: Leaves, ft: Leaves, table: AxisTable, axis: str, scaled: bool) -> Similarity:
    """Returns the similarity of MLP units: cosines of gates, and of up- and down-projections up to a common sign."""
    return Similarity(_units_alike(_Units.of(base, table, axis), _Units.of(ft, table, axis), scaled))


def _expert_similarity(base: Leaves, ft: Leaves, table: AxisTable, axis: str, scaled: bool) -> Similarity:
    """Returns the similarity of experts: cosine of their router weights, and of their units."""
    rows = [stacked(layer, table, axis, None) for layer in (base, ft)]
    inner = next(nested for nested, parent in table.parent_axis.items() if parent == axis)
    units = [_Units.of(layer, table, inner, (axis,)) for layer in (base, ft)]
    routers = [_unit_vectors(x) for x in rows if x is not None]
    return Similarity(routers[0] @ routers[1].T, lambda i, j: _units_alike(units[0].at(i), units[1].at(j), scaled))


@dataclass(frozen=True)
class _Units:
    """The directions of the weights of MLP units by their role: gate (None), writing, and reading weights."""

    by_role: Mapping[AxisRole | None, Float[np.ndarray, "*_ n"]]

    @classmethod
    def of(cls, layer: Leaves, table: AxisTable, axis: str, lead: Sequence[str] = ()) -> "_Units":
        roles: tuple[AxisRole | None, ...] = (None, "writes", "reads")
        found = {role: stacked(layer, table, axis, role, lead) for role in roles}
        return cls({role: _unit_vectors(x).astype(np.float32) for role, x in found.items() if x is not None})

    def at(self, parent: int) -> "_Units":
        return _Units({role: x[parent] for role, x in self.by_role.items()})


def _units_alike(base: _Units, ft: _Units, scaled: bool) -> Float[np.ndarray, "n n"]:
    cosines = {role: x @ ft.by_role[role].T for role, x in base.by_role.items()}
    both = cosines["writes"] + cosines["reads"]
    if None not in cosines:  # without a gate factors are positive
        return both
    return cosines[None] + (np.abs(both) if scaled else both)


def _head_similarity(base: Leaves, ft: Leaves, table: AxisTable, axis: str, scaled: bool) -> Similarity:
    """Returns the similarity of query heads: cosine of their value-output and of their query-key products."""
    group = next(nested for nested, parent in table.parent_axis.items() if parent == axis)
    K = table.sizes[axis]
    mapped = [dim for dim in table.sizes if MAP_PARENT.get(kind_of(dim)) == kind_of(axis)]
    total = sum(
        _circuit_cosines(*(_circuits(layer, table, dim, axis, group) for layer in (base, ft))) for dim in mapped
    )
    return Similarity(np.zeros((K, K)), lambda i, j: np.asarray(total)[i, :, j])


def _state_similarity(base: Leaves, ft: Leaves, table: AxisTable, axis: str, scaled: bool) -> Similarity:
    """Returns the similarity of the groups of a recurrence and of their heads: cosines of their weights.

    Only those that have an axis of features are compared: others may be initialised by a rule, alike in all models.
    """
    heads = next(nested for nested, parent in table.parent_axis.items() if parent == axis)
    of_heads, of_groups = (
        [_state_rows(layer, table, axis, heads, has) for layer in (base, ft)] for has in (True, False)
    )
    return Similarity(of_groups[0] @ of_groups[1].T, lambda i, j: of_heads[0][i] @ of_heads[1][j].T)


def _state_rows(
    layer: Leaves, table: AxisTable, groups: str, heads: str, of_heads: bool
) -> Float[np.ndarray, "n *_ m"]:
    """Returns the directions of the weights of each group that its heads have or share, for each head or group."""
    lead = (groups, heads) if of_heads else (groups,)
    names = [
        name
        for name, spec in table.leaves.items()
        if {"embed", *lead} <= set(spec.axes) and (heads in spec.axes) == of_heads
    ]
    return np.concatenate(
        [_unit_vectors(units_first(layer[name], table.leaves[name], lead)) for name in names], axis=-1
    )


_LATENTS = ("q_latent", "kv_latent")
_SIMILARITY = {
    "mlp": _unit_similarity, "expert": _expert_similarity, "kv_heads": _head_similarity, "q_group": _head_similarity,
    "state_groups": _state_similarity, "state_heads": _state_similarity,
}  # fmt: skip


@dataclass(frozen=True)
class _Circuits:
    """The two factors of a query head's value-output or query-key product.

    `own` is that of the query head, `shared` that of its kv head. P is the number of rope frequencies, whose products
    are compared one by one, or 1.
    """

    own: Num[np.ndarray, "P K G H n"]
    shared: Num[np.ndarray, "P K H m"]


def _circuits(layer: Leaves, table: AxisTable, dim: str, heads: str, group: str) -> _Circuits:
    per_query, per_head = [], []
    roles: tuple[AxisRole, ...] = ("writes", "reads")
    for role in roles:
        grouped = stacked(layer, table, dim, role, (heads, group))
        if grouped is not None:
            per_query.append(grouped)
        else:
            ungrouped = stacked(layer, table, dim, role, (heads,))
            assert ungrouped is not None
            per_head.append(ungrouped)
    (own,), (shared,) = per_query, per_head
    if kind_of(dim) == "v_dim":
        return _Circuits(own[None], shared[None])
    own, shared = _complex(own, table), _complex(shared, table)
    return _Circuits(np.moveaxis(own, 2, 0)[:, :, :, None], np.moveaxis(shared, 1, 0)[:, :, None])


def _circuit_cosines(base: _Circuits, ft: _Circuits) -> Float[np.ndarray, "K G K2 G2"]:
    norms = np.sqrt(_own_products(base)[:, :, None, None] * _own_products(ft)[None, None])
    products = np.stack([_products(base, ft, k) for k in range(base.own.shape[1])])
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def _products(base: _Circuits, ft: _Circuits, k: int) -> Float[np.ndarray, "G K2 G2"]:
    """Returns the inner products of kv head k of base with all heads of ft: traces of products of small matrices."""
    P, K, G, H, _ = ft.own.shape
    shared = np.einsum("phm,pKim->pKhi", base.shared[:, k], ft.shared.conj(), optimize=True)
    own = np.matmul(base.own[:, k].reshape(P, -1, base.own.shape[-1]), _transposed(ft.own.reshape(P, K * G * H, -1)))
    own = own.reshape(P, -1, H, K, G, H)
    return np.einsum("pghKGi,pKhi->gKG", own, _partner(shared), optimize=True).real


def _own_products(circuits: _Circuits) -> Float[np.ndarray, "K G"]:
    shared = np.einsum("pkhm,pkim->pkhi", circuits.shared, circuits.shared.conj(), optimize=True)
    own = np.einsum("pkghn,pkgin->pkghi", circuits.own, circuits.own.conj(), optimize=True)
    return np.einsum("pkghi,pkhi->kg", own, _partner(shared), optimize=True).real


def _partner(shared: np.ndarray) -> np.ndarray:
    # Keys are conjugated: q is multiplied by z and k by 1 / conj(z).
    return shared.conj()


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2).conj()


def _unit_vectors(x: Float[np.ndarray, "*F n"]) -> Float[np.ndarray, "*F n"]:
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def _adjacent(layer: Leaves, table: AxisTable, axis: str, lead: Sequence[str] = ()) -> AdjacentWeights:
    writes, reads = stacked(layer, table, axis, "writes", lead), stacked(layer, table, axis, "reads", lead)
    assert writes is not None
    assert reads is not None
    return AdjacentWeights(writes, reads)


def _complex(x: Float[np.ndarray, "*K H n"], table: AxisTable) -> Complex[np.ndarray, "*K H2 n"]:
    """Returns the pairs of a head's dimensions as complex numbers."""
    first, second = (np.take(x, dims, axis=-2) for dims in table.pairs_of(x.shape[-2]))
    return first + 1j * second


def _paired(weights: AdjacentWeights, table: AxisTable) -> AdjacentWeights:
    return AdjacentWeights(_complex(weights.writes, table), _complex(weights.reads, table))
