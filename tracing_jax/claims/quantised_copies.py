"""Whether the weights of one model are those of another, quantised: quantised again and compared, or bounded by steps.

Formats that round to the nearest value can be computed again from the original weights and the scales of the copy,
which follow from the copy itself: its largest weight of a block is at a known place of the format. Formats that
choose values to make up for one another's errors (GPTQ, AWQ, the K types of GGUF, importance matrices) cannot; there
the distance of the copy from the original is measured in steps of its own grid.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from tracing_jax.claims.tensor_pairs import TensorPair, is_rounded, step_of

SAMPLE = 256
"""Rows of a tensor by which its format is found. All rows are then quantised again in that format."""

NEAREST = 0.999
"""The least share of weights that quantising again must reproduce: scales are rounded, and so are ties."""

OF_A_ROW = 0.8
"""The least share of the weights of each row. A row of other weights has a tenth by chance in 4 bits, a third within a
step of them, and less in more bits; blocks whose scales are not known to the last bit may fail as a whole."""

GROUP = 32
"""Neighbouring weights of a row that share a grid: the groups of all formats are multiples of it, or 16 (K types)."""

_DISTINCT = 0.9
"""The largest share of distinct weights in the groups of a tensor that has a grid, on average."""

_TABLES = {
    # Source: Dettmers et al., QLoRA (arXiv 2305.14314), appendix E.
    "NF4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    # bitsandbytes' FP4: sign, and eight magnitudes over 12.
    "FP4": tuple(sorted({s * m / 12 for s in (-1, 1) for m in (0, 0.0625, 2, 3, 4, 6, 8, 12)})),
}  # fmt: skip

ScaleBlocks = Float32[np.ndarray, "n b"]
Requantiser = Callable[[ScaleBlocks, ScaleBlocks, bool], ScaleBlocks]
"""From blocks of the original and of the copy, whose scales are taken, to what the format makes of the original. The
last argument says whether codes are made with the scales of the original, which those of the copy are roundings of."""


@dataclass(frozen=True)
class Copy:
    """What one tensor of the copy is to that of the original.

    Attributes:
      leaf: of the params.
      kind: `identical`, `rounded` (to the coarser dtype), the name of a format that reproduces it, or `other`.
      share: of all weights that are reproduced; of `other`, by the best of the formats.
      weights, differing: of so many that were quantised again so many came out as other values.
      least, row: the least share of a row, and which row that is: reproduced, or of `other` within a step.
      nearest: the format of that share.
      is_on_grid: whether the copy is in that format, whatever it was made of.
      within: share of the weights within one step of the original, in the copy's own grid, or equal to it; of `other`
        alone, None where the copy has no grid.
      error: root mean square of the error, relative to that of the weights.
      steps: root mean square of the error in steps, of the weights that have a step.
      rescaled: what is left of the error once each column of the original is scaled to fit, relative to the copy; of
        `other`.
    """

    leaf: str
    kind: str
    share: float = 1.0
    nearest: str = ""
    is_on_grid: bool = True
    within: float | None = None
    error: float = 0.0
    steps: float | None = None
    rescaled: float | None = None
    weights: int = 0
    differing: int = 0
    least: float = 1.0
    row: int = 0


def copy_of(pair: TensorPair, is_identical: bool) -> Copy:
    """Returns what one tensor of ft is to that of base."""
    if is_identical:
        return Copy(pair.leaf, "identical")
    if is_rounded(pair):
        return Copy(pair.leaf, "rounded")
    if not pair.is_matrix:
        ours, theirs = pair.sample(1 << 20)
        return Copy(pair.leaf, "other", 0.0, is_on_grid=False, error=_relative(ours, theirs))
    shares: dict[str, float] = {}
    grids: list[str] = []
    ours, theirs = (rows.reshape(len(rows), -1, pair.shape[-1]) for rows in pair.sample(SAMPLE))
    ours, theirs = (rows.reshape(-1, pair.shape[-1]) for rows in (ours, theirs))
    largest = max(float(np.abs(rows.astype(np.float32)).max(initial=0)) for _, rows in pair.chunks())
    formats = _formats(ours.shape[-1], largest)
    for name, ways, is_on_grid in _shares(pair, ours, theirs, formats):
        shares[name] = max(ways.values())
        grids += [name] if is_on_grid else []
        # Ways that cannot be told apart by the sample may differ in other rows.
        likely = sorted((way for way in ways if ways[way] >= NEAREST), key=lambda way: -ways[way])
        nearly: list[Copy] = []
        for way in likely:
            found = _reproduced(pair, name, formats[name], way)
            if found.share >= NEAREST and found.least >= OF_A_ROW:
                return found
            nearly.append(found)
        if nearly:
            found = max(nearly, key=lambda copy: (copy.share, copy.least))
            return replace(_by_steps(pair), share=found.share, nearest=name, least=found.least, row=found.row,
                           is_on_grid=is_on_grid)  # fmt: skip
    best = max(grids or shares, key=lambda name: shares[name])
    return replace(_by_steps(pair), share=shares[best], nearest=best, is_on_grid=bool(grids))


def _reproduced(pair: TensorPair, name: str, made: tuple[int, Requantiser], way: str) -> Copy:
    """Returns what a format makes of all rows, in one of the ways of `_equal_in_ways`, beside the copy."""
    block, requantise = made
    equal, squares, size, rows = [], 0.0, 0.0, 0
    for ours, theirs in _matrices(pair):
        same = _equal_in_ways(pair, ours, theirs, block, requantise)[way]()
        equal.append(same.mean(axis=1))
        squares += float(((theirs.astype(np.float64) - ours) ** 2).sum())
        size, rows = size + float((ours.astype(np.float64) ** 2).sum()), rows + len(ours)
    share = np.concatenate(equal)
    weights = rows * pair.shape[-1]
    differing = round(float((1 - share).sum()) * pair.shape[-1])
    row = int(share.argmin())
    return Copy(pair.leaf, name, 1 - differing / weights, name, error=math.sqrt(squares / (size or 1.0)),
                weights=weights, differing=differing, least=float(share[row]), row=row)  # fmt: skip


def _by_steps(pair: TensorPair) -> Copy:
    """Returns how far all rows of the copy are from the original, in steps and once columns are rescaled."""
    within, least, squares, stepped, row, start, distinct = 0, 1.0, 0.0, 0, 0, 0, 0.0
    moments = []
    for original, copied in _matrices(pair):
        errors, values = _in_steps(original, copied)
        distinct += values * len(errors)
        near, finite = errors <= 1, np.isfinite(errors)
        within, stepped = within + int(near.sum()), stepped + int(finite.sum())
        squares += float((errors[finite] ** 2).sum())
        shares = near.mean(axis=1)
        if shares.min() < least:
            least, row = float(shares.min()), start + int(shares.argmin())
        start += len(errors)
        stacks = [rows.astype(np.float64).reshape(-1, *rows.shape[-1:]) for rows in (original, copied)]
        if len(pair.shape) > 2:
            stacks = [rows.reshape(-1, *pair.shape[-2:]) for rows in stacks]
        moments.append(np.stack([(a * b).sum(axis=-2) for a, b in itertools.combinations_with_replacement(stacks, 2)]))
    sums = np.sum(moments, axis=0) if len(pair.shape) == 2 else np.concatenate(moments, axis=1)
    ours, both, theirs = sums.reshape(3, -1)
    error = math.sqrt(max(0.0, float((ours - 2 * both + theirs).sum())) / (float(ours.sum()) or 1.0))
    left = theirs - both**2 / np.maximum(ours, 1e-30)
    return Copy(
        pair.leaf,
        "other",
        within=within / (start * pair.shape[-1]) if distinct <= _DISTINCT * start else None,
        error=error,
        steps=math.sqrt(squares / stepped) if stepped else None,
        rescaled=math.sqrt(max(0.0, float(left.sum())) / (float(theirs.sum()) or 1.0)),
        least=least,
        row=row,
    )


def _matrices(pair: TensorPair) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields all rows of both tensors as matrices, float32; of a stack of matrices one below the other."""
    # Blocks of 64 that run over the ends of rows begin anew where a multiple of 64 rows does.
    for chunk in pair.chunks(64 if len(pair.shape) == 2 else 1):
        yield tuple(rows.astype(np.float32).reshape(-1, pair.shape[-1]) for rows in chunk)  # type: ignore[misc]


def _shares(
    pair: TensorPair, ours: np.ndarray, theirs: np.ndarray, formats: Mapping[str, tuple[int, Requantiser]]
) -> Iterator[tuple[str, Mapping[str, float], bool]]:
    """Yields for each format the shares of the weights that it reproduces, and whether the copy is on its grid.

    A copy in a format is what that format makes of it.
    """
    for name, (block, requantise) in formats.items():
        copied = _blocks(theirs, block)
        ways = _equal_in_ways(pair, ours, theirs, block, requantise)
        shares = {way: float(np.mean(equal())) for way, equal in ways.items()}
        yield name, shares, float(np.mean(_equal(requantise(copied, copied, False), copied))) >= NEAREST


def _equal_in_ways(
    pair: TensorPair, ours: np.ndarray, theirs: np.ndarray, block: int, requantise: Requantiser
) -> Mapping[str, Callable[[], np.ndarray]]:
    """Returns for each way in which a copy may have been made what says which of its weights a format reproduces so.

    The original is taken as it is, and rounded to 16 bits first; codes are made with its scales, or those of the copy.
    """
    copied = _blocks(theirs, block)

    def equal(rows: np.ndarray, own: bool) -> np.ndarray:
        found = _equal(requantise(_blocks(rows, block), copied, own), copied)
        return found.reshape(-1)[: theirs.size].reshape(theirs.shape)

    def after_rounding(kind: Any, own: bool) -> np.ndarray:
        return equal(ours.astype(kind).astype(np.float32), own)

    def moved() -> np.ndarray:
        # The copy may be of the weights before they were rounded to base's dtype, which moves some across a boundary.
        half = (step_of(ours, pair.dtypes[0]) / 2).astype(np.float32)
        either = [equal(ours + sign * half, False) for sign in (-1, 1)]
        return np.logical_or.reduce([equal(ours, True), equal(ours, False), *either])

    ways: dict[str, Callable[[], np.ndarray]] = {}
    for own in (True, False):
        ways[f"as it is, {own}"] = partial(equal, ours, own)
        for kind in (np.float16, ml_dtypes.bfloat16):
            ways[f"{np.dtype(kind)}, {own}"] = partial(after_rounding, kind, own)
    return ways | {"moved": moved}


def _blocks(rows: np.ndarray, block: int) -> ScaleBlocks:
    """Returns rows as blocks; blocks that do not divide a row run over its end, as those of bitsandbytes do.

    The last block is filled up with its last weight, which moves neither its largest weight nor its least.
    """
    flat = rows.reshape(-1)
    return np.pad(flat, (0, -flat.size % block), mode="edge").reshape(-1, block)


def _equal(found: ScaleBlocks, copied: ScaleBlocks) -> np.ndarray:
    """Returns where values are equal: the scales of the copy are known up to their rounding alone."""
    scale = np.abs(copied).max(axis=1, keepdims=True)
    return np.abs(found - copied) <= 1e-4 * scale


def _formats(width: int, largest: float) -> Mapping[str, tuple[int, Requantiser]]:
    """Returns the formats that round to the nearest value: the size of a block, and how it is quantised again.

    Source: the reference quantisers of ggml (block_q8_0, q4_0, q5_0: one float16 scale; q4_1, q5_1: a minimum as well);
    bitsandbytes (LLM.int8, arXiv 2208.07339: the largest magnitude of a row is 127 steps; NF4 and FP4 in blocks of 64);
    FP8 (E4M3) scaled so that the largest magnitude is 448, or not scaled.
    """
    return {
        "Q8_0": (32, lambda a, b, own: _symmetric(a, b, own, 127)),
        "int8 per row": (width, lambda a, b, own: _symmetric(a, b, own, 127)),
        "NF4": (64, lambda a, b, own: _table(a, b, own, "NF4")),
        "FP4": (64, lambda a, b, own: _table(a, b, own, "FP4")),
        "Q4_0": (32, lambda a, b, own: _signed(a, b, own, 8)),
        "Q5_0": (32, lambda a, b, own: _signed(a, b, own, 16)),
        "Q4_1": (32, lambda a, b, own: _affine(a, b, own, 15)),
        "Q5_1": (32, lambda a, b, own: _affine(a, b, own, 31)),
        "FP8 per row": (width, lambda a, b, own: _float8(a, np.abs(b).max(axis=1, keepdims=True) / 448)),
        "FP8 per tensor": (width, lambda a, b, own: _float8(a, np.full((len(a), 1), largest / 448, np.float32))),
        "FP8 without scales": (width, lambda a, b, own: _float8(a, np.ones((len(a), 1), np.float32))),
    }


ONLY_NEAREST = ("Q8_0", "int8 per row", "NF4", "FP4", "FP8 per row", "FP8 per tensor", "FP8 without scales")
"""Formats whose quantisers all round to the nearest value; Q4_0 and its like may be made with an importance matrix."""


def _symmetric(original: ScaleBlocks, copied: ScaleBlocks, is_own: bool, steps: int) -> ScaleBlocks:
    own, scale = (np.abs(rows).max(axis=1, keepdims=True) / steps for rows in (original, copied))
    return np.clip(_half_away(original / _coding(own, scale, is_own)), -steps, steps) * scale


def _signed(original: ScaleBlocks, copied: ScaleBlocks, is_own: bool, half: int) -> ScaleBlocks:
    """The weight of largest magnitude, with its sign, is the lowest code, which is `half` below zero."""
    own, scale = (
        np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], 1) / -half for rows in (original, copied)
    )
    codes = np.clip(np.trunc(original / _coding(own, scale, is_own) + (half + 0.5)), 0, 2 * half - 1)
    return (codes - half) * scale


def _affine(original: ScaleBlocks, copied: ScaleBlocks, is_own: bool, steps: int) -> ScaleBlocks:
    (own_least, own), (least, scale) = (
        (rows.min(axis=1, keepdims=True), np.ptp(rows, axis=1, keepdims=True) / steps) for rows in (original, copied)
    )
    coding = _coding(own, scale, is_own)
    start = np.where(coding == own, own_least, least)
    return np.clip(np.trunc((original - start) / coding + 0.5), 0, steps) * scale + least


def _table(original: ScaleBlocks, copied: ScaleBlocks, is_own: bool, name: str) -> ScaleBlocks:
    table = np.array(_TABLES[name], np.float32)
    own, scale = (np.abs(rows).max(axis=1, keepdims=True) for rows in (original, copied))
    return table[np.searchsorted((table[1:] + table[:-1]) / 2, original / _coding(own, scale, is_own))] * scale


def _float8(original: ScaleBlocks, scale: np.ndarray) -> ScaleBlocks:
    scale = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    clipped = np.clip(original / scale, -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale


def _coding(own: np.ndarray, copied: np.ndarray, is_own: bool) -> np.ndarray:
    """Returns the scales that codes were made with: those of the original, which are stored rounded, where they agree.

    Nested scales of bitsandbytes are stored in eight bits, with errors of a few percent.
    """
    scale = np.where(np.abs(own - copied) <= 0.05 * np.abs(copied), own, copied) if is_own else copied
    return np.where(scale == 0, np.float32(1), scale).astype(np.float32)


def _half_away(values: np.ndarray) -> np.ndarray:
    return np.trunc(values + np.copysign(0.5, values))


def _in_steps(
    ours: Float32[np.ndarray, "r c"], theirs: Float32[np.ndarray, "r c"]
) -> tuple[Float32[np.ndarray, "r c"], float]:
    """Returns the error of each weight in steps of the copy's own grid, and how many of a group's weights are distinct.

    The step of a group is the smallest distance of its values, and that of the last columns of a row, too few for a
    group, the one before them. A group of one value takes the larger step of the groups beside it in its row, with
    which it may share a scale, or where these have none the usual one of all rows. Without any step errors are zero or
    infinite.
    """
    size = min(GROUP, ours.shape[-1])
    groups = ours.shape[-1] // size
    copied = theirs[:, : groups * size].reshape(len(theirs), groups, size)
    gaps = np.diff(np.sort(copied, axis=-1), axis=-1)
    real = gaps > 1e-5 * np.abs(copied).max(axis=-1, keepdims=True)  # values of one code differ by rounding alone
    steps = np.where(real, gaps, np.inf).min(axis=-1)
    steps[np.isinf(steps)] = 0
    beside = np.pad(steps, ((0, 0), (1, 1)))
    usual = np.median(steps[steps > 0]) if steps.any() else 0
    for other in (np.maximum(beside[:, :-2], beside[:, 2:]), usual):
        steps = np.where(steps == 0, other, steps)
    of_column = np.minimum(np.arange(ours.shape[-1]) // size, groups - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.abs(ours - theirs) / steps[:, of_column]
    return np.where(ours == theirs, np.float32(0), errors), float(np.mean(real.sum(axis=-1) + 1)) / size


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    size = float(np.sqrt(np.mean(ours.astype(np.float64) ** 2))) or 1.0
    return float(np.sqrt(np.mean((theirs.astype(np.float64) - ours) ** 2))) / size
