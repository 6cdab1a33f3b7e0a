"""`screen`: `csu` on sampled units and `match` on three sampled layers, reading a small part of the weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.axes import axis_table
from tracing_jax.forward import correlate, embedding_activations
from tracing_jax.progress import tqdm
from tracing_jax.sources import InMemory, ParamSource, Submodel
from tracing_jax.statistics.calibration import (
    DEFAULT_ALLOWANCE,
    DEFAULT_SOURCE,
    Null,
    agreement_effect,
    null_of,
)
from tracing_jax.statistics.comparison import (
    Comparison,
    bonferroni_log10,
    reserved,
    share_agreeing,
    share_by_layer,
    unit_notes,
)
from tracing_jax.statistics.cosine import similarities
from tracing_jax.statistics.csu import unit_rows
from tracing_jax.statistics.distinct_units import DistinctUnits, distinct_units
from tracing_jax.statistics.in_place import (
    in_place,
    in_place_effect,
    in_place_tests,
    layers_in_common,
    order_notes,
    order_premises,
    ordered_models,
    rows_not_applicable,
)
from tracing_jax.statistics.match import TAPS, compare_taps, form_tests, gates_not_applicable
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies, depths_not_applicable
from tracing_jax.tree import Tree

_UP = "mlp/up_proj/kernel"
_IN_PLACE = 0.25
"""Share of the weights to be read that goes to the units in place; the rest goes to the sampled layers."""
_PROJECTIONS = 3  # gate and down, beside up, determine which units are copies or write nothing
_FEWEST_UNITS, _MOST_UNITS = 8, 512
_MATCH_UNITS, _LAYERS, _TOKENS = 512, 3, 2048
"""Maximum numbers of base's units in a layer, of layers (three give six control pairs), and of shared tokens."""
_FEWEST_LAYERS = 2


@dataclass(frozen=True)
class ScreenPlan:
    """The part of both models that is read.

    Attributes:
      units: number of consecutive MLP units of every layer that are compared in place; 0 for none.
      layers: layers of which all of ft's units are read; empty for none.
      match_units: number of base's units matched to them.
      tokens: number of shared tokens.
      left_out: reasons why a part is left out.
    """

    units: int
    layers: tuple[int, ...]
    match_units: int
    tokens: int
    left_out: tuple[str, ...]


_UNREAD = (
    "only some units were read, and units that were not can cancel them, so that they may do nothing: compare the "
    "models by csu and match, or auto"
)


class Screen(options.Screen):
    """The tests of `csu` and `match` on a part of the weights, which the record states.

    Units in place: consecutive units, at an offset drawn from the seed and equal in both models, are matched among
    themselves as by `csu`. If one model was trained independently of the other by an algorithm that treats units alike,
    its distribution is invariant under permutations of its units, and so under those of the sampled units; the p-values
    are as exact as those of `csu`. Power is lower: the p-value of a layer with h sampled units is at least 1 / h!, and
    as with `csu` permuted units are not detected.

    Sampled layers: in three layers of ft, spread over the depth, consecutive units of base are matched to all of ft's
    by the form `weights` of `match`, which is invariant to permutations. Not detected are relatives that inherit other
    layers only, or not the embeddings.

    Units that are not read can cancel those that are. So the p-value is reserved: by itself it does not make a pair
    related, but says that a comparison in full is worth its time.

    Source: Zhu et al. 2025 (arXiv 2502.12292) for both tests; sampling is ours.
    """

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why neither part can be computed on models of these shapes; empty if one can."""
        plan = plan_within(self.share, base, ft, vocabularies)
        return [] if plan.units or plan.layers else list(plan.left_out)

    def compute(self, pair: Pair) -> Result:
        """Returns the tests of both parts, and the share of the weights read for them."""
        plan = plan_within(self.share, pair.base.arch, pair.ft.arch, pair.vocabularies)
        read = {"base": [0, 0], "ft": [0, 0]}
        tests: list[Test] = []
        notes, null, per_layer, shares = list(plan.left_out), None, None, []
        premises: list[dict[str, Any]] = []
        effects: list[str] = []
        if plan.units:
            compared = list(_in_place(plan, pair, read))
            places = [f"layer {i}" for i in range(len(compared))]
            tests += _named("units in place", in_place_tests(compared, places))
            per_layer, shares = share_by_layer(compared), [share_agreeing(compared)]
            ordered = ordered_models(compared)
            premises, effects = order_premises(ordered), [in_place_effect(compared)]
            notes += [*unit_notes(compared), *order_notes(ordered)]
        if plan.layers:
            layers, null_found = _sampled_layers(plan, pair, read)
            found = form_tests("sampled layers", layers, null_found)
            tests += [replace(test, places=[f"layer {i}" for i in plan.layers]) for test in found]
            null = {"sampled layers": null_found.as_dict()}
            notes += [f"sampled layers: {note}" for note in null_found.notes]
            shares.append(share_agreeing(layers))
            effects.append(agreement_effect(layers, "screen"))
        facts = _read_facts(pair, read)
        tests = [replace(test, firm_log10_p=0.0) for test in tests]
        return Result(
            headline=max(shares),
            label="sampled units found in place, or on which gate and up projection agree, share (the larger)",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null=null,
            per_layer=per_layer,
            notes=[_sentence(plan, facts), *notes],
            read=facts,
            premises=premises,
            effect="; ".join(effects),
            **reserved(tests, _UNREAD),
        ).for_pair(pair)


def _in_place(plan: ScreenPlan, pair: Pair, read: Mapping[str, list[int]]) -> Iterator[Comparison]:
    """Yields for each layer the comparison of the matching of a run of units with the identity."""
    width, none = min(pair.base.arch.mlp_dim, pair.ft.arch.mlp_dim), np.zeros(0, np.int32)
    for i in tqdm(range(layers_in_common(pair)), desc="screen: units in place", unit="layer", disable=None):
        start = int(pair.generator("screen", "units", i).integers(width - plan.units + 1))
        run = slice(start, start + plan.units)
        rows: list[Any] = []
        units: list[DistinctUnits] = []
        for side, model in (("base", pair.base), ("ft", pair.ft)):
            sampled = _mlps_of(Submodel(model, (i,), run, none, read[side]))
            rows.append(unit_rows(sampled.layer(0, (_UP,)), "up_proj"))
            units.append(distinct_units(sampled, 0))
        yield in_place(similarities(*rows), (units[0], units[1]), pair.generator("screen", i))


def _sampled_layers(plan: ScreenPlan, pair: Pair, read: Mapping[str, list[int]]) -> tuple[list[Comparison], Null]:
    """Returns how far gate and up projection agree in each sampled layer, and the null from pairs of different ones."""
    num_shared = len(pair.vocabularies.ids_base)
    first = int(pair.generator("screen", "tokens").integers(num_shared - plan.tokens + 1))
    tokens = [ids[first : first + plan.tokens] for ids in (pair.vocabularies.ids_base, pair.vocabularies.ids_ft)]
    start = int(pair.generator("screen", "match units").integers(pair.base.arch.mlp_dim - plan.match_units + 1))
    run = slice(start, start + plan.match_units)
    ours = list(_activations_of(plan, pair.base, run, tokens[0], read["base"], "screen: base's sampled layers"))
    compared: dict[tuple[int, int], Comparison] = {}
    theirs = _activations_of(plan, pair.ft, None, tokens[1], read["ft"], "screen: ft's sampled layers")
    for j, (others, units_ft) in enumerate(theirs):
        for i, (by_tap, units) in enumerate(ours):
            similarity = {tap: correlate(by_tap[tap], others[tap]) for tap in TAPS}
            compared[i, j] = compare_taps(similarity, pair, ("screen", "match", i, j), (units, units_ft))
    controls = [c for (i, j), c in compared.items() if i != j]
    null = null_of(controls, [DEFAULT_ALLOWANCE] * len(plan.layers), DEFAULT_SOURCE)
    return [compared[i, i] for i in range(len(plan.layers))], null


def _activations_of(
    plan: ScreenPlan, model: ParamSource, units: slice | None, tokens: np.ndarray, read: list[int], description: str
) -> Iterator[tuple[Mapping[str, np.ndarray], DistinctUnits]]:
    """Yields for each sampled layer the activations of its units on the tokens' embeddings, and which are distinct."""
    embed = Submodel(model, (), units, tokens, read).embed()
    ids = np.arange(plan.tokens, dtype=np.int32)
    for layer in tqdm(plan.layers, desc=description, unit="layer", disable=None):
        one = _mlps_of(Submodel(model, (layer,), units, tokens, read), embed)
        for _, by_tap in embedding_activations(one, ids, TAPS):
            yield by_tap, distinct_units(one, 0)


def _mlps_of(model: Submodel, embed: Tree | None = None) -> InMemory:
    """Returns the only layer of a model without its attention, read once, with the embeddings that are given."""
    return InMemory(model.arch, {"embed": embed, "layers": {"0": model.layer(0, ("mlp", model.arch.mlp_norm))}})


def _named(part: str, tests: Sequence[Test]) -> list[Test]:
    return [replace(test, name=f"{part}, {test.name}") for test in tests]


def _read_facts(pair: Pair, read: Mapping[str, list[int]]) -> dict[str, dict[str, int | float]]:
    """Returns for each side the bytes read, and their share of its weights."""
    return {
        side: {"bytes": read[side][1], "share": read[side][0] / parameters(model.arch)}
        for side, model in (("base", pair.base), ("ft", pair.ft))
    }


def _sentence(plan: ScreenPlan, facts: Mapping[str, Mapping[str, int | float]]) -> str:
    """Returns what was read, and what cannot be detected from it."""
    parts, blind = [], []
    if plan.units:
        parts.append(f"{plan.units} units of every layer")
        blind.append("units that were moved are not found in place")
    if plan.layers:
        parts.append(f"{plan.match_units} units of base in layers {', '.join(map(str, plan.layers))} of ft")
        blind.append("what was inherited in other layers alone, or without the embeddings, is not found in these")
    read = ", ".join(f"{fact['share']:.3g} of {side} ({fact['bytes'] / 2**20:.3g} MiB)" for side, fact in facts.items())
    return f"read {' and '.join(parts)}: {read}; {'; '.join(blind)}"


def plan_within(share: float, base: Arch, ft: Arch, vocabularies: Vocabularies) -> ScreenPlan:
    """Returns the part of both models to be read: at most `share` of the weights of either."""
    budget = min(share * parameters(arch) for arch in (base, ft))
    depth, embed = min(base.num_layers, ft.num_layers), max(base.embed_dim, ft.embed_dim)
    units, left_out = _units_in_place(share, budget, base, ft)
    budget -= (_PROJECTIONS * units + 1) * depth * embed
    tokens, match_units = min(_TOKENS, len(vocabularies.ids_base)), min(_MATCH_UNITS, base.mlp_dim)
    lines = _match_not_applicable(base, ft, tokens)
    count = 0
    if not lines:
        layer = max(_layer_parameters(base, match_units), _layer_parameters(ft, ft.mlp_dim))
        count = min(_LAYERS, depth, int((budget - tokens * embed) / layer))
        if count < _FEWEST_LAYERS:
            lines, count = [f"{share:g} of the weights holds fewer than {_FEWEST_LAYERS} layers' MLPs"], 0
    layers = tuple(np.linspace(0, depth - 1, count).round().astype(int).tolist())
    left_out = [f"units in place: {line}" for line in left_out] + [f"sampled layers: {line}" for line in lines]
    return ScreenPlan(units, layers, match_units, tokens, tuple(left_out))


def parameters(arch: Arch) -> int:
    """Returns the number of weights of a model."""
    table = axis_table(arch)
    return sum(math.prod(table.sizes[axis or ""] for axis in row.axes) for row in table.leaves.values())


def _units_in_place(share: float, budget: float, base: Arch, ft: Arch) -> tuple[int, list[str]]:
    """Returns how many units of each layer are within the budget; 0 and the reasons if too few or not comparable."""
    if lines := rows_not_applicable(base, ft):
        return 0, lines
    depth, width = min(base.num_layers, ft.num_layers), min(base.mlp_dim, ft.mlp_dim)
    units = min(_MOST_UNITS, width, int(_IN_PLACE * budget / (_PROJECTIONS * depth * base.embed_dim)))
    if units < _FEWEST_UNITS:
        return 0, [f"{share:g} of the weights holds fewer than {_FEWEST_UNITS} units a layer"]
    return units, []


def _layer_parameters(arch: Arch, units: int) -> int:
    """Returns the number of weights of so many units, with biases and norm."""
    return _PROJECTIONS * units * (arch.embed_dim + 1) + 2 * arch.embed_dim


def _match_not_applicable(base: Arch, ft: Arch, tokens: int) -> list[str]:
    lines = gates_not_applicable(base, ft) + depths_not_applicable(base, ft, "see match_all")
    if tokens < 2:
        lines.append("the vocabularies share no tokens whose embeddings could be compared")
    return lines
