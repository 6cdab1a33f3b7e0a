"""`match`: do the matchings of units by gate and by up projection agree? Invariant under every rewrite."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Array

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.forward import LayerCorrelations, Sample, correlate, correlations, embedding_correlations
from tracing_jax.matching import UnitMatching, live_units
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import ParamSource, Submodel
from tracing_jax.statistics.agreement import agreement_tests, matchings
from tracing_jax.statistics.calibration import (
    CONTROL_POSITIONS,
    CONTROL_UNITS,
    DEFAULT_ALLOWANCE,
    DEFAULT_SOURCE,
    Null,
    agreement_effect,
    calibrated_test,
    control_pairs,
    control_source,
    measured_allowance,
    null_of,
)
from tracing_jax.statistics.comparison import (
    Comparison,
    against_each_other,
    bonferroni_log10,
    compare_layers,
    live_among,
    reserved,
    sampled_partners,
    share_agreeing,
    share_by_layer,
    tests_of,
    unit_notes,
)
from tracing_jax.statistics.distinct_units import DistinctUnits, distinct_units
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.responses_on_text import asked_on_text, reservations
from tracing_jax.statistics.shared_tokens import with_doubts
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies, depths_not_applicable

TAPS = ("gate", "up")

Samples = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Tap -> activations `[S, F]` of base and of ft at the sampled positions."""


@dataclass(frozen=True)
class Match(options.Match):
    """Unconstrained test: do the matchings by gate and by up activations agree more than those of independent models?

    `forward`: the activations of both models on the same text, centred over the tokens. `weights`: the input of each
    MLP are the normalised embeddings of shared tokens; no forward pass. Up activations are matched by the absolute
    correlation, since a unit scaled by a negative number is the same unit.

    Parametric p-values, of a uniformly random matching, and calibrated ones are reported; the calibrated ones enter the
    verdict, by the smallest over layers, forms and tests after Bonferroni.

    With `units`, the weights form looks for a run of so many units of each of base's layers among all of ft's, at an
    offset drawn from the seed.

    Attributes:
      level: of the verdict; the allowance that control models give is a bound for it.

    Source: Zhu et al. 2025 (arXiv 2502.12292), which uses the parametric rank correlation, Fisher over layers and
    signed cosines without centring; the null of `calibration.py` is ours.
    """

    level: float = options.RunOptions.level

    @property
    def needs_tokens(self) -> bool:
        """Whether the forward form, which needs text, is among the forms."""
        return "forward" in self.forms

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why layers of equal index cannot be matched; empty if they can."""
        lines = gates_not_applicable(base, ft) + depths_not_applicable(base, ft, "see match_all")
        if "forward" not in self.forms and len(vocabularies.ids_base) < 2:
            lines.append("the vocabularies share no tokens whose embeddings could be compared")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the tests of both forms, parametric and calibrated; one forward pass per model."""
        tests: list[Test] = []
        nulls, notes, found = {}, [], {}
        for form in self.forms:
            if form == "weights" and len(pair.vocabularies.ids_base) < 2:
                notes.append("weights-only form: the vocabularies share no tokens")
                continue
            layers, controls = self._layers(form, pair.base, pair.ft, pair, pair.run_cache.scope("match", form))
            null = null_of(list(controls.values()), *self.allowance(form, pair))
            null = replace(null, controls={**null.controls, "places": _places(controls)})
            found[form], nulls[form] = layers, null
            tests += form_tests(form, layers, null)
            notes += [f"{form}: {note}" for note in (*null.notes, *unit_notes(layers))]
            if form == "weights" and self._run_of_units(pair.base.arch, pair) is not None:
                notes.append(f"weights: of each layer {self.units:,} units of base were matched to ft's")
        if "forward" in found and pair.blocks is not None:
            notes.append(f"forward: positions paired by {pair.blocks.how}")
        best = max(found.values(), key=share_agreeing)
        result = Result(
            headline=share_agreeing(best),
            label="units on which gate and up projection agree, share (the larger of the forms)",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null={form: null.as_dict() for form, null in nulls.items()},
            per_layer=share_by_layer(best),
            notes=notes,
            effect=agreement_effect(best),
            unit_map=_unit_map(best, pair),
            **reserved(tests, reservations(layer for layers in found.values() for layer in layers)),
        )
        return (with_doubts(result, pair) if "weights" in found else result).for_pair(pair)

    def _layers(
        self, form: str, base: ParamSource, ft: ParamSource, pair: Pair, run_cache: RunCache
    ) -> tuple[list[Comparison], dict[tuple[int, int], Comparison]]:
        """Returns the comparisons of the layers, and of control pairs of layers: (of base, of ft)."""
        samples: dict[int, Samples] = {}
        run = self._run_of_units(base.arch, pair) if form == "weights" else None
        both = replace(pair, base=base, ft=ft)

        def compare(layer: LayerCorrelations) -> Comparison:
            samples[layer.layer] = layer.samples
            _save_samples(run_cache, layer)
            units = distinct_units(base, layer.layer), distinct_units(ft, layer.layer)
            one, other = match_taps(layer.by_tap, pair, ("match", form, layer.layer), units, run)
            partners = sampled_partners(one, other, 0 if run is None else run.start)
            found = replace(against_each_other(one, other).of_units(*units), partners=partners)
            return found if form == "forward" else asked_on_text(found, both, (layer.layer, layer.layer))

        layers = compare_layers(self._correlations(form, base, ft, pair, run_cache), compare, run_cache)
        samples |= {i: _load_samples(run_cache, i) for i in range(len(layers)) if i not in samples}
        pairs = control_pairs(len(layers), len(layers), pair.generator("match", form, "controls"))
        return layers, dict(zip(pairs, _control_comparisons(samples, pairs, pair, form), strict=True))

    def _correlations(
        self, form: str, base: ParamSource, ft: ParamSource, pair: Pair, run_cache: RunCache
    ) -> Iterable[LayerCorrelations]:
        sample = Sample(CONTROL_POSITIONS, CONTROL_UNITS, pair.seed)
        if form == "forward":
            assert pair.blocks is not None
            return correlations(base, ft, pair.blocks, TAPS, pair.compute, "match", sample, run_cache)
        ids_base, ids_ft = pair.vocabularies.ids_base, pair.vocabularies.ids_ft
        drawn = np.sort(pair.vocabularies.drawn(pair.generator("match", "tokens"), self.max_tokens))
        shared, finished = (ids_base[drawn], ids_ft[drawn]), run_cache.count(Comparison)
        if (run := self._run_of_units(base.arch, pair)) is not None:
            base = Submodel(base, range(base.arch.num_layers), run, shared[0])
            shared = np.arange(len(drawn), dtype=shared[0].dtype), shared[1]
        return embedding_correlations(base, ft, shared, TAPS, pair.compute, sample, first=finished)

    def _run_of_units(self, base: Arch, pair: Pair) -> slice | None:
        """Returns which consecutive units of each of base's layers the weights form takes; None for all."""
        F = min(base.mlp_dim_of(i) for i in range(base.num_layers))
        if not 0 < self.units < F:
            return None
        start = int(pair.generator("match", "units").integers(F - self.units + 1))
        return slice(start, start + self.units)

    def allowance(self, form: str, pair: Pair) -> tuple[list[float], str]:
        """Returns for each of base's layers the share of units that may agree by convergence, and its source.

        Control models are compared with base and, if of equal depth, with ft.
        """
        if not pair.controls:
            return [DEFAULT_ALLOWANCE] * pair.base.arch.num_layers, DEFAULT_SOURCE
        others = [("base", pair.of_base())]
        if pair.base.arch.num_layers == pair.ft.arch.num_layers:
            others.append(("ft", pair))
        measured = [
            self._layers(form, control, other.ft, other, pair.run_cache.scope("match", form, f"control {i} {side}"))[0]
            for i, control in enumerate(pair.controls)
            for side, other in others
        ]
        return measured_allowance(measured, self.level, models=len(pair.controls)), control_source(
            len(pair.controls), len(others)
        )


def _places(controls: Mapping[tuple[int, int], Comparison]) -> list[list[int]]:
    """Returns for the record (layer of base, of ft, units, agreeing units) of each control pair."""
    return [[i, j, found.units, found.agreeing] for (i, j), found in sorted(controls.items(), key=lambda item: item[0])]


def _unit_map(layers: Sequence[Comparison], pair: Pair) -> dict[str, Any]:
    """Returns for the record the partners of units of one layer, that in which most agree."""
    i = max(range(len(layers)), key=lambda i: share_agreeing([layers[i]]))
    units = [model.arch.mlp_dim_of(i) for model in (pair.base, pair.ft)]
    return {
        "layer": i,
        "units": units,
        "readings": list(TAPS),
        "partners": [list(found) for found in layers[i].partners],
    }


def gates_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns reasons why these models have no gate and up projection to match; empty if they have."""
    lines = []
    for side, arch in (("base", base), ("ft", ft)):
        if not getattr(arch, "gated", True):
            lines.append(f"{side} has no gate: gate and up projection cannot be matched apart; see match_distilled")
        if getattr(arch, "num_experts", None):
            lines.append(f"{side} has experts: no two layers have the same units; see match_mlps")
    return lines


def match_taps(
    by_tap: Mapping[str, Array | np.ndarray],
    pair: Pair,
    names: Sequence[str | int],
    units: tuple[DistinctUnits, DistinctUnits] | None = None,
    run: slice | None = None,
) -> tuple[UnitMatching, UnitMatching]:
    """Returns the matchings by gate and by up correlations, over the live units, and of those `units` if given.

    The generators of both matchings follow from the seed of the run and the names. With `run`, the correlations are
    those of this range of base's units.
    """
    similarities = {tap: by_tap[tap] for tap in TAPS}
    if units is None:
        live = live_units(*similarities.values())
    else:
        drawn = None if run is None else np.arange(run.start, run.stop)
        live = live_among(*units, *similarities.values(), drawn=drawn)
    found = matchings(similarities, pair, names, live, absolute=("up",))
    return found["gate"], found["up"]


def compare_taps(
    by_tap: Mapping[str, Array | np.ndarray],
    pair: Pair,
    names: Sequence[str | int],
    units: tuple[DistinctUnits, DistinctUnits] | None = None,
) -> Comparison:
    """Returns the comparison of the matchings by gate and by up correlations; see `match_taps`."""
    found = against_each_other(*match_taps(by_tap, pair, names, units))
    return found if units is None else found.of_units(*units)


def _save_samples(run_cache: RunCache, layer: LayerCorrelations) -> None:
    run_cache.save_arrays(
        lambda: {f"{tap} {side}": found for tap, pair in layer.samples.items() for side, found in enumerate(pair)},
        "samples", layer.layer,
    )  # fmt: skip


def _load_samples(run_cache: RunCache, layer: int) -> Samples:
    arrays = run_cache.load_arrays("samples", layer)
    assert arrays is not None, f"the comparison of layer {layer} was cached without its samples"
    return {tap: (arrays[f"{tap} 0"], arrays[f"{tap} 1"]) for tap in TAPS}


def _control_comparisons(
    samples: Mapping[int, Samples],
    pairs: Sequence[tuple[int, int]],
    pair: Pair,
    form: str,
) -> Iterator[Comparison]:
    for i, j in pairs:
        by_tap = {tap: correlate(samples[i][tap][0], samples[j][tap][1]) for tap in TAPS}
        yield compare_taps(by_tap, pair, ("match", form, "control", i, j))


def form_tests(form: str, layers: Sequence[Comparison], null: Null) -> list[Test]:
    """Returns the calibrated tests of a form, which enter the verdict, and the parametric ones, which do not."""
    places = [f"layer {i}" for i in range(len(layers))]
    calibrated, parametric = agreement_tests(form, layers, null, places)
    rs, log_ps = [found.r for found in layers], [null.log_p_rank(i, found) for i, found in enumerate(layers)]
    name = f"{form}, rank correlation"
    rank = tests_of(layers, places, bonferroni, "Holm's minimum over layers")[0]
    return [
        calibrated,
        calibrated_test(f"{name}, calibrated", log_ps, rs, layers, places, null),
        replace(rank, name=f"{name}, parametric", decides=False),
        parametric,
    ]
