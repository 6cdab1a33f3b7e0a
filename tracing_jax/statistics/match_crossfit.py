"""`match_crossfit`: a rotation learnt from the MLPs of some layers; do the MLP units of the others agree under it?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.progress import tqdm
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
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.mlp_rows import mlp_row_leaves
from tracing_jax.statistics.repeated_layers import repeated_layers
from tracing_jax.statistics.statistic import Pair, Result, Vocabularies, depths_not_applicable
from tracing_jax.statistics.unit_alignment import Units, learn_rotation, row_similarities, units_of, weighted_moments
from tracing_jax.statistics.unit_descriptors import spread_layers
from tracing_jax.statistics.unwritten_features import with_unwritten_features

_FEW_CONTROLS, _MOST_CONTROLS = 6, 64

REPEATED = "layers of both models repeat others, so that the rotation is learnt from what it is tested on"

_TRAIN_LAYERS = 4
"""The most layers, evenly spread, that a rotation is learnt from."""

_UNITS = 2048
"""The most units of each of base's layers that are matched to ft's."""

_CONTROL_UNITS = 512
"""Units of each pair of layers that does not correspond, for the null."""

SPLITS = ("even and odd layers", "halves")
"""The two ways of dividing the layers; either part is held out in turn."""


class Fold(NamedTuple):
    """Layers that the rotation is learnt from, and layers whose units are then compared."""

    split: str
    part: int
    train: Sequence[int]
    held_out: Sequence[int]

    @property
    def name(self) -> str:
        """The name of the fold."""
        return f"{self.split}, {self.part}"


@dataclass(frozen=True)
class MatchCrossfit(options.MatchCrossfit):
    """Unconstrained test: does a rotation learnt from one half of the layers make the units of the other half agree?

    The rotation of the residual stream is learnt from the rows of gate, up and down of some layers (`unit_alignment`).
    Under it, each kind of rows of the held-out layers is matched apart: gate by cosine, up and down by its absolute
    value, since scaling a unit by a negative number changes both signs. Agreement of gate with up and with down
    (without a gate: of up with down) is counted, against the null of `calibration.py`. Its controls are held-out layers
    that do not correspond, under the same rotation. The rotation never depends on the held-out layers: where layers of
    both models repeat others, it does, and the p-value is reserved. Even and odd
    layers take turns, and so do the first and the second half: every layer is held out twice, and Bonferroni pays for
    all.

    Neither text nor embeddings, head or attention enter, so that the test finds relatives with another vocabulary.

    At most 2,048 of base's units are matched to all of ft's, and a rotation is learnt from at most
    four layers. For a pair of 7B models that is about 200 TFLOP and some thirty singular value decompositions
    of 4,096 features: an hour on two cores, 8 GiB; minutes on an accelerator.

    Attributes:
      level: of the verdict; the allowance that control models give is a bound for it.

    Source: ours. The rotation solves the orthogonal Procrustes problem (Schönemann 1966).
    """

    level: float = options.RunOptions.level

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why layers of equal index cannot be matched; empty if they can."""
        lines = dense_not_applicable(base, ft) + depths_not_applicable(base, ft, "see match_all")
        if base.gated != ft.gated:
            lines.append("only one model has gates: rows of their MLPs do not correspond")
        if min(base.num_layers, ft.num_layers) < 2:
            lines.append("one layer: none is left to compare")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the result of `_computed`, reserved where rows lie in directions that nothing writes."""
        return with_unwritten_features(self._computed(pair), pair)

    def _computed(self, pair: Pair) -> Result:
        """Returns the calibrated and the parametric tests; no forward pass."""
        compared = self._compared(pair, "pair")
        label = "units of held-out layers on which their rows agree, share"
        places = [f"layer {i}" for i in range(len(compared.layers))]
        nulls = nulls_of(compared, pair, self._compared, self.level)
        found = agreement_result("match_crossfit", pair, compared, nulls, label, places)
        if found.log10_p is None or not (repeated_layers(pair.base) and repeated_layers(pair.ft)):
            return found
        return replace(found, reservation=REPEATED, firm_log10_p=0.0)

    def _compared(self, pair: Pair, name: str) -> PairAgreements:
        """Returns the agreements of every layer in both splits, held out, and those of controls of all folds."""
        all_folds = folds(pair.base.arch.num_layers)
        places = control_places(all_folds, pair.generator("match_crossfit", "controls"))
        layers: list[Agreements] = [{} for _ in range(pair.base.arch.num_layers)]
        controls: list[Agreements] = []
        for f, fold in enumerate(tqdm(all_folds, desc="match_crossfit", unit="rotation", disable=None)):
            rotation, samples = self._rotation(pair, fold, name), {}
            for i in fold.held_out:
                ours, theirs = self._layer(pair, pair.base, i, "base"), _units(pair.ft, i)
                found = compare_rows(ours, theirs, rotation, pair, ("match_crossfit", name, fold.name, i))
                layers[i] |= _named(found, (fold.split,))
                samples[i] = self._few(pair, ours), self._few(pair, theirs)
            for i, j in (place for of, *place in places if of == f):
                names = ("match_crossfit", name, fold.name, "control", i, j)
                found = compare_rows(samples[i][0], samples[j][1], rotation, pair, names)
                controls.append(_named(found, SPLITS))  # few layers give few controls: both splits share them
        return PairAgreements(layers, controls)

    def _rotation(self, pair: Pair, fold: Fold, name: str) -> Float[Array, "D2 D"]:
        """Returns the rotation learnt from the training layers of a fold."""

        def learn() -> dict[str, np.ndarray]:
            train = [fold.train[i] for i in spread_layers(len(fold.train), _TRAIN_LAYERS)]
            ours, theirs = ([_units(model, i) for i in train] for model in (pair.base, pair.ft))
            moments = tuple([moment for layer in side for moment in weighted_moments(layer)] for side in (ours, theirs))
            some = [layer.some(some_units(len(layer.live), _UNITS, pair, "base")) for layer in ours]
            generator = pair.generator("match_crossfit", name, fold.name)
            return {"rotation": np.asarray(learn_rotation(some, theirs, moments, generator))}  # type: ignore[arg-type]

        run_cache = pair.run_cache.scope("match_crossfit", name)
        return jax.device_put(run_cache.cached_arrays(("rotation", fold.name), learn)["rotation"])

    def _layer(self, pair: Pair, model: ParamSource, layer: int, side: str) -> Units:
        found = _units(model, layer)
        return found.some(some_units(len(found.live), _UNITS, pair, side))

    def _few(self, pair: Pair, units: Units) -> Units:
        return units.some(some_units(len(units.live), _CONTROL_UNITS, pair, "controls"))


def folds(num_layers: int) -> list[Fold]:
    """Returns the ways in which layers are held out: even and odd ones, the first and the second half, in turns."""
    every, middle = list(range(num_layers)), num_layers // 2
    parts = ((every[::2], every[1::2]), (every[:middle], every[middle:]))
    return [Fold(split, part, both[1 - part], both[part]) for split, both in zip(SPLITS, parts) for part in (0, 1)]


def _named(found: Agreements, splits: Sequence[str]) -> Agreements:
    return {f"{name}, {split}": comparison for split in splits for name, comparison in found.items()}


def control_places(found: Sequence[Fold], generator: np.random.Generator) -> list[tuple[int, int, int]]:
    """Returns up to 64 (fold, layer of base, layer of ft), both held out and neither equal nor adjacent.

    If there are fewer than 6 of them, adjacent layers are included.
    """

    def apart(least: int) -> Iterator[tuple[int, int, int]]:
        for f, fold in enumerate(found):
            yield from ((f, i, j) for i in fold.held_out for j in fold.held_out if abs(i - j) >= least)

    places = list(apart(2))
    if len(places) < _FEW_CONTROLS:
        places = list(apart(1))
    return [places[at] for at in generator.permutation(len(places))[:_MOST_CONTROLS]]


def compare_rows(
    base: Units, ft: Units, rotation: Float[Array, "D2 D"], pair: Pair, names: Sequence[str | int]
) -> Agreements:
    """Returns the agreements of two layers' rows under a rotation of ft's."""
    sides = row_similarities(base, ft, rotation)
    pairs = [("gate", "up"), ("gate", "down")] if "gate" in sides else [("up", "down")]
    return agreements(sides, pairs, pair, names)


def _units(model: ParamSource, layer: int) -> Units:
    return units_of(model.layer(layer, mlp_row_leaves(model.arch)), model.arch, distinct_units(model, layer))
