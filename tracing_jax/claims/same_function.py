"""Whether two models of other weights compute the same function, measured against the rounding of their weights."""

import zlib
from dataclasses import asdict, dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tracing_jax.axes import AxisTable
from tracing_jax.checkpoint import Checkpoint
from tracing_jax.claims.claim import ClaimInputs, ClaimResult, result
from tracing_jax.claims.tensor_pairs import STEP_BITS, coarser, is_rounded, tensor_pairs
from tracing_jax.forward import logits
from tracing_jax.sources import MappedSource, ParamSource
from tracing_jax.statistics import Vocabularies
from tracing_jax.tree import Tree, flatten, map_named

_BLOCKS, _LENGTH = 4, 32
"""Of the tokens that are drawn."""

_FEWEST_TOKENS = 32
"""Shared tokens below which the functions are not compared."""

SAME, OTHER = 4.0, 20.0
"""Two functions are the same if they differ by at most `SAME` times what rounding the weights does, and are not by
`OTHER` times and more. Measured: rewrites of every kind, alone and together, move the logits by at most 0.9 times that
in float32 and bfloat16, and a ten-thousandth of the way to the demo's fine-tune by 29 times, in float32."""

_MAX_RELATIVE_CHANGE = 0.1
"""The relative change of matrices below which they correspond as stored."""

_FORWARD = 1e-6
"""How far two orders of summation move logits in float32, relative to their size, in a model of a few layers."""

_FORWARD_STEPS = 30.0
"""The same in units of what rounding the weights to float32 does, for deep models."""

_CORRESPONDING, _LEAST_OTHER = 0.01, 1e-5
"""Relative differences of products of embeddings: those of tokens read are at most the first for the products to be
comparable, and a row is another above the second at least."""

_ROWS_AT_ONCE = 16384

_PROBE_BITS = 10
"""Weights are moved within steps of so many bits, and the effect is scaled to those of their dtype: it is linear, and
steps of float32 would be lost in the forward pass."""


@dataclass(frozen=True)
class FunctionChange:
    """How far the logits of two models are apart, on random tokens that both have.

    Attributes:
      change: the root mean square of the differences, relative to that of base's logits around their mean.
      rounding: what rounding every weight of base anew, to its dtype, does to them; at least the error of the forward
        pass.
      tokens: how many shared tokens there are.
      read: how many of them were read.
      positions: at how many positions.
      other_rows: how many shared tokens and positions have embeddings that do not correspond, whether they were read or
        not; None if that is unknown.
    """

    change: float
    rounding: float
    tokens: int
    read: int
    positions: int
    other_rows: int | None

    @property
    def over_rounding(self) -> float:
        """The change in units of what rounding the weights does."""
        return self.change / self.rounding


def function_change(
    base: ParamSource, ft: ParamSource, vocabularies: Vocabularies, dtypes: tuple[np.dtype, np.dtype], seed: int
) -> FunctionChange | str:
    """Returns how far the logits are apart, or why that is unknown.

    Args:
      base: one model.
      ft: the other.
      vocabularies: how their tokens correspond.
      dtypes: those that the weights of the two are stored in.
      seed: draws the tokens and the rounding.
    """
    ids_base, ids_ft = (np.asarray(ids, np.int64) for ids in (vocabularies.ids_base, vocabularies.ids_ft))
    if vocabularies.same:
        ids_base = ids_ft = np.arange(min(base.arch.vocab_size, ft.arch.vocab_size))
    if len(ids_base) < _FEWEST_TOKENS:
        return f"the vocabularies share {len(ids_base)} tokens, and both models must read the same"
    rng = np.random.default_rng([seed, zlib.crc32(b"same function")])
    length = min(_LENGTH, *(arch.num_positions or _LENGTH for arch in (base.arch, ft.arch)))
    drawn = rng.integers(len(ids_base), size=(_BLOCKS, length))
    coarse = coarser(dtypes)
    try:
        ours = logits(base, ids_base[drawn].astype(np.int32))[..., ids_base]
        theirs = logits(ft, ids_ft[drawn].astype(np.int32))[..., ids_ft]
    except ValueError as error:  # a model without a head
        return str(error)
    moved = logits(_moved(base, seed), ids_base[drawn].astype(np.int32))[..., ids_base]
    effect = _distance(ours, moved) * 2.0**_PROBE_BITS
    rounding = max(effect * 2.0 ** -STEP_BITS[coarse.name], effect * _FORWARD_STEPS * 2.0**-23, _FORWARD)
    read = np.unique(drawn)
    other_rows = _other_rows(base.embed(), ft.embed(), (ids_base, ids_ft), read)
    return FunctionChange(_distance(ours, theirs), rounding, len(ids_base), len(read), length, other_rows)


def _other_rows(
    base: Tree, ft: Tree, ids: tuple[Int[np.ndarray, " V"], Int[np.ndarray, " V"]], read: Int[np.ndarray, " R"]
) -> int | None:
    """Returns how many rows of the embeddings of tokens and positions of both models do not correspond.

    Products with the rows of tokens that were read stay as they are when features are permuted, rotated or padded.
    None if not even those of the tokens read, of which the functions are alike, are alike.
    """
    embeddings = [np.asarray(side["embedding"]) for side in (base, ft)]
    refs = [rows[own[read]].astype(np.float64) for rows, own in zip(embeddings, ids)]
    scale = np.sqrt(np.square(refs[0] @ refs[0].T).sum() / max(np.square(refs[1] @ refs[1].T).sum(), 1e-300))

    def differences(ours: np.ndarray, theirs: np.ndarray) -> Float[np.ndarray, " n"]:
        a, b = ours.astype(np.float64) @ refs[0].T, scale * (theirs.astype(np.float64) @ refs[1].T)
        return np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-300 + 1e-9 * np.abs(a).max())

    typical = float(np.median(differences(*refs)))
    if typical > _CORRESPONDING:
        return None
    most, count = max(OTHER * typical, _LEAST_OTHER), 0
    for start in range(0, len(ids[0]), _ROWS_AT_ONCE):
        rows = (side[own[start : start + _ROWS_AT_ONCE]] for side, own in zip(embeddings, ids))
        count += int((differences(*rows) > most).sum())
    if "positions" in base and "positions" in ft:
        shared = min(len(base["positions"]), len(ft["positions"]))
        count += int((differences(*(np.asarray(side["positions"])[:shared] for side in (base, ft))) > most).sum())
    return count


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """A constant added to all logits of a position changes no probability, so it is taken away."""
    ours, theirs = (x.astype(np.float64) - x.mean(axis=-1, keepdims=True, dtype=np.float64) for x in (ours, theirs))
    return float(np.sqrt(np.mean((theirs - ours) ** 2) / max(np.mean(ours**2), 1e-30)))


def _moved(source: ParamSource, seed: int) -> ParamSource:
    """Returns a model whose weights are moved by up to half a step of `_PROBE_BITS` bits, uniformly."""

    def moved(subtree: Tree, table: AxisTable) -> Tree:
        def leaf(name: str, weights: np.ndarray) -> jnp.ndarray:
            weights = np.asarray(weights).astype(np.float32)
            rng = np.random.default_rng([seed, zlib.crc32(name.encode()), weights.size])
            _, exponent = np.frexp(np.abs(weights))
            step = np.ldexp(np.float32(1), exponent - 1 - _PROBE_BITS)
            return jnp.asarray(weights + step * rng.uniform(-0.5, 0.5, weights.shape).astype(np.float32))

        return map_named(leaf, subtree)

    return MappedSource(source, moved)


def coarsest_dtype(model: Checkpoint) -> np.dtype:
    """Returns the dtype with the fewest bits that weights of a checkpoint are stored in."""
    dtypes = (model.tensors.dtype(layout.slices[0].tensor) for layout in model.leaf_layouts.values())
    return min(dtypes, key=lambda dtype: STEP_BITS.get(dtype.name, 24), default=np.dtype(np.float32))


def change_in_place(base: ParamSource, ft: ParamSource) -> float | None:
    """Returns how far the first layer's matrices are apart, relative to their size; None if their shapes differ."""
    ours, theirs = (
        {n: np.asarray(w).astype(np.float64) for n, w in flatten(m.layer(0)).items() if np.ndim(w) > 1}
        for m in (base, ft)
    )
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        return None
    changed = sum(float(np.sum((theirs[name] - ours[name]) ** 2)) for name in ours)
    return float(np.sqrt(changed / max(sum(float(np.sum(x**2)) for x in ours.values()), 1e-30)))


def same_as(inputs: ClaimInputs) -> ClaimResult:
    """Tests the claim that both are one model: by their numbers, and where these differ by their functions."""
    if inputs.is_identical:
        return result("same-as", "holds", inputs.tensors, how="numbers")
    pairs, others = tensor_pairs(inputs.base, inputs.ft)
    if not others and all(is_rounded(pair) for pair in pairs):
        dtype = min((pair.dtypes for pair in pairs), key=lambda dtypes: dtypes[0].itemsize + dtypes[1].itemsize)
        names = " and ".join(sorted({one.name for one in dtype}))
        return result("same-as", "holds", f"all tensors are equal once they are rounded ({names})", how="rounded")
    dtypes = coarsest_dtype(inputs.base), coarsest_dtype(inputs.ft)
    found = function_change(inputs.pair.base, inputs.pair.ft, inputs.pair.vocabularies, dtypes, inputs.seed)
    if isinstance(found, str):
        return result("same-as", "not_testable", f"{inputs.tensors}, and the functions cannot be compared: {found}")
    numbers = {**asdict(found), "over_rounding": found.over_rounding}
    moved = (
        f"the logits on {found.read} random tokens, at the first {found.positions} positions, differ by "
        f"{found.change:.2g} of their size, {found.over_rounding:.2g} times what rounding the weights does"
    )
    if found.over_rounding >= OTHER:
        return result("same-as", "contradicted", f"{inputs.tensors}, and {moved}", **numbers)
    if found.over_rounding <= SAME and found.other_rows:
        why = f"{moved}, but {found.other_rows} shared tokens or positions have embeddings that do not correspond"
        return result("same-as", "contradicted", why, **numbers)
    in_place = (
        change_in_place(inputs.base, inputs.ft) if inputs.base.arch.num_layers == inputs.ft.arch.num_layers else None
    )
    if found.over_rounding > SAME:
        return result(
            "same-as", "not_testable", f"{moved}: too much for a rewrite, too little to exclude one", **numbers
        )
    if in_place is not None and in_place < _MAX_RELATIVE_CHANGE:
        why = f"the weights differ as stored, by {in_place:.2g} of their size, and {moved}: so does little training"
        return result("same-as", "not_testable", why, **numbers, change_in_place=in_place)
    if found.other_rows is None:
        why = f"the weights differ, and {moved}; whether other tokens have embeddings that correspond is not known"
        return result("same-as", "not_testable", why, **numbers)
    why = f"the weights differ, but {moved}, and the embeddings of all shared tokens correspond: one is a rewrite"
    return result("same-as", "holds", f"{why} of the other", how="function", **numbers)
