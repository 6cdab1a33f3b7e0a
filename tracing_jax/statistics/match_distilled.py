"""`match_distilled`: both models' FFNs are distilled into gated students, which are matched as in `match`."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.data import PairedBlocks
from tracing_jax.forward import activations, correlate
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.calibration import (
    BY_CONVERGENCE,
    CONTROL_POSITIONS,
    CONTROL_UNITS,
    DEFAULT_ALLOWANCE,
    Null,
    agreement_effect,
    control_pairs,
    control_source,
    measured_allowance,
    null_of,
)
from tracing_jax.statistics.comparison import (
    LN10,
    Comparison,
    bonferroni_log10,
    one_test,
    reserved,
    share_agreeing,
    share_by_layer,
    tests_of,
)
from tracing_jax.statistics.distinct_units import inactive_layers
from tracing_jax.statistics.match import compare_taps
from tracing_jax.statistics.nulls import composite_agreement_log_sf
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies, depths_not_applicable
from tracing_jax.statistics.students import (
    TAPS,
    Student,
    StudentTraining,
    fit_student,
    residual_up,
    student_correlations,
)

_FFN_TAPS = ("mlp_input", "mlp_output")
_WEAK = 0.5  # explained variance, below which a student is too unlike its teacher to be evidence

FORM = "students"

_MODELS = ("base", "ft")

TARGETS = ("whole", "rest")
"""What the matching by gate is compared with: the matching by up (whole), and by the residual of up given gate."""

REST_ALLOWANCE, REST_ALLOWANCE_TOGETHER = 0.02, 0.01
"""The share of units whose residual of up may agree by convergence: in one layer, and in all together. It may be below
the default allowance, since the test by the residual is an additional one: a layer's p-value is the larger of both."""


@dataclass(frozen=True)
class MatchDistilled(options.MatchDistilled):
    """Unconstrained test for any FFN: without gate, of other width or a mixture of experts.

    A gated student is fitted to each FFN on its own inputs and outputs at sampled positions of the text. The two
    students of a layer have different seeds; a shared one would make them alike. Then, as in `match`, the matchings by
    the students' gate and up pre-activations are compared, each model on its own inputs. They must agree for up, and
    for the residual of up given gate: students of an FFN without a gate have both nearly proportional, and then two
    matchings agree in independent models too. The larger of the two calibrated p-values enters the verdict; the test
    by the residual may combine all layers.

    One forward pass per model, layer by layer: memory holds the inputs and outputs of one layer of both models, 16
    bytes for each token and feature, and the pre-activations of all layers at the control positions.

    On tiny models (4 layers, 192 units; 2 CPU cores, 2026-11-24): a dense model and a mixture of experts upcycled from
    it agree on more than half their units, p = 1e-108, a GPT-2 and its fine-tune on a quarter, 1e-6; independent models
    have p = 1.

    Attributes:
      level: of the verdict; the allowance that control models give is a bound for it.

    Source: Zhu et al. 2025 (arXiv 2502.12292), section 3 (Adam 1e-3, batch 5000, 10,000 steps). Here: weight decay, a
    rate that falls with the width, and the null of `calibration.py`; see docs/distilled.md.
    """

    level: float = options.RunOptions.level

    needs_tokens: ClassVar[bool] = True

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns the reason why layers of equal index cannot be compared; empty if they can."""
        hint = "match_all finds which layers correspond, where both models have a gate"
        return depths_not_applicable(base, ft, f"students are compared at equal index; {hint}")

    def compute(self, pair: Pair) -> Result:
        """Returns the calibrated and the parametric tests; one forward pass per model."""
        found = self._compared(pair.base, pair.ft, pair, FORM)
        shares, source = self._allowances(pair)
        nulls = {target: null_of(found.controls[target], shares[target], source) for target in TARGETS}
        nulls["rest together"] = null_of(found.controls["rest"], shares["rest together"], source)
        inactive = {*inactive_layers(pair.base), *inactive_layers(pair.ft)}
        tests = _tests(found, nulls, inactive)
        return Result(
            headline=share_agreeing(found.layers["whole"]),
            label="units on which the students' gate and up projection agree, share",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null={target: null.as_dict() for target, null in nulls.items()} | {"explained": found.explained},
            per_layer=share_by_layer(found.layers["whole"]),
            notes=[*nulls["whole"].notes, *_notes(found.explained, inactive, pair)],
            effect=agreement_effect(found.layers["rest"], "match_distilled"),
            **reserved(tests, BY_CONVERGENCE),
        ).for_pair(pair)

    def recipe(self, base: Arch, ft: Arch) -> StudentTraining:
        """Returns the hyperparameters of both models' students, which have one width."""
        return StudentTraining(min(base.mlp_dim, ft.mlp_dim), self.steps, self.batch)

    def _compared(self, base: ParamSource, ft: ParamSource, pair: Pair, name: str) -> "_Compared":
        assert pair.blocks is not None
        blocks = pair.blocks.sampled(self.tokens, pair.generator("match_distilled", "positions"))
        recipe, run_cache = self.recipe(base.arch, ft.arch), pair.run_cache.scope("match_distilled", name)
        layers = [
            _cached_layer(run_cache, i, functools.partial(self._layer, i, sides, recipe, pair, name))
            for i, sides in enumerate(_ffns(base, ft, blocks, pair))
        ]
        controls: dict[str, list[Comparison]] = {target: [] for target in TARGETS}
        for i, j in control_pairs(len(layers), len(layers), pair.generator("match_distilled", name, "controls")):
            ours, theirs = layers[i].samples, layers[j].samples
            correlated = {tap: correlate(ours[f"base {tap}"], theirs[f"ft {tap}"]) for tap in TAPS}
            for target, comparison in _by_target(correlated, pair, (name, "control", i, j)).items():
                controls[target].append(comparison)
        return _Compared(
            {target: [layer.comparisons[target] for layer in layers] for target in TARGETS},
            controls,
            {model: [layer.explained[model] for layer in layers] for model in _MODELS},
        )

    def _layer(
        self, i: int, sides: Sequence[tuple[np.ndarray, np.ndarray]], recipe: StudentTraining, pair: Pair, name: str
    ) -> "_Layer":
        """Returns the comparisons of the students of one layer, given both FFNs' inputs and outputs."""
        seeds = student_seeds(pair, name, i)
        students = [fit_student(x, y, recipe, seed) for (x, y), seed in zip(sides, seeds)]
        inputs = [x for x, _ in sides]
        return _Layer(
            _by_target(student_correlations(*zip(inputs, students)), pair, (name, i)),
            {model: student.explained for model, student in zip(_MODELS, students)},
            {
                f"{model} {tap}": found
                for model, x, student in zip(_MODELS, inputs, students)
                for tap, found in self._sample(x, student, pair).items()
            },
        )

    def _sample(self, x: np.ndarray, student: Student, pair: Pair) -> dict[str, np.ndarray]:
        """Returns pre-activations of some units at some positions: the same positions for every layer and model."""
        rows = pair.generator("match_distilled", "rows").permutation(len(x))[:CONTROL_POSITIONS]
        units = pair.generator("match_distilled", "units").permutation(student.gate.shape[1])[:CONTROL_UNITS]
        weights = (student.gate, student.up, residual_up(x, student))
        return {tap: x[rows] @ own[:, units] for tap, own in zip(TAPS, weights, strict=True)}

    def _allowances(self, pair: Pair) -> tuple[dict[str, list[float]], str]:
        """Returns for each null the shares of units that may agree by convergence, and their source."""
        if not pair.controls:
            L, source = pair.base.arch.num_layers, "the default of 0.05, and less for the rest; see docs/distilled.md"
            shares = {"whole": [DEFAULT_ALLOWANCE] * L, "rest": [REST_ALLOWANCE] * L}
            return shares | {"rest together": [REST_ALLOWANCE_TOGETHER]}, source
        measured = [
            self._compared(control, other.ft, other, f"control {c} {side}").layers
            for c, control in enumerate(pair.controls)
            for side, other in (("base", pair.of_base()), ("ft", pair))
        ]
        source = control_source(len(pair.controls), 2)
        least = {"whole": DEFAULT_ALLOWANCE, "rest": REST_ALLOWANCE}
        shares = {
            target: measured_allowance(
                [layers[target] for layers in measured], self.level, least[target], len(pair.controls)
            )
            for target in TARGETS
        }
        return shares | {"rest together": [float(np.mean(shares["rest"]))]}, source


@dataclass(frozen=True)
class _Layer:
    """One layer: comparisons by target; explained variance by model; pre-activations by model and tap."""

    comparisons: Mapping[str, Comparison]
    explained: Mapping[str, float]
    samples: Mapping[str, np.ndarray]


def _cached_layer(run_cache: RunCache, i: int, make: Callable[[], _Layer]) -> _Layer:
    """Returns the layer from the cache of an interrupted run, or computes it."""
    fields, samples = run_cache.load(dict[str, Any], i), run_cache.load_arrays(i)
    if fields is not None and samples is not None:
        comparisons = {target: Comparison(**fields["comparisons"][target]) for target in TARGETS}
        return _Layer(comparisons, fields["explained"], samples)
    layer = make()
    run_cache.save_arrays(lambda: layer.samples, i)
    run_cache.save({"comparisons": {target: asdict(c) for target, c in layer.comparisons.items()},
                   "explained": layer.explained}, i)  # fmt: skip
    return layer


@dataclass(frozen=True)
class _Compared:
    """Target -> comparisons of the layers, and of control pairs of layers; model -> explained variance by layer."""

    layers: Mapping[str, list[Comparison]]
    controls: Mapping[str, list[Comparison]]
    explained: Mapping[str, list[float]]


def _by_target(correlated: Mapping[str, np.ndarray], pair: Pair, names: Sequence[str | int]) -> dict[str, Comparison]:
    """Returns the comparison of the matching by gate with that by up, and with that by the residual of up."""
    return {
        target: compare_taps(
            {"gate": correlated["gate"], "up": correlated[tap]}, pair, ("match_distilled", target, *names)
        )
        for target, tap in zip(TARGETS, ("up", "rest"), strict=True)
    }


def _tests(found: _Compared, nulls: Mapping[str, Null], inactive: Collection[int]) -> list[Test]:
    """Returns the calibrated tests, by the larger of both targets' p-values in each layer, and the parametric ones.

    Students are fitted to outputs of any size, so that layers that add next to nothing to the stream are left out.
    """
    layers, places = found.layers["whole"], [f"layer {i}" for i in range(len(found.layers["whole"]))]
    how = "never smaller than the rest's p-value; Holm's minimum over layers"
    null, rest_null, together = (nulls[name] for name in ("whole", "rest", "rest together"))
    rest, rest_firm = (
        [
            0.0 if i in inactive else p
            for i, p in enumerate(_rest_log_p(found.layers["rest"], rest_null, together, firm))
        ]
        for firm in (False, True)
    )

    def combined(
        name: str, log_p: Callable[[Null, int, Comparison], float], size: Callable[[Comparison], float]
    ) -> Test:
        own = [log_p(null, i, layer) for i, layer in enumerate(layers)]
        firm = [p if null.is_firm(i, size(layer)) else 0.0 for i, (p, layer) in enumerate(zip(own, layers))]
        made = one_test(f"{name}, calibrated", layers, np.maximum(own, rest).tolist(), places, bonferroni, how)
        return replace(made, firm_log10_p=bonferroni(np.maximum(firm, rest_firm).tolist()) / LN10)

    calibrated = [
        combined("agreement", Null.log_p_agreement, lambda layer: share_agreeing([layer])),
        combined("rank correlation", Null.log_p_rank, lambda layer: layer.r),
    ]
    of_rest: dict[str, Sequence[float | int]] = {
        "agreeing, rest": [c.agreeing for c in found.layers["rest"]],
        "r, rest": [c.r for c in found.layers["rest"]],
    }
    parametric = tests_of(layers, places, bonferroni, "Holm's minimum over layers")
    return [replace(test, values={**test.values, **of_rest}, calibrated=True) for test in calibrated] + [
        replace(test, name=f"{test.name}, parametric", decides=False) for test in parametric
    ]


def student_seeds(pair: Pair, name: str, layer: int) -> tuple[int, int]:
    """Returns the seeds of base's and of ft's student of a layer.

    Raises:
      ValueError: they are equal, which alone would make the students alike.
    """
    base, ft = (
        int(pair.generator("match_distilled", name, "student", side, layer).integers(2**31)) for side in ("base", "ft")
    )
    if base == ft:
        raise ValueError(f"layer {layer}: both students would start from seed {base}; choose another seed for the run")
    return base, ft


def _ffns(
    base: ParamSource, ft: ParamSource, blocks: PairedBlocks, pair: Pair
) -> Iterator[Sequence[tuple[np.ndarray, np.ndarray]]]:
    """Yields for each layer the inputs and outputs of base's and of ft's FFN at the same positions."""
    sides = ((base, blocks.base, blocks.at_base, "students of base"), (ft, blocks.ft, blocks.at_ft, "of ft"))
    passes = [
        activations(model, ids, at, blocks.valid, _FFN_TAPS, pair.compute, description)
        for model, ids, at, description in sides
    ]
    for found in zip(*passes, strict=True):
        yield [(taps["mlp_input"], taps["mlp_output"]) for _, taps in found]


def _rest_log_p(layers: Sequence[Comparison], null: Null, null_together: Null, firm: bool) -> list[float]:
    """Returns the log p-value of each layer by the residual: the smaller of its own and that of all layers, times two.

    Without a gate the residual is small, and a single layer has little power. The factor is Bonferroni's. If `firm`,
    agreement of no more than several times the allowance has a p-value of one.
    """
    units, agreeing = sum(c.units for c in layers), sum(c.agreeing for c in layers)
    together = 0.0
    if units:
        lam = min(len(layers) * null_together.lam, units)
        together = composite_agreement_log_sf(agreeing, units, null_together.u[0], lam)
    own = [null.log_p_agreement(i, layer) for i, layer in enumerate(layers)]
    if firm:
        together = together if null_together.is_firm(0, agreeing / max(1, units)) else 0.0
        own = [p if null.is_firm(i, share_agreeing([layer])) else 0.0 for i, (p, layer) in enumerate(zip(own, layers))]
    return [min(0.0, min(log_p, together) + math.log(2)) for log_p in own]


def _notes(explained: Mapping[str, Sequence[float]], inactive: Collection[int], pair: Pair) -> list[str]:
    assert pair.blocks is not None
    notes = [
        f"variance explained by the students: {side} " + ", ".join(f"{value:.2f}" for value in values)
        for side, values in explained.items()
    ]
    if inactive:
        notes.append(f"layers {', '.join(map(str, sorted(inactive)))}: an MLP adds next to nothing there: no evidence")
    for side, values in explained.items():
        if weak := [f"layer {i}" for i, value in enumerate(values) if value < _WEAK]:
            notes.append(f"{side}: students of {', '.join(weak)} explain less than {_WEAK:g}: no evidence")
    return [*notes, f"positions paired by {pair.blocks.how}"]
