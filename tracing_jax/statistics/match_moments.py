"""`match_moments`: `match` by second moments of weights, without text or embeddings, and invariant to the basis.

Gate and up projection read the residual stream and down writes to it. Over its units, each of them has a second moment
`A = sum_f w_f w_f^T` of its rows, which are scaled to length one. The signature of a row w are the numbers `w^T A w`,
one for each A. A rotation or permutation of the stream transforms w and every A together, and permuting or scaling the
units, or padding them with zeros, leaves the sums unchanged, so signatures are invariant. Embeddings, head and
attention do not enter.

Letters: F units of a layer, D features, M moments.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.matching import live_units, match_units
from tracing_jax.rewrites import gain_offset
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.calibration import (
    BY_CONVERGENCE,
    DEFAULT_ALLOWANCE,
    DEFAULT_SOURCE,
    agreement_effect,
    control_pairs,
    control_source,
    measured_allowance,
    null_of,
)
from tracing_jax.statistics.comparison import (
    Comparison,
    against_each_other,
    bonferroni_log10,
    reserved,
    share_agreeing,
    share_by_layer,
)
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.match import form_tests, gates_not_applicable
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies, depths_not_applicable
from tracing_jax.tree import Tree

PROJECTIONS = ("gate", "up")

Signatures = dict[str, tuple[Float[np.ndarray, "_ _"], Bool[np.ndarray, " _"]]]
"""`gate`, `up` -> signatures `[F, M]` of a layer's units, and which units are live `[F]`."""

_FORM = "moments"
_RIDGE = 0.1  # of a standardised coordinate's variance, below which a direction of the signatures counts as noise
_TINY = 1e-12


@dataclass(frozen=True)
class MatchMoments(options.MatchMoments):
    """Unconstrained test like `match`, with signatures of second moments in place of activations.

    Gate rows are matched by their signatures, up rows by theirs, and the two matchings compared. It finds a model whose
    embeddings and head were replaced, to which `match` is blind, whatever the order or basis of the other weights.

    Attributes:
      level: of the verdict; the allowance that control models give is a bound for it.
    """

    level: float = options.RunOptions.level

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why layers of equal index cannot be matched; empty if they can."""
        return gates_not_applicable(base, ft) + depths_not_applicable(base, ft, "see match_all")

    def compute(self, pair: Pair) -> Result:
        """Returns the calibrated and the parametric tests; no forward pass."""
        run_cache = pair.run_cache.scope("match_moments")
        base, ft = self._signatures(pair.base, "base", run_cache), self._signatures(pair.ft, "ft", run_cache)
        layers = [
            run_cache.cached(Comparison, (i,), functools.partial(_compare, *both, pair, (i,)))
            for i, both in enumerate(zip(base, ft))
        ]
        pairs = control_pairs(len(base), len(ft), pair.generator("match_moments", "controls"))
        controls = [
            _compare(self._some(base[i], pair), self._some(ft[j], pair), pair, ("control", i, j)) for i, j in pairs
        ]
        null = null_of(controls, *self._allowance(base, ft, pair))
        tests = form_tests(_FORM, layers, null)
        return Result(
            headline=share_agreeing(layers),
            label="units on which gate and up projection agree by their second moments, share",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null={_FORM: null.as_dict()},
            per_layer=share_by_layer(layers),
            notes=list(null.notes),
            effect=agreement_effect(layers),
            **reserved(tests, BY_CONVERGENCE),
        ).for_pair(pair)

    def _signatures(self, model: ParamSource, side: str, run_cache: RunCache) -> list[Signatures]:
        """Returns the signatures of every layer: of an interrupted run's layers those that were kept."""
        L, found = model.arch.num_layers, list[Signatures]()
        while (arrays := run_cache.load_arrays(side, len(found))) is not None:
            found.append({name: (arrays[name], arrays[f"{name} live"]) for name in PROJECTIONS})
        layers = signatures(model, spread_layers(L, self.moments_of), len(found))
        desc = f"match_moments, {side}"
        for layer in tqdm(layers, desc=desc, unit="layer", initial=len(found), total=L, disable=None):
            run_cache.save_arrays(functools.partial(_as_arrays, layer), side, len(found))
            found.append(layer)
        return found

    def _allowance(self, base: list[Signatures], ft: list[Signatures], pair: Pair) -> tuple[list[float], str]:
        """Returns for each layer the share of units that may agree by convergence, and its source."""
        if not pair.controls:
            return [DEFAULT_ALLOWANCE] * len(base), DEFAULT_SOURCE
        measured = []
        for c, control in enumerate(pair.controls):
            own = self._signatures(control, f"control {c}", pair.run_cache.scope("match_moments"))
            for side, other in (("base", base), ("ft", ft)):
                measured.append([_compare(*both, pair, (c, side, i)) for i, both in enumerate(zip(own, other))])
        return measured_allowance(measured, self.level), control_source(len(pair.controls), 2)

    def _some(self, layer: Signatures, pair: Pair) -> Signatures:
        """Returns a layer with some of its units, drawn from the seed of the run."""
        F = len(layer["gate"][1])
        drawn = np.sort(pair.generator("match_moments", "units", F).permutation(F)[: self.control_units])
        return {side: (found[drawn], live[drawn]) for side, (found, live) in layer.items()}


def _as_arrays(layer: Signatures) -> dict[str, np.ndarray]:
    return {f"{side}{part}": found for side, both in layer.items() for part, found in zip(("", " live"), both)}


def _compare(base: Signatures, ft: Signatures, pair: Pair, names: Sequence[str | int]) -> Comparison:
    """Returns the comparison of the matchings by gate and by up signatures."""
    gate, up = (signature_correlations(base[side], ft[side]) for side in PROJECTIONS)
    live = live_units(gate, up)
    return against_each_other(
        match_units(gate, pair.generator("match_moments", *names, "gate"), live),
        match_units(up, pair.generator("match_moments", *names, "up"), live),
    )


def spread_layers(num_layers: int, at_most: int) -> list[int]:
    """Returns at most `at_most` layers, evenly spread from the first to the last."""
    return sorted({round(x) for x in np.linspace(0, num_layers - 1, min(num_layers, at_most))})


def signatures(model: ParamSource, layers: Sequence[int], first: int = 0) -> Iterator[Signatures]:
    """Yields for the layers from `first` on, for `gate` and `up`, the signatures of the units and which are live.

    The moments are those of gate, up and down in the given layers. Units are live that write something and repeat no
    other; see `distinct_units`.
    """
    if first == model.arch.num_layers:
        return
    moments = [_moment(rows) for i in layers for rows in _unit_rows(model.layer(i), model.arch).values()]
    for i in range(first, model.arch.num_layers):
        rows = _unit_rows(model.layer(i), model.arch)
        live = np.isin(np.arange(len(rows["down"])), distinct_units(model, i).kept)
        yield {side: (log_quadratic_forms(rows[side], moments), live) for side in PROJECTIONS}


def signature_correlations(
    base: tuple[Float[np.ndarray, "F M"], np.ndarray], ft: tuple[Float[np.ndarray, "F2 M"], np.ndarray]
) -> Float[np.ndarray, "F F2"]:
    """Returns the cosines between standardised and whitened signatures of two layers; 0 for units that are not live.

    Each model's signatures are standardised over its own live units, and both are whitened with their mean covariance,
    so that coordinates which are shared by all units, or correlated, get little weight.
    """
    ours, theirs = _standardised(*base), _standardised(*ft)
    covariance = sum(side.T @ side / max(1, live.sum()) for side, (_, live) in ((ours, base), (theirs, ft))) / 2
    values, vectors = np.linalg.eigh(covariance + _RIDGE * np.eye(len(covariance)))
    ours, theirs = (_unit_length(side @ (vectors / np.sqrt(values))) for side in (ours, theirs))
    return ours @ theirs.T


def _unit_rows(layer: Tree, arch: Arch) -> dict[str, Float[Array, "F D"]]:
    """Returns a row of length one for each unit, or a zero row: what gate and up read, and what down writes."""
    mlp = layer["mlp"]
    scale = layer.get("mlp_norm", {}).get("scale")
    gain = 1.0 if scale is None else jnp.asarray(scale, jnp.float32) + gain_offset(arch)
    return {
        "gate": _normalised(jnp.asarray(mlp["gate_proj"]["kernel"], jnp.float32).T * gain),
        "up": _normalised(jnp.asarray(mlp["up_proj"]["kernel"], jnp.float32).T * gain),
        "down": _normalised(jnp.asarray(mlp["down_proj"]["kernel"], jnp.float32)),
    }


def log_quadratic_forms(rows: Float[Array, "F D"], moments: Sequence[Float[Array, "D D"]]) -> Float[np.ndarray, "F M"]:
    """Returns the logarithms of `w^T A w` for each row w and each moment A."""
    values = [np.asarray(_quadratic(rows, moment), np.float64) for moment in moments]
    return np.log(np.maximum(np.stack(values, axis=1), _TINY))


def _standardised(signatures: Float[np.ndarray, "F M"], live: np.ndarray) -> Float[np.ndarray, "F M"]:
    alive = signatures[live]
    if not len(alive):
        return np.zeros_like(signatures)
    centred = (signatures - alive.mean(axis=0)) / np.maximum(alive.std(axis=0), 1e-9)
    return np.where(live[:, None], centred, 0.0)


def _unit_length(rows: Float[np.ndarray, "F M"]) -> Float[np.ndarray, "F M"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)


@jax.jit
def _normalised(rows: Float[Array, "F D"]) -> Float[Array, "F D"]:
    length = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return jnp.where(length > 0, rows / jnp.where(length > 0, length, 1.0), 0.0)


@jax.jit
def _moment(rows: Float[Array, "F D"]) -> Float[Array, "D D"]:
    return jnp.einsum("fd,fe->de", rows, rows, precision="highest") / rows.shape[0]


@jax.jit
def _quadratic(rows: Float[Array, "F D"], moment: Float[Array, "D D"]) -> Float[Array, " F"]:
    return (jnp.einsum("fd,de->fe", rows, moment, precision="highest") * rows).sum(axis=1)
