"""Tests of units in place: is the matching of the units of two layers the identity?

What `csu` and `csh` are made of, and what must hold for their p-values to be exact: an order of the units that depends
on no weights in one of the two models, and units in place that are more alike than an order chosen afterwards makes
the units of independent models.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from tracing_jax.arch import Arch
from tracing_jax.matching import FactoredSimilarity, UnitMatching, match_units
from tracing_jax.statistics.comparison import (
    LN10,
    Comparison,
    against_identity,
    bonferroni_log10,
    live_among,
    reserved,
    share_agreeing,
    share_by_layer,
    tests_of,
    unit_notes,
)
from tracing_jax.statistics.distinct_units import DistinctUnits
from tracing_jax.statistics.identity_starts import IDENTITY_BELOW
from tracing_jax.statistics.nulls import composite_agreement_log_sf
from tracing_jax.statistics.pvalues import bonferroni, fisher
from tracing_jax.statistics.repeated_layers import repetition_notes, without_repeats
from tracing_jax.statistics.statistic import Pair, Result, Test, widths_not_applicable
from tracing_jax.tree import taken

ORDERED_BELOW = 0.01
"""p-value of units in no particular order, over all layers, below which a model's units count as put in an order."""


OUTSTANDING = 0.1
"""Share of the units of independent models that may be outliers where their order was chosen afterwards: the 1 % of the
definition, matched units that are the best of all and not of all others (3 %), and units alike by convergence (5 %)."""


BY_ORDER = (
    "units of independent models can be put in the same order by someone with both: order alone is no evidence, only "
    "units in place that are more similar than those of independent models are"
)

FROM_IDENTITY = (
    "rows of both models begin at the identity, as after an initialisation to it: they are in place in independent "
    "models as well"
)


_BY_ROTATION = 1.25
"""How many times what order and rotation explain the mean cosine of rows in place must be; see `beyond_rotation`."""

_SAMPLED = 1024  # matched units of a layer at most, whose similarities to all others are compared


def in_place(
    similarity: Float[Array | np.ndarray, "n m"] | FactoredSimilarity,
    units: tuple[DistinctUnits, DistinctUnits],
    generator: np.random.Generator,
    drawn: Int[np.ndarray, " n"] | None = None,
) -> Comparison:
    """Returns the comparison of the matching of distinct units, by absolute similarity, with the identity.

    Args:
      similarity: of all units of base's layer, or of those drawn, with all of ft's.
      units: of base and of ft, those that are matched.
      generator: for the matching, and for the units sampled by `placed_beyond_order`.
      drawn: the units of base that are compared, in increasing order; all if None.
    """
    base, ft = units
    rows = match_units(similarity, generator, live_among(base, ft, similarity, drawn=drawn), absolute=True)
    matching = rows if drawn is None else replace(rows, base=drawn[rows.base])
    found = against_identity(matching, base.total, ft.total, drawn=drawn is not None)
    beyond = placed_beyond_order(similarity, rows, ft.kept, base.total == ft.total, generator, places=matching.base)
    return replace(found, **beyond).of_units(base, ft)


def placed_beyond_order(
    similarity: Float[Array | np.ndarray, "n m"] | FactoredSimilarity,
    matching: UnitMatching,
    columns: Int[np.ndarray, " _"],
    by_index: bool,
    generator: np.random.Generator,
    places: Int[np.ndarray, " M"] | None = None,
) -> dict[str, Any]:
    """Returns `sampled`, `outstanding`, `similarity` and `nearest` of a `Comparison`, of some pairs of matched units.

    Whoever has both models can reorder the units of an independent one until the matching is the identity. Its matched
    units are then as similar as the best of other models, and not more: a pair is an outlier if it is more similar than
    99 % of the units are to their best partner but the matched one.

    Args:
      similarity: of units of base with all of ft's.
      matching: of its rows with its columns.
      columns: that take part.
      by_index: whether units are at equal places if their indices are equal; else if their ranks are.
      generator: draws the pairs that are sampled.
      places: the units of base that the matched rows are; the rows themselves if None.
    """
    drawn = np.sort(generator.permutation(len(matching.base))[:_SAMPLED])
    if not len(drawn) or len(columns) < 2:
        return {}
    places, ft = matching.base if places is None else places, matching.ft[drawn]
    if by_index:
        same = places[drawn] == ft
    else:
        same = np.argsort(np.argsort(places))[drawn] == np.argsort(np.argsort(matching.ft))[drawn]
    rows = np.abs(_rows_of(similarity, matching.base[drawn]))
    own = rows[np.arange(len(drawn)), ft].copy()
    rows[np.arange(len(drawn)), ft] = 0.0
    best_other = rows[:, columns].max(axis=1)
    outliers = same & (own > np.quantile(best_other, 0.99))
    return {
        "sampled": len(drawn),
        "outstanding": int(outliers.sum()),
        "similarity": float(np.where(same, own, 0.0).mean()),
        "nearest": float(best_other.mean()),
    }


def _rows_of(
    similarity: Float[Array | np.ndarray, "n m"] | FactoredSimilarity, rows: Int[np.ndarray, " r"]
) -> Float[np.ndarray, "r m"]:
    if isinstance(similarity, FactoredSimilarity):
        return np.array(taken(similarity.x, rows) @ similarity.y.T)
    return np.array(taken(similarity, rows))


def units_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns reasons why the MLP units of these models have no exact null; empty if they have."""
    experts = [getattr(arch, "num_experts", None) for arch in (base, ft)]
    if any(experts):
        return ["experts: units are exchangeable only inside their expert, so no exact null; see match_mlps"]
    return []


def rows_not_applicable(base: Arch, ft: Arch) -> list[str]:
    """Returns reasons why units of these models cannot be compared by the cosine of their rows; empty if they can."""
    return units_not_applicable(base, ft) + widths_not_applicable(base, ft)


def layers_in_common(pair: Pair) -> int:
    """Returns the number of layers that have a counterpart of equal index."""
    return min(pair.base.arch.num_layers, pair.ft.arch.num_layers)


def constrained_result(pair: Pair, comparisons: Sequence[Comparison], label: str, width: int | None = None) -> Result:
    """Returns the result of a comparison per layer: two tests, each combined by Fisher, then Bonferroni over both.

    The null is exact if the units of one of the models are in no particular order. Where units of both were put in an
    order that depends on their weights, both orders may follow the same rule: rank correlation is then left out. Where
    the units in place are no more similar than an order chosen afterwards makes them, the p-value is reserved: it
    cannot call the pair related. Of layers that repeat others in both models one pair counts.
    """
    layers = range(len(comparisons))
    kept = without_repeats(pair.base, pair.ft, layers)
    comparisons, places = [comparisons[i] for i in kept], [f"layer {i}" for i in kept]
    tests = in_place_tests(comparisons, places, width)
    ordered = ordered_models(comparisons)
    return Result(
        headline=share_agreeing(comparisons),
        label=label,
        log10_p=bonferroni_log10(tests),
        tests=tests,
        per_layer=share_by_layer(comparisons),
        notes=[
            *_depth_notes(pair),
            *repetition_notes(layers, kept),
            *unit_notes(comparisons),
            *order_notes(ordered),
        ],
        premises=order_premises(ordered),
        effect=in_place_effect(comparisons),
        **reserved(tests, place_reservation(comparisons)),
    ).for_pair(pair)


def place_reservation(comparisons: Sequence[Comparison]) -> str:
    """Returns how else than by descent units of both models can be in place."""
    return FROM_IDENTITY if begin_at_identity(comparisons) else BY_ORDER


def in_place_tests(
    comparisons: Sequence[Comparison], places: Sequence[str], width: int | None = None
) -> tuple[Test, Test, Test]:
    """Returns the tests of units in place: by rank correlation, by agreement, and of outlying units.

    The first is left out of the verdict where the units of both models were put in an order. The third enters it
    through the reservation that the first two have without it. Nothing is firm where rows of both models begin at the
    identity, or where a rotation explains how similar they are, if their `width` is given: see `beyond_rotation`.
    """
    rank, agreement = tests_of(comparisons, places, fisher, "Fisher over layers")
    outstanding = _outstanding_test(comparisons, places)
    not_firm = begin_at_identity(comparisons) or (width is not None and not beyond_rotation(comparisons, width))

    def firm(test: Test) -> float | None:
        if test.log10_p is None or outstanding.log10_p is None:
            return None
        return 0.0 if not_firm else max(test.log10_p, outstanding.log10_p)

    decides = not all(ordered_models(comparisons))
    return (
        replace(rank, decides=decides, firm_log10_p=firm(rank)),
        replace(agreement, firm_log10_p=firm(agreement)),
        outstanding,
    )


def in_place_effect(comparisons: Sequence[Comparison]) -> str:
    """Returns how many units are in place, and how many are by chance, as a sentence."""
    units, agreeing = sum(c.units for c in comparisons), sum(c.agreeing for c in comparisons)
    return (
        f"{agreeing:,} of {units:,} units are in the same place; in independent models about one in each of "
        f"{len(comparisons)} layers is"
    )


def ordered_models(comparisons: Sequence[Comparison]) -> tuple[bool, bool]:
    """Returns for base and for ft whether its units were put in an order that depends on their weights."""
    base, ft = (
        min((c.order_p[side] for c in comparisons), default=1.0) * max(1, len(comparisons)) < ORDERED_BELOW
        for side in (0, 1)
    )
    return base, ft


def beyond_rotation(comparisons: Sequence[Comparison], width: int) -> bool:
    """Returns whether rows in place are more similar than a rotation fitted to them makes rows of independent models.

    That is asked of the layer with the most similar ones, of the two such, and so on: a rotation can be fitted to
    some of the layers only, and then fits these no better than it says here.

    Of N pairs of random rows of `width` features the rotation that fits them best gives a mean cosine of
    0.85 sqrt(width / N), by the nuclear norm of a Gaussian matrix. An order chosen afterwards makes each as similar as
    the closest other unit is. Of random rows, with order and rotation fitted in turns to one layer or all, the mean
    cosine came to 0.8 to 1.1 times the root of the sum of both squares.
    """
    ranked = sorted(comparisons, key=lambda c: -c.similarity)
    units = np.cumsum([c.units for c in ranked])
    similarity, nearest = (
        np.cumsum([value * c.units for value, c in zip(values, ranked, strict=True)]) / np.maximum(units, 1)
        for values in ([c.similarity for c in ranked], [c.nearest for c in ranked])
    )
    explained = np.sqrt(nearest**2 + 0.85**2 * width / np.maximum(units, 1))
    return bool((similarity > _BY_ROTATION * explained).any())


def begin_at_identity(comparisons: Sequence[Comparison]) -> bool:
    """Returns whether rows of both models begin at the identity, in some layer of each."""
    return all(min((c.identity_p[side] for c in comparisons), default=1.0) < IDENTITY_BELOW for side in (0, 1))


def order_premises(
    ordered: Sequence[bool], units: str = "units", by: str = "norms of gate, up and down rows"
) -> list[dict[str, Any]]:
    """Returns for the record the premise of the exact tests, that one model's units are in no particular order.

    Args:
      ordered: of base and of ft, whether the units are in an order that depends on their weights.
      units: what is in order or not.
      by: what their index was compared with.
    """
    return [
        {
            "premise": f"{units} of {side} in no particular order (index against {by})",
            "holds": not found,
            "needed": "of one of the two models",
        }
        for side, found in zip(("base", "ft"), ordered, strict=True)
    ]


def order_notes(ordered: Sequence[bool]) -> list[str]:
    """Returns what follows if the units of both models are in an order that depends on their weights."""
    if not all(ordered):
        return []
    return [
        "the units of both models are in an order that depends on their norms: rank correlation, which any common rule "
        "for the order raises, is left out, and the p-value is conditional on two orders that do not follow one rule"
    ]


def _depth_notes(pair: Pair) -> list[str]:
    depths = [model.arch.num_layers for model in (pair.base, pair.ft)]
    if depths[0] == depths[1]:
        return []
    return [f"{depths[0]} and {depths[1]} layers: the first {min(depths)} are compared; see match_all"]


def _outstanding_test(comparisons: Sequence[Comparison], places: Sequence[str]) -> Test:
    """Returns the test that more units are outliers in place than an order chosen afterwards can make so."""
    log_ps = [
        composite_agreement_log_sf(c.outstanding, c.sampled, OUTSTANDING, 1.0) if c.sampled else 0.0
        for c in comparisons
    ]
    values: dict[str, Sequence[float | int]] = {
        "sampled": [c.sampled for c in comparisons],
        "in place and more similar than to other units": [c.outstanding for c in comparisons],
    }
    log10_ps = [log_p / LN10 for log_p in log_ps]
    log10_p = bonferroni(log_ps) / LN10 if log_ps else 0.0
    return Test(
        "similarity in place", log10_p, "Holm's minimum over layers", list(places), log10_ps, values, decides=False
    )
