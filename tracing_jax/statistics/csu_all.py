"""`csu_all`: which matrices are where they were? The rows of every matrix matched, each matrix with a p of its own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from tracing_jax.arch import Arch
from tracing_jax.axes import AxisTable, axis_table, kind_of
from tracing_jax.source import InMemory, parts
from tracing_jax.statistics.comparison import Comparison, bonferroni_log10, one_test
from tracing_jax.statistics.constrained import row_problems
from tracing_jax.statistics.csu import compare_rows
from tracing_jax.statistics.pvalues import smallest
from tracing_jax.statistics.statistic import AFTER_ALIGNMENT, Pair, Result, Test, Vocabularies
from tracing_jax.tree import flatten

_ROWS = {"gate_proj": "mlp", "up_proj": "mlp", "down_proj": "embed", "o_proj": "embed",
         "q_proj": "", "k_proj": "", "v_proj": "", "embedding": "vocab", "lm_head": "vocab"}  # fmt: skip
"""Matrix -> the axis whose units are its rows; for heads, all axes but `embed` together."""

_EXACT = ("gate_proj", "up_proj", "down_proj", "o_proj")
"""Matrices whose rows an independent model may have in any order. Heads are outside that group, rope orders the rows
inside a head, and the rows of embedding and head are tokens: their p-values have no exact null."""


@dataclass(frozen=True)
class CsuAll:
    """Constrained tests on all matrices: same name and same layer, or, on request, every two of equal shape.

    Each matrix has its own p-value by agreement and by rank correlation; the smallest counts after Bonferroni (Holm's
    first step), never a Fisher sum: down and o of all layers share one permutation of the features.
    """

    all_pairs: bool = False
    needs_tokens: ClassVar[bool] = False

    def problems(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why rows of these models have no cosine."""
        return row_problems(base, ft)

    def compute(self, pair: Pair) -> Result:
        """Returns the p-values of the matrices, those with an exact null apart from those without."""
        found: dict[bool, dict[str, Comparison]] = {True: {}, False: {}}
        for place, exact, base, ft in tqdm(self._pairs(pair), desc="csu_all", unit="matrix", disable=None):
            found[exact][place] = compare_rows(base, ft, pair.generator("csu_all", place))
        tests = [
            *_tests("exact null", found[True], decides=True),
            *_tests("no exact null", found[False], decides=False),
        ]
        exact_tests = [test for test in tests if test.decides]
        kept = list(found[True].values())
        result = Result(
            headline=float(np.mean([c.agreeing / max(1, c.units) for c in kept])) if kept else None,
            label="rows that stay in place, mean share over matrices with an exact null",
            log10_p=bonferroni_log10(exact_tests) if exact_tests else None,
            p_reason=None if exact_tests else "no two matrices with an exact null have equal shapes",
            tests=tests,
            notes=["q, k, v, embedding and head have no exact null: their p-values decide nothing"],
        )
        return result.without_p(AFTER_ALIGNMENT) if pair.aligned else result

    def _pairs(self, pair: Pair) -> Iterator[tuple[str, bool, np.ndarray, np.ndarray]]:
        """Yields the name, whether the null is exact, and both matrices as rows."""
        if not self.all_pairs:
            others = dict(_matrices(pair.ft))
            for name, rows in _matrices(pair.base):
                if name in others and rows.shape == others[name].shape:
                    yield name, _is_exact(name), rows, others[name]
            return
        for name, rows in _matrices(pair.base):
            for other, other_rows in _matrices(pair.ft):
                if rows.shape == other_rows.shape:
                    yield f"{name} : {other}", _is_exact(name) and _is_exact(other), rows, other_rows


def _is_exact(name: str) -> bool:
    return any(matrix in name for matrix in _EXACT)


def _matrices(model: InMemory) -> Iterator[tuple[str, Float[np.ndarray, "n d"]]]:
    """Yields the kernels of a model as rows, by name without the last part."""
    table = axis_table(model.arch)
    for prefix, part in parts(model):
        for leaf, kernel in flatten(part).items():
            matrix = leaf.split("/")[-1] if leaf.endswith("embedding") else leaf.split("/")[-2:][0]
            if matrix in _ROWS and not leaf.endswith("bias"):
                yield (prefix + leaf).removesuffix("/kernel"), _rows(kernel, prefix + leaf, _ROWS[matrix], table)


def _rows(kernel: Float[Array, "..."], name: str, axis: str, table: AxisTable) -> Float[np.ndarray, "n d"]:
    """Returns the kernel with the units of an axis as rows; without an axis, all but the features."""
    kinds = [kind_of(a) if a else "" for a in table.leaves[name].axes]
    if axis:
        moved = np.moveaxis(np.asarray(kernel), kinds.index(axis), 0)
        return moved.reshape(moved.shape[0], -1)
    moved = np.moveaxis(np.asarray(kernel), kinds.index("embed"), -1)
    return moved.reshape(-1, moved.shape[-1])


def _tests(name: str, found: dict[str, Comparison], decides: bool) -> list[Test]:
    if not found:
        return []
    places, comparisons = list(found), list(found.values())
    agreements, ranks = [c.log_p_agreement for c in comparisons], [c.log_p_rank for c in comparisons]
    made = [
        one_test(f"agreement, {name}", comparisons, agreements, places, smallest, "Holm's minimum"),
        one_test(f"rank correlation, {name}", comparisons, ranks, places, smallest, "Holm's minimum"),
    ]
    return [replace(test, decides=decides) for test in made]
