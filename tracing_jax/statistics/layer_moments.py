"""Descriptors of the MLP units of a layer by the layer's own weights: at any depth, whatever became of other layers.

Seven second moments describe what a layer reads and writes: those of its gate, up and down rows, and of its attention
the sums over query heads of `M M^T` and `M^T M`, for the QK product `M = W_Q^T W_K` and the OV product `M = W_O W_V`.
The descriptor of a row w are the numbers `w^T A w`, for these and for their means over the layers of the model.

Letters: D features, K kv heads, G queries of each, H head dim.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.rewrites import gain_offset
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.distinct_units import DistinctUnits, distinct_units
from tracing_jax.statistics.head_kernels import head_kernels
from tracing_jax.statistics.mlp_rows import gain_of
from tracing_jax.statistics.unit_alignment import Units, units_of, weighted_moments
from tracing_jax.statistics.unit_descriptors import Descriptors, log_quadratic_forms
from tracing_jax.tree import Tree

Moments = list[Float[Array, "D D"]]

Drawn = Callable[[int, Int[np.ndarray, " K"]], Int[np.ndarray, " k"]]
"""A layer, and its units that are live -> some of these."""


def layer_descriptors(
    model: ParamSource, means_of: Sequence[int], layers: Sequence[int], drawn: Drawn | None = None
) -> Iterator[Descriptors]:
    """Yields for some layers the descriptors of gate and up rows, and which units are live.

    Args:
      model: a model whose MLPs have gates.
      means_of: the layers over which the means of the moments are taken; without any there are no means.
      layers: those to describe.
      drawn: gives of the units of a layer those to describe; all by default.
    """
    if not layers:
        return
    totals: Moments = []
    for i in means_of:
        found = layer_moments(model.layer(i), model.arch, distinct_units(model, i))
        totals = [total + own for total, own in zip(totals, found)] if totals else found
    for i in layers:
        layer = model.layer(i)
        units, found = units_and_moments(layer, model.arch, distinct_units(model, i))
        if drawn is not None:
            units = units.some(drawn(i, np.flatnonzero(units.live)))
        moments = [*found, *totals]
        yield {side: (log_quadratic_forms(units.rows[side], moments), units.live) for side in ("gate", "up")}


def layer_moments(layer: Tree, arch: Arch, distinct: DistinctUnits) -> Moments:
    """Returns the seven moments of a layer, each of trace one; zero where all weights behind one are zero."""
    return units_and_moments(layer, arch, distinct)[1]


def units_and_moments(
    layer: Tree, arch: Arch, distinct: DistinctUnits, attention: Moments | None = None
) -> tuple[Units, Moments]:
    """Returns the units of a layer and its seven moments; those of its attention are computed where not given."""
    units = units_of(layer, arch, distinct)
    return units, [*weighted_moments(units), *(attention_moments(layer, arch) if attention is None else attention)]


def attention_moments(layer: Tree, arch: Arch) -> Moments:
    """Returns the four moments of a layer's attention, each of trace one; zero where all weights behind one are.

    All are zero in a layer without attention.
    """
    if "attn" not in layer:
        return [jnp.zeros((arch.embed_dim, arch.embed_dim), jnp.float32)] * 4
    before, after = gain_of(layer, "attn_norm", arch), gain_of(layer, "attn_post_norm", arch)
    kernels = head_kernels(layer, arch)
    scales = {name: layer["attn"][f"{name}_norm"]["scale"] for name in "qk" if arch.qk_norm is not None}
    return list(_product_moments(kernels, (before, after), scales, gain_offset(arch), arch.norm_subtracts_mean))


@functools.partial(jax.jit, static_argnames=("offset", "centred"))
def _product_moments(
    kernels: Mapping[str, Float[Array, "..."]],
    gains: tuple[Float[Array, "..."], Float[Array, "..."]],
    scales: Mapping[str, Float[Array, "..."]],
    offset: float,
    centred: bool,
) -> tuple[Float[Array, "D D"], ...]:
    """Returns the moments of a layer's kernels with the gains around them, less their mean over features if `centred`.

    Args:
      kernels: those of `head_kernels`.
      gains: of the norms before and after the attention.
      scales: of the norms of queries and keys, less `offset`.
      offset: what is added to them.
      centred: whether the norms of the model subtract the mean.
    """

    def einsum(equation: str, *arrays: Array) -> Array:
        return jnp.einsum(equation, *arrays, precision="highest")

    def read(name: str) -> Array:
        side = jnp.moveaxis(jnp.moveaxis(kernels[name], 0, -1) * gains[0], -1, 0)
        side = side * (scales[name].astype(jnp.float32) + offset) if name in scales else side
        return side - side.mean(axis=0) if centred else side

    q, k, v = map(read, "qkv")
    o = kernels["o"] * gains[1]
    o = o - o.mean(axis=-1, keepdims=True) if centred else o
    keys, values = (einsum("dkh,dki->khi", side, side) for side in (k, v))
    queries, outputs = einsum("dkgh,dkgi->khi", q, q), einsum("kghd,kgid->khi", o, o)
    found = (
        einsum("dkgh,ekgh->de", einsum("dkgi,khi->dkgh", q, keys), q),
        einsum("dkh,ekh->de", einsum("dki,khi->dkh", k, queries), k),
        einsum("kghd,kghe->de", einsum("kgid,khi->kghd", o, values), o),
        einsum("dkh,ekh->de", einsum("dki,khi->dkh", v, outputs), v),
    )
    traces = [jnp.trace(moment) for moment in found]
    return tuple(
        jnp.where(trace > 0, moment / jnp.where(trace > 0, trace, 1.0), 0.0) for moment, trace in zip(found, traces)
    )
