"""The calibrated null of `match`: how far the matchings of two independently trained models agree.

No theorem gives the distribution of the agreement between the gate's and the up projection's matching. Two effects
raise it in independent models. Gate and up rows of one unit resemble each other, in layers that do not correspond as
well: control pairs of such layers measure it in the run itself (lambda, m, s). And some units respond alike in all
models trained on similar text, at the same depth: an allowance u for their share is measured on control models known to
be independent, or is 0.05.

Source: Gurnee et al. 2024, Universal Neurons in GPT2 Language Models (arXiv 2401.12181).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from tracing_jax.statistics.comparison import LN10, Comparison, one_test
from tracing_jax.statistics.nulls import composite_agreement_log_sf, rank_log_sf
from tracing_jax.statistics.pvalues import bonferroni
from tracing_jax.statistics.statistic import QUANTILE_LEVELS, Test, quantiles

DEFAULT_ALLOWANCE = 0.05
"""The share of units that may agree by convergence if no control models are given: the upper end of what Gurnee et al.
found among seeds of GPT-2, and above all that docs/nulls.md measured."""

DEFAULT_SOURCE = "the default of 0.05: the upper end found among seeds of GPT-2 (arXiv 2401.12181)"

FEWEST_CONTROLS = 20
"""Control models, below which a measured allowance is never smaller than the default."""

MARGIN = 3
"""Agreement of up to so many times the allowance is called undecided. The p-value falls from .5 to 1e-39 between 5 %
and 8 % of 11,008 units, while of the allowance only the order of magnitude is known."""

BY_CONVERGENCE = (
    f"agreement of up to {MARGIN} times the allowance for units that independent models share by convergence is not "
    "called related, however small its p-value"
)

SEEN: Mapping[str, str] = {
    "match": "at most 8 of 128 units of a layer in 2,016 pairs of independently trained models (docs/nulls.md)",
    **dict.fromkeys(
        ("match_all", "screen"),
        "by match, in layers of equal index, at most 8 of 128 units in 2,016 pairs of independently trained models "
        "(docs/nulls.md)",
    ),
    "match_distilled": "at most 6 of 192 units of a layer in six pairs of each of two kinds (docs/distilled.md)",
    **{
        name: f"at most {most} of 128 units of a layer in {pairs} pairs of independently trained models (docs/nulls.md)"
        for name, most, pairs in (
            ("match_moments", 7, "1,128"),
            ("match_io", 9, "1,624"),
            ("match_crossfit", 6, "1,624"),
        )
    },
}
"""Statistic -> the greatest agreement of independent models: in both forms of `match` by `benchmarks.convergence`, in
`match_distilled` by `benchmarks.distilled`, and in others by `benchmarks.independent_pairs`."""

CONTROL_POSITIONS, CONTROL_UNITS = 1024, 2048
"""Positions and units of a control pair of layers, whose units are compared as those of corresponding layers."""

FEW_PAIRS = 6  # control pairs, below which their mean and deviation are unreliable
WIDE_LAMBDA, _WIDE_SCALE = 4.0, 2.0
"""Without controls: a correlation of .6 between a unit's gate and up rows lifts the mean agreement to 3.65."""


@dataclass(frozen=True)
class Null:
    """The null distribution of agreement and rank correlation.

    Attributes:
      lam: mean number of units that agree by chance.
      m, s: location and scale of z = r sqrt(h - 1).
      u: the share of units that may agree by convergence, by layer.
      controls: the number of control pairs of layers, and the quantiles of their k and z.
      source: the source of u.
      notes: warnings for the record.
    """

    lam: float
    m: float
    s: float
    u: tuple[float, ...]
    controls: Mapping[str, Any]
    source: str
    notes: tuple[str, ...] = ()

    def log_p_agreement(self, layer: int, found: Comparison) -> float:
        """Returns the log p-value of the agreement of a layer: Binomial(h, u) + Poisson(lambda) or more."""
        if not found.units:
            return 0.0
        return composite_agreement_log_sf(found.agreeing, found.units, self.u[layer], min(self.lam, found.units))

    def log_p_rank(self, layer: int, found: Comparison) -> float:
        """Returns the log p-value of the rank correlation of a layer, its z shifted by m and u and scaled by s.

        If a share u of the units agrees and the others are in random order, the mean of r is u.
        """
        if found.units < 3:
            return 0.0
        root = math.sqrt(found.units - 1)
        r = ((found.r - self.u[layer]) * root - self.m) / self.s / root
        return rank_log_sf(1.0 - max(-1.0, r), found.units)

    def is_firm(self, layer: int, share: float) -> bool:
        """Returns whether agreement, or rank correlation, of this size is more than several times the allowance."""
        return share > MARGIN * self.u[layer]

    def as_dict(self) -> dict[str, Any]:
        """Returns the parameters of the null, for the record."""
        return {
            "lambda": self.lam, "m": self.m, "s": self.s, "u": list(self.u), "u from": self.source,
            "controls": dict(self.controls),
        }  # fmt: skip


def control_pairs(num_base: int, num_ft: int, generator: np.random.Generator, most: int = 64) -> list[tuple[int, int]]:
    """Returns up to `most` (layer of base, layer of ft) that differ in relative depth by more than one layer.

    If there are fewer than 6 of them, adjacent layers are included.
    """
    depth = (np.arange(num_base)[:, None] / max(1, num_base - 1), np.arange(num_ft) / max(1, num_ft - 1))
    apart = np.abs(depth[0] - depth[1]) * (max(num_base, num_ft) - 1)
    for least in (1.5, 0.5):
        pairs = np.argwhere(apart > least)
        if len(pairs) >= FEW_PAIRS:
            break
    return [(int(i), int(j)) for i, j in generator.permutation(pairs)[:most]]


def null_of(controls: Sequence[Comparison], u: Sequence[float], source: str) -> Null:
    """Returns the null of these comparisons of control pairs and this allowance per layer."""
    found = [c for c in controls if c.units >= 2]
    z, k = np.array([c.r * math.sqrt(c.units - 1) for c in found]), np.array([c.agreeing for c in found])
    lam, m, s = 1.0, 0.0, 1.0
    notes = []
    if len(found):
        lam = max(lam, float(k.mean()))
        m = max(m, float(np.median(z)))
        s = max(s, 1.4826 * float(np.median(np.abs(z - np.median(z)))))
    if len(found) < FEW_PAIRS:
        lam, s = max(lam, WIDE_LAMBDA), max(s, _WIDE_SCALE)
        notes.append(f"only {len(found)} control pairs of layers: the null is widened to lambda {lam:.3g}, s {s:.3g}")
    shown: dict[str, Any] = {"pairs": len(found)}
    if len(found):
        shown |= {"levels": list(QUANTILE_LEVELS), "k": quantiles(k), "z": quantiles(z)}
    return Null(lam, m, s, tuple(u), shown, source, tuple(notes))


def measured_allowance(
    by_control: Sequence[Sequence[Comparison]],
    level: float,
    least: float = DEFAULT_ALLOWANCE,
    models: int | None = None,
) -> list[float]:
    """Returns for each layer the share of units that may agree by convergence in a new pair.

    Args:
      by_control: for each pair with a control model, the comparison of each layer.
      level: of the verdict; the bound has a confidence of 1 - level / 10.
      least: what it is at least, if there are fewer than `FEWEST_CONTROLS` control models.
      models: the number of control models, if each was compared with both models: of relatives these say one thing.
    """
    few = (len(by_control) if models is None else models) < FEWEST_CONTROLS
    by_layer = [[c for c in layer if c.units] for layer in zip(*by_control)]
    deviation = _deviation(by_layer)
    found = [_predicted_share(layer, level / 10, least, deviation) for layer in by_layer]
    return [max(share, least) for share in found] if few else found


def _deviation(by_layer: Sequence[Sequence[Comparison]]) -> tuple[float, int]:
    """Returns the standard deviation of transformed shares around their layer's mean, and its degrees of freedom.

    It is at least that of counts with a common share.
    """
    deviations = [roots - roots.mean() for found in by_layer if len(roots := _roots(found))]
    freedom = sum(len(d) - 1 for d in deviations)
    if not freedom:
        return 0.0, 0
    least = 0.5 / math.sqrt(min(c.units for found in by_layer for c in found))
    return max(least, math.sqrt(sum(float(d @ d) for d in deviations) / freedom)), freedom


def _roots(found: Sequence[Comparison]) -> np.ndarray:
    """Returns the arcsines of the roots of the shares, whose variance does not depend on the share."""
    return np.array([math.asin(math.sqrt((c.agreeing + 0.375) / (c.units + 0.75))) for c in found])


def _predicted_share(found: Sequence[Comparison], alpha: float, least: float, common: tuple[float, int]) -> float:
    """Returns the upper bound, at confidence 1 - alpha, on the share of agreeing units in one more pair of models.

    The greater of two: that of Clopper and Pearson on the greatest share seen, and the prediction bound for a new value
    of the transformed shares, taken as normal, with a standard deviation that all layers have in common. Of a single
    pair there is no second one.
    """
    bounds = [upper_share(c.agreeing, c.units, alpha) for c in found]
    deviation, freedom = common
    if found and freedom:
        known = freedom >= FEWEST_CONTROLS - 1  # of fewer, Student's quantile bounds nothing, but the default does
        quantile = float(special.stdtrit(freedom, 1 - alpha) if known else special.ndtri(1 - alpha))
        margin = quantile * deviation * math.sqrt(1 + 1 / len(found))
        bounds.append(math.sin(min(float(_roots(found).mean()) + margin, math.pi / 2)) ** 2)
    if len(found) < FEWEST_CONTROLS:
        bounds.append(least)
    return min(max(bounds, default=least), 1.0 - 1e-9)


def upper_share(agreeing: int, units: int, alpha: float) -> float:
    """Returns the upper Clopper-Pearson bound, at confidence 1 - alpha, on the share of units that agree."""
    if agreeing >= units:
        return 1.0 - 1e-9
    return float(special.betaincinv(agreeing + 1, units - agreeing, 1 - alpha))


def agreement_effect(layers: Sequence[Comparison], statistic: str = "match", of_pairs: bool = False) -> str:
    """Returns how many units agree, beside what this statistic shows of independent models.

    Args:
      layers: the comparisons of layers of equal index, or of all pairs of layers.
      statistic: a key of `SEEN`.
      of_pairs: whether they are of all pairs, in most of which no unit should agree.
    """
    if not any(c.units for c in layers):
        return "no unit of both models is evidence, so that none could be compared"
    best = max(layers, key=lambda c: c.agreeing / max(1, c.units))
    most = f"{best.agreeing:,} of {best.units:,}"
    if of_pairs:
        found = f"{most} units agree in the one of {len(layers):,} pairs of layers where most do"
    else:
        total = sum(c.agreeing for c in layers), sum(c.units for c in layers)
        found = f"{total[0]:,} of {total[1]:,} units agree, {most} in the layer where most do"
    return f"{found}; independent models: {SEEN[statistic]}"


def control_source(controls: int, sides: int) -> str:
    """Returns the source of an allowance measured on control models, compared with base alone or (`sides` 2) ft too."""
    against = "base and ft" if sides == 2 else "base"
    return f"control models ({controls}), each against {against}: upper bound for a new pair, at 1 - level / 10"


def calibrated_test(
    name: str,
    log_ps: Sequence[float],
    sizes: Sequence[float],
    layers: Sequence[Comparison],
    places: Sequence[str],
    null: Null,
) -> Test:
    """Returns a calibrated test by Holm's minimum; firm is its p-value of the layers of an effect beyond the margin.

    Layers whose units agree on embeddings and not on a text are left out there.

    Args:
      name: of the test.
      log_ps: for each layer its calibrated log p-value.
      sizes: for each layer the share of agreeing units, or the rank correlation.
      layers: the comparisons.
      places: the names of the layers.
      null: what the p-values were calibrated by.
    """
    test = one_test(name, layers, log_ps, places, bonferroni, "Holm's minimum over layers")
    is_firm = [null.is_firm(i, size) and found.agrees_on_text for i, (size, found) in enumerate(zip(sizes, layers))]
    firm = bonferroni([p if kept else 0.0 for p, kept in zip(log_ps, is_firm)])
    return replace(test, firm_log10_p=firm / LN10, calibrated=True)
