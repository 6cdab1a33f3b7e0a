"""Alignment: brings the units of a fine-tuned model into base's order, and proves that its function is unchanged."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from tracing_jax.arch import Arch
from tracing_jax.axes import PERMUTABLE, axis_table, kind_of
from tracing_jax.data import paired_one_to_one
from tracing_jax.forward import logits
from tracing_jax.grams import LayerCorrelations, correlations
from tracing_jax.matching import Coordinate, Shared, Similarity, coordinates, match_weights, solve, value
from tracing_jax.models import tap_axes
from tracing_jax.sharding import Compute, make_mesh
from tracing_jax.source import InMemory, Mapped, ParamSource, permuted
from tracing_jax.symmetry import Permutations, identity, share_moved

Evidence = Literal["weights", "activations"]

TAP = {"embed": "residual", "mlp": "units", "kv_heads": "heads", "q_group": "heads", "expert": "units"}
"""Axis kind -> the tap (see `models.tap_axes`) whose activations tell its units apart."""

_NEEDS = {"kv_heads": ("v_dim",), "q_group": ("v_dim",), "expert": ("mlp",)}
"""Axis kind -> the other kinds, beside the one that holds it, that must be of one size in both models for its units to
be compared."""

LOGITS_TOLERANCE = 1e-3
"""The most that alignment may move ft's logits, relative to the largest. A permutation only reorders sums, which moves
float32 logits by about 1e-5; the proof computes in float32 whatever the weights' dtype, so one bound serves all."""

_PROOF_TOKENS = (2, 32)  # blocks, positions


@dataclass(frozen=True)
class Alignment:
    """The permutations that align a fine-tuned model to its base.

    Attributes:
      permutations: axis -> p, where unit `p[i]` of ft belongs to unit i of base.
      evidence: what the units were compared by.
      objective: how alike the paired units are: first as ft came, then after each sweep. For weights, the sum over
        leaves of their cosine; for activations, the mean correlation of paired units (one sweep).
      share_moved: axis kind -> share of units that change place.
      logits_moved: greatest change of any logit of ft, relative to max(1, its greatest logit).
      left_out: leaf name -> why the comparison of weights went without it.
      converged: no single axis could be improved; False if the descent was stopped before.
    """

    permutations: Permutations
    evidence: Evidence
    objective: tuple[float, ...]
    share_moved: dict[str, float]
    logits_moved: float
    left_out: Mapping[str, str]
    converged: bool = True


def align(
    base: InMemory,
    ft: InMemory,
    kinds: Sequence[str] = ("embed", "mlp"),
    *,
    evidence: Evidence,
    tokens: Int[np.ndarray, "N T"] | None = None,
    compute: Compute | None = None,
    shared: Shared | None = None,
    seed: int = 0,
) -> Alignment:
    """Returns the permutations of ft's units of these kinds that align it to base, proven to keep ft's function.

    Args:
      base: the model that stays.
      ft: the model whose units move; it is not changed (see `aligned`).
      kinds: axis kinds among `axes.PERMUTABLE`; those that neither model has add nothing.
      evidence: what tells units apart: the weights, or the activations on `tokens`.
      tokens: the blocks both models read; activations only.
      compute: where and how the activations are computed. By default float32 on one device.
      shared: pairs of ids of tokens that mean the same, if the vocabularies differ; weights only.
      seed: draws the tokens of the proof.

    Raises:
      ValueError: models whose units cannot be paired, arguments that do not fit (all at once), or an aligned model
        whose logits are not ft's own.
    """
    _check(base.arch, ft.arch, kinds, evidence, tokens)
    left_out: Mapping[str, str] = {}
    converged = True
    if evidence == "weights":
        table = axis_table(base.arch)
        matching = match_weights(base.params, ft.params, table, table.axes_of_kind(kinds), shared=shared)
        permutations, objective, left_out = matching.permutations, matching.objective, matching.left_out
        converged = matching.converged
    else:
        assert tokens is not None
        permutations, objective = _by_activations(base, ft, kinds, tokens, compute or Compute(make_mesh()))
    for name, reason in left_out.items():
        logging.warning("alignment goes without %s: %s", name, reason)
    if not converged:
        logging.warning("the descent of the alignment was stopped before it converged")
    moved = _logits_moved(ft, permutations, seed)
    return Alignment(permutations, evidence, objective, share_moved(permutations), moved, left_out, converged)


def alignment_problems(base: Arch, ft: Arch, kinds: Sequence[str]) -> list[str]:
    """Returns why the units of these kinds cannot be paired between models of these shapes; empty if they can."""
    lines = []
    if unknown := sorted(set(kinds) - set(PERMUTABLE)) or ([] if kinds else ["(none)"]):
        lines.append(f"kinds {', '.join(unknown)} cannot be aligned; choose from {', '.join(PERMUTABLE)}")
    if base.num_layers != ft.num_layers:
        lines.append(f"depth: {base.num_layers} layers in base, {ft.num_layers} in ft; layers are paired one to one")
    sizes, sizes_ft = (_sizes(arch) for arch in (base, ft))
    holders = {
        kind_of(axis): kind_of(holder) for arch in (base, ft) for axis, holder in axis_table(arch).within.items()
    }
    if kinds and not set(kinds) & (sizes.keys() | sizes_ft.keys()) and not unknown:
        lines.append(f"neither model has units of kind {', '.join(kinds)}")
    needed = [need for kind in kinds for need in (kind, *_NEEDS.get(kind, ()), holders.get(kind, kind))]
    for kind in dict.fromkeys(needed):
        if sizes.get(kind) != sizes_ft.get(kind):
            size, size_ft = (found.get(kind, "no") for found in (sizes, sizes_ft))
            lines.append(f"{kind}: {size} units in base, {size_ft} in ft; they are paired one to one")
    return lines


def _sizes(arch: Arch) -> dict[str, int]:
    """Returns axis kind -> number of units, the same in all layers."""
    return {kind_of(axis): size for axis, size in axis_table(arch).sizes.items()}


def aligned(ft: ParamSource, alignment: Alignment) -> Mapped:
    """Returns the fine-tuned model with its units in base's order, part by part as they are asked for."""
    return permuted(ft, alignment.permutations)


def _by_activations(
    base: InMemory,
    ft: InMemory,
    kinds: Sequence[str],
    tokens: np.ndarray,
    compute: Compute,
) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """Returns the permutations, and the mean correlation of paired units before and after."""
    table = axis_table(base.arch)
    axes = table.axes_of_kind(kinds)
    unmoved = identity(table, axes)
    found: dict[str, np.ndarray] = {}
    before, after, pairs = 0.0, 0.0, 0
    taps = sorted({TAP[kind] for kind in kinds})
    layers = correlations(base, ft, paired_one_to_one(tokens, tokens), taps, compute, "align")
    for coordinate, similarity in _similarities(base.arch, coordinates(table, axes), layers):
        found |= solve(coordinate, similarity)
        before += value(coordinate, similarity, unmoved)
        after += value(coordinate, similarity, found)
        pairs += math.prod(table.sizes[axis] for axis in (coordinate.axis, coordinate.nested) if axis is not None)
    return found, (before / pairs, after / pairs)


def _similarities(
    arch: Arch, todo: Sequence[Coordinate], layers: Iterator[LayerCorrelations]
) -> Iterator[tuple[Coordinate, Similarity]]:
    """Yields each coordinate as soon as its correlations are there: those of the whole model after the last layer."""
    whole_model = [coordinate for coordinate in todo if "/" not in coordinate.axis]
    total: dict[Coordinate, np.ndarray] = {}
    for found_in in layers:
        for coordinate in todo:
            found = found_in.by_tap[TAP[kind_of(coordinate.axis)]]
            if coordinate in whole_model:
                total[coordinate] = total.get(coordinate, np.float32(0)) + found / np.float32(arch.num_layers)
            elif coordinate.axis.startswith(f"layers/{found_in.layer}/"):
                yield coordinate, _similarity(arch, coordinate, found)
    for coordinate, mean in total.items():
        yield coordinate, _similarity(arch, coordinate, mean)


def _similarity(arch: Arch, coordinate: Coordinate, correlation: Float[np.ndarray, "U U"]) -> Similarity:
    """Returns the correlation of units; over other axes of their tap, such as the features of a head, the mean."""
    tap, sizes = tap_axes(arch)[TAP[kind_of(coordinate.axis)]], _sizes(arch)
    paired = [kind_of(axis) for axis in (coordinate.axis, coordinate.nested) if axis is not None]
    base = [chr(ord("a") + dim) for dim in range(len(tap))]
    ft = [letter.upper() if kind in paired else letter for letter, kind in zip(base, tap)]
    pairing = "".join([base[tap.index(kind)] for kind in paired] + [ft[tap.index(kind)] for kind in paired])
    shape = [sizes[kind] for kind in tap]
    found = np.einsum(f"{''.join(base + ft)}->{pairing}", correlation.reshape(shape + shape))
    found = found / np.float32(math.prod(sizes[kind] for kind in tap if kind not in paired))
    if coordinate.nested is None:
        return Similarity(found)
    return Similarity(np.zeros((len(found), len(found)), np.float32), lambda i, j: found[i, :, j])


def _logits_moved(ft: InMemory, permutations: Permutations, seed: int) -> float:
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
    if lines := lines + alignment_problems(base, ft, kinds):
        raise ValueError("cannot align these models:\n  " + "\n  ".join(lines))
