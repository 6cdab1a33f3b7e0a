"""The claim that one model is another, quantised: what its tensors are to those of the original, and what that says."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tracing_jax.checkpoint import Checkpoint
from tracing_jax.claims.claim import ClaimInputs, ClaimResult, identical_result, result
from tracing_jax.claims.quantised_copies import NEAREST, OF_A_ROW, ONLY_NEAREST, Copy, copy_of
from tracing_jax.claims.tensor_pairs import STEP_BITS, is_equal, tensor_pairs

WITHIN = 0.99
"""The least share of weights within one step of the original, where nothing can be reproduced."""

_UNRELATED = 0.5
"""The error of a copy, relative to the weights, from which on it is none: independent weights are at 1.4."""


def quantised_of(inputs: ClaimInputs) -> ClaimResult:
    """Tests the claim that every weight of ft is base's, rounded to the values of a format."""
    stored = _is_quantised(inputs.ft)
    if inputs.is_identical and not stored:
        return identical_result("quantised-of", inputs)
    pairs, others = tensor_pairs(inputs.base, inputs.ft)
    if others:
        why = f"{len(others)} tensors have no counterpart of the same shape, such as {others[0]}"
        return result("quantised-of", "contradicted", why, others=others[:20])
    copies = [copy_of(pair, is_equal(pair)) for pair in pairs]
    counts = Counter(copy.kind for copy in copies)
    facts: dict[str, Any] = {"kinds": dict(counts), "others": [asdict(c) for c in copies if c.kind == "other"][:200]}
    formats = [kind for kind in counts if kind not in ("identical", "rounded", "other")]
    left = [copy for copy in copies if copy.kind == "other"]
    if not left:
        how = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        finer = [pair for pair in pairs if _bits(pair.dtypes[1]) > _bits(pair.dtypes[0])]
        if not formats and not stored and finer:
            why = f"base's tensors are the coarser ones: {finer[0].dtypes[0].name}, and ft's {finer[0].dtypes[1].name}"
            return result("quantised-of", "contradicted", why, **facts)
        again, differing = (sum(getattr(copy, name) for copy in copies) for name in ("weights", "differing"))
        why = f"base's tensors, all rows of them quantised again, are ft's: {how}"
        why += f"; {differing:,} of {again:,} weights came out as another value of the grid" if differing else ""
        return result("quantised-of", "holds", why, **facts, requantised=again, differing=differing)
    found = _by_error(left, copies, stored or bool(formats), facts)
    if found.outcome == "contradicted" and _is_quantised(inputs.base):
        why = f"base is quantised itself, and the original of both may be the same: {found.because}"
        return result("quantised-of", "not_testable", why, **found.evidence)
    return found


def _by_error(
    left: Sequence[Copy], copies: Sequence[Copy], is_quantised: bool, facts: Mapping[str, Any]
) -> ClaimResult:
    """Returns the outcome by the tensors that no format reproduces."""
    name, worst = "quantised-of", max(left, key=lambda copy: copy.error)
    size = f"the error is {worst.error:.2g} of the weights in {worst.leaf}"
    if _is_rescaled(left):
        why = "columns were rescaled before the weights were rounded, as AWQ and SmoothQuant do; this is not undone"
        return result(name, "not_testable", f"{why}: {size}", **facts)
    if worst.error > _UNRELATED:
        return result(name, "contradicted", f"{len(left)} of {len(copies)} tensors are no copy: {size}", **facts)
    # Writers of such a format round to the nearest value: other values come from other weights.
    nearest = [copy for copy in left if copy.is_on_grid and copy.nearest in ONLY_NEAREST]
    if nearest:
        one = min(nearest, key=lambda copy: min(copy.share, copy.least))
        why = f"{one.nearest} of base reproduces {one.share:.2%} of the weights of {one.leaf}, expected {NEAREST:.1%}"
        if one.share >= NEAREST:
            why += f", but {one.least:.1%} of those of row {one.row}, expected {OF_A_ROW:.0%}"
        return result(name, "contradicted", f"{why}: other weights were quantised", **facts)
    matrices = [copy for copy in left if copy.within is not None]
    if not is_quantised and not matrices:
        why = (
            f"ft is not stored in a quantised format, and {len(left)} of its tensors are no rounding of base's: {size}"
        )
        return result(name, "contradicted", why, **facts)
    far = [copy for copy in matrices if copy.within is not None and (copy.within < WITHIN or copy.least < OF_A_ROW)]
    if far:
        one = min(far, key=lambda copy: min(copy.within or 0.0, copy.least))
        why = (
            f"{len(far)} of {len(copies)} tensors are further from base's than one step of ft's grid: in {one.leaf} "
            f"{one.within:.1%} of the weights are within it, expected {WITHIN:.0%}, and {one.least:.1%} of those of "
            f"row {one.row}, expected {OF_A_ROW:.0%}; {size}"
        )
        return result(name, "contradicted", why, **facts)
    if len(matrices) < len(left):
        rest = [copy.leaf for copy in left if copy.within is None]
        return result(
            name, "not_testable", f"{len(rest)} tensors without a grid differ, such as {rest[0]}: {size}", **facts
        )
    steps, within = max(copy.steps or 0.0 for copy in matrices), min(copy.within or 0.0 for copy in matrices)
    least = min(copy.least for copy in matrices)
    why = (
        f"of each of the {len(matrices)} tensors that cannot be reproduced at least {within:.1%} of the weights are "
        f"within a step of base's, and {least:.0%} in every row, the error at most {steps:.2g} steps (root mean "
        "square); training by less than a step would not show"
    )
    return result(name, "holds", why, **facts, bounded=True)


def _is_rescaled(left: Sequence[Copy]) -> bool:
    """Returns whether factors per column explain most of the error of a matrix, as where AWQ rescales channels."""
    return any(copy.rescaled is not None and copy.rescaled < 0.5 * min(copy.error, 2 * _UNRELATED) for copy in left)


def _bits(dtype: np.dtype) -> int:
    return STEP_BITS[dtype.name]


def _is_quantised(checkpoint: Checkpoint) -> bool:
    return any("dequantised" in note or ".gguf" in note for note in checkpoint.notes)
