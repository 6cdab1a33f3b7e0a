"""`match_mlps`: which MLP of ft comes from which MLP of base, in whatever layer, dense or expert?"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from tracing_jax import options
from tracing_jax.arch import Arch
from tracing_jax.progress import tqdm
from tracing_jax.sources import MlpIndex, MlpsAsLayers, mlp_indices
from tracing_jax.statistics.comparison import Comparison, bonferroni_log10, reserved, unit_notes
from tracing_jax.statistics.cosine import similarities
from tracing_jax.statistics.csu import unit_rows
from tracing_jax.statistics.distinct_units import distinct_units
from tracing_jax.statistics.in_place import (
    in_place,
    in_place_tests,
    order_premises,
    ordered_models,
    place_reservation,
)
from tracing_jax.statistics.match_all import MatchAll, units_not_applicable
from tracing_jax.statistics.repeated_layers import first_alike
from tracing_jax.statistics.statistic import Pair, Result, Test, Vocabularies

_UP = "mlp/up_proj/kernel"
_TOKENS = 1024  # the most shared tokens whose embeddings are used
_UNITS = 256  # the most units of each of base's MLPs that are matched to ft's
_MOST_LAYERS = 4  # of large mixtures, from which MLPs are drawn


@dataclass(frozen=True)
class MatchMlps(options.MatchMlps):
    """Unconstrained test of every MLP of base against every MLP of ft; and, of those that correspond, units in place.

    The MLPs of both models, dense ones and experts alike, are compared as the layers of `match_all` are, in the
    weights-only form: gate and up responses to the embeddings of shared tokens (without gates what units read and what
    they write), agreement of their matchings, the calibrated null, and an assignment in which several MLPs of ft may
    come from one of base, as in a mixture of experts that was upcycled from a dense model. It is invariant under
    permutations of experts and of their units. Routers take no part: a vector added to all rows of a router before a
    softmax changes nothing, so that they are no evidence.

    Then the up-projections of each MLP of ft and its closest one of base are compared as by `csu`. The closest is found
    by matchings that the order of the units does not change, so that the p-values of units in place stay exact.

    Of mixtures with more than `max_pairs` pairs of MLPs some of base's are drawn; see `chosen_places`.

    Attributes:
      level: significance level, after Bonferroni over all pairs, below which two MLPs are assigned to each other.

    Source: ours, after Zhu et al. 2025 (arXiv 2502.12292).
    """

    level: float = options.RunOptions.level

    needs_tokens: ClassVar[bool] = False

    def not_applicable(self, base: Arch, ft: Arch, vocabularies: Vocabularies) -> list[str]:
        """Returns reasons why no MLPs of these models can be matched; empty if they can."""
        lines = units_not_applicable(base, ft, vocabularies)
        if len(vocabularies.ids_base) < 2:
            lines.append("the vocabularies share no tokens whose embeddings could be compared")
        if chosen_places(base, ft, self.max_pairs, np.random.default_rng(0)) is None:
            pairs = len(mlp_indices(base)) * len(mlp_indices(ft))
            lines.append(
                f"{pairs:,} pairs of MLPs are more than match_mlps.max_pairs = {self.max_pairs:,}; only of models of "
                "equal depth can some be drawn"
            )
        return lines

    def compute(self, pair: Pair) -> Result:
        """Returns the map of the MLPs with its p-values; no forward pass."""
        chosen = chosen_places(pair.base.arch, pair.ft.arch, self.max_pairs, pair.generator("match_mlps", "places"))
        assert chosen is not None
        base, ft = (MlpsAsLayers(model, places) for model, places in zip((pair.base, pair.ft), chosen, strict=True))
        cache = pair.run_cache.scope("match_mlps")
        mlps = replace(pair, base=base, ft=ft, controls=(), run_cache=cache, aligned=False)
        matched = MatchAll(forms=("weights",), positions=_TOKENS, units=_UNITS, level=self.level).compute(mlps)
        assert matched.layer_map is not None
        tests: list[Test] = [replace(test, places=_names(base, ft)) for test in matched.tests]
        compared = dict(self._in_place(mlps, base, ft, np.array(matched.layer_map["log10_p"])))
        placed = [] if not compared else in_place_tests(list(compared.values()), list(compared), base.arch.embed_dim)
        in_order = place_reservation(list(compared.values())) if reserved(placed, "") else None
        reservations = [text for text in (matched.reservation, in_order) if text]
        notes = [*_drawn(pair, base, ft), *matched.notes]
        if pair.controls:
            notes.append(
                "match_mlps: control models say nothing of which MLPs correspond; the default allowance is used"
            )
        if compared:
            tests += [replace(test, name=f"units in place, {test.name}") for test in placed]
            notes += unit_notes(list(compared.values()))
        found = matched.layer_map["pairs"] + matched.layer_map["copies"]
        is_part = len(base.places) < len(mlp_indices(pair.base.arch))
        return Result(
            headline=len({row["base"] for row in found}) / base.arch.num_layers
            if is_part
            else len(found) / ft.arch.num_layers,
            label="MLPs of base that were drawn and correspond to an MLP of ft, share"
            if is_part
            else "MLPs of ft that correspond to an MLP of base, share",
            log10_p=bonferroni_log10(tests),
            tests=tests,
            null=matched.null,
            layer_map=dict(matched.layer_map) | {"sentence": _sentence(found, base, ft)},
            notes=notes,
            blind_to=(*(matched.blind_to or ()), *(["MLPs that were not drawn"] if is_part else [])) or None,
            effect=matched.effect,
            premises=order_premises(ordered_models(list(compared.values()))) if compared else (),
            **reserved(tests, "; ".join(reservations)),
        ).for_pair(pair)

    def _in_place(
        self, mlps: Pair, base: MlpsAsLayers, ft: MlpsAsLayers, log10_p: np.ndarray
    ) -> Iterator[tuple[str, Comparison]]:
        """Yields for each MLP of ft the comparison of its units with those, in their order, of base's closest MLP.

        Of experts that repeat others the first counts: p-values of the others are no further evidence.
        """
        if base.arch.embed_dim != ft.arch.embed_dim:
            return
        firsts, seen = (first_alike(base), first_alike(ft)), set[tuple[int, int]]()
        for j in tqdm(range(ft.arch.num_layers), desc="match_mlps, in place", unit="MLP", disable=None):
            i = int(log10_p[:, j].argmin())
            if (place := (firsts[0][i], firsts[1][j])) in seen:
                continue
            seen.add(place)

            def compare(i: int = i, j: int = j) -> Comparison:
                rows = [
                    jnp.asarray(unit_rows(model.layer(at, (_UP,)), "up_proj")) for model, at in ((base, i), (ft, j))
                ]
                units = distinct_units(base, i), distinct_units(ft, j)
                return in_place(similarities(*rows), units, mlps.generator("match_mlps", "in place", j))

            yield f"base {base.name(i)} : ft {ft.name(j)}", mlps.run_cache.cached(Comparison, ("in place", j), compare)


def chosen_places(
    base: Arch, ft: Arch, most: int, generator: np.random.Generator
) -> tuple[tuple[MlpIndex, ...], tuple[MlpIndex, ...]] | None:
    """Returns which MLPs of base are compared with which of ft, at most so many pairs; None if that cannot be.

    Of large mixtures of equal depth some MLPs of base are drawn, in a few layers, and matched to all that ft has
    in these layers: experts can be permuted in their layer, and each of the pairs is paid for.
    """
    places = mlp_indices(base), mlp_indices(ft)
    if len(places[0]) * len(places[1]) <= most:
        return tuple(places[0]), tuple(places[1])
    widest = max(sum(layer == i for layer, _ in places[1]) for i in range(ft.num_layers))
    count = min(_MOST_LAYERS, math.isqrt(most // widest), base.num_layers)
    if base.num_layers != ft.num_layers or count < 1:
        return None
    layers = sorted(int(i) for i in generator.choice(base.num_layers, count, replace=False))
    drawn: list[MlpIndex] = []
    for layer in layers:
        own = [place for place in places[0] if place[0] == layer]
        few = generator.choice(len(own), min(len(own), most // (count * count * widest)), replace=False)
        drawn += [own[at] for at in sorted(few)]
    return tuple(drawn), tuple(place for place in places[1] if place[0] in layers)


def _drawn(pair: Pair, base: MlpsAsLayers, ft: MlpsAsLayers) -> list[str]:
    every = len(mlp_indices(pair.base.arch))
    if len(base.places) == every:
        return []
    layers = ", ".join(map(str, dict.fromkeys(layer for layer, _ in base.places)))
    return [
        f"match_mlps: {len(base.places)} of base's {every:,} MLPs were drawn, and matched to the "
        f"{len(ft.places):,} of ft's layers {layers}; match_mlps.max_pairs sets how many"
    ]


def _names(base: MlpsAsLayers, ft: MlpsAsLayers) -> list[str]:
    return [
        f"base {base.name(i)} : ft {ft.name(j)}" for i in range(base.arch.num_layers) for j in range(ft.arch.num_layers)
    ]


def _sentence(found: list[Mapping[str, Any]], base: MlpsAsLayers, ft: MlpsAsLayers) -> str:
    count = ft.arch.num_layers
    if not found:
        return f"None of ft's {count} MLPs corresponds to an MLP of base beyond what independent models share."
    pairs = ", ".join(f"ft {ft.name(row['ft'])} to base {base.name(row['base'])}" for row in found[:12])
    more = f", and {len(found) - 12} more" if len(found) > 12 else ""
    return f"{len(found)} of ft's {count} MLPs correspond to one of base's {base.arch.num_layers}: {pairs}{more}."
