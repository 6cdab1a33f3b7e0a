"""`match_moments`: `match` by weights that answer to weights. It needs no text and no embeddings, and no basis."""

import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.matching import live_units, match_units
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.calibration import (
    LEAST_ALLOWANCE,
    control_pairs,
    control_source,
    measured_allowance,
    null_of,
)
from tracing_jax.statistics.comparison import (
    Comparison,
    against_each_other,
    bonferroni_log10,
    share_agreeing,
    share_by_layer,
)
from tracing_jax.statistics.match import form_tests, gate_problems
from tracing_jax.statistics.moments import SIDES, signature_correlations, signatures, spread_layers
from tracing_jax.statistics.statistic import AFTER_ALIGNMENT, Pair, Result, Vocabularies

Signed = dict[str, tuple[np.ndarray, np.ndarray]]
"""`gate`, `up` -> signatures of a layer's units, and which units live."""

FORM = "moments"


class MatchMoments(options.MatchMoments):
    """Unconstrained test, as `match`, with the signatures of `moments.py` in the place of activations.

    Gate rows are matched by their signatures, up rows by theirs, and the two matchings compared. It finds a model whose
    embeddings and head were replaced, which leaves `match` nothing to stand on, in whatever order or basis the rest is.
    """

    needs_tokens: ClassVar[bool] = False

    def problems(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why no layer of these models can be matched with the layer of equal index."""
        lines = gate_problems(base, ft)
        if base.num_layers != ft.num_layers:
            lines.append(f"different depth ({base.num_layers} and {ft.num_layers} layers): see match_all")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the tests, parametric and calibrated."""
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
        tests = form_tests(FORM, layers, null)
        result = Result(
            headline=share_agreeing(layers),
            label="units on which gate and up projection agree by their second moments, share",
            log10_p=bonferroni_log10([test for test in tests if test.decides]),
            tests=tests,
            null={FORM: null.as_dict()},
            per_layer=share_by_layer(layers),
            notes=list(null.notes),
        )
        return result.without_p(AFTER_ALIGNMENT) if pair.aligned else result

    def _signatures(self, model: ParamSource, side: str, run_cache: RunCache) -> list[Signed]:
        """Returns the signatures of every layer: of an interrupted run's layers those that were kept."""
        L, found = model.arch.num_layers, list[Signed]()
        while (arrays := run_cache.load_arrays(side, len(found))) is not None:
            found.append({name: (arrays[name], arrays[f"{name} live"]) for name in SIDES})
        layers = signatures(model, spread_layers(L, self.moments_of), len(found))
        desc = f"match_moments, {side}"
        for layer in tqdm(layers, desc=desc, unit="layer", initial=len(found), total=L, disable=None):
            run_cache.save_arrays(functools.partial(_as_arrays, layer), side, len(found))
            found.append(layer)
        return found

    def _allowance(self, base: list[Signed], ft: list[Signed], pair: Pair) -> tuple[list[float], str]:
        """Returns the share of each layer's units that may agree by convergence, and where it comes from."""
        if not pair.controls:
            return [LEAST_ALLOWANCE] * len(base), "our own seeds agreed on no more than chance; see docs/nulls.md"
        measured = []
        for c, control in enumerate(pair.controls):
            own = self._signatures(control, f"control {c}", pair.run_cache.scope("match_moments"))
            for side, other in (("base", base), ("ft", ft)):
                measured.append([_compare(*both, pair, (c, side, i)) for i, both in enumerate(zip(own, other))])
        return measured_allowance(measured), control_source(len(pair.controls), 2)

    def _some(self, layer: Signed, pair: Pair) -> Signed:
        """Returns a layer with some of its units, drawn from the seed of the run."""
        F = len(layer["gate"][1])
        drawn = np.sort(pair.generator("match_moments", "units", F).permutation(F)[: self.control_units])
        return {side: (found[drawn], live[drawn]) for side, (found, live) in layer.items()}


def _as_arrays(layer: Signed) -> dict[str, np.ndarray]:
    return {f"{side}{part}": found for side, both in layer.items() for part, found in zip(("", " live"), both)}


def _compare(base: Signed, ft: Signed, pair: Pair, names: Sequence[str | int]) -> Comparison:
    """Returns how far the matchings by gate and by up signatures agree."""
    gate, up = (signature_correlations(base[side], ft[side]) for side in SIDES)
    live = live_units(gate, up)
    return against_each_other(
        match_units(gate, pair.generator("match_moments", *names, "gate"), live),
        match_units(up, pair.generator("match_moments", *names, "up"), live),
    )
