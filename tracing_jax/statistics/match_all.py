"""`match_all`: which layer of ft comes from which layer of base? `match` on every pair of layers."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.forward import activations, correlate, embedding_activations
from tracing_jax.matching import assign, live_units, match_units
from tracing_jax.progress import trange
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.agreement import dense_not_applicable
from tracing_jax.statistics.calibration import (
    DEFAULT_ALLOWANCE,
    Null,
    agreement_effect,
    null_of,
)
from tracing_jax.statistics.comparison import LN10, Comparison, bonferroni_log10, one_test, reserved
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.match import TAPS, Match, compare_taps
from tracing_jax.statistics.match_io import responses
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.responses_on_text import asked_on_text, reservations
from tracing_jax.statistics.shared_tokens import rows_of_tokens, tokens_not_applicable, with_doubts
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies

Activations = Mapping[str, np.ndarray]
"""Tap -> activations `[S, F]` of one layer at the sampled positions."""

_FEW_POSITIONS = 64

CORRESPOND = 1e-6
"""Parametric p-value of two assigned layers, after Bonferroni over all pairs, below which they are no controls."""


@dataclass(frozen=True)
class LayerMap:
    """The assignment of layers of ft to layers of base.

    Attributes:
      pairs: (layer of base, layer of ft), each layer once, in base's order.
      copies: (layer of base, layer of ft) for the remaining layers of ft that match a layer which has a partner
        already: an up-scaled model repeats layers.
      unmatched_base, unmatched_ft: layers that match none.
    """

    pairs: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, int], ...]
    unmatched_base: tuple[int, ...]
    unmatched_ft: tuple[int, ...]


@dataclass(frozen=True)
class MatchAll(options.MatchAll):
    """Every layer of base against every layer of ft, by gate and up activations as in `match`.

    The forward form stores base's and ft's activations at sampled positions of the text, at most `max_gib` in all; the
    weights-only form gives every MLP the embeddings of shared tokens as input. A pair's p-value is the smallest of both
    forms and both tests, after Bonferroni. Layers are assigned by these p-values; a layer may have no partner.

    Without gates there is the weights-only form alone, and what units write takes the place of a second thing that they
    read: as in `match_io`, up rows on the embeddings of shared tokens, and down rows on the rows of the head.

    Fewer positions are sampled if the stored activations would take more than `max_gib`.

    Attributes:
      level: significance level, after Bonferroni over all pairs, below which two layers are assigned to each other.

    Source: Zhu et al. 2025 (arXiv 2502.12292), section 4, which maps the blocks of Llama 3.1 onto those of Llama 3.2.
    """

    level: float = options.RunOptions.level

    @property
    def needs_tokens(self) -> bool:
        """Whether the forward form, which needs text, is among the forms."""
        return "forward" in self.forms

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why no layers of these models can be matched; empty if they can."""
        lines, forms = dense_not_applicable(base, ft) + units_not_applicable(base, ft, vocabularies), self._forms(base)
        if "forward" in forms and self._positions(base, ft) < _FEW_POSITIONS:
            lines.append(f"activations at {_FEW_POSITIONS} positions take more than {self.max_gib:g} GiB; raise it")
        if "forward" not in forms and len(vocabularies.ids_base) < 2:
            lines.append("the vocabularies share no tokens whose embeddings could be compared")
        return lines

    def _forms(self, base: Arch) -> tuple[str, ...]:
        return self.forms if base.gated else ("weights",)

    def compute(self, pair: Pair) -> Result:
        """Returns the layer map with its p-values; one forward pass per model."""
        by_form: dict[str, tuple[list[Activations], list[Activations]]] = {}
        compared: dict[str, list[list[Comparison]]] = {}
        nulls: dict[str, Null] = {}
        log_p: dict[str, np.ndarray] = {}
        firm: dict[str, np.ndarray] = {}
        for form in self._forms(pair.base.arch):
            if form == "forward" or len(pair.vocabularies.ids_base) >= 2:
                by_form[form] = self._activations(form, pair)
                compared[form] = self._compare(form, pair, *by_form[form])
                nulls[form], log_p[form], firm[form] = _calibrated(compared[form], *self._allowances(form, pair))
        combined = np.minimum(0.0, np.min(list(log_p.values()), axis=0) + math.log(len(log_p)))
        found = assign_layers(combined, math.log(self.level / combined.size))
        units = _kept_units(found, by_form, log_p, pair)
        result = self._result(found, combined, compared, nulls, log_p, firm, units, pair)
        return (with_doubts(result, pair) if "weights" in by_form else result).for_pair(pair)

    def _positions(self, base: Arch, ft: Arch) -> int:
        units = sum(arch.mlp_dim_of(i) for arch in (base, ft) for i in range(arch.num_layers))
        bytes_each = 4 * len(self._forms(base)) * len(TAPS) * units
        return int(min(self.positions, self.max_gib * 2**30 // bytes_each))

    def _activations(self, form: str, pair: Pair) -> tuple[list[Activations], list[Activations]]:
        """Returns the activations of all layers of base and of ft at the same positions."""
        count = self._positions(pair.base.arch, pair.ft.arch)
        generator = pair.generator("match_all", form, "positions")
        if form == "forward":
            assert pair.blocks is not None
            chosen = pair.blocks.sampled(count, generator)
            sides = ((pair.base, chosen.base, chosen.at_base, "base"), (pair.ft, chosen.ft, chosen.at_ft, "ft"))
            return tuple(
                [found for _, found in activations(model, ids, at, chosen.valid, TAPS, pair.compute, description)]
                for model, ids, at, description in sides
            )  # type: ignore[return-value]
        drawn = pair.vocabularies.drawn(generator, count)
        if not pair.base.arch.gated:
            return self._responses(pair.base, pair.vocabularies.ids_base[drawn]), self._responses(
                pair.ft, pair.vocabularies.ids_ft[drawn]
            )
        sources: tuple[tuple[ParamSource, np.ndarray], ...] = (
            (pair.base, pair.vocabularies.ids_base[drawn]), (pair.ft, pair.vocabularies.ids_ft[drawn])
        )  # fmt: skip
        return tuple([found for _, found in embedding_activations(model, ids, TAPS)] for model, ids in sources)  # type: ignore[return-value]

    def _responses(self, model: ParamSource, ids: Int[np.ndarray, " S"]) -> list[Activations]:
        """Returns for each layer what its units read of tokens and write for them, under the names of taps."""
        tokens = rows_of_tokens(model, ids)
        bar = trange(model.arch.num_layers, desc="match_all, what units read and write", unit="layer", disable=None)
        found = (responses(model, i, tokens, gated=False) for i in bar)
        return [{"gate": layer["up"], "up": layer["effect"]} for layer in found]

    def _allowances(self, form: str, pair: Pair) -> tuple[list[float], list[float], str]:
        """Returns the shares of units of base's and of ft's layers that may agree by convergence, and their source.

        Controls have base's depth: shares for ft's layers are interpolated at their relative depth.
        """
        u, source = Match(level=self.level).allowance(form, pair)
        if not pair.controls:
            return u, [DEFAULT_ALLOWANCE] * pair.ft.arch.num_layers, source
        base, ft = (np.linspace(0, 1, model.arch.num_layers) for model in (pair.base, pair.ft))
        return u, np.interp(ft, base, u).tolist(), source

    def _compare(
        self, form: str, pair: Pair, base: Sequence[Activations], ft: Sequence[Activations]
    ) -> list[list[Comparison]]:
        """Returns at [i][j] the comparison of layer i of base with layer j of ft."""
        run_cache = pair.run_cache.scope("match_all", form)
        kept, kept_ft = _kept(pair.base), _kept(pair.ft)

        def compare(i: int, units: np.ndarray, j: int) -> Comparison:
            by_tap = {tap: correlate(base[i][tap][:, units], ft[j][tap][:, kept_ft[j]]) for tap in TAPS}
            found = compare_taps(by_tap, pair, ("match_all", form, i, j))
            return found if form == "forward" else asked_on_text(found, pair, (i, j))

        table = []
        for i in trange(len(base), desc=f"match_all, {form}", unit="layer", disable=None):
            drawn = pair.generator("match_all", "units", i).permutation(len(kept[i]))[: self.units]
            make = functools.partial(compare, i, kept[i][np.sort(drawn)])
            table.append([run_cache.cached(Comparison, (i, j), functools.partial(make, j)) for j in range(len(ft))])
        return table

    def _result(
        self,
        found: LayerMap,
        combined: np.ndarray,
        compared: Mapping[str, list[list[Comparison]]],
        nulls: Mapping[str, Null],
        log_p: Mapping[str, np.ndarray],
        firm: Mapping[str, np.ndarray],
        units: Mapping[tuple[int, int], np.ndarray],
        pair: Pair,
    ) -> Result:
        num_base, num_ft = combined.shape
        places = [f"base {i} : ft {j}" for i in range(num_base) for j in range(num_ft)]
        tests: list[Test] = [
            replace(
                one_test(
                    f"{form}, calibrated", [c for row in table for c in row], log_p[form].ravel().tolist(), places,
                    bonferroni, "Holm's minimum over layer pairs",
                ),
                firm_log10_p=bonferroni(firm[form].ravel().tolist()) / LN10,
                calibrated=True,
            )
            for form, table in compared.items()
        ]  # fmt: skip
        kept = [(len(units[place]), pair.ft.arch.mlp_dim_of(place[1])) for place in found.pairs]
        shown = {
            "log10_p": (combined / LN10).tolist(),
            "pairs": [
                {"base": i, "ft": j, "log10_p": float(combined[i, j] / LN10), "units": pair.ft.arch.mlp_dim_of(j),
                 "agreeing": len(units[i, j])}
                for i, j in found.pairs
            ],
            "copies": [{"base": i, "ft": j, "log10_p": float(combined[i, j] / LN10)} for i, j in found.copies],
            "unmatched_base": list(found.unmatched_base),
            "unmatched_ft": list(found.unmatched_ft),
            "sentence": layer_map_sentence(found, num_base, num_ft, kept),
        }  # fmt: skip
        notes = [f"{form}: {note}" for form, null in nulls.items() for note in null.notes]
        return Result(
            headline=len(found.pairs) / num_ft,
            label="layers of ft that correspond to a layer of base, share",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null={form: null.as_dict() for form, null in nulls.items()},
            layer_map=shown,
            notes=notes,
            arrays={f"units of base {i} and ft {j}": found_units for (i, j), found_units in units.items()},
            effect=_effect(compared),
            **reserved(tests, reservations(cell for table in compared.values() for row in table for cell in row)),
        )


def units_not_applicable(base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
    """Returns the reasons why units of these models cannot be matched in two ways; empty if they can."""
    if base.gated != ft.gated:
        return [f"{side} has no gate, the other has" for side, a in (("base", base), ("ft", ft)) if not a.gated]
    return [] if base.gated else tokens_not_applicable(base, ft, vocabularies)


def _effect(compared: Mapping[str, Sequence[Sequence[Comparison]]]) -> str:
    """Returns the effect by the form in which most units agree in a pair of layers."""
    cells = [[cell for row in table for cell in row] for table in compared.values()]
    most = max(cells, key=lambda form: max(cell.agreeing / max(1, cell.units) for cell in form))
    return agreement_effect(most, "match_all", of_pairs=True)


def _kept(model: ParamSource) -> list[np.ndarray]:
    """Returns for each layer the units that count as evidence."""
    return [distinct_units(model, i).kept for i in range(model.arch.num_layers)]


def _kept_units(
    found: LayerMap,
    by_form: Mapping[str, tuple[Sequence[Activations], Sequence[Activations]]],
    log_p: Mapping[str, np.ndarray],
    pair: Pair,
) -> dict[tuple[int, int], np.ndarray]:
    """Returns for each assigned pair of layers the matched units `[M, 2]`, by the form of smaller p-value."""
    units = {}
    for i, j in found.pairs:
        form = min(log_p, key=lambda form: log_p[form][i, j])
        base, ft = (side[at] for side, at in zip(by_form[form], (i, j)))
        units[i, j] = paired_units(base, ft, pair.generator("match_all", "unit map", i, j))
    return units


def paired_units(base: Activations, ft: Activations, generator: np.random.Generator) -> np.ndarray:
    """Returns the units of two layers on which gate and up projection agree, `[M, 2]`: unit of base, unit of ft."""
    by_tap = {tap: correlate(base[tap], ft[tap]) for tap in TAPS}
    gate, up = by_tap["gate"], by_tap["up"]
    live = live_units(gate, up)
    one, other = (match_units(s, generator, live, absolute=s is up) for s in (gate, up))
    same = (one.base == other.base) & (one.ft == other.ft)
    return np.stack([one.base[same], one.ft[same]], axis=1)


def _calibrated(
    table: Sequence[Sequence[Comparison]], u_base: Sequence[float], u_ft: Sequence[float], source: str
) -> tuple[Null, np.ndarray, np.ndarray]:
    """Returns the null, measured on pairs of layers that do not correspond, and the log p-values `[L, L2]` under it.

    The second are those of the tests, by agreement or by rank correlation, whose own effect is firm; 0 without one.

    Layers correspond if they are assigned to each other with a p-value that no number of pairs explains. Were the best
    assignment of independent models left out as well, the pairs that agree most by chance would be missing from their
    own null.
    """
    num_base, num_ft = len(table), len(table[0])
    parametric = np.array([[c.log_p_agreement for c in row] for row in table])
    assigned = assign_layers(parametric, math.log(CORRESPOND / parametric.size)).pairs
    controls = [table[i][j] for i, j in _control_places(num_base, num_ft, assigned)]
    u = np.maximum.outer(u_base, u_ft)
    null = null_of(controls, u_base, source)

    def log_ps(i: int, j: int) -> tuple[float, float]:
        own, found = replace(null, u=(float(u[i, j]),)), table[i][j]
        tests = (
            (own.log_p_agreement(0, found), found.agreeing / max(1, found.units)),
            (own.log_p_rank(0, found), found.r),
        )
        firm = [log_p for log_p, size in tests if found.agrees_on_text and own.is_firm(0, size)]
        best = (min(log_p for log_p, _ in tests), min(firm, default=0.0))
        return min(0.0, best[0] + math.log(2)), min(0.0, best[1] + math.log(2))

    found = np.array([[log_ps(i, j) for j in range(num_ft)] for i in range(num_base)])
    return null, found[..., 0], found[..., 1]


def unexplained(table: Sequence[Sequence[Comparison]], below: float | None = None) -> list[Comparison]:
    """Returns the pairs of layers that are controls where layers of ft correspond to any of base's.

    The best pair of each layer of either model is none where its p-value is so small that no number of pairs explains
    it. All others are: if many layers agree with one another, they do for a reason other than descent.

    Args:
      table: the comparison of layer i of base with layer j of ft, at [i][j].
      below: that p-value; by default `CORRESPOND`, over all pairs.
    """
    log_p = np.array([[cell.log_p_agreement for cell in row] for row in table])
    least = math.log(CORRESPOND / log_p.size if below is None else below)
    best = (log_p == log_p.min(axis=0)) | (log_p == log_p.min(axis=1, keepdims=True))
    return [table[i][j] for i, j in np.argwhere(~best | (log_p >= least))]


def _control_places(num_base: int, num_ft: int, assigned: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields the pairs of layers neither assigned nor adjacent to an assigned pair; if none, all not assigned."""
    apart = np.ones((num_base, num_ft), bool)
    for i, j in assigned:
        apart[max(0, i - 1) : i + 2, j] = apart[i, max(0, j - 1) : j + 2] = False
    if not apart.any():
        apart[:] = True
        apart[tuple(zip(*assigned))] = False
    yield from ((int(i), int(j)) for i, j in np.argwhere(apart))


def assign_layers(log_p: Float[np.ndarray, "L L2"], log_level: float) -> LayerMap:
    """Returns the assignment of layers of smallest total log p-value; only pairs below the level are assigned.

    Args:
      log_p: natural log p-value of layer i of base and layer j of ft, at [i, j].
      log_level: the level of one pair, already divided by the number of pairs.
    """
    gain = np.maximum(log_level - log_p, 0.0)
    if gain.shape[0] <= gain.shape[1]:
        found = list(enumerate(assign(gain).tolist()))
    else:
        found = [(i, j) for j, i in enumerate(assign(gain.T).tolist())]
    pairs = tuple(sorted((int(i), int(j)) for i, j in found if gain[i, j] > 0))
    taken = {j for _, j in pairs}
    left = [j for j in range(gain.shape[1]) if j not in taken]
    copies = tuple((int(gain[:, j].argmax()), j) for j in left if gain[:, j].max() > 0)
    alike = {i for i, _ in pairs} | {i for i, _ in copies}
    return LayerMap(
        pairs,
        copies,
        tuple(i for i in range(gain.shape[0]) if i not in alike),
        tuple(j for j in left if not gain[:, j].max() > 0),
    )


def layer_map_sentence(found: LayerMap, num_base: int, num_ft: int, kept: Sequence[tuple[int, int]]) -> str:
    """Returns the map as a sentence; `kept` has for each pair the numbers of matched units and of all of ft's units."""
    if not found.pairs:
        return f"None of ft's {num_ft} layers corresponds to a layer of base beyond what independent models share."
    in_order = all(a[1] < b[1] for a, b in zip(found.pairs, found.pairs[1:]))
    words = [
        f"{len(found.pairs)} of ft's {num_ft} layers correspond to base's {num_base}, "
        f"{'in order' if in_order else 'not in order'} ({_runs(found.pairs)})"
    ]
    if found.copies:
        words.append("ft's " + ", ".join(f"layer {j} repeats base's {i}" for i, j in found.copies))
    if found.unmatched_base:
        words.append(f"base's {ranges(found.unmatched_base)} left no trace")
    if found.unmatched_ft:
        words.append(f"nothing of base resembles ft's {ranges(found.unmatched_ft)}")
    share = [f"{k} of {h}" for k, h in kept]
    if len(set(share)) == 1:
        words.append(f"in each matched layer {share[0]} units agree")
    else:
        total = sum(k for k, _ in kept), sum(h for _, h in kept)
        words.append(f"in the matched layers {total[0]} of {total[1]} units agree")
    return "; ".join(words) + "."


def ranges(numbers: Iterable[int]) -> str:
    """Returns the numbers as ranges: `layers 0-3, 7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {shown}"


def _runs(pairs: Sequence[tuple[int, int]]) -> str:
    """Returns the pairs with runs as ranges: `base 0-3 -> ft 0-3, base 6 -> ft 4`."""
    runs: list[list[tuple[int, int]]] = []
    for pair in pairs:
        if runs and pair == (runs[-1][-1][0] + 1, runs[-1][-1][1] + 1):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    sides = [[ranges(pair[side] for pair in run).split(" ", 1)[1] for side in (0, 1)] for run in runs]
    return ", ".join(f"base {base} → ft {ft}" for base, ft in sides)
