"""`match_all`: which layer comes from which? `match` on every pair of layers, whatever the depths and widths."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import trange

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.forward import activations, correlate, embedding_activations
from tracing_jax.matching import live_units, match_units
from tracing_jax.sources import ParamSource
from tracing_jax.statistics.calibration import Null, null_of, tabled_allowance
from tracing_jax.statistics.comparison import LN10, Comparison, bonferroni_log10, one_test
from tracing_jax.statistics.layer_map import LayerMap, assign_layers, sentence
from tracing_jax.statistics.match import TAPS, Match, compare_taps, gate_problems
from tracing_jax.statistics.pvalues import smallest
from tracing_jax.statistics.statistic import AFTER_ALIGNMENT, Pair, Result, Test, Vocabularies

Activations = Mapping[str, np.ndarray]
"""Tap -> activations `[S, F]` of one layer at the sampled positions."""

_FEW_POSITIONS = 64


@dataclass(frozen=True)
class MatchAll(options.MatchAll):
    """Every layer of base against every layer of ft, by gate and up activations as in `match`.

    The forward form keeps base's and ft's activations at sampled positions of the text, at most `max_gib` in all; the
    weights-only form hands every MLP the embeddings of shared tokens. A pair's p-value is the smaller of the forms' and
    of the tests', after Bonferroni. Layers are assigned by the evidence, and a layer may stay without a partner.

    Fewer positions are sampled where the kept activations would take more than `max_gib`.

    Attributes:
      level: below which, after Bonferroni over all pairs, two layers belong together.

    Source: Zhu et al. 2025 (arXiv 2502.12292), section 4, which maps the blocks of Llama 3.1 onto those of Llama 3.2.
    """

    level: float = options.RunOptions.level

    @property
    def needs_tokens(self) -> bool:
        """Only the forward form reads text."""
        return "forward" in self.forms

    def problems(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns why no layers of these models can be matched."""
        lines = gate_problems(base, ft)
        if "forward" in self.forms and self._positions(base, ft) < _FEW_POSITIONS:
            lines.append(f"activations at {_FEW_POSITIONS} positions take more than {self.max_gib:g} GiB; raise it")
        if "forward" not in self.forms and len(vocabularies.ids_base) < 2:
            lines.append("the vocabularies share no tokens whose embeddings could be compared")
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the map with its p-values; one forward pass per model."""
        kept: dict[str, tuple[list[Activations], list[Activations]]] = {}
        compared: dict[str, list[list[Comparison]]] = {}
        nulls: dict[str, Null] = {}
        log_p: dict[str, np.ndarray] = {}
        for form in self.forms:
            if form == "forward" or len(pair.vocabularies.ids_base) >= 2:
                kept[form] = self._activations(form, pair)
                compared[form] = self._compare(form, pair, *kept[form])
                nulls[form], log_p[form] = _calibrated(compared[form], *self._allowances(form, pair))
        both = np.minimum(0.0, np.min(list(log_p.values()), axis=0) + math.log(len(log_p)))
        found = assign_layers(both, math.log(self.level / both.size))
        units = _units(found, kept, log_p, pair)
        result = self._result(found, both, compared, nulls, log_p, units, pair)
        return result.without_p(AFTER_ALIGNMENT) if pair.aligned else result

    def _positions(self, base: Arch, ft: Arch) -> int:
        bytes_each = 4 * len(self.forms) * len(TAPS) * (base.num_layers * base.mlp_dim + ft.num_layers * ft.mlp_dim)
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
        drawn = generator.permutation(len(pair.vocabularies.ids_base))[:count]
        sources: tuple[tuple[ParamSource, np.ndarray], ...] = (
            (pair.base, pair.vocabularies.ids_base[drawn]), (pair.ft, pair.vocabularies.ids_ft[drawn])
        )  # fmt: skip
        return tuple([found for _, found in embedding_activations(model, ids, TAPS)] for model, ids in sources)  # type: ignore[return-value]

    def _allowances(self, form: str, pair: Pair) -> tuple[list[float], list[float], str]:
        """Returns the shares of base's and of ft's layers that may agree by convergence, and where they come from.

        Controls are of base's depth: at a layer of ft counts what they share at its relative depth.
        """
        u, source = Match().allowance(form, pair)
        if not pair.controls:
            return u, tabled_allowance(pair.ft.arch.num_layers, form), source
        base, ft = (np.linspace(0, 1, model.arch.num_layers) for model in (pair.base, pair.ft))
        return u, np.interp(ft, base, u).tolist(), source

    def _compare(
        self, form: str, pair: Pair, base: Sequence[Activations], ft: Sequence[Activations]
    ) -> list[list[Comparison]]:
        run_cache = pair.run_cache.scope("match_all", form)

        def compare(i: int, units: np.ndarray, j: int) -> Comparison:
            by_tap = {tap: correlate(base[i][tap][:, units], ft[j][tap]) for tap in TAPS}
            return compare_taps(by_tap, pair, ("match_all", form, i, j))

        rows = []
        for i in trange(len(base), desc=f"match_all, {form}", unit="layer", disable=None):
            drawn = pair.generator("match_all", "units", i).permutation(base[i]["gate"].shape[1])[: self.units]
            make = functools.partial(compare, i, np.sort(drawn))
            rows.append([run_cache.cached(Comparison, (i, j), functools.partial(make, j)) for j in range(len(ft))])
        return rows

    def _result(
        self,
        found: LayerMap,
        both: np.ndarray,
        compared: Mapping[str, list[list[Comparison]]],
        nulls: Mapping[str, Null],
        log_p: Mapping[str, np.ndarray],
        units: Mapping[tuple[int, int], np.ndarray],
        pair: Pair,
    ) -> Result:
        num_base, num_ft = both.shape
        places = [f"base {i} : ft {j}" for i in range(num_base) for j in range(num_ft)]
        tests: list[Test] = [
            one_test(
                f"{form}, calibrated", [c for row in rows for c in row], log_p[form].ravel().tolist(), places, smallest,
                "Holm's minimum over layer pairs",
            )
            for form, rows in compared.items()
        ]  # fmt: skip
        kept = [(len(units[place]), pair.ft.arch.mlp_dim) for place in found.pairs]
        shown = {
            "log10_p": (both / LN10).tolist(),
            "pairs": [
                {"base": i, "ft": j, "log10_p": float(both[i, j] / LN10), "units": pair.ft.arch.mlp_dim,
                 "agreeing": len(units[i, j])}
                for i, j in found.pairs
            ],
            "copies": [{"base": i, "ft": j, "log10_p": float(both[i, j] / LN10)} for i, j in found.copies],
            "unmatched_base": list(found.unmatched_base),
            "unmatched_ft": list(found.unmatched_ft),
            "sentence": sentence(found, num_base, num_ft, kept),
        }  # fmt: skip
        notes = [f"{form}: {note}" for form, null in nulls.items() for note in null.notes]
        return Result(
            headline=len(found.pairs) / num_ft,
            label="layers of ft that come from a layer of base, share",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null={form: null.as_dict() for form, null in nulls.items()},
            layer_map=shown,
            notes=notes,
            arrays={f"units of base {i} and ft {j}": found_units for (i, j), found_units in units.items()},
        )


def _units(
    found: LayerMap,
    kept: Mapping[str, tuple[Sequence[Activations], Sequence[Activations]]],
    log_p: Mapping[str, np.ndarray],
    pair: Pair,
) -> dict[tuple[int, int], np.ndarray]:
    """Returns for each pair of layers its units, by the form that tells the pair apart best."""
    units = {}
    for i, j in found.pairs:
        form = min(log_p, key=lambda form: log_p[form][i, j])
        base, ft = (side[at] for side, at in zip(kept[form], (i, j)))
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
    rows: Sequence[Sequence[Comparison]], u_base: Sequence[float], u_ft: Sequence[float], source: str
) -> tuple[Null, np.ndarray]:
    """Returns the null, measured on pairs that do not correspond, and the log p-values against it."""
    num_base, num_ft = len(rows), len(rows[0])
    parametric = np.array([[c.log_p_agreement for c in row] for row in rows])
    assigned = assign_layers(parametric, 0.0).pairs
    controls = [rows[i][j] for i, j in _controls(num_base, num_ft, assigned)]
    u = np.maximum.outer(u_base, u_ft)
    null = null_of(controls, u_base, source)

    def log_p(i: int, j: int) -> float:
        own = replace(null, u=(float(u[i, j]),))
        best = min(own.log_p_agreement(0, rows[i][j]), own.log_p_rank(0, rows[i][j]))
        return min(0.0, best + math.log(2))

    return null, np.array([[log_p(i, j) for j in range(num_ft)] for i in range(num_base)])


def _controls(num_base: int, num_ft: int, assigned: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields the layer pairs that are not assigned and do not stand beside an assigned one; without any, all others."""
    apart = np.ones((num_base, num_ft), bool)
    for i, j in assigned:
        apart[max(0, i - 1) : i + 2, j] = apart[i, max(0, j - 1) : j + 2] = False
    if not apart.any():
        apart[:] = True
        apart[tuple(zip(*assigned))] = False
    yield from ((int(i), int(j)) for i, j in np.argwhere(apart))
