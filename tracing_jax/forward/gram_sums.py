"""Running sums over tokens, on the device, from which a Pearson correlation follows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from tracing_jax.blocked_matmul import accumulate_matmul
from tracing_jax.forward.unit_samples import ArrayPair


class Sums(NamedTuple):
    """Running sums over tokens of one tap, of activations minus a shift: without it squares far from 0 would cancel."""

    cross: Float[Array, "U U2"]
    first: tuple[Float[Array, " U"], Float[Array, " U2"]]
    square: tuple[Float[Array, " U"], Float[Array, " U2"]]
    shift: tuple[Float[Array, " U"], Float[Array, " U2"]]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def zero_sums(U: int, U2: int, mesh: Mesh) -> Sums:
    """Returns the sums over no tokens, for U units of base and U2 of ft."""

    def zeros(*shape: int) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.zeros(shape, jnp.float32), gram_sharding(shape, mesh))

    return Sums(zeros(U, U2), (zeros(U), zeros(U2)), (zeros(U), zeros(U2)), (zeros(U), zeros(U2)))


def gram_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a sum: a Gram's rows over `model` where they divide evenly, all else replicated."""
    shards = mesh.shape["model"]
    is_split = shards > 1 and len(shape) == 2 and shape[0] % shards == 0
    return NamedSharding(mesh, P("model", None) if is_split else P())


def accumulate(sums: Sums, units: ArrayPair, weight: Float[Array, "B P"], is_first: bool | jax.Array) -> Sums:
    """Returns the sums with a batch of both models' units added; the first batch also sets the shift."""
    # One late token, not a mean: a constant unit is then exactly 0, and first tokens are often outliers.
    shift_a, shift_b = (jnp.where(is_first, x[0, -1], old) for x, old in zip(units, sums.shift, strict=True))
    a, b = (x - shift for x, shift in zip(units, (shift_a, shift_b), strict=True))
    weighted_a, weighted_b = (x * weight[:, :, None] for x in (a, b))

    def products(start: int | Int[Array, ""], width: int) -> Float[Array, "U W"]:
        columns = jax.lax.dynamic_slice_in_dim(b, start, width, 2)
        return jnp.einsum("btu,btv->uv", weighted_a, columns, precision="highest")

    return Sums(
        accumulate_matmul(sums.cross, products),
        (sums.first[0] + weighted_a.sum((0, 1)), sums.first[1] + weighted_b.sum((0, 1))),
        (sums.square[0] + (weighted_a * a).sum((0, 1)), sums.square[1] + (weighted_b * b).sum((0, 1))),
        (shift_a, shift_b),
    )


@functools.partial(jax.jit, donate_argnames="cross")
def pearson(
    cross: Float[Array, "U U2"], first: ArrayPair, square: ArrayPair, count: int | jax.Array
) -> Float[Array, "U U2"]:
    """Returns cov(a, b) / sqrt(var(a) var(b)), and 0 where either variance is 0; reuses the memory of `cross`."""
    covariance = cross - first[0][:, None] * first[1] / count
    scales = []
    for total, squares in zip(first, square, strict=True):
        variance = squares - total**2 / count
        scales.append(jnp.where(variance > 0, jax.lax.rsqrt(variance), 0.0))
    return covariance * scales[0][:, None] * scales[1]
