"""From two models and what may be undone to a proven alignment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int

from tracing_jax.alignment.kinds import alignment_problems, beyond_permutations, existing
from tracing_jax.alignment.parts import cosines
from tracing_jax.alignment.permuting import by_activations
from tracing_jax.alignment.result import Alignment, Evidence, by_kind, undone_by
from tracing_jax.alignment.structure import without_surplus
from tracing_jax.alignment.undoing import gains_of, undo
from tracing_jax.arch import Arch
from tracing_jax.axes import PERMUTABLE, axis_table
from tracing_jax.forward import check_function, logits
from tracing_jax.matching import Shared, match_weights
from tracing_jax.rewrites import Permutation, Permutations, Rewrite, share_moved
from tracing_jax.run_cache import RunCache
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.sources import ParamSource, disguised, in_memory, params_of, permuted

LOGITS_TOLERANCE = 1e-3
"""The most that a permutation may move ft's logits, relative to the largest. It only reorders sums, which moves float32
logits by about 1e-5; the proof computes in float32 whatever the weights' dtype, so one bound serves all. What other
maps may move, `forward.FUNCTION_TOLERANCE` says."""

_PROOF_TOKENS = (2, 32)  # blocks, positions

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
    """Returns the maps of these kinds that align ft to base, proven to keep ft's function.

    Args:
      base: the model that stays.
      ft: the model that moves; it is not changed (see `aligned`).
      kinds: what to undo, of `KINDS`; or `all` or `auto` alone. Every kind named is estimated, needed or not, and is
        left out where it does not exist for base's family. `rotation` brings `gains` with it.
      evidence: what tells units apart: the weights, or the activations on `tokens` (permutations only).
      tokens: the blocks both models read; activations only.
      compute: where and how the activations are computed. By default float32 on one device.
      shared: pairs of ids of tokens that mean the same, if the vocabularies differ; weights only.
      seed: draws the tokens of the proof.
      run_cache: where the permutations found by weights are kept, for a second start.

    Raises:
      ValueError: models that cannot be aligned, arguments that do not fit (all at once), or an aligned model whose
        logits are not ft's own.
      AlignmentError: surplus units or layers of ft are not silent, or no row of a token is shared.
    """
    _check(base.arch, ft.arch, kinds, evidence, tokens)
    if beyond_permutations(kinds):
        found = _undone(base, ft, kinds, shared, seed)
    elif evidence == "weights":
        found = _by_weights(base, ft, kinds, shared, seed, run_cache)
    else:
        assert tokens is not None
        permutations, objective = by_activations(base, ft, kinds, tokens, compute or Compute(make_mesh()))
        moved = _logits_moved(ft, permutations, seed)
        found = Alignment(permutations, evidence, objective, share_moved(permutations), moved, {})
    for name, reason in found.left_out.items():
        logging.warning("alignment goes without %s: %s", name, reason)
    if not found.converged:
        logging.warning("the descent of the alignment was stopped before it converged")
    return found


def _by_weights(
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
    moved = _logits_moved(ft, matching.permutations, seed)
    return Alignment(
        matching.permutations, "weights", matching.objective, share_moved(matching.permutations), moved,
        matching.left_out, matching.converged,
    )  # fmt: skip


@dataclass(frozen=True)
class _Found:
    """Rewrites of a model of base's shape, with what is known of them."""

    rewrites: tuple[Rewrite, ...]
    permutations: Permutations
    left_out: Mapping[str, str]
    cosines: Mapping[str, float]
    undone: Mapping[str, Any]


def _undone(base: ParamSource, ft: ParamSource, kinds: Sequence[str], shared: Shared | None, seed: int) -> Alignment:
    """Returns the alignment by more than permutations."""
    wanted, absent = existing(kinds, base.arch)
    surplus, report = without_surplus(base, ft, wanted)
    rest = in_memory(disguised(ft, surplus), "dropping padding") if surplus else ft
    found = _by_permutations(base, rest, shared) if "auto" in kinds else None
    # Maps cannot bring a leaf closer than to a cosine of one, which is not waited for where it would decide nothing.
    if found is None or not _explain(found.cosines, dict.fromkeys(found.cosines, 1.0)):
        mapped = _by_maps(base, rest, wanted, absent, shared)
        found = found if found is not None and _explain(found.cosines, mapped.cosines) else mapped
    before = cosines(base, ft, shared)
    rewrites = surplus + found.rewrites
    if all(isinstance(rewrite, Permutation) for rewrite in rewrites):
        moved, rewrites = _logits_moved(ft, found.permutations, seed), ()
    else:
        moved = check_function(ft, disguised(ft, rewrites), seed=seed)
    return Alignment(
        found.permutations,
        "weights",
        (math.fsum(before.values()), math.fsum(found.cosines.values())),
        share_moved(found.permutations),
        moved,
        found.left_out,
        rewrites=rewrites,
        undone={**report, **found.undone},
        likeness=by_kind(before, found.cosines),
    )


def _by_maps(
    base: ParamSource, ft: ParamSource, kinds: set[str], absent: Mapping[str, str], shared: Shared | None
) -> _Found:
    undoing = undo(base, ft, kinds, shared)
    after = disguised(ft, undoing.rewrites)
    undone = undone_by(undoing.rewrites, gains_of(base), gains_of(ft))
    if ft.arch.tied and not after.arch.tied:
        undone["untied"] = True
    left_out = {**absent, **undoing.left_out}
    return _Found(undoing.rewrites, undoing.permutations, left_out, cosines(base, after, shared), undone)


def _by_permutations(base: ParamSource, ft: ParamSource, shared: Shared | None) -> _Found:
    table = axis_table(base.arch)
    matching = match_weights(params_of(base), params_of(ft), table, table.axes_of_kind(PERMUTABLE), shared=shared)
    after = permuted(ft, matching.permutations)
    rewrites = (Permutation(matching.permutations),)
    return _Found(rewrites, matching.permutations, matching.left_out, cosines(base, after, shared), {})


def _explain(permuted: Mapping[str, float], mapped: Mapping[str, float]) -> bool:
    """Says whether permutations alone bring every leaf about as close to base as all maps do."""
    times, plus = _ABOUT_AS_ALIKE
    return all(1 - permuted[name] <= times * (1 - mapped[name]) + plus for name in permuted if name in mapped)


def _logits_moved(ft: ParamSource, permutations: Permutations, seed: int) -> float:
    blocks, length = _PROOF_TOKENS
    shape = (blocks, min(length, ft.arch.num_positions or length))
    tokens = np.random.default_rng(seed).integers(ft.arch.vocab_size, size=shape, dtype=np.int32)
    expected, found = logits(ft, tokens), logits(permuted(ft, permutations), tokens)
    moved = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
    if not moved <= LOGITS_TOLERANCE:  # NaN too
        raise ValueError(
            f"alignment moves ft's logits by {moved:.2e} of their greatest, expected at most {LOGITS_TOLERANCE:.0e}: "
            f"the axis table of family {ft.arch.family} does not describe these weights, or they hold NaN; "
            "align fewer kinds to find which axis it is"
        )
    return moved


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
