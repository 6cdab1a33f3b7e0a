"""The pairs of a zoo as rows: state, results, verdict after Holm over all pairs; and whether p-values are uniform."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import kstest

from tracing_jax.report.bounded_p_values import bounded
from tracing_jax.statistics import Identity, over_pairs, word_of
from tracing_jax.statistics.verdict import VerdictName
from tracing_jax.zoo.folder import PairState, State, ZooFolder
from tracing_jax.zoo.plan import PlannedPair

ORDER_TESTS = ("csu", "csh")
"""Statistics that test whether units are in the same order in both models: not after a permutation."""


@dataclass(frozen=True)
class PairRow:
    """One pair of the plan; models have their short names, and p-values are decimal logarithms.

    Attributes:
      pair: the name of the pair, of which its files are called.
      base, ft: the names of its models.
      known: whether they are known to be related, if anything is known.
      state, error: of the pair, and the first line of its error.
      log10_p: Holm-adjusted over the statistics of the pair; None without a record, or a test that applies.
      firm_log10_p: the same of evidence without a reservation, adjusted over all pairs once it is in a report.
      adjusted_log10_p: log10_p, Holm-adjusted over all pairs of the zoo that have one.
      alone: the verdict on the pair alone.
      sees_all_rewrites: whether a test ran that is invariant under every rewrite of these models, and no part of both
        is identical.
      verdict: by the adjusted p-values; None without a record.
      parts: of a related pair, part of the models -> verdict and `log10_p` of its own, once judged beside all pairs.
      statistic: the one that decided.
      calibrated: whether its p-value rests on the allowance for convergent units.
      level: below which a pair is related.
      jsd: Jensen-Shannon divergence of the predictions, nats per token, in [0, ln 2].
      l2: mean Frobenius distance of the weights over tensors, without alignment.
      units: share of the narrower models' MLP units that agree with units of the other, in [0, 1].
      in_place_log10_p: the smallest p-value of the statistics `ORDER_TESTS` on the pair.
      shapes: of base and of ft: layers, MLP units, tokens and so on.
      layer_map: which layer comes from which, if `match_all` ran.
    """

    pair: str
    base: str
    ft: str
    known: bool | None
    state: State
    error: str = ""
    log10_p: float | None = None
    firm_log10_p: float | None = None
    adjusted_log10_p: float | None = None
    alone: VerdictName | None = None
    sees_all_rewrites: bool = False
    verdict: VerdictName | None = None
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    statistic: str | None = None
    calibrated: bool = False
    level: float | None = None
    jsd: float | None = None
    l2: float | None = None
    units: float | None = None
    in_place_log10_p: float | None = None
    shapes: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {})
    layer_map: Mapping[str, Any] | None = None

    @property
    def models(self) -> tuple[str, str]:
        """The names of both models."""
        return self.base, self.ft

    @property
    def word(self) -> str:
        """The verdict as it is shown; empty without a record."""
        return (self.verdict or "").replace("_", " ")

    @property
    def parts_text(self) -> str:
        """The finding on each part of a related pair, `MLPs related, attention no evidence`; else empty."""
        return ", ".join(f"{part} {found['verdict'].replace('_', ' ')}" for part, found in self.parts.items())

    @property
    def is_related(self) -> bool:
        """Whether the verdict is that their weights are not independent."""
        return self.verdict in ("related", "identical")

    @property
    def in_place(self) -> bool:
        """Whether the units of both models are in the same order, by the tests of that."""
        p, level = self.in_place_log10_p, self.level
        return p is not None and level is not None and p < math.log10(level)

    @property
    def shown_log10_ps(self) -> tuple[float | None, float | None]:
        """log10_p and adjusted_log10_p as people are shown them."""
        found = self.log10_p, self.adjusted_log10_p
        return (bounded(found[0]), bounded(found[1])) if self.calibrated else found

    def other(self, name: str) -> str:
        """Returns the model beside this one."""
        return self.ft if name == self.base else self.base


def read_rows(folder: ZooFolder) -> list[PairRow]:
    """Returns a row for every pair of the plan, done or not."""
    names, proposal = folder.plan.names, folder.plan.proposal
    rows = [_read(folder, pair, names) for pair in folder.plan.pairs]
    return with_verdicts(rows, 0 if proposal is None else proposal.left_out)


def with_verdicts(rows: Sequence[PairRow], left_out: int = 0) -> list[PairRow]:
    """Returns the rows with the p-values of all pairs that are done adjusted over one another, and the verdicts.

    Args:
      rows: of a zoo.
      left_out: pairs that were compared by signatures alone. They count as p = 1, since the others were chosen from
        them by the same weights.
    """
    none = [0.0] * left_out
    adjusted, firm = (
        over_pairs([*ps, *none])[: len(rows)] for ps in ([r.log10_p for r in rows], [r.firm_log10_p for r in rows])
    )
    judged = (
        replace(row, adjusted_log10_p=log10_p, firm_log10_p=firm_log10_p)
        for row, log10_p, firm_log10_p in zip(rows, adjusted, firm, strict=True)
    )
    tested = left_out + sum(row.log10_p is not None for row in rows)
    verdicts = (replace(row, verdict=_verdict(row)) if row.state == "done" else row for row in judged)
    return [replace(row, parts=_parts(row, tested) if row.verdict == "related" else {}) for row in verdicts]


def _parts(row: PairRow, pairs: int) -> dict[str, dict[str, Any]]:
    """Returns the findings on the parts of a pair, Bonferroni-adjusted over so many pairs: each has several parts."""
    return {part: _part(found, pairs, row.level) for part, found in row.parts.items()}


def _part(found: Mapping[str, Any], pairs: int, level: float | None) -> dict[str, Any]:
    log10_p = number(found.get("log10_p"))
    if log10_p is None or level is None:
        return {"verdict": found["verdict"], "log10_p": None}
    adjusted = min(0.0, log10_p + math.log10(pairs))
    weakened = found["verdict"] == "related" and adjusted >= math.log10(level)
    return {"verdict": "undecided" if weakened else found["verdict"], "log10_p": adjusted}


def row_of(pair: PlannedPair, names: Mapping[str, str], state: PairState, record: Mapping[str, Any] | None) -> PairRow:
    """Returns the row of a pair, not yet judged beside the others."""
    row = PairRow(pair.name, names[pair.base], names[pair.ft], pair.related, state.state, state.error)
    if record is None:
        return row
    judged, models = record["verdict"], record["models"]
    shapes = (models["base"].get("shape") or {}, models["ft"].get("shape") or {})
    layer_map = _field(record, "match_all", "layer_map")
    units = _share_of_units(layer_map, shapes) if layer_map else number(_field(record, "match", "headline"))
    in_place = [p for name in ORDER_TESTS if (p := number(_field(record, name, "log10_p"))) is not None]
    return replace(
        row,
        log10_p=number(judged["adjusted_log10_p"]),
        firm_log10_p=number(judged["firm_log10_p"]),
        alone=judged["verdict"],
        sees_all_rewrites=judged["sees_all_rewrites"] and not _copied_parts(judged),
        parts=judged.get("parts") or {},
        statistic=judged["statistic"],
        calibrated=bool(judged.get("calibrated")),
        level=judged["level"],
        jsd=number(_field(record, "jsd", "headline")),
        l2=number(_field(record, "l2", "headline")),
        units=1.0 if judged["verdict"] == "identical" else units,  # without a test that would find all of them
        in_place_log10_p=min(in_place, default=None),
        shapes=shapes,
        layer_map=layer_map,
    )


def _copied_parts(judged: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the parts of the models of which all tensors are identical: such a pair is not without evidence."""
    identical = judged.get("identical")
    return Identity(**identical).whole_parts if identical else ()


def number(value: Any) -> float | None:
    """Returns a number of a record, in which infinities are strings; None for None and for what is no number."""
    return None if value is None or math.isnan(float(value)) else float(value)


def _read(folder: ZooFolder, pair: PlannedPair, names: Mapping[str, str]) -> PairRow:
    record = folder.record(pair)
    return row_of(pair, names, folder.state(pair) if record is None else PairState("done"), record)


def _field(record: Mapping[str, Any], statistic: str, field: str) -> Any:
    """Returns a field of a statistic on the pair as given."""
    return ((record["statistics"].get(statistic) or {}).get("non_aligned") or {}).get(field)


def _share_of_units(layer_map: Mapping[str, Any], shapes: tuple[Mapping[str, Any], Mapping[str, Any]]) -> float | None:
    """Returns the share of all MLP units of the smaller model that agree in the layers of the map."""
    sizes = [shape["num_layers"] * shape["mlp_dim"] for shape in shapes if shape]
    agreeing = sum(found["agreeing"] for found in layer_map["pairs"])
    return min(1.0, agreeing / min(sizes)) if sizes and min(sizes) else None


def _verdict(row: PairRow) -> VerdictName:
    """Returns the verdict of a pair beside all others: one that no p-value decides stays as it is."""
    if row.alone in ("identical", "not_testable", "not_asked"):
        return row.alone
    if row.adjusted_log10_p is None or row.firm_log10_p is None or row.level is None:
        return "undecided"
    return word_of(row.adjusted_log10_p, row.firm_log10_p, row.level, row.sees_all_rewrites)


BINS = 10


@dataclass(frozen=True)
class Uniformity:
    """A histogram of p-values in [0, 1].

    Attributes:
      counts: pairs in each of the `BINS` bins of equal width.
      ks_p: p-value of the Kolmogorov-Smirnov test against the uniform, two-sided; None for fewer than two pairs, and
        where the pairs were selected.
      ones: how many are exactly 1, as a calibrated test gives for every pair without a sign of descent.
      too_small: p-value of the one-sided test that they are smaller than uniform; None as above.
      selected: whether the pairs were chosen by signatures of the same weights, so that p need not be uniform.
    """

    counts: tuple[int, ...]
    ks_p: float | None
    ones: int
    too_small: float | None
    selected: bool = False


def uniformity(rows: Sequence[PairRow], selected: bool = False) -> Uniformity:
    """Returns the histogram of the unadjusted p-values of all pairs without evidence of a relation."""
    p = np.array([10.0**row.log10_p for row in rows if row.verdict == "no_evidence" and row.log10_p is not None])
    counts = tuple(int(count) for count in np.histogram(p, BINS, (0.0, 1.0))[0])
    enough = len(p) >= 2 and not selected
    return Uniformity(
        counts,
        float(kstest(p, "uniform").pvalue) if enough else None,
        int((p >= 1.0).sum()),
        float(kstest(p, "uniform", alternative="greater").pvalue) if enough else None,
        selected,
    )


def uniformity_sentence(found: Uniformity) -> str:
    """Returns the histogram's meaning: conservative as it should be, or too many small p-values."""
    total = sum(found.counts)
    if found.selected and total:
        return (
            f"{total} pair{'s' if total != 1 else ''}, chosen by a p-value of the same weights (that of signatures): "
            "so these need not be uniform if the pairs are independent, and are not tested for it."
        )
    if found.ks_p is None or found.too_small is None:
        return f"{total} pair{'s' if total != 1 else ''}: too few to say anything."
    if found.too_small < 0.01:
        return (
            f"There are more small p-values than independent pairs give (one-sided Kolmogorov-Smirnov p = "
            f"{found.too_small:.2g}): some of these pairs may be related after all, or the tests are not calibrated "
            "for such models. Look at the smallest ones in the table of pairs."
        )
    text = (
        f"Kolmogorov-Smirnov p = {found.ks_p:.2g} against the uniform; not smaller than uniform "
        f"(p = {found.too_small:.2g})."
    )
    if found.ks_p < 0.01:
        text += (
            f" They lie above the uniform ({found.ones} of {total} are exactly 1), which is the safe side: the p-value "
            "of a pair pays for all statistics that were asked, and calibrated tests allow for units that independent "
            "models share."
        )
    return text
