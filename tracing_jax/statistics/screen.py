"""`screen`: a first look at a small part of the weights. `csu` on sampled units, `match` on three sampled layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.forward import correlate, embedding_activations
from tracing_jax.sources import Submodel
from tracing_jax.statistics.calibration import Null, null_of, tabled_allowance
from tracing_jax.statistics.comparison import Comparison, bonferroni_log10, share_agreeing, share_by_layer, tests_of
from tracing_jax.statistics.constrained import layers_in_common
from tracing_jax.statistics.cosine import similarities
from tracing_jax.statistics.csu import compare_rows, unit_rows
from tracing_jax.statistics.match import TAPS, compare_taps, form_tests
from tracing_jax.statistics.pvalues import fisher
from tracing_jax.statistics.screen_plan import Plan, parameters, plan_within
from tracing_jax.statistics.statistic import AFTER_ALIGNMENT, Pair, Result, Test, Vocabularies

_UP = "mlp/up_proj/kernel"


class Screen(options.Screen):
    """Two tests on a part of the weights that is stated in the record, with the p-values of `csu` and of `match`.

    Units in place: a run of units, drawn from the seed, the same in both models, is matched within itself as by `csu`.
    If one model was trained independently of the other and treats units alike, then permuting its units leaves its law
    unchanged, and so does permuting those of the run among themselves; the p-values are as exact as those of `csu`.
    What is lost is power: h units of a run bound a layer's p by 1 / h!, and as with `csu` units that were moved are not
    found at all.

    Sampled layers: three layers of ft, spread over the depth, in which the units of a run of base's are looked for by
    the weights-only form of `match`. That sees through permutations. What is lost: a relative of which other layers
    alone are inherited, and one whose embeddings are not.

    Source: Zhu et al. 2025 (arXiv 2502.12292) for both tests; sampling is ours.
    """

    @property
    def needs_tokens(self) -> bool:
        """It reads no text."""
        return False

    def problems(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why neither part can be computed on models of these shapes."""
        plan = plan_within(self.share, base, ft, vocabularies)
        return [] if plan.units or plan.layers else list(plan.left_out)

    def compute(self, pair: Pair) -> Result:
        """Returns the tests of both parts and what was read for them."""
        plan = plan_within(self.share, pair.base.arch, pair.ft.arch, pair.vocabularies)
        read = {"base": [0, 0], "ft": [0, 0]}
        tests: list[Test] = []
        notes, null, per_layer, shares = list(plan.left_out), None, None, []
        if plan.units:
            in_place = list(_in_place(plan, pair, read))
            places = [f"layer {i}" for i in range(len(in_place))]
            tests += _named("units in place", tests_of(in_place, places, fisher, "Fisher over layers"))
            per_layer, shares = share_by_layer(in_place), [share_agreeing(in_place)]
        if plan.layers:
            layers, null_found = _sampled_layers(plan, pair, read)
            found = form_tests("sampled layers", layers, null_found)
            tests += [replace(test, places=[f"layer {i}" for i in plan.layers]) for test in found]
            null = {"sampled layers": null_found.as_dict()}
            notes += [f"sampled layers: {note}" for note in null_found.notes]
            shares.append(share_agreeing(layers))
        facts = _read_facts(pair, read)
        result = Result(
            headline=max(shares),
            label="sampled units found in place, or on which gate and up projection agree, share (the larger)",
            log10_p=bonferroni_log10([test for test in tests if test.decides]),
            tests=tests,
            null=null,
            per_layer=per_layer,
            notes=[_sentence(plan, facts), *notes],
            read=facts,
        )
        return result.without_p(AFTER_ALIGNMENT) if pair.aligned else result


def _in_place(plan: Plan, pair: Pair, read: Mapping[str, list[int]]) -> Iterator[Comparison]:
    """Yields for each layer how far matching keeps the units of a run in place."""
    width, none = min(pair.base.arch.mlp_dim, pair.ft.arch.mlp_dim), np.zeros(0, np.int32)
    for i in tqdm(range(layers_in_common(pair)), desc="screen: units in place", unit="layer", disable=None):
        start = int(pair.generator("screen", "units", i).integers(width - plan.units + 1))
        run = slice(start, start + plan.units)
        rows = []
        for side, model in (("base", pair.base), ("ft", pair.ft)):
            excerpt = Submodel(model, (i,), run, none, read[side])
            rows.append(unit_rows(excerpt.layer(0, (_UP,)), "up_proj"))
        yield compare_rows(similarities(*rows), pair.generator("screen", i))


def _sampled_layers(plan: Plan, pair: Pair, read: Mapping[str, list[int]]) -> tuple[list[Comparison], Null]:
    """Returns how far gate and up projection agree in each sampled layer, and the null from pairs of different ones."""
    num_shared = len(pair.vocabularies.ids_base)
    first = int(pair.generator("screen", "tokens").integers(num_shared - plan.tokens + 1))
    tokens = [ids[first : first + plan.tokens] for ids in (pair.vocabularies.ids_base, pair.vocabularies.ids_ft)]
    start = int(pair.generator("screen", "match units").integers(pair.base.arch.mlp_dim - plan.match_units + 1))
    base = Submodel(pair.base, plan.layers, slice(start, start + plan.match_units), tokens[0], read["base"])
    ft = Submodel(pair.ft, plan.layers, None, tokens[1], read["ft"])
    ids = np.arange(plan.tokens, dtype=np.int32)
    kept = [by_tap for _, by_tap in embedding_activations(base, ids, TAPS, "screen: base's sampled layers")]
    compared: dict[tuple[int, int], Comparison] = {}
    for j, others in embedding_activations(ft, ids, TAPS, "screen: ft's sampled layers"):
        for i, by_tap in enumerate(kept):
            similarity = {tap: correlate(by_tap[tap], others[tap]) for tap in TAPS}
            compared[i, j] = compare_taps(similarity, pair, ("screen", "match", i, j))
    allowance = tabled_allowance(pair.base.arch.num_layers, "weights")
    source = "the table measured on our own seeds, by relative depth, and 0.05 at least"
    null = null_of([c for (i, j), c in compared.items() if i != j], [allowance[i] for i in plan.layers], source)
    return [compared[i, i] for i in range(len(plan.layers))], null


def _named(part: str, tests: Sequence[Test]) -> list[Test]:
    return [replace(test, name=f"{part}, {test.name}") for test in tests]


def _read_facts(pair: Pair, read: Mapping[str, list[int]]) -> dict[str, dict[str, int | float]]:
    """Returns for each side the bytes looked at, and the share of its weights that they hold."""
    return {
        side: {"bytes": read[side][1], "share": read[side][0] / parameters(model.arch)}
        for side, model in (("base", pair.base), ("ft", pair.ft))
    }


def _sentence(plan: Plan, facts: Mapping[str, Mapping[str, int | float]]) -> str:
    """Returns what was looked at, and what that cannot find."""
    parts, blind = [], []
    if plan.units:
        parts.append(f"{plan.units} units of every layer")
        blind.append("units that were moved are not found in place")
    if plan.layers:
        parts.append(f"{plan.match_units} units of base in layers {', '.join(map(str, plan.layers))} of ft")
        blind.append("what was inherited in other layers alone, or without the embeddings, is not found in these")
    read = ", ".join(f"{fact['share']:.3g} of {side} ({fact['bytes'] / 2**20:.3g} MiB)" for side, fact in facts.items())
    return f"looked at {' and '.join(parts)}: {read}; {'; '.join(blind)}"
