"""`align`: estimates the alignment of two models, and proves by logits that it keeps the function of ft."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from tracing_jax.alignment.activation_matching import match_activations
from tracing_jax.alignment.applicability import (
    MAPS,
    activations_problem,
    alignment_problems,
    beyond_permutations,
    supported,
)
from tracing_jax.alignment.expansions import remove_expansions
from tracing_jax.alignment.float64_leaves import leaf_cosines
from tracing_jax.alignment.learning import Learned, Learning, learn
from tracing_jax.alignment.residual_products import residual_products
from tracing_jax.alignment.result import Alignment, Evidence, cosines_by_kind, undone_by
from tracing_jax.alignment.rewrite_estimation import estimate_rewrites, gains_of, means_of
from tracing_jax.axes import PERMUTABLE, axis_table
from tracing_jax.forward import LEAST_BLOCKS, check_function
from tracing_jax.matching import Shared, match_weights
from tracing_jax.rewrites import MeanSetting, Permutation, Rewrite, reorders_only
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import ParamSource, in_memory, is_resident, params_of, rewritten

LOGITS_TOLERANCE = 1e-3
"""The most that a permutation may move ft's logits, relative to the largest. It only reorders sums, which moves float32
logits by about 1e-5; the proof computes in float32 whatever the weights' dtype, so one bound serves all. The bounds of
other rewrites are in `forward.FUNCTION_TOLERANCE`."""

_PAIRED_BY = 64
"""Blocks of text on whose activations units are paired anew."""

_READ_BLOCKS = 128
"""Blocks of text, at most, on whose hidden states the map of the features is estimated."""

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
    learning: Learning | None = None,
) -> Alignment:
    """Returns the rewrites of these kinds that align ft to base, proven to keep ft's function.

    Args:
      base: the model that stays as it is.
      ft: the model to align; it is not changed (see `aligned`).
      kinds: of `KINDS`; or `all` or `auto` alone. Every kind named is estimated, needed or not, and left out where
        base's family does not support it. `rotation` includes `gains`.
      evidence: what units are compared by: the weights, or the activations on `tokens`. Where more than permutations
        is asked for, activations are the hidden states, which determine the map of the features; units and heads are
        then compared by weights. `learned` starts from the weights and lowers the loss between the models on `tokens`
        by gradient descent on the maps among `kinds`; both models must be in memory.
      tokens: the blocks both models read; activations and learned only. A loss along the path that is to mean
        something is taken on other text.
      compute: where and how the activations are computed. By default float32 on one device.
      shared: pairs of ids of tokens that mean the same, if the vocabularies differ; weights only.
      seed: draws the tokens of the proof.
      run_cache: where the permutations found by weights are kept, for a second start.
      learning: steps, rate and ends of `learned`.

    Raises:
      ValueError: models that cannot be aligned, arguments that do not fit (all at once), or an aligned model whose
        logits are not ft's own.
      AlignmentError: surplus units or layers of ft are not inactive, or the models share no token.
    """
    _check(base, ft, kinds, evidence, tokens)
    compute = compute or Compute(make_mesh())
    text = tokens if evidence == "activations" else None
    if evidence == "learned":
        assert tokens is not None
        start = _by_rewrites(base, ft, kinds, shared, text, compute, seed)
        settings = learning or Learning()
        learned = _learned(base, in_memory(rewritten(ft, start.rewrites)), kinds, tokens, settings, compute, seed)
        found = _with_learned(base, ft, start, learned, shared, seed)
    elif beyond_permutations(kinds):
        found = _by_rewrites(base, ft, kinds, shared, text, compute, seed)
    elif evidence == "weights":
        found = _matched_by_weights(base, ft, kinds, shared, seed, run_cache)
    else:
        assert tokens is not None
        permutations, objective, left_out = match_activations(base, ft, kinds, tokens, compute)
        rewrites = (Permutation(permutations),)
        found = Alignment(rewrites, evidence, objective, _prove(ft, rewrites, seed), left_out)
    for name, reason in found.left_out.items():
        logging.warning("not used for the alignment: %s: %s", name, reason)
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


def _learned(
    base: ParamSource,
    ft: ParamSource,
    kinds: Sequence[str],
    tokens: Int[np.ndarray, "N T"],
    settings: Learning,
    compute: Compute,
    seed: int,
) -> Learned:
    """Returns what is learnt in two stages, between which MLP units are paired anew by their activations.

    Units of models that are not aligned yet are paired badly. Once the loss has brought the residual streams together,
    their activations tell which belong together.
    """
    wanted = supported(kinds, base.arch)[0]
    maps = wanted & MAPS.keys()
    first = max(1, round(settings.steps * settings.before_pairing))
    if "mlp" not in wanted or settings.before_pairing <= 0 or first >= settings.steps:
        return learn(base, ft, maps, tokens, settings, compute, seed)
    before = learn(base, ft, maps, tokens, replace(settings, steps=first, ends="ft"), compute, seed)
    moved = in_memory(rewritten(ft, before.rewrites))
    permutations, _, _ = match_activations(base, moved, ("mlp",), tokens[:_PAIRED_BY], compute)
    again = Permutation(permutations)
    paired = in_memory(rewritten(moved, [again]))
    after = learn(base, paired, maps, tokens, replace(settings, steps=settings.steps - first), compute, seed)
    barriers = before.barriers + after.barriers
    steps = before.steps + after.steps
    if min(before.barriers) <= min(after.barriers) and settings.ends == "ft":
        return replace(before, barriers=barriers, steps=steps)
    best_step = before.steps + after.best_step
    return Learned((*before.rewrites, again, *after.rewrites), after.base_rewrites, barriers, steps, best_step)


def _with_learned(
    base: ParamSource, ft: ParamSource, start: Alignment, learned: Learned, shared: Shared | None, seed: int
) -> Alignment:
    """Returns the alignment that continues `start` by what was learnt, proven at both ends."""
    rewrites = start.rewrites + learned.rewrites
    moved = [_prove(ft, rewrites, seed)]
    if learned.base_rewrites:
        moved.append(_prove(base, learned.base_rewrites, seed))
    new_base, new_ft = rewritten(base, learned.base_rewrites), rewritten(ft, rewrites)
    barriers = learned.barriers
    report = {"ends": "both" if learned.base_rewrites else "ft", "steps": learned.steps, "best_step": learned.best_step}
    return replace(
        start,
        rewrites=rewrites,
        evidence="learned",
        objective=barriers,
        logits_moved=max(moved),
        undone={**start.undone, "learned": report},
        likeness=cosines_by_kind(leaf_cosines(base, ft, shared), leaf_cosines(new_base, new_ft, shared)),
        base_rewrites=learned.base_rewrites,
    )


@dataclass(frozen=True)
class _Candidate:
    """Rewrites of a model of base's shape, with what is known of them."""

    rewrites: tuple[Rewrite, ...]
    left_out: Mapping[str, str]
    cosines: Mapping[str, float]
    undone: Mapping[str, Any]


def _by_rewrites(
    base: ParamSource,
    ft: ParamSource,
    kinds: Sequence[str],
    shared: Shared | None,
    tokens: Int[np.ndarray, "N T"] | None,
    compute: Compute,
    seed: int,
) -> Alignment:
    """Returns the alignment by more than permutations, that of the features from hidden states if there is text."""
    wanted, unsupported = supported(kinds, base.arch)
    removals, report = remove_expansions(base, ft, wanted)
    reduced = in_memory(rewritten(ft, removals), "dropping padding") if removals else ft
    found = _by_permutations(base, reduced, shared) if "auto" in kinds else None
    # No map aligns a leaf better than to a cosine of one: maps are estimated only where they could decide something.
    if found is None or not _explains(found.cosines, dict.fromkeys(found.cosines, 1.0)):
        states = None
        if tokens is not None and {"embed", "rotation"} & wanted:
            states = residual_products(base, reduced, wanted, tokens[:_READ_BLOCKS], compute, seed)
        mapped = _by_maps(base, reduced, wanted, unsupported, shared, states)
        found = found if found is not None and _explains(found.cosines, mapped.cosines) else mapped
    before = leaf_cosines(base, ft, shared)
    rewrites = removals + found.rewrites
    return Alignment(
        rewrites,
        "weights" if tokens is None else "activations",
        (math.fsum(before.values()), math.fsum(found.cosines.values())),
        _prove(ft, rewrites, seed),
        found.left_out,
        undone={**report, **found.undone},
        likeness=cosines_by_kind(before, found.cosines),
    )


def _by_maps(
    base: ParamSource,
    ft: ParamSource,
    kinds: set[str],
    unsupported: Mapping[str, str],
    shared: Shared | None,
    states: Float[np.ndarray, "D D"] | None,
) -> _Candidate:
    rewrites, left_out = estimate_rewrites(base, ft, kinds, shared, states)
    after = rewritten(ft, rewrites)
    means = means_of(ft) if any(isinstance(rewrite, MeanSetting) for rewrite in rewrites) else {}
    undone = undone_by(rewrites, gains_of(base), gains_of(ft), means)
    if ft.arch.tied and not after.arch.tied:
        undone["untied"] = True
    return _Candidate(rewrites, {**unsupported, **left_out}, leaf_cosines(base, after, shared), undone)


def _by_permutations(base: ParamSource, ft: ParamSource, shared: Shared | None) -> _Candidate:
    table = axis_table(base.arch)
    matching = match_weights(params_of(base), params_of(ft), table, table.axes_of_kind(PERMUTABLE), shared=shared)
    rewrites = (Permutation(matching.permutations),)
    return _Candidate(rewrites, matching.left_out, leaf_cosines(base, rewritten(ft, rewrites), shared), {})


def _explains(permuted: Mapping[str, float], mapped: Mapping[str, float]) -> bool:
    """Returns whether permutations alone bring every leaf about as close to base as all maps do."""
    times, plus = _ABOUT_AS_ALIKE
    return all(1 - permuted[name] <= times * (1 - mapped[name]) + plus for name in permuted if name in mapped)


def _prove(ft: ParamSource, rewrites: Sequence[Rewrite], seed: int) -> float:
    """Returns how far the rewrites move ft's logits; raises ValueError if further than rounding explains."""
    tolerance = LOGITS_TOLERANCE if reorders_only(rewrites) else None
    return check_function(ft, rewritten(ft, rewrites), seed=seed, tolerance=tolerance)


def _check(base: ParamSource, ft: ParamSource, kinds: Sequence[str], evidence: str, tokens: np.ndarray | None) -> None:
    lines = []
    if evidence not in get_args(Evidence):
        lines.append(f"evidence {evidence!r} is not one of {', '.join(get_args(Evidence))}")
    if evidence in ("activations", "learned") and tokens is None:
        lines.append(f"evidence by {evidence} needs tokens for both models to read")
    if evidence == "activations" and (problem := activations_problem(kinds)):
        lines.append(problem)
    if evidence == "learned":
        lines += _not_learnable(base, ft, kinds, tokens)
    if lines := lines + alignment_problems(base.arch, ft.arch, kinds):
        raise ValueError("cannot align these models:\n  " + "\n  ".join(lines))


def _not_learnable(base: ParamSource, ft: ParamSource, kinds: Sequence[str], tokens: np.ndarray | None) -> list[str]:
    """Returns why an alignment between these models cannot be learnt; empty if it can."""
    lines = []
    if not supported(kinds, base.arch)[0] & MAPS.keys():
        lines.append(f"{', '.join(kinds)}: nothing that can be learnt; choose all, or some of {', '.join(MAPS)}")
    if streamed := [side for side, source in (("base", base), ("ft", ft)) if not is_resident(source)]:
        lines.append(
            f"evidence learned: {' and '.join(streamed)} would be streamed, and the gradient of a loss between the "
            "models needs all layers of both in memory; load them whole"
        )
    if tokens is not None and len(tokens) < LEAST_BLOCKS:
        lines.append(f"{len(tokens)} blocks of text to learn an alignment from, expected at least {LEAST_BLOCKS}")
    return lines
