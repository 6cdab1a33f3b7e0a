"""`match_distilled`: gated students of both models' FFNs, matched as in `match`; for FFNs of any kind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tracing_jax.activations import activations
from tracing_jax.arch import Arch
from tracing_jax.data import PairedBlocks
from tracing_jax.grams import correlate
from tracing_jax.source import ParamSource
from tracing_jax.statistics.calibration import LEAST_ALLOWANCE, control_pairs, measured_allowance, null_of
from tracing_jax.statistics.comparison import Comparison, bonferroni_log10, share_agreeing
from tracing_jax.statistics.match import TAPS, compare_taps, form_tests
from tracing_jax.statistics.statistic import AFTER_ALIGNMENT, Pair, Result, Vocabularies
from tracing_jax.statistics.students import Recipe, Student, fit_student, student_correlations

_FFN_TAPS = ("mlp_input", "mlp_output")
_WEAK = 0.5  # explained variance, below which a student says little of its teacher

FORM = "students"


@dataclass(frozen=True)
class MatchDistilled:
    """Unconstrained test for any FFN: without gate, of other width or a mixture of experts.

    To each FFN a gated student is fitted, on its own inputs and outputs at sampled positions of the text. The two
    students of a layer have seeds of their own; a shared one would make them alike. Then `match`: matchings by the
    students' gate and by their up pre-activations, each on its own model's inputs, agree on far more units than those
    of independent models' students do. The calibrated p-values decide.

    One forward pass per model, layer after layer: inputs and outputs of one layer of both models live at a time, 16
    bytes for each token and feature, and of all layers the pre-activations at the control positions.

    Attributes:
      tokens: at most so many paired positions to learn from and to compare on.
      steps, batch, rate, decay: of a student's training; see `students.Recipe`.
      units: width of the students; 0 takes the narrower model's.
      control_positions, control_units: at most so many for the layers that do not correspond.

    Source: Zhu et al. 2025 (arXiv 2502.12292), section 3 (Adam 1e-3, batch 5000, 10,000 steps). Here: weight decay, a
    rate that falls with the width, and the null of `calibration.py`; see docs/distilled.md.
    """

    tokens: int = 32768
    steps: int = 1000
    batch: int = 512
    units: int = 0
    rate: float = Recipe.rate
    decay: float = Recipe.decay
    control_positions: int = 1024
    control_units: int = 2048

    @property
    def needs_tokens(self) -> bool:
        """Students learn from text."""
        return True

    def problems(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why no layer of these models can be compared with the layer of equal index."""
        if base.num_layers == ft.num_layers:
            return []
        return [
            f"different depth ({base.num_layers} and {ft.num_layers} layers): students are compared at equal index; "
            "match_all finds which layers correspond, where both models have a gate"
        ]

    def compute(self, pair: Pair) -> Result:
        """Returns the calibrated tests, and the parametric ones beside them; one forward pass per model."""
        layers, controls, explained = self._layers(pair.base, pair.ft, pair, FORM)
        null = null_of(controls, *self._allowance(pair))
        tests = form_tests(FORM, layers, null)
        result = Result(
            headline=share_agreeing(layers),
            label="units on which the students' gate and up projection agree, share",
            log10_p=bonferroni_log10([test for test in tests if test.decides]),
            tests=tests,
            null={FORM: null.as_dict() | {"explained": {"base": explained[0], "ft": explained[1]}}},
            per_layer={"label": "log10 p by agreement, calibrated", "values": list(tests[0].log10_ps or ())},
            notes=[*null.notes, *_notes(explained, pair)],
        )
        return result.without_p(AFTER_ALIGNMENT) if pair.aligned else result

    def recipe(self, base: Arch, ft: Arch) -> Recipe:
        """Returns how the students of two models are trained; both have one width."""
        return Recipe(self.units or min(base.mlp_dim, ft.mlp_dim), self.steps, self.batch, self.rate, self.decay)

    def _layers(
        self, base: ParamSource, ft: ParamSource, pair: Pair, name: str
    ) -> tuple[list[Comparison], list[Comparison], tuple[list[float], list[float]]]:
        """Returns the comparisons of the layers, of layer pairs that do not correspond, and what students explain."""
        layers, samples = [], []
        explained: tuple[list[float], list[float]] = ([], [])
        for i, inputs, students in self._students(base, ft, pair, name):
            by_tap = student_correlations(*zip(inputs, students))
            layers.append(compare_taps(by_tap, pair, ("match_distilled", name, i)))
            samples.append([self._sample(*both, pair) for both in zip(inputs, students)])
            for student, values in zip(students, explained):
                values.append(student.explained)
        pairs = control_pairs(len(layers), len(layers), pair.generator("match_distilled", name, "controls"))
        controls = [
            compare_taps(
                {tap: correlate(samples[i][0][tap], samples[j][1][tap]) for tap in TAPS},
                pair,
                ("match_distilled", name, "control", i, j),
            )
            for i, j in pairs
        ]
        return layers, controls, explained

    def _students(
        self, base: ParamSource, ft: ParamSource, pair: Pair, name: str
    ) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray], tuple[Student, Student]]]:
        """Yields for each layer both FFNs' inputs and students; those of the layers before are gone."""
        assert pair.blocks is not None
        blocks = pair.blocks.sampled(self.tokens, pair.generator("match_distilled", "positions"))
        recipe = self.recipe(base.arch, ft.arch)
        for i, sides in enumerate(_ffns(base, ft, blocks, pair)):
            seeds = student_seeds(pair, name, i)
            fitted = [fit_student(x, y, recipe, seed) for (x, y), seed in zip(sides, seeds)]
            yield i, (sides[0][0], sides[1][0]), (fitted[0], fitted[1])

    def _sample(self, x: np.ndarray, student: Student, pair: Pair) -> dict[str, np.ndarray]:
        """Returns pre-activations of some units at some positions: the same positions for every layer and model."""
        rows = pair.generator("match_distilled", "rows").permutation(len(x))[: self.control_positions]
        units = pair.generator("match_distilled", "units").permutation(student.gate.shape[1])[: self.control_units]
        return {"gate": x[rows] @ student.gate[:, units], "up": x[rows] @ student.up[:, units]}

    def _allowance(self, pair: Pair) -> tuple[list[float], str]:
        """Returns the share of each layer that may agree by convergence, and where it comes from."""
        if not pair.controls:
            source = f"{LEAST_ALLOWANCE:g}; students of independent models agreed on less, see docs/distilled.md"
            return [LEAST_ALLOWANCE] * pair.base.arch.num_layers, source
        measured = [
            self._layers(control, model, pair, f"control {c} {side}")[0]
            for c, control in enumerate(pair.controls)
            for side, model in (("base", pair.base), ("ft", pair.ft))
        ]
        source = (
            f"{len(pair.controls)} control models, each against base and ft: upper 99 % bound of the greatest share"
        )
        return measured_allowance(measured), source


def student_seeds(pair: Pair, name: str, layer: int) -> tuple[int, int]:
    """Returns the seeds of base's and of ft's student of a layer.

    Raises:
      ValueError: they are equal, and the students would be alike for that alone.
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
    walks = [
        activations(model, ids, at, blocks.valid, _FFN_TAPS, pair.compute, description)
        for model, ids, at, description in sides
    ]
    for found in zip(*walks, strict=True):
        yield [(taps["mlp_input"], taps["mlp_output"]) for _, taps in found]


def _notes(explained: Sequence[Sequence[float]], pair: Pair) -> list[str]:
    assert pair.blocks is not None
    notes = [
        f"variance explained by the students: {side} " + ", ".join(f"{value:.2f}" for value in values)
        for side, values in zip(("base", "ft"), explained)
    ]
    for side, values in zip(("base", "ft"), explained):
        if weak := [f"layer {i}" for i, value in enumerate(values) if value < _WEAK]:
            notes.append(f"{side}: students of {', '.join(weak)} explain less than {_WEAK:g} and can carry no evidence")
    return [*notes, f"positions paired by {pair.blocks.how}"]
