"""`features_in_place`: are the features of the residual stream in place? One matching over all matrices that have them.

Letters: D features, n units of the other axes of a matrix.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, LeafSpec, axis_table
from tracing_jax.progress import tqdm
from tracing_jax.rewrites import gain_offset
from tracing_jax.sources import subtree
from tracing_jax.statistics.comparison import bonferroni_log10, reserved, share_agreeing
from tracing_jax.statistics.distinct_units import all_units, inactive_layers
from tracing_jax.statistics.head_kernels import inactive_attention
from tracing_jax.statistics.in_place import in_place, in_place_tests, layers_in_common
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies, widths_not_applicable
from tracing_jax.tree import flatten, readable, to_host

_MATRICES = frozenset(
    "embedding lm_head q_proj k_proj v_proj o_proj q_rope_proj k_rope_proj q_a_proj kv_a_proj gate_proj up_proj"
    " down_proj other".split()
)
"""Matrices drawn at random; `other` are those of a model that is read by its weights alone. Norms, biases, routers and
positions may start from rules that independent models share."""

_COLUMNS = 1024  # the most units (heads, MLP) of each matrix that features are compared on
_TOKENS = 4096  # the most shared tokens of embedding and head
_CHOSEN = (
    "whoever has both models can make the features of an independent one resemble those of the other: by the order and "
    "signs of MLP units, the mixing of values inside heads, tokens that no text holds, units and heads that do nothing"
)


class FeaturesInPlace(options.FeaturesInPlace):
    """Constrained test on the features of the residual stream; exact if either model was trained independently.

    The features of base are compared with those of ft by the correlation of their weights in each matrix, over the
    heads, MLP units or shared tokens that it connects them with. The correlations of all matrices are added up, each
    matrix counting alike, and one assignment is compared with the identity. Exact since all matrices of a model share
    one permutation of the features; q, k, v, embedding and head, which have no exact null by themselves, take part.

    Heads, MLP units and layers are taken in their order: where they moved, a matrix adds noise, and no false evidence.
    A matrix whose other axes differ in size is left out. Gains of norms, and a change of sign of features, do not
    matter. What the null assumes is only that neither model was made to look like the other. Who has both can choose
    much of what features are compared on, so that the p-value is reserved: by itself it does not make a pair related.

    The correlations of a 7B pair take about two minutes on two cores, beside reading its weights once.

    Source: ours; the exact null is that of Zhu et al. 2025 (arXiv 2502.12292).
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns the reason why features of these models have no counterpart; empty if they have."""
        return widths_not_applicable(base, ft)

    def compute(self, pair: Pair) -> Result:
        """Returns the p-values by agreement, with rank correlation beside it; no forward pass."""
        matrices = _matrices(pair)
        similarity = readable(self._summed(pair, matrices))
        everything = all_units(pair.base.arch.embed_dim)
        found = [in_place(similarity, (everything, everything), pair.generator("features_in_place"))]
        rank, agreement, outstanding = in_place_tests(found, ["features"])
        # Order may follow one rule in both models; and none of what is in place is firm, see _CHOSEN.
        tests = (replace(agreement, firm_log10_p=0.0), replace(rank, decides=False), outstanding)
        return Result(
            headline=share_agreeing(found),
            label="features of the residual stream that stay in place, share",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            notes=_notes(pair, matrices),
            effect=f"{found[0].agreeing:,} of {found[0].units:,} features are in place; by chance about one is",
            **reserved(tests, _CHOSEN),
        ).for_pair(pair)

    def _summed(self, pair: Pair, matrices: Mapping[str, list["_Matrix"]]) -> Float[Array, "D D"]:
        """Returns the sum over the matrices of the correlations of base's features with ft's."""
        run_cache = pair.run_cache.scope("features_in_place")
        D, kept = pair.base.arch.embed_dim, run_cache.load_arrays("summed")
        done = 0 if kept is None else int(kept["parts"])
        total = jax.device_put(np.zeros((D, D), np.float32) if kept is None else kept["total"])
        bar = tqdm(
            list(matrices)[done:], desc="features", unit="subtree", initial=done, total=len(matrices), disable=None
        )
        for number, prefix in enumerate(bar, done + 1):
            for base, ft, axes in self._rows(pair, prefix, matrices[prefix]):
                total = _with_correlations(total, base, ft, axes)
            state = functools.partial(_state, total, number)
            run_cache.save_if_due(state, total.nbytes, "summed")
        run_cache.delete("summed")
        return total

    def _rows(
        self, pair: Pair, prefix: str, matrices: list["_Matrix"]
    ) -> Iterator[tuple["_Columns", "_Columns", tuple[int, int]]]:
        """Yields for each matrix of a part the same sampled columns of base and of ft, and the axes of the features."""
        if not matrices:
            return
        base, ft = (flatten(subtree(model, prefix)) for model in (pair.base, pair.ft))
        vocabularies = pair.vocabularies
        for matrix in matrices:
            drawn = pair.generator("features_in_place", matrix.name).permutation(matrix.columns)
            drawn = np.sort(drawn[: _TOKENS if matrix.of_tokens else _COLUMNS])
            columns = (drawn, drawn)
            if matrix.of_tokens:
                columns = (vocabularies.ids_base[drawn], vocabularies.ids_ft[drawn])
            yield (
                _columns_of(base, matrix.name, matrix.base, columns[0], pair.base.arch),
                _columns_of(ft, matrix.name, matrix.ft, columns[1], pair.ft.arch),
                (matrix.base.axes.index("embed"), matrix.ft.axes.index("embed")),
            )


@dataclass(frozen=True)
class _Matrix:
    """A matrix that both models have: its name in its part, its specs, and the number of its shared columns."""

    name: str
    base: LeafSpec
    ft: LeafSpec
    columns: int
    of_tokens: bool


def _matrices(pair: Pair) -> dict[str, list[_Matrix]]:
    """Returns the matrices by part of the model, of the layers that both have and that do something in both.

    An adversary can put base's layers into ft such that they do nothing.
    """
    base, ft = (axis_table(model.arch) for model in (pair.base, pair.ft))
    inactive = tuple(
        f"layers/{i}/{part}/"
        for part, of_model in (("mlp", inactive_layers), ("attn", inactive_attention))
        for model in (pair.base, pair.ft)
        for i in of_model(model)
    )
    prefixes = ["embed/", *(f"layers/{i}/" for i in range(layers_in_common(pair))), "head/"]
    found: dict[str, list[_Matrix]] = {prefix: [] for prefix in prefixes}
    for prefix in prefixes:
        for name in (name for name in _names(base) if name.startswith(prefix) and not name.startswith(inactive)):
            specs = [table.leaves.get(name) for table in (base, ft)]
            if specs[0] is None or specs[1] is None:
                continue
            of_tokens = "vocab" in specs[0].axes
            columns = [_columns(table, spec) for table, spec in zip((base, ft), specs) if spec]
            shared = len(pair.vocabularies.ids_base) if of_tokens else math.prod(columns[0])
            if shared >= 2 and (of_tokens or columns[0] == columns[1]):
                found[prefix].append(_Matrix(name.removeprefix(prefix), specs[0], specs[1], shared, of_tokens))
    return found


def _names(table: AxisTable) -> list[str]:
    """Returns the names of the matrices that have the axis of the features."""
    return [
        name
        for name, spec in table.leaves.items()
        if "embed" in spec.axes and not name.endswith("/bias") and _MATRICES & set(name.split("/")[-3:])
    ]


def _columns(table: AxisTable, spec: LeafSpec) -> list[int]:
    """Returns the sizes of the other axes of a matrix."""
    return [table.sizes[axis or ""] for axis in spec.axes if axis != "embed"]


class _Columns(NamedTuple):
    """A matrix, the gain of the norm before it (of those that read the stream; else 1), and which columns count."""

    leaf: Array | np.ndarray
    gain: Float[Array | np.ndarray, " _"]
    columns: Int[Array | np.ndarray, " n"]


def _columns_of(
    leaves: Mapping[str, Any], name: str, spec: LeafSpec, columns: Int[np.ndarray, " n"], arch: Arch
) -> _Columns:
    gain = np.ones(1, np.float32)
    if spec.input_norm is not None:
        scale = leaves["/".join([*spec.input_norm.split("/")[-1:], "scale"])]
        gain = np.asarray(to_host(scale), np.float32) + np.float32(gain_offset(arch))
    return _Columns(leaves[name], gain, columns)


def _feature_rows(found: _Columns, axis: int) -> Float[Array, "D n"]:
    """Returns the weights of each feature in some columns, with the gain; the axis is that of the features."""
    rows = jnp.moveaxis(found.leaf, axis, 0)
    return rows.reshape(rows.shape[0], -1)[:, found.columns].astype(jnp.float32) * found.gain[:, None]


@functools.partial(jax.jit, static_argnames="axes", donate_argnums=0)
def _with_correlations(
    total: Float[Array, "D D"], base: _Columns, ft: _Columns, axes: tuple[int, int]
) -> Float[Array, "D D"]:
    # Both at once, which compiles in three quarters of the time.
    sides = _standardised(jnp.stack([_feature_rows(found, axis) for found, axis in zip((base, ft), axes)]))
    return total + jnp.einsum("an,bn->ab", sides[0], sides[1], precision="highest")


def _standardised(rows: Float[Array, "M D n"]) -> Float[Array, "M D n"]:
    """Returns the rows centred and scaled to length one; a constant row is zero."""
    centred = rows - rows.mean(axis=-1, keepdims=True)
    length = jnp.linalg.norm(centred, axis=-1, keepdims=True)
    least = 1e-6 * jnp.linalg.norm(rows, axis=-1, keepdims=True)  # what is left of a constant row is rounding
    return jnp.where(length > least, centred / jnp.where(length > 0, length, 1.0), 0.0)


def _state(total: Float[Array, "D D"], parts: int) -> dict[str, np.ndarray]:
    return {"total": to_host(total), "parts": np.array(parts)}


def _notes(pair: Pair, matrices: Mapping[str, list[_Matrix]]) -> list[str]:
    """Returns which matrices were left out, and why."""
    notes, depths = [], [model.arch.num_layers for model in (pair.base, pair.ft)]
    if depths[0] != depths[1]:
        notes.append(f"{depths[0]} and {depths[1]} layers: the first {min(depths)} are compared")
    kept = {prefix + matrix.name for prefix, some in matrices.items() for matrix in some}
    left_out = sorted(
        {
            name.removesuffix("/kernel").split("/")[-1]
            for model in (pair.base, pair.ft)
            for name in _names(axis_table(model.arch))
            if name.startswith(tuple(matrices)) and name not in kept
        }
    )
    if left_out:
        notes.append(
            f"left out, since only one model has them, in other sizes, or without shared tokens: {', '.join(left_out)}"
        )
    return notes
