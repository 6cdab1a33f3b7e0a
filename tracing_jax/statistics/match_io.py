"""`match_io`: MLP units matched by what they read from shared tokens, and apart by what they write to them.

The response of a unit to a token is the product of its row with the token's input embedding; its effect on a token that
of its down row with the token's row of the head. There is no forward pass and no text, and no gate is needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.forward import correlate
from tracing_jax.progress import trange
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.agreement import (
    Agreements,
    PairAgreements,
    agreement_result,
    agreements,
    dense_not_applicable,
    nulls_of,
    some_units,
)
from tracing_jax.statistics.calibration import control_pairs
from tracing_jax.statistics.comparison import Comparison
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.mlp_rows import mlp_row_leaves, mlp_rows
from tracing_jax.statistics.shared_tokens import TokenRows, shared_token_rows, tokens_not_applicable, with_doubts
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies, depths_not_applicable
from tracing_jax.tree import taken

_CONTROL_TOKENS = 1024  # of each pair of layers that does not correspond, for the null

Responses = Mapping[str, Float[np.ndarray, "_ _"]]
"""`gate` (if the MLP has one), `up`, `effect` -> what each unit gives for each token, `[S, F]`."""


@dataclass(frozen=True)
class MatchIo(options.MatchIo):
    """Unconstrained test: do the matchings by what units read and by what they write agree?

    Up rows (of an MLP without a gate: its first matrix) are matched by the correlation, over shared tokens, of their
    products with the input embeddings; down rows by that of their products with the head. Absolute values count, since
    a unit scaled by a negative number is the same unit. A gate is a third matching, compared with the effects as well.
    Agreement is counted in layers of equal index, against the null of `calibration.py`.

    Embeddings, gains and head turn together, so every rewrite that keeps the vocabulary leaves the products unchanged.
    Biases of the MLP are constants over the tokens, which correlations leave out.

    At most `units` of base's units are matched to all of ft's, by at most `max_tokens` tokens. For a pair of 7B
    models about 60 TFLOP in all, some minutes on two cores, besides reading the MLPs once; memory 1 GiB.

    Attributes:
      level: of the verdict; the allowance that control models give is a bound for it.

    Source: ours.
    """

    level: float = options.RunOptions.level

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why layers of equal index cannot be matched; empty if they can."""
        lines = dense_not_applicable(base, ft) + depths_not_applicable(base, ft, "see match_all")
        return lines + tokens_not_applicable(base, ft, vocabularies)

    def compute(self, pair: Pair) -> Result:
        """Returns the calibrated and the parametric tests; no forward pass."""
        compared = self._compared(pair, "pair")
        result = agreement_result(
            "match_io",
            pair,
            compared,
            nulls_of(compared, pair, self._compared, self.level),
            "units on which what they read and what they write agree, share",
            [f"layer {i}" for i in range(len(compared.layers))],
        )
        return with_doubts(result, pair)

    def _compared(self, pair: Pair, name: str) -> PairAgreements:
        """Returns the agreements of the layers of a pair, and those of control pairs of layers."""
        base, ft, run_cache = pair.base, pair.ft, pair.run_cache.scope("match_io", name)
        tokens = shared_token_rows(pair, self.max_tokens, "match_io")
        gated = base.arch.gated and ft.arch.gated
        layers: list[Agreements] = []
        samples: list[tuple[Responses, Responses]] = []
        for i in trange(base.arch.num_layers, desc="match_io", unit="layer", disable=None):
            if (kept := _load(run_cache, i, gated)) is None:
                drawn = some_units(base.arch.mlp_dim_of(i), self.units, pair, "match_io", "base")
                sides = responses(base, i, tokens[0], gated, drawn), responses(ft, i, tokens[1], gated)
                kept = self._layer(pair, *sides, ("match_io", name, i))
                _save(run_cache, i, *kept)
            layers.append(kept[0])
            samples.append(kept[1])
        places = control_pairs(len(layers), len(layers), pair.generator("match_io", "controls"))

        def control(i: int, j: int) -> Agreements:
            found = io_similarities(samples[i][0], samples[j][1])
            return agreements(found, compared_pairs(gated), pair, ("match_io", name, "control", i, j))

        return PairAgreements(layers, [control(i, j) for i, j in places])

    def _layer(
        self, pair: Pair, ours: Responses, theirs: Responses, names: Sequence[str | int]
    ) -> tuple[Agreements, tuple[Responses, Responses]]:
        """Returns the agreements of a layer, and of both models what the controls need."""
        found = agreements(io_similarities(ours, theirs), compared_pairs("gate" in ours), pair, names)
        few = [_first_tokens(side, _CONTROL_TOKENS) for side in (ours, _some(theirs, self.units, pair, "ft"))]
        return found, (few[0], few[1])


def compared_pairs(gated: bool) -> list[tuple[str, str]]:
    """Returns which matchings are compared."""
    return [("up", "effect"), ("gate", "effect")] if gated else [("up", "effect")]


def responses(
    model: ParamSource, layer: int, tokens: TokenRows, gated: bool, drawn: Int[np.ndarray, " n"] | None = None
) -> Responses:
    """Returns what each unit of a layer, or each of those drawn, gives for each token, centred over the tokens."""
    units = distinct_units(model, layer)
    rows = mlp_rows(model.layer(layer, mlp_row_leaves(model.arch)), model.arch)
    rows["down"] = jnp.asarray(units.outputs(rows["down"]))
    some = rows if drawn is None else {name: taken(side, drawn) for name, side in rows.items()}
    found = {name: _products(tokens.read, some[name]) for name in (("gate", "up") if gated else ("up",))}
    found["effect"] = _products(tokens.effect, some["down"])
    is_kept = units.is_kept if drawn is None else units.is_kept[drawn]
    return {name: np.where(is_kept, values, 0.0) for name, values in found.items()}  # others: no part


def io_similarities(ours: Responses, theirs: Responses) -> dict[str, Float[np.ndarray, "U U2"]]:
    """Returns the correlations over the tokens of the units of two layers, absolute but for the gate's.

    The gate of a unit cannot be negated without changing the function.
    """
    found = {name: correlate(ours[name], theirs[name]) for name in ours}
    return {name: values if name == "gate" else np.abs(values) for name, values in found.items()}


@jax.jit
def _products(tokens: Float[Array, "S D"], rows: Float[Array | np.ndarray, "F D"]) -> Float[Array, "S F"]:
    return jnp.einsum("sd,fd->sf", tokens - tokens.mean(axis=0), rows, precision="highest")


def _some(found: Responses, most: int, pair: Pair, side: str) -> dict[str, np.ndarray]:
    units = some_units(found["up"].shape[1], most, pair, "match_io", side)
    return {name: values[:, units] for name, values in found.items()}


def _first_tokens(found: Responses, most: int) -> dict[str, np.ndarray]:
    return {name: side[:most] for name, side in found.items()}


def _save(run_cache: RunCache, layer: int, found: Agreements, samples: tuple[Responses, Responses]) -> None:
    sides = {f"{name} {at}": values for at, side in enumerate(samples) for name, values in side.items()}
    run_cache.save_arrays(lambda: sides, "samples", layer)
    for name, comparison in found.items():
        run_cache.cached(Comparison, (name, layer), lambda comparison=comparison: comparison)  # type: ignore[misc]


def _load(run_cache: RunCache, layer: int, gated: bool) -> tuple[Agreements, tuple[Responses, Responses]] | None:
    """Returns what an interrupted run kept of a layer."""
    names = [f"{one} and {other}" for one, other in compared_pairs(gated)]
    found = {name: run_cache.load(Comparison, name, layer) for name in names}
    arrays = run_cache.load_arrays("samples", layer)
    if arrays is None or None in found.values():
        return None
    sides = [{key[:-2]: values for key, values in arrays.items() if key.endswith(f" {at}")} for at in (0, 1)]
    return {name: comparison for name, comparison in found.items() if comparison is not None}, (sides[0], sides[1])
