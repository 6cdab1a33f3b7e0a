"""What one layer of ft needs to stand like base's: which units and heads belong together, and the maps on them.

Units are told apart by what scaling leaves: their gate, and the directions of what writes and reads them. Heads by what
value mixing and maps of queries and keys leave: the products of values and output, and of queries and keys, frequency
by frequency. Letters: K kv heads, G queries of each, H head dim, F mlp, n other numbers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Complex, Float, Num

from tracing_jax.alignment.balance import Sides, factors, matrices
from tracing_jax.alignment.parts import Leaves, after, rows, stacked
from tracing_jax.arch import Arch
from tracing_jax.axes import MAPPED, AxisTable, kind_of
from tracing_jax.matching import Similarity, coordinates, solve
from tracing_jax.rewrites import Permutation, QueryKeyMaps, Rewrite, UnitScaling, ValueMixing


@dataclass
class BlockMaps:
    """What brings layers of ft to base, by axis.

    Attributes:
      permutations: as in `symmetry.Permutation`; applied before the others.
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
        """The rewrites, in order, without those that have nothing to do."""
        found: list[tuple[dict[str, np.ndarray], Rewrite]] = [
            (self.permutations, Permutation(self.permutations)),
            (self.factors, UnitScaling(self.factors)),
            (self.values, ValueMixing(self.values)),
            (self.queries, QueryKeyMaps(self.queries)),
        ]
        return [rewrite for data, rewrite in found if data]

    def add(self, other: "BlockMaps") -> None:
        """Takes over what another layer needs."""
        for name in ("permutations", "factors", "values", "queries", "left_out"):
            getattr(self, name).update(getattr(other, name))


def block_maps(base: Leaves, ft: Leaves, prefix: str, arch: Arch, kinds: Collection[str]) -> BlockMaps:
    """Returns what brings one layer of ft to base's, its features being in order already.

    Args:
      base: the leaves of base's layer.
      ft: the leaves of ft's layer.
      prefix: of both.
      arch: base's facts.
      kinds: what may be used, see `kinds.KINDS`.
    """
    table = rows(arch, prefix)
    found = BlockMaps()
    permuted = [axis for axis in table.sizes if kind_of(axis) in kinds and axis != "embed"]
    for coordinate in coordinates(table, permuted):
        similarity = _SIMILARITY[kind_of(coordinate.axis)](base, ft, table, coordinate.axis, "scaling" in kinds)
        found.permutations |= solve(coordinate, _of_units(similarity) if coordinate.nested is None else similarity)
    ft = after(ft, prefix, found.rewrites, arch)
    for axis in table.sizes:
        lead = [table.within[axis]] if axis in table.within else []
        held = [other for other in table.sizes if kind_of(other) == MAPPED.get(kind_of(axis))]
        if kind_of(axis) == "mlp" and "scaling" in kinds:
            found.factors[axis] = factors(*(_sides(part, table, axis, lead) for part in (base, ft)))
        if kind_of(axis) == "v_dim" and "values" in kinds:
            found.values[axis], degenerate = matrices(*(_sides(part, table, axis, held) for part in (base, ft)))
            if degenerate:
                found.left_out[axis] = f"kv heads {degenerate} have values of too low rank to be mixed"
        if kind_of(axis) == "qk_dim" and "queries" in kinds:
            found.queries[axis] = factors(*(_paired(_sides(part, table, axis, held)) for part in (base, ft)))
    return found


def _of_units(similarity: Similarity) -> Similarity:
    """Returns the similarity of units whose inner units stay in order."""
    if (inner := similarity.nested) is None:
        return similarity
    n = len(similarity.units)
    held = [[np.trace(inner(i, j)) for j in range(n)] for i in range(n)]
    return Similarity(similarity.units + np.asarray(held))


def _unit_similarity(base: Leaves, ft: Leaves, table: AxisTable, axis: str, scaled: bool) -> Similarity:
    """Returns how alike MLP units are: cosine of their gates, and of the other sides up to a common sign."""
    return Similarity(_units_alike(_Units.of(base, table, axis), _Units.of(ft, table, axis), scaled))


def _expert_similarity(base: Leaves, ft: Leaves, table: AxisTable, axis: str, scaled: bool) -> Similarity:
    """Returns how alike experts are: cosine of what the router knows them by, and of the units inside."""
    known = [stacked(part, table, axis, None) for part in (base, ft)]
    inner = next(held for held, holder in table.within.items() if holder == axis)
    units = [_Units.of(part, table, inner, (axis,)) for part in (base, ft)]
    routers = [_directions(x) for x in known if x is not None]
    return Similarity(routers[0] @ routers[1].T, lambda i, j: _units_alike(units[0].at(i), units[1].at(j), scaled))


@dataclass(frozen=True)
class _Units:
    """The directions of what describes MLP units, by side: their gate (None), what writes and what reads them."""

    by_side: Mapping[str | None, Float[np.ndarray, "*_ n"]]

    @classmethod
    def of(cls, part: Leaves, table: AxisTable, axis: str, lead: Sequence[str] = ()) -> "_Units":
        found = {side: stacked(part, table, axis, side, lead) for side in (None, "writes", "reads")}
        return cls({side: _directions(x).astype(np.float32) for side, x in found.items() if x is not None})

    def at(self, holder: int) -> "_Units":
        return _Units({side: x[holder] for side, x in self.by_side.items()})


def _units_alike(base: _Units, ft: _Units, scaled: bool) -> Float[np.ndarray, "n n"]:
    cosines = {side: x @ ft.by_side[side].T for side, x in base.by_side.items()}
    both = cosines["writes"] + cosines["reads"]
    return cosines.get(None, np.float32(0)) + (np.abs(both) if scaled else both)


def _head_similarity(base: Leaves, ft: Leaves, table: AxisTable, axis: str, scaled: bool) -> Similarity:
    """Returns how alike the queries of heads are: cosine of their value-output and of their query-key products."""
    group = next(inner for inner, holder in table.within.items() if holder == axis)
    K = table.sizes[axis]
    mapped = [held for held in table.sizes if MAPPED.get(kind_of(held)) == kind_of(axis)]
    total = sum(_circuit_cosines(*(_circuits(part, table, dim, axis, group) for part in (base, ft))) for dim in mapped)
    return Similarity(np.zeros((K, K)), lambda i, j: np.asarray(total)[i, :, j])


_SIMILARITY = {
    "mlp": _unit_similarity, "expert": _expert_similarity, "kv_heads": _head_similarity, "q_group": _head_similarity
}  # fmt: skip


@dataclass(frozen=True)
class _Circuits:
    """The two factors whose product is what a query's head does: `own` of each query, `shared` by a kv head's queries.

    Products of a frequency's pair are apart from those of the others, so that `frequencies` of them stand in front.
    """

    own: Num[np.ndarray, "P K G H n"]
    shared: Num[np.ndarray, "P K H m"]


def _circuits(part: Leaves, table: AxisTable, dim: str, heads: str, group: str) -> _Circuits:
    per_query, per_head = [], []
    for side in ("writes", "reads"):
        grouped = stacked(part, table, dim, side, (heads, group))
        if grouped is not None:
            per_query.append(grouped)
        else:
            held = stacked(part, table, dim, side, (heads,))
            assert held is not None
            per_head.append(held)
    (own,), (shared,) = per_query, per_head
    if kind_of(dim) == "v_dim":
        return _Circuits(own[None], shared[None])
    own, shared = _complex(own), _complex(shared)
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
    # Queries count as they are and keys conjugated: q is multiplied by z and k by 1 / conj(z).
    return shared.conj()


def _transposed(x: np.ndarray) -> np.ndarray:
    return np.swapaxes(x, -1, -2).conj()


def _directions(x: Float[np.ndarray, "*F n"]) -> Float[np.ndarray, "*F n"]:
    norms = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)


def _sides(part: Leaves, table: AxisTable, axis: str, lead: Sequence[str] = ()) -> Sides:
    writes, reads = (stacked(part, table, axis, side, lead) for side in ("writes", "reads"))
    assert writes is not None
    assert reads is not None
    return Sides(writes, reads)


def _complex(x: Float[np.ndarray, "*K H n"]) -> Complex[np.ndarray, "*K H2 n"]:
    """Returns the pairs (h, h + H/2) of a head's dimensions as complex numbers."""
    first, second = np.split(x, 2, axis=-2)
    return first + 1j * second


def _paired(sides: Sides) -> Sides:
    return Sides(_complex(sides.writes), _complex(sides.reads))
