"""The verdict on a pair: what was found, what else can explain it, and what the tests that ran do not detect."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from tracing_jax.arch import Arch
from tracing_jax.record import SMALLEST_CALIBRATED
from tracing_jax.rewrites import DISGUISES, residual_group
from tracing_jax.statistics.pvalues import holm
from tracing_jax.statistics.statistic import Result

DECIDING: Mapping[str, str] = {
    "csu": "MLPs", "csh": "MLPs", "match": "MLPs", "match_all": "MLPs", "match_mlps": "MLPs",
    "match_moments": "MLPs",
    "match_io": "MLPs", "match_crossfit": "MLPs", "match_heads": "attention", "match_distilled": "MLPs",
    "screen": "MLPs", "unseen_tokens": "embedding", "features_in_place": "all parts", "csu_procrustes": "MLPs",
    "heads_in_place": "attention",
}  # fmt: skip
"""Statistics whose p-values are exact, or calibrated against a measured null, and the part of the models that they
compare. Only these enter the verdict."""

HIDING: Mapping[str, Sequence[str]] = {
    "csu": ("permute", "rotate"), "csh": ("permute",), "match": (), "match_all": (), "match_mlps": (),
    "match_moments": (), "match_io": (), "match_crossfit": (), "features_in_place": ("permute", "rotate"),
    "csu_procrustes": ("permute",), "heads_in_place": ("permute",),
}  # fmt: skip
"""Statistics on the body of a model whose power has been measured (docs/power.md), and the rewrites that hide a
relation from them."""

LIMITS: Mapping[str, Sequence[str]] = {
    "csh": ("training on for several times as long", "replaced embeddings"),
    "match": ("replaced embeddings with training after it",),
    "match_all": ("replaced embeddings with training after it",),
    "match_mlps": ("replaced embeddings with training after it",),
    "match_moments": ("merges in equal parts", "training on for several times as long"),
    "match_io": ("replaced embeddings", "MLPs trained anew"),
    "match_crossfit": ("MLPs trained anew in most layers",),
    "match_heads": ("replaced embeddings", "attention trained anew"),
    "unseen_tokens": ("another vocabulary", "a body without its embedding"),
    "features_in_place": ("another width",),
    "csu_procrustes": ("replaced embeddings", "MLPs trained anew"),
    "heads_in_place": ("attention trained anew", "another number of heads"),
}
"""What else a statistic does not detect: changes that are no rewrites, since they change the function too."""

_REWRITES = {
    "permute": "permuted units or features",
    "rotate": "a rotated residual stream",
}
_SIGNS = "features of the residual stream of other signs"

_MOVED_LAYERS = "layers that were moved"
_OBSCURED = "layers most of whose MLP units are no evidence"
"""Given as a reason where that is so in most layers, so that no test of units can find much."""

_WITHOUT_EMBEDDINGS = ("match_crossfit", "match_moments")
"""Statistics that detect a relation where embeddings were replaced and the model was trained on."""

_BY_EMBEDDINGS = (
    " (those tests do not detect embeddings that were replaced before further training, "
    f"which {' and '.join(_WITHOUT_EMBEDDINGS)} detect)"
)
_NONE_WITHOUT_EMBEDDINGS = _BY_EMBEDDINGS.replace("detect)", "would, but they do not apply to these models)")

_OF_ANY_LAYERS = ("match_all", "match_mlps")
"""Statistics that compare every layer with every other, and not those of equal index; so does `match_moments` where the
models differ in depth."""

VerdictName = Literal["identical", "related", "no_evidence", "undecided", "not_testable", "not_asked"]

UNDECIDED_BELOW = 0.05
_EVIDENCE = 20

EXPLANATIONS = (
    "one descends from the other",
    "both descend from a third model",
    "one is a merge in which the other, or a relative of it, had a part",
    "parts of one were copied into the other",
    "both started from the same initialisation: a public one, or the same random seed, which the defaults of common "
    "training code make likely",
)
"""What `related` can mean. The tests tell dependent weights from independent ones, and not these from one another."""


@dataclass(frozen=True)
class Identity:
    """How many tensors of two models are identical, of all that either has; by part of the model as well.

    Attributes:
      equal, total: numbers of tensors.
      by_part: part -> the same two numbers.
    """

    equal: int
    total: int
    by_part: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether all tensors are identical."""
        return self.equal == self.total > 0

    @property
    def whole_parts(self) -> tuple[str, ...]:
        """The parts of which all tensors are identical: copied, though the other parts need not be."""
        parts = ("embedding", "attention", "MLPs")
        return tuple(part for part in parts if (counts := self.by_part.get(part)) and counts[0] == counts[1] > 0)


@dataclass(frozen=True)
class Verdict:
    """The verdict of all tests of a pair as given.

    Attributes:
      verdict: `identical`: all tensors are. `related`: a test that no reservation applies to is below the level.
        `no_evidence`: a test ran that is invariant under every rewrite of these models, and none is below 0.05.
        `undecided`: neither. `not_testable`: no test that was asked for applies. `not_asked`: none of the statistics
        is a test.
      meaning: the verdict in a sentence.
      explanations: of `related`, what it can mean.
      level: the significance level.
      statistic: the statistic that decided: the one of smallest p-value, where that of a calibrated test counts as no
        smaller than 10^-12; None if none applies.
      adjusted_log10_p: its p-value, Holm-adjusted over the statistics in `family`.
      firm_log10_p: the smallest adjusted p-value of evidence without a reservation.
      calibrated: whether the deciding p-value rests on the allowance for convergent units.
      effect: the effect size of the deciding statistic, in a sentence.
      family: statistic -> log10 p, of the statistics over which Holm adjusts.
      layers: the layers significant by themselves in that statistic, after Bonferroni over all its places.
      evidence: the 20 places of smallest p-value in all statistics in `family`, not adjusted, smallest first.
      parts: part of the model -> its own finding: verdict, statistic, all its statistics, adjusted log10 p and effect.
      blind_to: statistic -> rewrites of these models that make it miss a relation.
      limits: statistic -> other changes that make it miss a relation.
      sees_all_rewrites: whether a test of measured power ran that is invariant under every rewrite of these models.
      reservations: statistic -> how else than by dependence its p-value can be small.
      not_applicable: statistic -> why it does not apply.
      identical: how many tensors are identical, where they were compared.
    """

    verdict: VerdictName
    meaning: str
    level: float
    explanations: Sequence[str] = ()
    statistic: str | None = None
    adjusted_log10_p: float | None = None
    firm_log10_p: float | None = None
    calibrated: bool = False
    effect: str | None = None
    family: Mapping[str, float] = field(default_factory=dict)
    layers: Sequence[str] = ()
    evidence: Sequence[Mapping[str, Any]] = ()
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    blind_to: Mapping[str, Sequence[str]] = field(default_factory=dict)
    limits: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sees_all_rewrites: bool = False
    reservations: Mapping[str, str] = field(default_factory=dict)
    not_applicable: Mapping[str, str] = field(default_factory=dict)
    identical: Identity | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the verdict as plain data."""
        return asdict(self)


def verdict(results: Mapping[str, Result], level: float, identical: Identity | None = None, scope: str = "") -> Verdict:
    """Returns the verdict of the results on a pair as given; results on an aligned pair have no p-value to enter it.

    Args:
      results: statistic -> its result.
      level: significance level.
      identical: how many tensors of the pair are identical, if they were compared.
      scope: what was read of the models, where that is less than all: a clause, see `scope_of`.

    Raises:
      ValueError: a level outside (0, 0.05].

    Example:
      >>> tj.verdict({"csu": tj.Result(0.9, "units in place", log10_p=-12.0)}, level=1e-3).verdict
      'related'
    """
    if not 0 < level <= UNDECIDED_BELOW:
        raise ValueError(f"level={level}: expected above 0 and at most {UNDECIDED_BELOW}")
    deciding = {name: results[name] for name in DECIDING if name in results}
    found = {name: result for name, result in deciding.items() if result.log10_p is not None}
    reasons = {name: result.not_applicable for name, result in deciding.items() if result.not_applicable}
    whole = identical is not None and identical.is_whole
    if not found:
        word: VerdictName = "identical" if whole else "not_testable" if deciding else "not_asked"
        meaning = _meaning(word, level, identical=identical, reasons=reasons, scope=scope)
        return Verdict(word, meaning, level, not_applicable=reasons, identical=identical)
    adjusted = _holm({name: result.log10_p for name, result in found.items()})
    firm = _holm({name: result.deciding_log10_p for name, result in found.items()})
    blind = {name: list(result.blind_to or ()) for name, result in found.items() if result.blind_to}
    sees_all = any(_sees_all(name, result) for name, result in found.items())
    copied = () if identical is None or whole else identical.whole_parts
    word = "identical" if whole else word_of(min(adjusted.values()), min(firm.values()), level, sees_all and not copied)
    order = firm if word == "related" else adjusted
    least = math.log10(level)
    statistic = _that_decides(found, order, blind, level)
    reserved = {
        name: result.reservation
        for name, result in found.items()
        if result.reservation and adjusted[name] < least <= firm[name]
    }
    hint = _hint(word, deciding, found)
    return Verdict(
        word,
        _meaning(word, level, identical, reasons, min(adjusted.values()), blind, reserved, hint, scope, copied),
        level,
        EXPLANATIONS if word == "related" else (),
        statistic,
        adjusted[statistic],
        min(firm.values()),
        _is_calibrated(found[statistic]),
        found[statistic].effect,
        {name: float(result.log10_p) for name, result in found.items() if result.log10_p is not None},
        _layers_below(found[statistic], level) if word == "related" else [],
        ranked_evidence(found)[:_EVIDENCE],
        _parts(found, adjusted, firm, level) | _identical_parts(identical, copied, found),
        blind,
        {name: LIMITS[name] for name in found if name in LIMITS},
        sees_all,
        reserved,
        reasons,
        identical,
    )


def _hint(word: VerdictName, deciding: Mapping[str, Result], found: Iterable[str]) -> str:
    """Returns what the sentence adds: of no evidence what all tests that ran miss, of others which test to run."""
    if word == "no_evidence":
        # One that compared some of the layers may have missed what another would find.
        if any(deciding[name].blind_to == () for name in set(found) & set(_WITHOUT_EMBEDDINGS)):
            return ""
        refused = all(name in deciding and deciding[name].not_applicable for name in _WITHOUT_EMBEDDINGS)
        return _NONE_WITHOUT_EMBEDDINGS if refused else _BY_EMBEDDINGS
    return "" if "match" in deciding else ": run match, or auto"


_FEWEST_UNITS = 16
"""Matched units of a layer below which no p-value is small. Where three layers or fewer measure chance, that of
calibrated tests if all units agree is 10^-1.1 of 8 units, 10^-2.6 of 12 and 10^-4.4 of 16, before a factor of up to 100
for layers and tests."""


def _sees_all(name: str, result: Result) -> bool:
    """Returns whether a statistic is invariant under every rewrite, and had units to compare in half of its places.

    In some place there must be so many that their p-value is small if all agree, after every adjustment.
    """
    counts = [np.ravel(test.values["units"]) for test in result.tests if "units" in test.values]
    units = np.concatenate(counts) if counts else np.zeros(0)
    has_units = not counts or bool(np.mean(units > 0) >= 0.5 and units.max() >= _FEWEST_UNITS)
    return name in HIDING and result.blind_to == () and has_units


def word_of(log10_p: float, firm_log10_p: float, level: float, sees_all_rewrites: bool) -> VerdictName:
    """Returns the verdict by the smallest adjusted p-values of a pair, with and without reservations."""
    if firm_log10_p < math.log10(level):
        return "related"
    if log10_p >= math.log10(UNDECIDED_BELOW) and sees_all_rewrites:
        return "no_evidence"
    return "undecided"


def hidden_by(
    statistic: str, base: Arch, ft: Arch, layers_may_be_moved: bool = False, units_are_obscured: bool = False
) -> tuple[str, ...] | None:
    """Returns the rewrites of either model that make a statistic miss a relation; None if that is not known of it.

    Layers may be moved where a model has some that do nothing, so that its others need not have the index of those that
    they correspond to. So it is where the models differ in depth. Units are obscured where most of a model share a gate
    with others and carry no evidence; see `obscured_layers`.
    """
    if statistic not in HIDING:
        return None
    other_depth = base.num_layers != ft.num_layers
    of_any = statistic in _OF_ANY_LAYERS or (other_depth and statistic == "match_moments")
    moved: tuple[str, ...] = (_MOVED_LAYERS,) if (other_depth or layers_may_be_moved) and not of_any else ()
    moved += (_OBSCURED,) if units_are_obscured and DECIDING[statistic] == "MLPs" else ()
    if base.reading is not None or ft.reading is not None:  # which rewrites there are is not known: any may be
        return tuple(_REWRITES[name] for name in HIDING[statistic]) + moved
    found = tuple(
        _SIGNS if name == "rotate" and {residual_group(arch) for arch in (base, ft)} <= {"signs", None} else words
        for name, words in _REWRITES.items()
        if name in HIDING[statistic] and not all(DISGUISES[name].unsupported(arch) for arch in (base, ft))
    )
    return found + moved


def scope_of(base: Arch, ft: Arch, component: str | None = None) -> str:
    """Returns what was read of two models, as a clause, where that is less than all; empty if all was."""
    if component is not None:
        return f"only their component {component} was compared, read by its weights alone"
    sides = [side for side, arch in (("base", base), ("ft", ft)) if arch.reading is not None]
    if len(sides) == 2:
        return "both models were read by their weights alone"
    return f"{sides[0]} was read by its weights alone" if sides else ""


def over_pairs(log10_ps: Sequence[float | None]) -> list[float | None]:
    """Returns the p-values of several pairs, Holm-adjusted over those that have one, as decimal logarithms.

    Each is already adjusted over the statistics of its pair, so it is the p-value of that pair alone.
    """
    known = [log10_p for log10_p in log10_ps if log10_p is not None]
    if not known:
        return list(log10_ps)
    adjusted = iter(map(float, holm([log10_p * math.log(10) for log10_p in known]) / math.log(10)))
    return [None if log10_p is None else next(adjusted) for log10_p in log10_ps]


def ranked_evidence(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """Returns every place of every test that enters the verdict with its log10 p, smallest first."""
    rows = [
        {"statistic": name, "test": test.name, "place": place, "log10_p": log10_p}
        for name, result in results.items()
        for test in result.tests
        if test.decides
        for place, log10_p in zip(test.places, test.log10_ps or ())
    ]
    return sorted(rows, key=lambda row: row["log10_p"])


def _holm(log10_ps: Mapping[str, float | None]) -> dict[str, float]:
    return dict(zip(log10_ps, map(float, (p for p in over_pairs(list(log10_ps.values())) if p is not None))))


def _is_calibrated(result: Result) -> bool:
    deciding = [test for test in result.tests if test.decides and test.log10_p is not None]
    return bool(deciding) and min(deciding, key=lambda test: test.log10_p or 0.0).calibrated


def _that_decides(
    found: Mapping[str, Result], log10_ps: Mapping[str, float], blind: Mapping[str, Sequence[str]], level: float
) -> str:
    """Returns the statistic of smallest p-value as shown; of equal ones by power, then by its own p-value."""
    floor = min(SMALLEST_CALIBRATED, math.log10(level))

    def rank(name: str) -> tuple[Any, ...]:
        p, result = log10_ps[name], found[name]
        return _shown(result, p, floor), name in blind, p, result.log10_p

    return min(log10_ps, key=rank)


def _shown(result: Result, log10_p: float, floor: float) -> float:
    """Returns the p-value by which a result is chosen as the one that decides: as people are shown it."""
    return max(log10_p, floor) if _is_calibrated(result) else log10_p


def _meaning(
    word: VerdictName,
    level: float,
    identical: Identity | None = None,
    reasons: Mapping[str, str] | None = None,
    log10_p: float = 0.0,
    blind: Mapping[str, Sequence[str]] | None = None,
    reserved: Mapping[str, str] | None = None,
    hint: str = "",
    scope: str = "",
    copied: Sequence[str] = (),
) -> str:
    """Returns the verdict in a sentence; of `undecided`, why."""
    if copied:
        rest = "no other sign of common weights was found"
        if word != "undecided" or log10_p < math.log10(UNDECIDED_BELOW):
            rest = _meaning(word, level, identical, reasons, log10_p, blind, reserved, hint, scope)
        return f"every tensor of the {' and the '.join(copied)} is identical; {rest}"
    if word == "identical":
        of = f"that were read are identical; {scope}" if scope else "of the two models are identical"
        return f"all {identical.total if identical else 0} tensors {of}"
    if word == "related":
        return "the weights of the two models are not independent" + (f"; {scope}" if scope else "")
    if word == "not_asked":
        return "no verdict was asked for: the statistics are descriptive; csu, csh and match are tests"
    if word == "not_testable":
        return "no test applies to this pair: " + "; ".join(f"{name}: {why}" for name, why in (reasons or {}).items())
    if word == "no_evidence" and scope:
        return (
            "no sign of common weights was found in the parts that were read, by tests that are invariant under "
            f"permuted units and rotated features; {scope}: other parts, and other rewrites that its forward pass may "
            f"allow, were not tested{hint}; independence is never proved"
        )
    if word == "no_evidence":
        return (
            "no sign of common weights was found, by tests that are invariant under every known rewrite of these models"
            f"{hint}; independence is never proved"
        )
    if reserved and log10_p < math.log10(level):
        return "the evidence can have another cause: " + "; ".join(f"{name}: {why}" for name, why in reserved.items())
    if log10_p < math.log10(UNDECIDED_BELOW):
        return "evidence too weak to call at this level, and too strong to dismiss"
    if blind:
        cannot = "; ".join(f"{name} does not detect {' or '.join(rewrites)}" for name, rewrites in blind.items())
        return f"nothing was found, and {cannot}{hint}"
    return f"nothing was found, by tests whose power on such pairs has not been measured{hint}"


def _parts(
    found: Mapping[str, Result], adjusted: Mapping[str, float], firm: Mapping[str, float], level: float
) -> dict[str, dict[str, Any]]:
    """Returns for each part of the models that a test compared the finding of the statistic of smallest p-value."""
    parts: dict[str, dict[str, Any]] = {}
    floor = min(SMALLEST_CALIBRATED, math.log10(level))
    compared = {name: _part_of(name, result) for name, result in found.items()}
    for part in dict.fromkeys(compared.values()):
        names = [name for name in found if compared[name] == part]
        best = min(names, key=lambda name: (_shown(found[name], firm[name], floor), firm[name], adjusted[name]))
        sees_all = any(_sees_all(name, found[name]) for name in names)
        parts[part] = {
            "verdict": word_of(min(adjusted[n] for n in names), firm[best], level, sees_all),
            "statistic": best,
            "statistics": names,
            "log10_p": adjusted[best],
            "effect": found[best].effect,
        }
    return parts


def _part_of(name: str, result: Result) -> str:
    """Returns the part of the models that a statistic compares: that of experts where it compared some."""
    has_experts = any("expert" in place for test in result.tests for place in test.places)
    return "experts" if name == "match_mlps" and has_experts else DECIDING[name]


def _identical_parts(
    identical: Identity | None, copied: Sequence[str], found: Mapping[str, Result]
) -> dict[str, dict[str, Any]]:
    """Returns the finding on each part of which all tensors are identical, which takes the place of a test's."""
    parts: dict[str, dict[str, Any]] = {}
    for part in copied:
        assert identical is not None
        count = identical.by_part[part][1]
        parts[part] = {
            "verdict": "identical",
            "statistics": [name for name, result in found.items() if _part_of(name, result) == part],
            "effect": f"{count} of {count} tensors are identical" if count > 1 else "its one tensor is identical",
        }
    return parts


def _layers_below(result: Result, level: float) -> list[str]:
    deciding = [test for test in result.tests if test.decides]
    looked_at = sum(len(test.places) for test in deciding)
    carrying = {
        place: None
        for test in deciding
        for place, log10_p in zip(test.places, test.log10_ps or ())
        if log10_p + math.log10(looked_at) < math.log10(level)
    }
    return sorted(carrying, key=_natural)


def _natural(place: str) -> tuple[list[int], str]:
    return [int(word) if word.isdigit() else 0 for word in place.split()], place
