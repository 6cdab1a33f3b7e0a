"""`csu` and `csu_all`: do matrices have their rows in place? Rows are matched, and the matching compared with identity.

`csu` takes the up-projections, whose rows are the MLP units; `csu_all` every matrix, with a p-value for each.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table, kind_of
from tracing_jax.matching import FactoredSimilarity
from tracing_jax.progress import tqdm, trange
from tracing_jax.sources import ParamSource, leaf, one_mlp
from tracing_jax.statistics.agreement import some_units
from tracing_jax.statistics.comparison import Comparison, all_reserved, bonferroni_log10, one_test, overlapped
from tracing_jax.statistics.cosine import similarities
from tracing_jax.statistics.distinct_units import DistinctUnits, all_units, distinct_units
from tracing_jax.statistics.identity_starts import diagonal_ranks, identity_p
from tracing_jax.statistics.in_place import (
    begin_at_identity,
    constrained_result,
    in_place,
    layers_in_common,
    rows_not_applicable,
)
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies, widths_not_applicable
from tracing_jax.statistics.unit_outputs import reached_experts
from tracing_jax.tree import Tree, to_host

_ROWS = {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "embed", "o_proj": "embed",
         "q_proj": "", "k_proj": "", "v_proj": "", "embedding": "vocab", "lm_head": "vocab"}  # fmt: skip
"""Matrix -> the axis whose units are its rows; for heads, all axes but `embed` together."""

_EXACT = ("gate_proj", "up_proj", "down_proj", "o_proj")
"""Matrices whose rows are exchangeable in an independent model. Heads are not in that group, rope fixes the order of
rows inside a head, and rows of embedding and head are tokens: their p-values have no exact null."""


_MatrixPair = tuple[str, bool, Callable[[], "RowPair"]]
"""The name of two matrices, whether their null is exact, and the function that reads and compares their rows."""


@dataclass(frozen=True)
class RowPair:
    """The cosines of rows of a matrix of base with all of one of ft, and those rows that are compared.

    Attributes:
      similarity: of all rows of base's matrix, or of those drawn.
      base, ft: the units that the rows of both matrices are.
      drawn: the rows of base's matrix that are compared; all if None.
    """

    similarity: Array | np.ndarray | FactoredSimilarity
    base: DistinctUnits
    ft: DistinctUnits
    drawn: Int[np.ndarray, " n"] | None = None

    def compared(self, generator: np.random.Generator) -> Comparison:
        """Returns the comparison of the matching by absolute cosine with the identity."""
        return in_place(self.similarity, (self.base, self.ft), generator, self.drawn)


_UNREAD = "what the units read is not known, and units that read nothing can write as another model's do"


class Csu(options.Csu):
    """Constrained test on the up-projection; exact if either model was trained independently of the other.

    Rows are matched by |cos|: a unit whose row and output are scaled by a negative number is the same unit. Layers of
    equal index are compared; each has a permutation of its own under the null, so p-values are combined by Fisher. Of a
    layer with experts in both models one expert, drawn from the seed of the run, is compared with that of equal number:
    units are exchangeable inside their expert.

    With `units`, so many of base's units in a layer, drawn from the seed, are matched to all of ft's. What they
    are matched to is in random order under the null as before, so that the p-values stay exact.

    Source: Zhu et al. 2025 (arXiv 2502.12292), which matches on the signed cosine, in index order.
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why up-projection rows of these models cannot be compared; empty if they can."""
        if base.reading or ft.reading:
            return rows_not_applicable(base, ft)
        lines = widths_not_applicable(base, ft)
        layers = range(min(base.num_layers, ft.num_layers))
        if other := [i for i in layers if base.has_experts(i) != ft.has_experts(i)]:
            lines.append(f"layer {other[0]} has experts in one model and none in the other; see match_mlps")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the p-values per layer and combined, by rank correlation and by agreement."""
        run_cache = pair.run_cache.scope("csu")
        layers, kept = layers_in_common(pair), run_cache.count(Comparison)

        def by_layer() -> Iterator[tuple[int, RowPair]]:
            for i in trange(kept, layers, desc="csu", unit="layer", initial=kept, total=layers, disable=None):
                yield i, _rows_of_layer(pair, i, self.units)

        def compare(item: tuple[int, RowPair]) -> Comparison:
            i, rows = item
            return run_cache.cached(Comparison, (i,), lambda: rows.compared(pair.generator("csu", i)))

        comparisons = [comparison for i in range(kept) if (comparison := run_cache.load(Comparison, i))]
        comparisons += overlapped(by_layer(), compare)
        label = "units whose up-projection stays in place, share"
        found = constrained_result(pair, comparisons, label, pair.base.arch.embed_dim)
        if not all(model.arch.has("mlp/up_proj") for model in (pair.base, pair.ft)):
            found = all_reserved(found, _UNREAD)
        notes = [*found.notes]
        if any(map(pair.base.arch.has_experts, range(layers))):
            notes.append("of each layer with experts one expert was compared, drawn at random")
        if any(map(self._is_drawn, (pair.base.arch.mlp_dim_of(i) for i in range(layers)))):
            notes.append(f"of each layer {self.units:,} units of base, drawn at random, were matched to ft's")
        return replace(found, notes=notes)

    def _is_drawn(self, units: int) -> bool:
        return 0 < self.units < units


class CsuAll(options.CsuAll):
    """Constrained tests on all matrices: of equal name and layer, or (`all_pairs`) every two of equal shape.

    Each matrix has a p-value by agreement and one by rank correlation; the smallest is taken after Bonferroni. Fisher's
    method would be invalid: down and o of all layers share one permutation of the features.
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why rows of these models have no cosine; empty if they have."""
        return rows_not_applicable(base, ft)

    def compute(self, pair: Pair) -> Result:
        """Returns the p-values of the matrices, with and without an exact null in separate tests."""
        found: dict[bool, dict[str, Comparison]] = {True: {}, False: {}}
        places = list(self._pairs(pair))
        comparisons = overlapped(self._similarities(pair, places), functools.partial(_compare, pair))
        for (place, exact, _), comparison in zip(places, comparisons, strict=True):
            found[exact and not begin_at_identity([comparison])][place] = comparison
        tests = [
            *_tests("exact null", found[True], decides=True),
            *_tests("no exact null", found[False], decides=False),
        ]
        kept = list(found[True].values())
        return Result(
            headline=float(np.mean([c.agreeing / max(1, c.units) for c in kept])) if kept else None,
            label="rows that stay in place, mean share over matrices with an exact null",
            log10_p=bonferroni_log10(tests),
            p_reason=None if kept else "no two matrices with an exact null have equal shapes",
            tests=tests,
            notes=[
                "q, k, v, embedding and head have no exact null, nor have matrices whose rows begin at the identity in "
                "both models: their p-values do not enter the verdict"
            ],
        ).for_pair(pair)

    def _similarities(self, pair: Pair, places: Sequence[_MatrixPair]) -> Iterator[tuple[str, RowPair | Comparison]]:
        """Yields for each place its similarities, or its comparison if an interrupted run has cached it."""
        for place, _, rows in tqdm(places, desc="csu_all", unit="matrix", disable=None):
            yield place, pair.run_cache.load(Comparison, "csu_all", place) or rows()

    def _pairs(self, pair: Pair) -> Iterator[_MatrixPair]:
        """Yields the name of two matrices, whether their null is exact, and the function that reads them."""
        tables = [axis_table(model.arch) for model in (pair.base, pair.ft)]
        shapes, shapes_ft = (_shapes(table) for table in tables)
        for name, shape in shapes.items():
            others = [o for o, other in shapes_ft.items() if other == shape and (self.all_pairs or o == name)]
            for other in others:
                place = f"{_short(name)} : {_short(other)}" if self.all_pairs else _short(name)
                exact = _is_exact(name) and _is_exact(other)
                yield place, exact, functools.partial(_rows_of_both, pair, (name, other), tables)


def up_rows(base: ParamSource, ft: ParamSource, layer: int, drawn: Int[np.ndarray, " n"] | None = None) -> RowPair:
    """Returns the up-projections of a layer of both models, a row per unit, to be compared by their distinct units.

    Where the up-projection of either is not known, as in a model that is read by its weights alone, what units write.

    Args:
      base: the one model.
      ft: the other.
      layer: which.
      drawn: the units of base that are compared; all if None.
    """
    models = (base, ft)
    units = [distinct_units(model, layer) for model in models]
    if all(model.arch.has("mlp/up_proj") for model in models):
        rows = [unit_rows(model.layer(layer, ("mlp/up_proj/kernel",)), "up_proj") for model in models]
    else:
        down = [model.layer(layer, ("mlp/down_proj/kernel",))["mlp"]["down_proj"]["kernel"] for model in models]
        rows = [found.outputs(side) for found, side in zip(units, down, strict=True)]
    ours = rows[0] if drawn is None else rows[0][drawn]
    return RowPair(similarities(ours, rows[1]), units[0], units[1], drawn)


def _rows_of_layer(pair: Pair, layer: int, most: int) -> RowPair:
    """Returns the rows of a layer or, if it has experts, of one of them that both models have.

    Args:
      pair: both models.
      layer: which.
      most: the most units of base that are compared; 0 for all.
    """
    F = pair.base.arch.mlp_dim_of(layer)
    drawn = some_units(F, most, pair, "csu", layer) if 0 < most < F else None
    if not pair.base.arch.has_experts(layer):
        return up_rows(pair.base, pair.ft, layer, drawn)
    experts = min(pair.base.arch.num_experts or 0, pair.ft.arch.num_experts or 0)
    reached = reached_experts(pair.base, layer)[:experts] & reached_experts(pair.ft, layer)[:experts]
    expert = int(pair.generator("csu", "expert", layer).choice(np.flatnonzero(reached) if reached.any() else experts))
    return up_rows(one_mlp(pair.base, layer, expert), one_mlp(pair.ft, layer, expert), 0, drawn)


def _rows_of_both(pair: Pair, names: tuple[str, str], tables: Sequence[AxisTable]) -> RowPair:
    models = (pair.base, pair.ft)
    rows = [_rows(model, name, table) for model, name, table in zip(models, names, tables, strict=True)]
    units = [
        distinct_units(model, int(name.split("/")[1]))
        if _are_units(name, model.arch)
        else all_units(len(found), identity_p(to_host(diagonal_ranks(found))))
        for model, name, found in zip(models, names, rows, strict=True)
    ]
    return RowPair(similarities(*rows), units[0], units[1])


def unit_rows(layer: Tree, projection: str) -> Float[Array | np.ndarray, "F D"]:
    """Returns the weights of each MLP unit of a layer on the features, a row per unit."""
    return layer["mlp"][projection]["kernel"].T


def _compare(pair: Pair, item: tuple[str, RowPair | Comparison]) -> Comparison:
    place, found = item
    if isinstance(found, Comparison):
        return found
    make = functools.partial(found.compared, pair.generator("csu_all", place))
    return pair.run_cache.cached(Comparison, ("csu_all", place), make)


def _short(name: str) -> str:
    return name.removesuffix("/kernel")


def _is_exact(name: str) -> bool:
    return any(matrix in name for matrix in _EXACT)


def _are_units(name: str, arch: Arch) -> bool:
    """Returns whether the rows of a matrix are the units of an MLP, not those of several experts."""
    return _ROWS[_matrix(name)] == "mlp" and not arch.num_experts


def _matrix(name: str) -> str:
    """Returns the kind of matrix of a leaf, such as `up_proj`; empty if it is not compared."""
    *_, holder, last = name.split("/")
    matrix = last if last == "embedding" else holder
    return matrix if matrix in _ROWS and last != "bias" else ""


def _shapes(table: AxisTable) -> dict[str, tuple[int, int]]:
    """Returns for each matrix of a model that reads or writes features its numbers of rows and columns."""
    shapes = {}
    for name in [name for name, spec in table.leaves.items() if _matrix(name) and "embed" in spec.axes]:
        size = {kind_of(axis or ""): table.sizes[axis or ""] for axis in table.leaves[name].axes}
        units = [_ROWS[_matrix(name)]] if _ROWS[_matrix(name)] else [kind for kind in size if kind != "embed"]
        rows = math.prod(size[kind] for kind in units)
        shapes[name] = rows, math.prod(size.values()) // rows
    return shapes


def _rows(model: ParamSource, name: str, table: AxisTable) -> Float[np.ndarray, "n d"]:
    """Returns a matrix with the units of its axis as rows; without an axis, all but the features."""
    axis = _ROWS[_matrix(name)]
    kernel = to_host(leaf(model, name))
    kinds = [kind_of(a) if a else "" for a in table.leaves[name].axes]
    if axis:
        moved = np.moveaxis(kernel, kinds.index(axis), 0)
        return moved.reshape(moved.shape[0], -1)
    moved = np.moveaxis(kernel, kinds.index("embed"), -1)
    return moved.reshape(-1, moved.shape[-1])


def _tests(name: str, found: dict[str, Comparison], decides: bool) -> list[Test]:
    if not found:
        return []
    places, comparisons = list(found), list(found.values())
    agreements, ranks = [c.log_p_agreement for c in comparisons], [c.log_p_rank for c in comparisons]
    made = [
        one_test(f"agreement, {name}", comparisons, agreements, places, bonferroni, "Holm's minimum"),
        one_test(f"rank correlation, {name}", comparisons, ranks, places, bonferroni, "Holm's minimum"),
    ]
    return [replace(test, decides=decides) for test in made]
