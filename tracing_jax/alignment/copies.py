"""Copies of MLP units and kv heads of ft: found in its weights, and made one again.

Units are copies if their gate rows are the same and their up rows the same up to a factor, which the down rows undo;
kv heads if their keys are the same up to a map that commutes with rotary positions, and their values up to any map.
Those are the copies that keep the function, and that other rewrites leave copies.

Letters: F MLP units, K kv heads, H head dim, D features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Complex, Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tracing_jax.alignment.float64_leaves import Leaves, in_float64, leaves, own_table, units_first
from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, kind_of
from tracing_jax.matching import normalised_rows
from tracing_jax.rewrites import KvGrouping, QueryKeyMaps, Rewrite, UnitGrouping, ValueMixing
from tracing_jax.rewrites.copies import NEGLIGIBLE
from tracing_jax.sources import ParamSource

_BLOCK = 2048  # units compared with all others at a time


def group_copies(
    base: Arch, ft: ParamSource, rewrites: Sequence[Rewrite] = ()
) -> tuple[tuple[Rewrite, ...], dict[str, Any]]:
    """Returns the rewrites that make copies in ft one, where it has more than base, and a report of what they remove.

    Args:
      base: the facts of the model to compare with.
      ft: the model.
      rewrites: that come before.
    """
    found: list[Rewrite] = []
    report: dict[str, Any] = {}
    source = in_float64(ft, rewrites)
    arch = source.arch
    if arch.mlp_dim > base.mlp_dim and not UnitGrouping.unsupported(arch):
        grouping = _unit_grouping(base, source)
        if grouping.units < arch.mlp_dim:
            found.append(grouping)
            report["units"] = arch.mlp_dim - grouping.units
    times = base.q_group // arch.q_group
    is_multiple = base.q_group == times * arch.q_group and arch.num_kv_heads % times == 0
    if times > 1 and is_multiple and not KvGrouping.unsupported(arch):
        heads = _kv_grouping(arch.num_kv_heads // times, source)
        found += heads
        report |= {"kv_heads": arch.num_kv_heads - arch.num_kv_heads // times} if heads else {}
    return tuple(found), report


def _unit_grouping(base: Arch, ft: ParamSource) -> UnitGrouping:
    groups: dict[str, np.ndarray] = {}
    factors: dict[str, np.ndarray] = {}
    for i in range(ft.arch.num_layers):
        prefix = f"layers/{i}/"
        table, weights = own_table(ft.arch, prefix), leaves(ft, prefix)
        for axis in [axis for axis in table.sizes if kind_of(axis) == "mlp"]:
            rows = _rows(weights, table, axis)
            if axis in table.parent_axis:
                pairs = [_grouped(*(side[e] for side in rows)) for e in range(len(rows[1]))]
                groups[axis], factors[axis] = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
            else:
                groups[axis], factors[axis] = _grouped(*rows)
    kept = max(int((members[members >= 0]).max(initial=-1)) + 1 for members in groups.values())
    units = max(kept, base.mlp_dim)
    for axis, members in groups.items():  # what is dropped gets numbers behind those that stay
        groups[axis] = np.where(members < 0, units - 1 - members, members)
    return UnitGrouping(groups, factors, min(units, ft.arch.mlp_dim))


def _rows(weights: Leaves, table: AxisTable, axis: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what each unit reads by its gate and by its up projection, and what it writes: `[*parent, F, n]`."""
    lead = [table.parent_axis[axis]] if axis in table.parent_axis else []
    sides: dict[str | None, list[np.ndarray]] = {None: [], "writes": [], "reads": []}
    for name, spec in table.leaves.items():
        if name in weights and axis in spec.axes:
            sides[spec.roles[spec.axes.index(axis)]].append(units_first(weights[name], spec, [*lead, axis]))
    shape = sides["writes"][0].shape[:-1]
    empty = np.zeros((*shape, 0))
    gate, up, down = (np.concatenate([empty, *sides[role]], axis=-1) for role in (None, "writes", "reads"))
    return gate, up, down


def _grouped(
    gate: Float[np.ndarray, "F n"], up: Float[np.ndarray, "F m"], down: Float[np.ndarray, "F D"]
) -> tuple[Int[np.ndarray, " F"], Float[np.ndarray, " F"]]:
    """Returns the group of each unit, by the first member, and the factor of its up row to that member's.

    Groups that write nothing together get numbers below 0, each its own.
    """
    gated = gate.shape[-1] > 0
    first = _first_copies(gate, up) if gated else _first_copies(up, up[:, :0])
    squares = np.square(up[first]).sum(axis=-1)
    factors = (up * up[first]).sum(axis=-1) / np.where(squares > 0, squares, 1.0)
    factors = factors if gated else np.ones(len(up))
    together = np.zeros_like(down)
    np.add.at(together, first, down * factors[:, None])
    size, largest = np.linalg.norm(together, axis=1), np.zeros(len(down))
    np.maximum.at(largest, first, np.linalg.norm(down, axis=1) * np.abs(factors))
    members = np.bincount(first, minlength=len(first))
    cancelled = (members > 1) & (size <= NEGLIGIBLE * largest)
    numbers = np.empty(len(first), np.int64)
    leaders = np.flatnonzero(members)
    numbers[leaders[cancelled[leaders]]] = -1 - np.arange(cancelled[leaders].sum())
    numbers[leaders[~cancelled[leaders]]] = np.arange((~cancelled[leaders]).sum())
    return numbers[first], factors


def _first_copies(same: Float[np.ndarray, "F n"], parallel: Float[np.ndarray, "F m"]) -> Int[np.ndarray, " F"]:
    """Returns for each unit the first whose rows in `same` are equal, and whose rows in `parallel` parallel, to its."""
    limit = 1 - NEGLIGIBLE**2 / 2
    lengths = np.linalg.norm(same, axis=1)
    pairs: list[np.ndarray] = []
    units_same, units_parallel = (normalised_rows(rows).astype(np.float32) for rows in (same, parallel))
    for start in range(0, len(same), _BLOCK):
        block = slice(start, start + _BLOCK)
        near = units_same[block] @ units_same.T >= limit
        near &= np.abs(lengths[block, None] - lengths) <= NEGLIGIBLE * lengths
        if parallel.shape[1]:
            near &= np.abs(units_parallel[block] @ units_parallel.T) >= limit
        rows, columns = np.nonzero(near)
        pairs.append(np.stack([rows + start, columns]))
    rows, columns = np.concatenate(pairs, axis=1)
    count = len(same)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(count, count))
    component = connected_components(graph, directed=False)[1]
    _, first = np.unique(component, return_index=True)
    return first[component]


def _kv_grouping(heads: int, ft: ParamSource) -> list[Rewrite]:
    """Returns the rewrites that leave as many kv heads; none if ft's are not copies, as many of each."""
    arch = ft.arch
    groups: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    keys: dict[str, np.ndarray] = {}
    for i in filter(arch.has_attention, range(arch.num_layers)):
        prefix = f"layers/{i}/"
        table, weights = own_table(arch, prefix), leaves(ft, prefix)
        k, v = (_per_head(weights, table, prefix, kind) for kind in ("k_proj", "v_proj"))
        first, value_maps, key_factors = _same_heads(k, v, arch, table)
        numbers = _dealt_out(first, ~np.any(k, axis=(1, 2)) & ~np.any(v, axis=(1, 2)), arch.num_kv_heads // heads)
        if not np.array_equal(np.bincount(numbers), np.full(heads, arch.num_kv_heads // heads)):
            return []
        groups[prefix + "kv_heads"] = numbers
        values[prefix + "v_dim"] = value_maps
        keys[prefix + "qk_dim"] = key_factors
    maps: list[Rewrite] = []
    if not ValueMixing.unsupported(arch):
        maps.append(ValueMixing(values))
    if not QueryKeyMaps.unsupported(arch):
        maps.append(QueryKeyMaps(keys))
    return [*maps, KvGrouping(groups, heads)]


def _dealt_out(first: Int[np.ndarray, " K"], zero: Bool[np.ndarray, " K"], times: int) -> Int[np.ndarray, " K"]:
    """Returns the group of each kv head; those that are zero are all the same, and fill groups of `times` in turn."""
    own = first.copy()
    own[zero] = len(first) + np.arange(zero.sum()) // times
    return np.asarray(np.unique(own, return_inverse=True)[1])


def _per_head(weights: Leaves, table: AxisTable, prefix: str, module: str) -> Float[np.ndarray, "K H n"]:
    """Returns the weights that a kv head computes its keys or values with, those of the bias last."""
    inner = prefix + ("qk_dim" if module == "k_proj" else "v_dim")
    names = [f"attn/{module}/{leaf}" for leaf in ("kernel", "bias") if f"attn/{module}/{leaf}" in weights]
    sides = [units_first(weights[name], table.leaves[name], [prefix + "kv_heads", inner]) for name in names]
    return np.concatenate(sides, axis=-1)


def _same_heads(
    k: Float[np.ndarray, "K H n"], v: Float[np.ndarray, "K H n"], arch: Arch, table: AxisTable
) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, "K H H"], Complex[np.ndarray, "K P"]]:
    """Returns for each kv head the first that is the same, and the maps of values and queries that make them equal."""
    count = len(k)
    first = np.arange(count)
    value_maps = np.tile(np.eye(v.shape[1]), (count, 1, 1))
    key_factors = np.ones((count, len(table.pairs[0])), np.complex128)
    mixed, turned = not ValueMixing.unsupported(arch), not QueryKeyMaps.unsupported(arch)
    for j in range(count):
        for i in [i for i in range(j) if first[i] == i]:
            matrix = v[i] @ np.linalg.pinv(v[j]) if mixed else np.eye(v.shape[1])
            z = _factors(k[j], k[i], table) if turned else np.ones(key_factors.shape[1], np.complex128)
            same_values = _near(matrix @ v[j], v[i]) and np.linalg.matrix_rank(matrix) == len(matrix)
            if same_values and _near(_turned(k[j], 1 / z.conj(), table) if turned else k[j], k[i]):
                first[j], value_maps[j], key_factors[j] = i, matrix, z
                break
    return first, value_maps, key_factors


def _factors(found: np.ndarray, wanted: np.ndarray, table: AxisTable) -> np.ndarray:
    """Returns the z of the queries, with 1 / conj(z) times the keys found as near as possible to those wanted."""
    x, y = (_complex(rows, table) for rows in (found, wanted))
    w = (x.conj() * y).sum(axis=1) / np.maximum(np.square(np.abs(x)).sum(axis=1), np.finfo(float).tiny)
    return 1 / np.where(w == 0, 1.0, w).conj()


def _turned(rows: np.ndarray, factors: np.ndarray, table: AxisTable) -> np.ndarray:
    first, second = (np.asarray(dims, np.int64) for dims in table.pairs)
    turned = _complex(rows, table) * factors[:, None]
    new = rows.copy()
    new[first], new[second] = turned.real, turned.imag
    return new


def _complex(rows: np.ndarray, table: AxisTable) -> np.ndarray:
    first, second = (np.asarray(dims, np.int64) for dims in table.pairs)
    return np.asarray(rows[first] + 1j * rows[second])


def _near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.linalg.norm(found - wanted) <= NEGLIGIBLE * np.linalg.norm(wanted))
