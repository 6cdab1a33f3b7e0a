"""`match_moments`: `match` by second moments of weights, without text or embeddings, and invariant to the basis.

Gate and up projection read the residual stream and down writes to it. Over its units, each of them has a second moment
`A = sum_f w_f w_f^T` of its rows, which are scaled to length one. The descriptor of a row w are the numbers `w^T A w`,
one for each A. A rotation or permutation of the stream transforms w and every A together, and permuting or scaling the
units, or padding them with zeros, leaves the sums unchanged, so descriptors are invariant. Embeddings, head and
attention do not enter.

Letters: F units of a layer, D features, M moments.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.matching import live_units, match_units
from tracing_jax.progress import tqdm
from tracing_jax.rewrites import gain_offset
from tracing_jax.run_cache import RunCache
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.agreement import agreement_tests, some_units
from tracing_jax.statistics.calibration import (
    BY_CONVERGENCE,
    CONTROL_UNITS,
    DEFAULT_ALLOWANCE,
    DEFAULT_SOURCE,
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
    against_each_other,
    bonferroni_log10,
    one_test,
    reserved,
    share_agreeing,
    share_by_layer,
)
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.layer_moments import Drawn, layer_descriptors
from tracing_jax.statistics.match import form_tests, gates_not_applicable
from tracing_jax.statistics.match_all import assign_layers, layer_map_sentence, unexplained
from tracing_jax.statistics.mlp_rows import unit_length
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies, depths_not_applicable
from tracing_jax.statistics.unit_descriptors import (
    Descriptors,
    descriptor_correlations,
    log_quadratic_forms,
    spread_layers,
)
from tracing_jax.statistics.unwritten_features import with_unwritten_features
from tracing_jax.tree import taken

PROJECTIONS = ("gate", "up")

_MOMENTS_OF = 8
"""The most layers, evenly spread, that give their moments."""

_MAP_UNITS = 512
"""Units of base's layers that are matched at unequal depth."""

_TEST_NAMES = {"model": "moments", "layer": "layer moments"}
"""Form -> the name of its test."""

_LABEL = "units on which gate and up projection agree by their second moments, share"


@dataclass(frozen=True)
class MatchMoments(options.MatchMoments):
    """Unconstrained test like `match`, with descriptors of second moments in place of activations.

    Gate rows are matched by their descriptors, up rows by theirs, and the two matchings compared. It finds a model
    whose embeddings and head were replaced, which `match` does not detect, whatever the order or basis of the other
    weights.

    The form `model` takes the moments of gate, up and down rows of all layers, up to eight. The form `layer`
    (`layer_moments`) takes those of a unit's own layer, of its attention too, and their means over the layers: it needs
    no equal depth. Models of unequal depth are compared layer by layer with at most 512 of base's units, and
    layers assigned as in `match_all`; its p-values are of agreement alone, after Bonferroni over all pairs of layers.

    With `layers`, so many are drawn from the seed, and no others read: they are compared, and the form `layer` has no
    means over layers. With `units`, so many of base's in each are matched to all of ft's.

    Attributes:
      level: of the verdict; the allowance that control models give is a bound for it.
    """

    level: float = options.RunOptions.level

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why no layers of these models can be matched; empty if they can."""
        lines = gates_not_applicable(base, ft)
        if self.layers:
            return lines + depths_not_applicable(base, ft, "match_moments.layers draws layers of equal index")
        if "layer" in self.forms:
            return lines
        return lines + depths_not_applicable(base, ft, "see match_all, or the form layer")

    def compute(self, pair: Pair) -> Result:
        """Returns the result of `_computed`, reserved where rows lie in directions that nothing writes."""
        return with_unwritten_features(self._computed(pair), pair)

    def _computed(self, pair: Pair) -> Result:
        """Returns the calibrated and the parametric tests; no forward pass."""
        if pair.base.arch.num_layers != pair.ft.arch.num_layers:
            return self._mapped(pair)
        numbers = self._layers(pair)
        found = {form: self._compared(form, pair, numbers) for form in self.forms}
        tests = [
            replace(test, places=[f"layer {i}" for i in numbers])
            for form, (layers, null) in found.items()
            for test in _tests(form, layers, null)
        ]
        best = max((layers for layers, _ in found.values()), key=share_agreeing)
        is_part = len(numbers) < pair.base.arch.num_layers
        drawn = [f"match_moments: layers {', '.join(map(str, numbers))} were drawn and compared"] if is_part else []
        return Result(
            headline=share_agreeing(best),
            label=_LABEL,
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null={_TEST_NAMES[form]: null.as_dict() for form, (_, null) in found.items()},
            per_layer=None if is_part else share_by_layer(best),
            notes=[*drawn, *(note for _, null in found.values() for note in null.notes)],
            effect=agreement_effect(best, "match_moments"),
            blind_to=("layers that were not drawn",) if is_part else None,
            **reserved(tests, BY_CONVERGENCE),
        ).for_pair(pair)

    def _layers(self, pair: Pair) -> list[int]:
        """Returns the numbers of the layers that are compared, of models of equal depth."""
        L = pair.base.arch.num_layers
        if not 0 < self.layers < L:
            return list(range(L))
        return sorted(map(int, pair.generator("match_moments", "layers").choice(L, self.layers, replace=False)))

    def _compared(self, form: str, pair: Pair, numbers: Sequence[int]) -> tuple[list[Comparison], Null]:
        """Returns the comparison of these layers in one form, and its null."""
        names = () if form == "model" else (form,)
        run_cache = pair.run_cache.scope("match_moments", *names)
        base = self._descriptors(form, pair.base, run_cache, "base", numbers, self._drawn(pair))
        ft = self._descriptors(form, pair.ft, run_cache, "ft", numbers)
        layers = [
            run_cache.cached(Comparison, (i,), functools.partial(_compare, *both, pair, (*names, i)))
            for i, both in zip(numbers, zip(base, ft))
        ]
        pairs = control_pairs(len(base), len(ft), pair.generator("match_moments", "controls"))
        controls = [
            _compare(self._some(base[i], pair), self._some(ft[j], pair), pair, (*names, "control", i, j))
            for i, j in pairs
        ]
        return layers, null_of(controls, *self._allowance(form, base, ft, pair, numbers))

    def _drawn(self, pair: Pair) -> Drawn | None:
        """Returns what draws the units of base that are compared, from those that are live; None for all."""
        if not self.units:
            return None
        return lambda i, live: live[some_units(len(live), self.units, pair, "match_moments", i)]

    def _mapped(self, pair: Pair) -> Result:
        """Returns the tests of every layer of base with every layer of ft, by the form `layer`, and the layer map."""
        run_cache = pair.run_cache.scope("match_moments", "layer")
        base, ft = (
            self._descriptors("layer", model, run_cache, side, range(model.arch.num_layers))
            for model, side in ((pair.base, "base"), (pair.ft, "ft"))
        )
        some = [self._some(layer, pair, _MAP_UNITS) for layer in base]
        table = [
            [
                run_cache.cached(Comparison, (i, j), functools.partial(_compare, ours, theirs, pair, ("map", i, j)))
                for j, theirs in enumerate(ft)
            ]
            for i, ours in enumerate(some)
        ]
        result = _mapped_result(table, _TEST_NAMES["layer"], _LABEL)
        if pair.controls:
            note = "match_moments: control models have base's depth; the default allowance is used at unequal depth"
            result = replace(result, notes=[*result.notes, note])
        return result.for_pair(pair)

    def _descriptors(
        self,
        form: str,
        model: ParamSource,
        run_cache: RunCache,
        side: str,
        numbers: Sequence[int],
        drawn: Drawn | None = None,
    ) -> list[Descriptors]:
        """Returns the descriptors of these layers: of an interrupted run's layers those that were kept."""
        L, found = model.arch.num_layers, list[Descriptors]()
        while (arrays := run_cache.load_arrays(side, len(found))) is not None:
            found.append({name: (arrays[name], arrays[f"{name} live"]) for name in PROJECTIONS})
        is_part = len(numbers) < L
        left, moments_of = numbers[len(found) :], list(numbers) if is_part else spread_layers(L, _MOMENTS_OF)
        if form == "model":
            layers = descriptors(model, moments_of, left, drawn)
        else:
            layers = layer_descriptors(model, [] if is_part else moments_of, left, drawn)
        desc = f"match_moments, {form}, {side}"
        for layer in tqdm(layers, desc=desc, unit="layer", initial=len(found), total=len(numbers), disable=None):
            run_cache.save_arrays(functools.partial(_as_arrays, layer), side, len(found))
            found.append(layer)
        return found

    def _allowance(
        self, form: str, base: list[Descriptors], ft: list[Descriptors], pair: Pair, numbers: Sequence[int]
    ) -> tuple[list[float], str]:
        """Returns for each layer the share of units that may agree by convergence, and its source."""
        if not pair.controls:
            return [DEFAULT_ALLOWANCE] * len(base), DEFAULT_SOURCE
        measured, run_cache = [], pair.run_cache.scope("match_moments", form)
        for c, control in enumerate(pair.controls):
            own = self._descriptors(form, control, run_cache, f"control {c}", numbers)
            some = [self._some(layer, pair, self.units) for layer in own] if self.units else own
            for side, pairs in (("base", zip(base, own)), ("ft", zip(some, ft))):
                measured.append([_compare(*both, pair, (c, side, i)) for i, both in enumerate(pairs)])
        return measured_allowance(measured, self.level, models=len(pair.controls)), control_source(
            len(pair.controls), 2
        )

    def _some(self, layer: Descriptors, pair: Pair, most: int | None = None) -> Descriptors:
        """Returns a layer with some of its units, drawn from the seed of the run; by default those for controls."""
        F = len(layer["gate"][1])
        drawn = np.sort(pair.generator("match_moments", "units", F).permutation(F)[: most or CONTROL_UNITS])
        return {projection: (found[drawn], live[drawn]) for projection, (found, live) in layer.items()}


def _mapped_result(table: Sequence[Sequence[Comparison]], name: str, label: str) -> Result:
    """Returns the test of all pairs of layers by agreement, and the layer map.

    Controls are those of `unexplained`. The effect size is the share of agreeing units in
    the assigned pairs of layers.

    Args:
      table: the comparison of layer i of base with layer j of ft, at [i][j].
      name: of the test.
      label: of the effect size.
    """
    num_base, num_ft = len(table), len(table[0])
    cells = [cell for row in table for cell in row]
    null = null_of(unexplained(table), [DEFAULT_ALLOWANCE], DEFAULT_SOURCE)
    log_p = [null.log_p_agreement(0, cell) for cell in cells]
    places = [f"base {i} : ft {j}" for i in range(num_base) for j in range(num_ft)]
    how = "Holm's minimum over layer pairs"
    calibrated = one_test(f"{name}, agreement, calibrated", cells, log_p, places, bonferroni, how)
    firm = bonferroni([p if null.is_firm(0, share_agreeing([cell])) else 0.0 for p, cell in zip(log_p, cells)])
    calibrated = replace(calibrated, calibrated=True, firm_log10_p=firm / LN10)
    free = [cell.log_p_agreement for cell in cells]
    parametric = one_test(f"{name}, agreement, parametric", cells, free, places, bonferroni, how)
    found = assign_layers(np.array(log_p).reshape(num_base, num_ft), math.log(options.RunOptions.level / len(cells)))
    kept = [table[i][j] for i, j in found.pairs]
    shown = [
        {"base": i, "ft": j, "log10_p": float(log_p[i * num_ft + j] / LN10), "units": table[i][j].units,
         "agreeing": table[i][j].agreeing}
        for i, j in (*found.pairs, *found.copies)
    ]  # fmt: skip
    return Result(
        headline=share_agreeing(kept),
        label=label,
        log10_p=calibrated.log10_p,
        tests=[calibrated, replace(parametric, decides=False)],
        null={name: null.as_dict()},
        layer_map={
            "log10_p": (np.array(log_p).reshape(num_base, num_ft) / LN10).tolist(),
            "pairs": shown[: len(found.pairs)],
            "copies": shown[len(found.pairs) :],
            "unmatched_base": list(found.unmatched_base),
            "unmatched_ft": list(found.unmatched_ft),
            "sentence": layer_map_sentence(found, num_base, num_ft, [(cell.agreeing, cell.units) for cell in kept]),
        },
        notes=list(null.notes),
        effect=agreement_effect(cells, "match_moments", of_pairs=True),
        **reserved([calibrated], BY_CONVERGENCE),
    )


def _tests(form: str, layers: Sequence[Comparison], null: Null) -> list[Test]:
    if form == "model":
        return form_tests(_TEST_NAMES[form], layers, null)
    return agreement_tests(_TEST_NAMES[form], layers, null, [f"layer {i}" for i in range(len(layers))])


def _as_arrays(layer: Descriptors) -> dict[str, np.ndarray]:
    return {
        f"{projection}{part}": found for projection, both in layer.items() for part, found in zip(("", " live"), both)
    }


def _compare(base: Descriptors, ft: Descriptors, pair: Pair, names: Sequence[str | int]) -> Comparison:
    """Returns the comparison of the matchings by gate and by up descriptors."""
    gate, up = (descriptor_correlations(base[projection], ft[projection]) for projection in PROJECTIONS)
    live = live_units(gate, up)
    return against_each_other(
        match_units(gate, pair.generator("match_moments", *names, "gate"), live),
        match_units(up, pair.generator("match_moments", *names, "up"), live),
    )


def descriptors(
    model: ParamSource, moments_of: Sequence[int], layers: Sequence[int], drawn: Drawn | None = None
) -> Iterator[Descriptors]:
    """Yields for some layers, for `gate` and `up`, the descriptors of the units and which are live.

    Units are live that write something and repeat no other; see `distinct_units`.

    Args:
      model: a model whose MLPs have gates.
      moments_of: the layers whose gate, up and down rows give the moments.
      layers: those to describe.
      drawn: gives of the units of a layer those to describe; all by default.
    """
    if not layers:
        return
    moments = [_moment(rows) for i in moments_of for rows in _unit_rows(model, i).values()]
    for i in layers:
        rows, live = _unit_rows(model, i), distinct_units(model, i).is_kept
        if drawn is not None:
            some = drawn(i, np.flatnonzero(live))
            rows, live = {name: jnp.asarray(taken(rows[name], some)) for name in PROJECTIONS}, live[some]
        yield {projection: (log_quadratic_forms(rows[projection], moments), live) for projection in PROJECTIONS}


def _unit_rows(model: ParamSource, index: int) -> dict[str, Float[Array, "F D"]]:
    """Returns a row of length one for each live unit, a zero row for others: gate and up read, down writes."""
    layer, arch, units = model.layer(index), model.arch, distinct_units(model, index)
    mlp = layer["mlp"]
    scale = layer.get(arch.mlp_norm, {}).get("scale", 1.0 - gain_offset(arch))
    kernels = {name: mlp[f"{name}_proj"]["kernel"] for name in PROJECTIONS}
    rows = _kept_rows(
        kernels, units.outputs(mlp["down_proj"]["kernel"]), scale, units.is_kept, gain_offset(arch),
        arch.norm_subtracts_mean,
    )  # fmt: skip
    return {name: rows[name] for name in (*PROJECTIONS, "down")}


@functools.partial(jax.jit, static_argnames=("offset", "centred"))
def _kept_rows(
    kernels: Mapping[str, Float[Array, "D F"]],
    down: Float[Array, "F D"],
    scale: Float[Array, "..."],
    is_kept: Bool[np.ndarray | Array, " F"],
    offset: float,
    centred: bool,
) -> dict[str, Float[Array, "F D"]]:
    gain = jnp.asarray(scale, jnp.float32) + offset
    rows = {name: kernel.astype(jnp.float32).T * gain for name, kernel in kernels.items()}
    rows["down"] = down.astype(jnp.float32)
    if centred:  # norms subtract the mean over the features: whatever it is, nothing reads it
        rows = {name: side - side.mean(axis=-1, keepdims=True) for name, side in rows.items()}
    return {name: unit_length(jnp.where(is_kept[:, None], projection, 0.0)) for name, projection in rows.items()}


@jax.jit
def _moment(rows: Float[Array, "F D"]) -> Float[Array, "D D"]:
    return jnp.einsum("fd,fe->de", rows, rows, precision="highest") / rows.shape[0]
