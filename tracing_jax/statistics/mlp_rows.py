"""What the units of an MLP read and write, one row of weights each, in a form that rewrites change together."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tracing_jax.arch import Arch
from tracing_jax.rewrites import gain_offset
from tracing_jax.tree import Tree

MlpRows = dict[str, Float[Array, "F D"]]
"""`gate` (if the MLP has one), `up`, `down` -> a row for each unit."""


def mlp_row_leaves(arch: Arch) -> tuple[str, ...]:
    """Returns the leaves of a layer that `mlp_rows` needs."""
    kernels = ("mlp/gate_proj/kernel", "mlp/up_proj/kernel", "mlp/down_proj/kernel")
    return (*kernels, arch.mlp_norm, "mlp_post_norm")


def mlp_rows(layer: Tree, arch: Arch) -> MlpRows:
    """Returns what each unit reads (gate and up rows) and writes (down rows), float32.

    Rows that read have the gain of the norm before the MLP, rows that write that of the norm after it, if there are
    such norms. Where the norms subtract the mean over the features, nothing reads it: it is subtracted from all rows.
    """
    mlp, names = layer["mlp"], (*(("gate",) if arch.gated else ()), "up", "down")
    kernels = {name: mlp[f"{name}_proj"]["kernel"] for name in names}
    scales = {
        side: layer.get(norm, {}).get("scale") for side, norm in (("read", arch.mlp_norm), ("write", "mlp_post_norm"))
    }
    rows = _mlp_rows(kernels, scales, gain_offset(arch), arch.norm_subtracts_mean)
    return {name: rows[name] for name in names}


@functools.partial(jax.jit, static_argnames=("offset", "centred"))
def _mlp_rows(
    kernels: Mapping[str, Float[Array, "..."]],
    scales: Mapping[str, Float[Array, " D"] | None],
    offset: float,
    centred: bool,
) -> MlpRows:
    found = {}
    for name, kernel in kernels.items():
        rows, scale = (kernel, scales["write"]) if name == "down" else (kernel.T, scales["read"])
        rows = (rows if scale is None else rows * (scale.astype(jnp.float32) + offset)).astype(jnp.float32)
        found[name] = rows - rows.mean(axis=-1, keepdims=True) if centred else rows
    return found


def gain_of(tree: Tree, norm: str, arch: Arch) -> Float[Array, " D"] | float:
    """Returns the gain of a norm of a layer or of the head, float32; 1 if it has none."""
    scale: Mapping[str, Array] = tree.get(norm, {})
    if "scale" not in scale:
        return 1.0
    offset = gain_offset(arch)
    return jnp.asarray(scale["scale"], jnp.float32) + offset if offset else jnp.asarray(scale["scale"], jnp.float32)


def without_mean(rows: Float[Array, "... D"], arch: Arch) -> Float[Array, "... D"]:
    """Returns the rows without their mean over the features if the norms of the model subtract it, else as they are."""
    return rows - rows.mean(axis=-1, keepdims=True) if arch.norm_subtracts_mean else rows


@functools.partial(jax.jit, static_argnames="centred")
def scaled_rows(
    kernel: Float[Array, "D F"], gain: Float[Array, " D"], centred: bool
) -> tuple[Float[Array, "D F"], Float[Array, " F"], Float[Array, ""]]:
    """Returns what units read, times the gain and less its mean if `centred`, over the factors that are returned too.

    The factors are the largest weight of each unit and the largest gain: squares of what is left do not overflow.
    """
    weights, largest = kernel.astype(jnp.float32), jnp.abs(kernel.astype(jnp.float32)).max(axis=0)
    most = jnp.abs(gain).max()
    rows = weights / jnp.where(largest > 0, largest, 1.0) * (gain / jnp.where(most > 0, most, 1.0))[:, None]
    return rows - rows.mean(axis=0) if centred else rows, largest, most


@jax.jit
def unit_length(rows: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns the rows scaled to length one; zero rows stay zero."""
    length = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return jnp.where(length > 0, rows / jnp.where(length > 0, length, 1.0), 0.0)


@jax.jit
def centred_directions(rows: Float[Array, "S D"]) -> Float[Array, "S D"]:
    """Returns the rows, float32, centred over all of them and scaled to length one."""
    rows = rows.astype(jnp.float32)
    return unit_length(rows - rows.mean(axis=0))
