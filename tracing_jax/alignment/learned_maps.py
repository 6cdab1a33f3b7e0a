"""Maps that keep the function of a model, with parameters through which gradients pass, and the rewrites that they are.

A model is taken with its gains folded into their readers. Every map is then linear in the weights, and the gains that
it has in the end are parameters like the others. The parameters are zero where a map is the identity, except the
matrices of values.

Letters: D embed, K kv heads, H head dim.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table, kind_of
from tracing_jax.rewrites import (
    QueryKeyMaps,
    Rewrite,
    Rotation,
    UnitScaling,
    ValueMixing,
    foldable_norms,
    gain_offset,
    map_along,
    pair_blocks,
    parent_of,
    residual_group,
    scaling_degree,
)

Values = dict[str, dict[str, Any]]
"""Kind of map -> axis or norm -> its parameters; see `initial_values`."""

_SHAPES = {"rotation": "embed", "scaling": "mlp", "values": "v_dim", "queries": "qk_dim"}
"""Kind of map -> the kind of axis that it acts on."""


def initial_values(arch: Arch, kinds: Collection[str]) -> Values:
    """Returns the parameters of the identity, of the maps among these kinds.

    * `rotation`: a matrix A, whose map is the Cayley transform of `A - A^T`, in models with LayerNorms without the
      direction of ones; none where norms commute with signs alone.
    * `gains`: norm -> the logarithms of what its gain is multiplied by.
    * `scaling`: axis -> the logarithms of the units' factors.
    * `values`: axis -> the matrix of each kv head.
    * `queries`: axis -> the logarithm of the size and the angle of z, for each kv head and pair.
    """
    table = axis_table(arch)
    found: Values = {kind: {} for kind in (*_SHAPES, "gains") if kind in kinds}
    if "gains" in found:
        found["gains"] = {norm: jnp.zeros(arch.embed_dim) for norm in foldable_norms(arch)}
    for kind, axis in [(kind, axis) for kind, of in _SHAPES.items() for axis in table.sizes if kind_of(axis) == of]:
        if kind in found and not (kind == "rotation" and residual_group(arch) == "signs"):
            found[kind][axis] = _identity(kind, axis, table)
    return {kind: maps for kind, maps in found.items() if maps}


def _identity(kind: str, axis: str, table: AxisTable) -> Float[Array, "..."]:
    size = table.sizes[axis]
    if kind == "rotation":
        return jnp.zeros((size, size))
    parent = table.parent_axis.get(axis) if kind == "scaling" else parent_of(axis)
    parents = () if parent is None else (table.sizes[parent],)
    if kind == "values":
        return jnp.broadcast_to(jnp.eye(size), (*parents, size, size))
    return jnp.zeros((*parents, size // 2, 2) if kind == "queries" else (*parents, size))


def mapped(leaves: Mapping[str, Any], values: Values, gains: Mapping[str, Any], arch: Arch) -> Any:
    """Returns all leaves of a model after the maps; differentiable in `values`.

    Args:
      leaves: of a model whose foldable gains are one, by name.
      values: the parameters of the maps.
      gains: norm -> the gain that it has after the maps, if its parameters are zero or it has none.
      arch: the facts of the model.
    """
    maps, table, offset = _maps(values, arch), axis_table(arch), gain_offset(arch)
    new = {norm: gain * jnp.exp(values.get("gains", {}).get(norm, 0.0)) for norm, gain in gains.items()}
    return {name: _mapped_leaf(name, x, maps, new, table, offset) for name, x in leaves.items()}


def _mapped_leaf(
    name: str, x: Any, maps: Mapping[str, Any], gains: Mapping[str, Any], table: AxisTable, offset: float
) -> Any:
    spec = table.leaves[name]
    norm, _, kind = name.rpartition("/")
    if norm in gains:
        # A bias is added to what the readers of the norm get, as the residual stream is turned.
        return gains[norm] - offset if kind == "scale" else _turned(x, maps) * gains[norm]
    for dim, (axis, role) in enumerate(zip(spec.axes, spec.roles, strict=True)):
        if axis is not None and axis in maps and role is not None:
            x = map_along(x, dim, spec, axis, maps[axis][role == "reads"], table)
    if spec.input_norm is not None and spec.input_norm in gains:
        x = x / gains[spec.input_norm].reshape([-1 if axis == "embed" else 1 for axis in spec.axes])
    return x


def _turned(x: Float[Array, " D"], maps: Mapping[str, Any]) -> Float[Array, " D"]:
    return maps["embed"][0] @ x if "embed" in maps else x


def _maps(values: Values, arch: Arch) -> dict[str, tuple[Any, Any]]:
    """Returns axis -> (M, M^-T), as `apply_maps` takes them."""
    maps: dict[str, tuple[Any, Any]] = {}
    table = axis_table(arch)
    for kind, of_kind in values.items():
        for axis, found in of_kind.items():
            if kind == "rotation":
                maps[axis] = (R := cayley(found, arch), R)
            elif kind == "scaling":
                maps[axis] = (jnp.exp(found), jnp.exp(-(scaling_degree(arch) or 1) * found))
            elif kind == "values":
                maps[axis] = (found, jnp.linalg.inv(found).swapaxes(1, 2))
            elif kind == "queries":
                size, turn = jnp.exp(found[..., 0]), jnp.exp(1j * found[..., 1])
                maps[axis] = (pair_blocks(size * turn, table), pair_blocks(turn / size, table))
    return maps


def cayley(A: Any, arch: Arch) -> Any:
    """Returns the orthogonal matrix `(I + S)^-1 (I - S)` of `S = (A - A^T) / 2`; the identity for zeros.

    In models with LayerNorms S is taken without the direction of ones, so that the matrix keeps it.

    Source: Cayley 1846. It gives every rotation without a half turn.
    """
    xp = A.__array_namespace__()
    if residual_group(arch) == "keeps_mean":
        A = A - A.mean(axis=0) - A.mean(axis=1)[:, None] + A.mean()
    S, identity = (A - A.T) / 2, xp.eye(len(A), dtype=A.dtype)
    return xp.linalg.solve(identity + S, identity - S)


def rewrites_of(values: Values, arch: Arch) -> list[Rewrite]:
    """Returns the maps as rewrites, in float64; the gains, which need the model, are left out."""
    found = {kind: {axis: np.asarray(x, np.float64) for axis, x in maps.items()} for kind, maps in values.items()}
    rewrites: list[Rewrite] = []
    if "rotation" in found:
        rewrites.append(Rotation(cayley(found["rotation"]["embed"], arch)))
    if "scaling" in found:
        rewrites.append(UnitScaling({axis: np.exp(x) for axis, x in found["scaling"].items()}))
    if "values" in found:
        rewrites.append(ValueMixing(found["values"]))
    if "queries" in found:
        rewrites.append(
            QueryKeyMaps({axis: np.exp(x[..., 0] + 1j * x[..., 1]) for axis, x in found["queries"].items()})
        )
    return rewrites
