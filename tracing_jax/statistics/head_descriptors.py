"""Descriptors of query heads that no rotation of the residual stream, and no map inside a head, changes.

A query head acts by two matrices on the residual stream: `A = W_Q W_K^T`, which decides where it looks, and
`B = W_V W_O`, which decides what it writes. Maps inside a head cancel in both. Of each: its norm, singular values,
traces of itself and its square, and how it acts on the second moments M of rows of the model (embeddings, gate, up and
down projection): `tr(A^T M A)`, `tr(A M A^T)` and `tr(A^T M A M)`, relative to `tr(A^T A)`. All of these follow from
matrices of the size of a head.

Letters: D features, K kv heads, G queries per kv head, H head dim, m rows of a moment, F descriptor entries.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import special

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.rewrites import gain_offset
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.head_kernels import head_kernels
from tracing_jax.statistics.mlp_rows import centred_directions, unit_length, without_mean
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.tree import Tree, flatten, taken, to_host

FactoredMoments = Float[np.ndarray, "N m D"]
"""For each second moment `M = P^T P` the rows P, scaled to length one; rows of zeros make them equally many."""

_MLP = ("gate_proj", "up_proj", "down_proj")
_LEAST = 1e-6
"""Of the norm of a matrix: smaller singular values and forms are taken for so much."""
_RIDGE = 0.1  # of a standardised entry's variance, below which a direction of the descriptors counts as noise


def moments_of_layers(
    model: ParamSource, layers: Sequence[int], ids: Int[np.ndarray, " S"], rows_of_each: int
) -> FactoredMoments:
    """Returns the rows of the moments: embeddings of these tokens, and of gate, up and down the units of largest norm.

    The norm of a unit is the product of those of its rows, which permuting, scaling and padding units leave as it is.

    Args:
      model: read subtree by subtree.
      layers: the layers that the units come from.
      ids: tokens of the embedding's moment; none gives none.
      rows_of_each: how many units of all layers together.
    """
    found = list[np.ndarray]()
    if len(ids) >= 2:
        rows = jnp.asarray(taken(model.embed()["embedding"], ids), jnp.float32)
        found.append(to_host(centred_directions(without_mean(rows, model.arch))))
    by_name: dict[str, list[Array]] = {}
    for i in layers:
        for name, rows in _largest_units(model, i, -(-rows_of_each // len(layers))):
            by_name.setdefault(name, []).append(rows)
    found += [np.concatenate(to_host(some)) for some in by_name.values()]
    stacked = np.zeros((len(found), max(map(len, found), default=0), model.arch.embed_dim), np.float32)
    for moment, some in zip(stacked, found):
        moment[: len(some)] = some
    return stacked


def head_descriptors(
    layer: Tree, arch: Arch, moments: FactoredMoments, num_singular_values: int
) -> Float[np.ndarray, "K G F"]:
    """Returns the descriptor of each query head of a layer."""
    parts = []
    for found in to_host(
        _gram_matrices(head_kernels(layer, arch), _gains(layer, arch), moments, arch.norm_subtracts_mean)
    ):
        through_one, through_other, cross = (grams.astype(np.float64) for grams in found)
        parts.append(_invariants(through_one, through_other, cross, num_singular_values))
    return np.concatenate(parts, axis=-1)


def descriptor_cosines(
    base: Sequence[Float[np.ndarray, "K G F"]], ft: Sequence[Float[np.ndarray, "K G F"]]
) -> Iterator[Float[np.ndarray, "K G K G"]]:
    """Yields for each layer the cosines of base's descriptors with ft's.

    Entries are standardised over the heads of a layer, and whitened by their covariance over all layers of both models:
    entries that vary together get little weight.
    """
    sides = [[_standardised(layer) for layer in side] for side in (base, ft)]
    rows = np.concatenate([layer.reshape(-1, layer.shape[-1]) for side in sides for layer in side])
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows) + _RIDGE * np.eye(rows.shape[1]))
    for ours, theirs in zip(*sides):
        whitened = [side @ (vectors / np.sqrt(values)) for side in (ours, theirs)]
        a, b = (side / np.maximum(np.linalg.norm(side, axis=-1, keepdims=True), 1e-12) for side in whitened)
        yield np.einsum("kgf,jhf->kgjh", a, b)


def log_p_of_order(layers: Sequence[Float[np.ndarray, "K G F"]]) -> float:
    """Returns the log p-value of the heads of a model being in random order with regard to their descriptors.

    For each entry the rank correlation with the index is added up over layers, for kv heads (their mean over queries)
    and for the queries inside them. The smallest two-sided p-value of these sums, by their normal limit, after
    Bonferroni. Heads that a tool put in order of their norm, or of another entry, have a small one.
    """
    stacked = np.stack(layers)
    log_ps = []
    for heads in (stacked.mean(axis=2), stacked.reshape(-1, *stacked.shape[2:])):
        if heads.shape[1] > 1:
            ranks = (heads[:, :, None] > heads[:, None]).sum(axis=2) + (heads[:, :, None] == heads[:, None]).sum(
                axis=2
            ) / 2
            ranks = ranks - ranks.mean(axis=1, keepdims=True)
            index = np.arange(heads.shape[1]) - (heads.shape[1] - 1) / 2
            z = np.einsum("lnf,n->lf", ranks, index) * math.sqrt(heads.shape[1] - 1) / np.square(index).sum()
            log_ps.append(special.log_ndtr(-np.abs(z.sum(axis=0) / math.sqrt(len(heads)))) + math.log(2))
    return bonferroni(np.minimum(np.concatenate(log_ps), 0.0))


def _gains(layer: Tree, arch: Arch) -> dict[str, Float[Array, "..."]]:
    """Returns what multiplies the kernels of a layer: the gain of the norm before, and of those after its projections.

    `input` broadcasts over features; `q`, `k` and `v` over the axes of their kernel but the first.
    """
    offset = gain_offset(arch)
    scales = {"input": layer.get("attn_norm", {}).get("scale")}
    scales |= {name: layer["attn"].get(f"{name}_norm", {}).get("scale") for name in "qkv"}
    return {name: jnp.asarray(scale, jnp.float32) + offset for name, scale in scales.items() if scale is not None}


def _invariants(
    one: Float[np.ndarray, "N K G H H"],
    other: Float[np.ndarray, "N K G2 H H"],
    cross: Float[np.ndarray, "K G3 H H"],
    num_singular: int,
) -> Float[np.ndarray, "K G3 F"]:
    """Returns the descriptor entries of `X Y^T`, given the Gram matrices of X and Y, plain and through each moment."""
    square = _trace(one[0], other[0])  # tr(X Y^T Y X^T), the squared norm
    square = np.maximum(square, np.finfo(np.float64).tiny)
    singular = _singular_values(one[0], other[0]) / np.sqrt(square)[..., None]
    places = np.linspace(0, singular.shape[-1] - 1, num_singular).round().astype(int)
    entries = [np.log(square), *np.moveaxis(np.log(np.maximum(singular[..., places], _LEAST)), -1, 0)]
    entries += [
        np.trace(cross, axis1=-2, axis2=-1) / np.sqrt(square),
        _trace(cross, np.swapaxes(cross, -1, -2)) / square,
    ]
    for through_one, through_other in zip(one[1:], other[1:]):
        forms = (_trace(through_one, other[0]), _trace(one[0], through_other), _trace(through_one, through_other))
        entries += [np.log(np.maximum(form / square, _LEAST**2)) for form in forms]
    return np.stack(np.broadcast_arrays(*entries), axis=-1)


def _trace(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns `tr(X^T Y)` for each head."""
    return (one * other).sum(axis=(-2, -1))


def _singular_values(
    one: Float[np.ndarray, "K G H H"], other: Float[np.ndarray, "K G2 H H"]
) -> Float[np.ndarray, "K G3 H"]:
    """Returns the singular values of `X Y^T`, largest first: the roots of the eigenvalues of `X^T X Y^T Y`."""
    try:
        root = np.linalg.cholesky(one)  # in a seventh of the time
    except np.linalg.LinAlgError:  # a matrix is singular
        values, vectors = np.linalg.eigh(one)
        root = vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
    product = np.swapaxes(root, -1, -2) @ other @ root
    return np.sqrt(np.maximum(np.linalg.eigvalsh(product), 0))[..., ::-1]


_Grams = tuple[Float[Array, "N1 K _ H H"], Float[Array, "N1 K _ H H"], Float[Array, "K _ H H"]]


@functools.partial(jax.jit, static_argnames="centred")
def _gram_matrices(
    kernels: Mapping[str, Float[Array, "..."]],
    gains: Mapping[str, Float[Array, "..."]],
    moments: Float[Array | np.ndarray, "N m D"],
    centred: bool,
) -> tuple[_Grams, ...]:
    """Returns those of the heads' queries X and keys Y, and of their values X and outputs Y, with the gains applied.

    For each head: `X^T M X` for M the identity and each moment, the same for Y, and `X^T Y`. If `centred`, norms
    subtract the mean over the features, and nothing reads that of a column.
    """

    def centred_side(side: Array) -> Array:
        return side - side.mean(axis=0) if centred else side

    def scaled(name: str) -> Float[Array, "D K *G H"]:
        kernel = kernels[name] * gains.get(name, 1.0)
        gain = gains.get("input", jnp.ones(1))
        return centred_side(kernel * gain.reshape(-1, *[1] * (kernel.ndim - 1)))

    def through(side: Float[Array, "D K G H"]) -> Float[Array, "N1 K G H H"]:
        read = jnp.einsum("nmd,dkgh->nmkgh", moments, side, precision="highest")
        return jnp.concatenate([_products(side, side)[None], _products(read, read)])

    def grams(one: Float[Array, "D K G H"], other: Float[Array, "D K G2 H"]) -> _Grams:
        return through(one), through(other), _products(one, other)

    key, value, output = (
        scaled("k")[:, :, None],
        scaled("v")[:, :, None],
        centred_side(jnp.moveaxis(kernels["o"], -1, 0)),
    )
    return grams(scaled("q"), key), grams(value, output)


def _products(one: Float[Array, "*N m K G H"], other: Float[Array, "*N m K G2 H"]) -> Float[Array, "*N K G3 H H"]:
    # Heads in front before the product: XLA's products of batches in the middle take twice as long.
    sides = (jnp.moveaxis(side, -4, -2) for side in jnp.broadcast_arrays(one, other))
    return jnp.einsum("...mh,...mi->...hi", *sides, precision="highest")


def _largest_units(model: ParamSource, index: int, count: int) -> Iterator[tuple[str, Float[Array, "m D"]]]:
    """Yields (projection, rows of the units of largest norm) of a layer, of all its experts if it has some."""
    layer = flatten(model.layer(index, ("mlp", model.arch.mlp_norm)))
    specs = axis_table(model.arch).restricted(f"layers/{index}/").leaves
    scale = layer.get(f"{model.arch.mlp_norm}/scale", 1.0 - gain_offset(model.arch))
    leaves = {name: leaf for name in _MLP if (leaf := f"mlp/{name}/kernel") in layer}
    kernels = {name: layer[leaf] for name, leaf in leaves.items()}
    axes = tuple((name, specs[leaf].axes.index("embed")) for name, leaf in leaves.items())
    centred = model.arch.norm_subtracts_mean
    found = _rows_of_largest(kernels, scale, axes, gain_offset(model.arch), count, centred)
    yield from ((name, found[name]) for name in leaves)


@functools.partial(jax.jit, static_argnames=("axes", "offset", "count", "centred"))
def _rows_of_largest(
    kernels: Mapping[str, Float[Array, "..."]],
    scale: Float[Array, "..."],
    axes: tuple[tuple[str, int], ...],
    offset: float,
    count: int,
    centred: bool,
) -> dict[str, Float[Array, "m D"]]:
    """Returns for each projection the rows of the units of largest norm; `axes` are those of the features.

    What is written to all features alike, or read of them, is taken out if norms subtract it (`centred`).
    """
    found = {}
    for name, axis in axes:
        rows = jnp.moveaxis(kernels[name].astype(jnp.float32), axis, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        if name != "down_proj":
            rows = rows * (jnp.asarray(scale, jnp.float32) + offset)
        found[name] = rows - rows.mean(axis=-1, keepdims=True) if centred else rows
    norms = sum(jnp.log(jnp.linalg.norm(rows, axis=1)) for rows in found.values())
    largest = jnp.argsort(-norms)[:count]
    return {name: unit_length(rows[largest]) for name, rows in found.items()}


def _standardised(layer: Float[np.ndarray, "K G F"]) -> Float[np.ndarray, "K G F"]:
    deviation = layer.std(axis=(0, 1))
    return (layer - layer.mean(axis=(0, 1))) / np.where(deviation > 1e-9, deviation, 1.0)
