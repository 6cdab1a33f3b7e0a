"""`align`: estimates the alignment of two models, and proves by logits that it keeps the function of ft."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from tracing_jax.alignment.activation_matching import match_activations
from tracing_jax.alignment.applicability import alignment_problems, beyond_permutations, supported
from tracing_jax.alignment.expansions import remove_expansions
from tracing_jax.alignment.float64_leaves import cosines
from tracing_jax.alignment.result import Alignment, Evidence, cosines_by_kind, undone_by
from tracing_jax.alignment.rewrite_estimation import estimate_rewrites, gains_of
from tracing_jax.arch import Arch
from tracing_jax.axes import PERMUTABLE, axis_table
from tracing_jax.forward import check_function
from tracing_jax.matching import Shared, match_weights
from tracing_jax.rewrites import Permutation, Rewrite, reorders_only
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import ParamSource, in_memory, params_of, rewritten

LOGITS_TOLERANCE = 1e-3
"""The most that a permutation may move ft's logits, relative to the largest. It only reorders sums, which moves float32
logits by about 1e-5; the proof computes in float32 whatever the weights' dtype, so one bound serves all. The bounds of
other rewrites are in `forward.FUNCTION_TOLERANCE`."""

_ABOUT_AS_ALIKE = (1.3, 0.05)
"""Permutations explain a leaf if its distance from base, 1 - cosine, is at most so many times that after all maps, plus
so much: with more freedom every leaf comes a little closer, and noise is fitted too."""


def align(
    base: ParamSource,
    ft: ParamSource,
    kinds: Sequence[str] = ("embed", "mlp"),
    *,
    evidence: Evidence,
    tokens: Int[np.ndarray, "N T"] | None = None,
    compute: Compute | None = None,
    shared: Shared | None = None,
    seed: int = 0,
    run_cache: RunCache | None = None,
) -> Alignment:
    """Returns the rewrites of these kinds that align ft to base, proven to keep ft's function.

    Args:
      base: the model that stays as it is.
      ft: the model to align; it is not changed (see `aligned`).
      kinds: of `KINDS`; or `all` or `auto` alone. Every kind named is estimated, needed or not, and left out where
        base's family does not support it. `rotation` includes `gains`.
      evidence: what units are compared by: the weights, or the activations on `tokens` (permutations only).
      tokens: the blocks both models read; activations only.
      compute: where and how the activations are computed. By default float32 on one device.
      shared: pairs of ids of tokens that mean the same, if the vocabularies differ; weights only.
      seed: draws the tokens of the proof.
      run_cache: where the permutations found by weights are kept, for a second start.

    Raises:
      ValueError: models that cannot be aligned, arguments that do not fit (all at once), or an aligned model whose
        logits are not ft's own.
      AlignmentError: surplus units or layers of ft are not inactive, or the models share no token.
    """
    _check(base.arch, ft.arch, kinds, evidence, tokens)
    if beyond_permutations(kinds):
        found = _rewritten_by_weights(base, ft, kinds, shared, seed)
    elif evidence == "weights":
        found = _matched_by_weights(base, ft, kinds, shared, seed, run_cache)
    else:
        assert tokens is not None
        permutations, objective, left_out = match_activations(
            base, ft, kinds, tokens, compute or Compute(make_mesh())
        )  # fmt: skip
        rewrites = (Permutation(permutations),)
        found = Alignment(rewrites, evidence, objective, _prove(ft, rewrites, seed), left_out)
    for name, reason in found.left_out.items():
        logging.warning("alignment goes without %s: %s", name, reason)
    if not found.converged:
        logging.warning("the descent of the alignment was stopped before it converged")
    return found


def _matched_by_weights(
    base: ParamSource,
    ft: ParamSource,
    kinds: Sequence[str],
    shared: Shared | None,
    seed: int,
    run_cache: RunCache | None,
) -> Alignment:
    table = axis_table(base.arch)
    axes = table.axes_of_kind(kinds)
    matching = match_weights(params_of(base), params_of(ft), table, axes, shared=shared, run_cache=run_cache)
    rewrites = (Permutation(matching.permutations),)
    moved = _prove(ft, rewrites, seed)
    return Alignment(rewrites, "weights", matching.objective, moved, matching.left_out, matching.converged)


@dataclass(frozen=True)
class _Candidate:
    """Rewrites of a model of base's shape, with what is known of them."""

    rewrites: tuple[Rewrite, ...]
    left_out: Mapping[str, str]
    cosines: Mapping[str, float]
    undone: Mapping[str, Any]


def _rewritten_by_weights(
    base: ParamSource, ft: ParamSource, kinds: Sequence[str], shared: Shared | None, seed: int
) -> Alignment:
    """Returns the alignment by more than permutations."""
    wanted, unsupported = supported(kinds, base.arch)
    removals, report = remove_expansions(base, ft, wanted)
    reduced = in_memory(rewritten(ft, removals), "dropping padding") if removals else ft
    found = _by_permutations(base, reduced, shared) if "auto" in kinds else None
    # No map aligns a leaf better than to a cosine of one: maps are estimated only where they could decide something.
    if found is None or not _explains(found.cosines, dict.fromkeys(found.cosines, 1.0)):
        mapped = _by_maps(base, reduced, wanted, unsupported, shared)
        found = found if found is not None and _explains(found.cosines, mapped.cosines) else mapped
    before = cosines(base, ft, shared)
    rewrites = removals + found.rewrites
    return Alignment(
        rewrites,
        "weights",
        (math.fsum(before.values()), math.fsum(found.cosines.values())),
        _prove(ft, rewrites, seed),
        found.left_out,
        undone={**report, **found.undone},
        likeness=cosines_by_kind(before, found.cosines),
    )


def _by_maps(
    base: ParamSource, ft: ParamSource, kinds: set[str], unsupported: Mapping[str, str], shared: Shared | None
) -> _Candidate:
    rewrites, left_out = estimate_rewrites(base, ft, kinds, shared)
    after = rewritten(ft, rewrites)
    undone = undone_by(rewrites, gains_of(base), gains_of(ft))
    if ft.arch.tied and not after.arch.tied:
        undone["untied"] = True
    return _Candidate(rewrites, {**unsupported, **left_out}, cosines(base, after, shared), undone)


def _by_permutations(base: ParamSource, ft: ParamSource, shared: Shared | None) -> _Candidate:
    table = axis_table(base.arch)
    matching = match_weights(params_of(base), params_of(ft), table, table.axes_of_kind(PERMUTABLE), shared=shared)
    rewrites = (Permutation(matching.permutations),)
    return _Candidate(rewrites, matching.left_out, cosines(base, rewritten(ft, rewrites), shared), {})


def _explains(permuted: Mapping[str, float], mapped: Mapping[str, float]) -> bool:
    """Returns whether permutations alone bring every leaf about as close to base as all maps do."""
    times, plus = _ABOUT_AS_ALIKE
    return all(1 - permuted[name] <= times * (1 - mapped[name]) + plus for name in permuted if name in mapped)


def _prove(ft: ParamSource, rewrites: Sequence[Rewrite], seed: int) -> float:
    """Returns how far the rewrites move ft's logits; raises ValueError if further than rounding explains."""
    tolerance = LOGITS_TOLERANCE if reorders_only(rewrites) else None
    return check_function(ft, rewritten(ft, rewrites), seed=seed, tolerance=tolerance)


def _check(base: Arch, ft: Arch, kinds: Sequence[str], evidence: str, tokens: np.ndarray | None) -> None:
    lines = []
    if evidence not in ("weights", "activations"):
        lines.append(f"evidence {evidence!r} is not one of weights, activations")
    if evidence == "activations" and tokens is None:
        lines.append("evidence by activations needs tokens for both models to read")
    if evidence == "activations" and (beyond := beyond_permutations(kinds)):
        lines.append(f"{', '.join(beyond)}: estimated from weights alone; activations tell permutations")
    if lines := lines + alignment_problems(base, ft, kinds):
        raise ValueError("cannot align these models:\n  " + "\n  ".join(lines))
