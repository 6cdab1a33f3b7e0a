"""`l2`: mean distance of the tensors, ranked among permuted copies of the fine-tuned model."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.progress import tqdm
from tracing_jax.rewrites import Dims, Permutations, take_units, unit_moves
from tracing_jax.sources import prefixes, subtree
from tracing_jax.statistics.permuted_copies import draw_permutations, permutation_result, shapes_not_applicable
from tracing_jax.statistics.pvalues import permutation_test
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies
from tracing_jax.tree import flatten, to_host

_LABEL = "mean Frobenius distance over tensors"


class L2(options.L2):
    """Mean over tensors of the Frobenius distance; its p-value from copies of ft with features and MLP units permuted.

    Tensors whose rows are tokens are left out where the vocabularies differ.

    Source: Zhu et al. 2025 (arXiv 2502.12292).
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why the tensors of these models cannot be subtracted; empty if they can."""
        return shapes_not_applicable(base, ft)

    def compute(self, pair: Pair) -> Result:
        """Returns the distance of the pair as given, with the p-value of its rank among the permuted copies."""
        permutations = draw_permutations(pair, self.num_perm)
        observed, permuted = distances(pair, permutations)
        log_p = None
        if permutations:
            generator = pair.generator("l2", "ties")
            log_p = permutation_test(observed, permuted, generator=generator, larger_is_similar=False)
        return permutation_result(pair, _LABEL, observed, permuted, log_p)


def distances(pair: Pair, permutations: Sequence[Permutations]) -> tuple[float, np.ndarray]:
    """Returns the mean distance of the pair as given, and of each permuted copy of ft; no copy is made.

    `||A - P B||^2 = ||A||^2 + ||B||^2 - 2 <A, P B>`, one leaf in memory at a time. Where a leaf is permuted along one
    dimension, all products come from one matrix of inner products between its units. The pair as given is subtracted
    directly: for a light fine-tune the difference of the squares would cancel.
    """
    table = axis_table(pair.ft.arch)
    stacked = {axis: np.stack([p[axis] for p in permutations]) for axis in permutations[0]} if permutations else {}

    def of_subtree(prefix: str) -> _Sums:
        observed, permuted, count = 0.0, np.zeros(len(permutations)), 0
        for name, base, ft in _leaf_pairs(pair, prefix):
            count += 1
            observed += float(np.sqrt(_sum(_squared_difference(base, ft))))
            squares = _sum(_products(base, base)) + _sum(_products(ft, ft))
            if permutations:
                dims, indices = unit_moves(table.leaves[name], stacked, table.parent_axis)
                permuted += np.sqrt(np.maximum(squares - 2 * _crosses(base, ft, dims, indices), 0.0))
        return _Sums(observed, permuted.tolist(), count)

    sums = [
        pair.run_cache.cached(_Sums, ("l2", len(permutations), prefix), functools.partial(of_subtree, prefix))
        for prefix in tqdm(prefixes(pair.base.arch), desc="l2", unit="subtree", disable=None)
    ]
    count = sum(found.leaves for found in sums)
    return sum(found.observed for found in sums) / count, np.sum([found.permuted for found in sums], axis=0) / count


@dataclass(frozen=True)
class _Sums:
    """Over the leaves of one subtree: the distances as given, those of each permuted copy, and how many leaves."""

    observed: float
    permuted: list[float]
    leaves: int


def _leaf_pairs(pair: Pair, prefix: str) -> Iterator[tuple[str, jax.Array, jax.Array]]:
    """Yields the leaves of one subtree that both models have with equal shapes."""
    rows = axis_table(pair.base.arch).leaves
    ours, theirs = (flatten(subtree(model, prefix)) for model in (pair.base, pair.ft))
    for name, leaf in ours.items():
        is_tokens = "vocab" in rows[prefix + name].axes
        if name in theirs and leaf.shape == theirs[name].shape and (pair.vocabularies.same or not is_tokens):
            yield prefix + name, leaf, theirs[name]


@jax.jit
def _squared_difference(base: jax.Array, ft: jax.Array) -> jax.Array:
    return jnp.square(base.astype(jnp.float32) - ft.astype(jnp.float32)).sum(axis=-1)


@jax.jit
def _products(base: jax.Array, ft: jax.Array) -> jax.Array:
    return (base.astype(jnp.float32) * ft.astype(jnp.float32)).sum(axis=-1)


def _crosses(base: jax.Array, ft: jax.Array, dims: Dims, indices: Sequence[np.ndarray]) -> Float[np.ndarray, " T"]:
    """Returns the inner product of base with each permuted copy of ft; a leaf that no permutation moves has one."""
    if not dims:
        return np.array([_sum(_products(base, ft))])
    if len(dims) == 1 and dims[0][1] is None:
        between = to_host(_between_units(base, ft, dims[0][0]))
        return between[np.arange(len(between)), indices[0]].sum(axis=1, dtype=np.float64)
    return to_host(_permuted_products(base, ft, dims, indices)).sum(axis=1, dtype=np.float64)


@functools.partial(jax.jit, static_argnames="dim")
def _between_units(base: jax.Array, ft: jax.Array, dim: int) -> Float[Array, "n n"]:
    """Returns the inner products of base's units along a dimension with ft's."""
    rows = [jnp.moveaxis(leaf, dim, 0).reshape(leaf.shape[dim], -1).astype(jnp.float32) for leaf in (base, ft)]
    return jnp.einsum("na,ma->nm", *rows, precision="highest")


@functools.partial(jax.jit, static_argnames="dims")
def _permuted_products(
    base: jax.Array, ft: jax.Array, dims: Dims, indices: Sequence[jax.Array | np.ndarray]
) -> jax.Array:
    """Returns for each copy the products of base with ft taken at its indices, added up along the last axis, `[T, _]`.

    One copy of the leaf exists at a time. The rows are summed on the host in float64.
    """

    def one(taken: list[jax.Array]) -> jax.Array:
        return _products(base, jnp.asarray(take_units(ft, dims, taken))).ravel()

    return jax.lax.map(one, indices)


def _sum(rows: jax.Array) -> float:
    return float(to_host(rows).sum(dtype=np.float64))
