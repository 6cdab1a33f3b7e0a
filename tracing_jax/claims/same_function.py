"""Whether two models of other weights compute the same function, measured against the rounding of their weights."""

import zlib
from dataclasses import asdict, dataclass

import jax.numpy as jnp
import numpy as np

from tracing_jax.axes import AxisTable
from tracing_jax.claims.claim import ClaimInputs, ClaimResult, result
from tracing_jax.claims.tensor_pairs import STEP_BITS, is_rounded, tensor_pairs
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
    """

    change: float
    rounding: float
    tokens: int

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
    coarse = min(dtypes, key=lambda dtype: STEP_BITS[dtype.name])
    try:
        ours = logits(base, ids_base[drawn].astype(np.int32))[..., ids_base]
        theirs = logits(ft, ids_ft[drawn].astype(np.int32))[..., ids_ft]
    except ValueError as error:  # a model without a head
        return str(error)
    moved = logits(_moved(base, seed), ids_base[drawn].astype(np.int32))[..., ids_base]
    effect = _distance(ours, moved) * 2.0**_PROBE_BITS
    rounding = max(effect * 2.0 ** -STEP_BITS[coarse.name], effect * _FORWARD_STEPS * 2.0**-23, _FORWARD)
    return FunctionChange(_distance(ours, theirs), rounding, len(ids_base))


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
    dtypes = inputs.base.tensors.dtype(pairs[0].slice_base.tensor) if pairs else np.dtype(np.float32)
    theirs = pairs[0].dtypes[1] if pairs else dtypes
    found = function_change(inputs.pair.base, inputs.pair.ft, inputs.pair.vocabularies, (dtypes, theirs), inputs.seed)
    if isinstance(found, str):
        return result("same-as", "not_testable", f"{inputs.tensors}, and the functions cannot be compared: {found}")
    numbers = {**asdict(found), "over_rounding": found.over_rounding}
    moved = (
        f"the logits on random tokens differ by {found.change:.2g} of their size, {found.over_rounding:.2g} times what "
        "rounding the weights does"
    )
    if found.over_rounding >= OTHER:
        return result("same-as", "contradicted", f"{inputs.tensors}, and {moved}", **numbers)
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
    return result("same-as", "holds", f"the weights differ, but {moved}: one is a rewrite of the other", how="function",
                  **numbers)  # fmt: skip
