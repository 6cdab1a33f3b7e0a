"""Permutation tests: copies of the fine-tuned model with features and MLP units permuted, stored as permutations."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table, kind_of
from tracing_jax.rewrites import Permutations, several_random_permutations
from tracing_jax.statistics.statistic import QUANTILE_LEVELS, Pair, Result, depths_not_applicable, quantiles

PERMUTED_AXES = ("embed", "mlp")
"""Axes under whose permutations an independent model is exchangeable with its permuted copies."""


def draw_permutations(pair: Pair, count: int) -> list[Permutations]:
    """Returns random permutations of ft's features and MLP units, the same for every statistic of a run."""
    table = axis_table(pair.ft.arch)
    key = jax.random.fold_in(jax.random.key(pair.seed), 0x9E37)  # independent of the draws of config.permute
    return list(several_random_permutations(key, count, table, PERMUTED_AXES)) if count else []


def shapes_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns a reason for each kind of axis, other than the vocabulary, that has different sizes; empty if none."""
    if lines := depths_not_applicable(base, ft, "no layer has a counterpart"):
        return lines
    one, other = ({kind_of(axis): size for axis, size in axis_table(arch).sizes.items()} for arch in (base, ft))
    return [
        f"different width: {kind} has {one.get(kind, 0)} and {other.get(kind, 0)} units"
        for kind in sorted((one.keys() | other.keys()) - {"vocab"})
        if one.get(kind) != other.get(kind)
    ]


CHOSEN_ORDER = (
    "the p-value is the rank among copies in random orders, if ft's order was not chosen by base: an independent model "
    "that was aligned to base and saved ranks first"
)
"""What a rank among permuted copies rests on; in every result that has one."""


def permutation_result(
    pair: Pair, label: str, observed: float, permuted: Sequence[float] | np.ndarray, log_p: float | None
) -> Result:
    """Returns the observed value with its p-value, and the quantiles of the permuted copies as its null."""
    null, notes = None, []
    if log_p is not None:
        notes = [CHOSEN_ORDER]
    if len(permuted):
        null = {
            "permuted copies": len(permuted),
            "mean of the copies": float(np.mean(permuted)),
            "standard deviation of the copies": float(np.std(permuted)),
            "quantiles of the copies": dict(zip(map(str, QUANTILE_LEVELS), quantiles(np.asarray(permuted)))),
        }
    return Result(
        headline=observed,
        label=label,
        log10_p=None if log_p is None else log_p / math.log(10),
        p_reason="no permuted copies were asked for (num_perm = 0)" if log_p is None else None,
        null=null,
        notes=notes,
    ).for_pair(pair)
