"""One base compared with several models: figure, and page with links to the page of each pair."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.figure import Figure

from tracing_jax.record import plain
from tracing_jax.report.bounded_p_values import with_bounded_p_values
from tracing_jax.report.figures import pairs_figure, png
from tracing_jax.report.findings import SENTENCES, model_name
from tracing_jax.report.formatting import (
    outcome,
    p_cell,
    requested_model,
    results_by_stage,
)
from tracing_jax.report.html_elements import Cell, Page, Section, Table, as_cell, table_of
from tracing_jax.report.page import verdict_banner
from tracing_jax.report.printed import PAIR_HEADERS, adjustment_text, pair_names, pair_rows, path_rows

_SAME_NATS = 0.01  # largest difference at which an aligned curve is left out as equal to the one before

_PATH_HEADERS = ("", "path", "base loss", "midpoint", "barrier", "end loss")


def figure_of_pairs(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss along the path from the base of the records to each of their models, and the p-values of each pair.

    An aligned curve that alignment did not change is left out; so is a panel for which no record has anything.
    """
    curves, log10_ps, level = _shown(records)
    return pairs_figure(curves, log10_ps, base=model_name(records[0], "base"), level=level)


def _shown(
    records: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Mapping[str, Any]], float | None]:
    """What the figure shows: curves by label, log10 p of each statistic by pair, and the level."""
    curves: dict[str, Mapping[str, Any]] = {}
    names = pair_names(records)
    for name, record in zip(names, records, strict=True):
        stages = results_by_stage(record["statistics"].get("mode", {}))
        before, after = (stages.get(stage, {}).get("curve") for stage in ("non-aligned", "aligned"))
        if before:
            curves[name] = before
        if after and not (before and _same(before, after)):
            curves[f"{name}, aligned"] = after
    verdicts = [with_bounded_p_values(record).get("verdict") or {} for record in records]
    log10_ps = {name: verdict["family"] for name, verdict in zip(names, verdicts, strict=True) if verdict.get("family")}
    level = next((math.log10(verdict["level"]) for verdict in verdicts if verdict), None)
    return curves, log10_ps, level


def _alt(records: Sequence[Mapping[str, Any]]) -> str:
    """What the figure shows, for those who do not see it."""
    curves, log10_ps, level = _shown(records)
    base, said = model_name(records[0], "base"), []
    losses = {label: [math.nan if loss is None else float(loss) for loss in curve["loss"]]
              for label, curve in curves.items()}  # fmt: skip
    if paths := [f"{label} from {loss[0]:.2f} to {loss[-1]:.2f}, at most {max(filter(math.isfinite, loss)):.2f}"
                 for label, loss in losses.items() if any(map(math.isfinite, loss))]:  # fmt: skip
        said.append(f"Loss in nats per token along the path from {base}: {'; '.join(paths)}.")
    if log10_ps and level is not None:
        least = {name: min(found.items(), key=lambda item: float(item[1])) for name, found in log10_ps.items()}
        found = "; ".join(f"{name} {p_cell(log10_p)} by {statistic}" for name, (statistic, log10_p) in least.items())
        said.append(f"Smallest p-value of each pair with {base}, where the level is {10**level:g}: {found}.")
    return " ".join(said) or "No pair has a path or a p-value that enters a verdict."


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = zip(one["loss"], other["loss"], strict=True)
    return all(abs(float(a) - float(b)) <= _SAME_NATS for a, b in pairs)


def pairs_html(records: Sequence[Mapping[str, Any]], pages: Sequence[str]) -> str:
    """One self-contained HTML page about all the records, which share their base; everything in it is escaped.

    Args:
        records: one for each model compared with the base.
        pages: links to the page of each record, relative to this page.
    """
    records = [plain(record) for record in records]
    figure = base64.b64encode(png(figure_of_pairs(records))).decode()
    sections = [Section("Loss along the path, and p-values", figure=figure, alt=_alt(records)), _statistics(records)]
    if rows := [row[1:] for record in records for row in path_rows(record)]:
        sections.append(Section("Paths", ["Losses in nats per token."], table=table_of(_PATH_HEADERS, rows)))
    sections += [Section("Notes", text=notes)] if (notes := _notes(records)) else []
    return Page(
        title=(f"{len(records)} models", requested_model(records[0], "base")),
        summary=(),
        sections=sections,
        first=[_pairs(records, pages)],
    ).html()


def _pairs(records: Sequence[Mapping[str, Any]], pages: Sequence[str]) -> Section:
    """The verdict on each pair as a table, and the tests behind it."""
    links = dict(zip(pair_names(records), pages, strict=True))
    by_name = {row[0]: row for row in pair_rows(records)}
    rows = [
        [Cell(name, link=link), *map(_coloured, by_name.get(name, [name, *[None] * 5])[1:])]
        for name, link in links.items()
    ]
    text = [adjustment_text(records)] if by_name else []
    banners = [
        verdict_banner(record["verdict"], name)
        for name, record in zip(links, records, strict=True)
        if record.get("verdict")
    ]
    return Section("Pairs", text, banners=banners, table=Table(rows, ("", *PAIR_HEADERS[1:])))


def _coloured(value: Any) -> Cell:
    """A value as a cell, which has the colour of its verdict if it is one."""
    text, word = as_cell(value), str(value).replace(" ", "_")
    return replace(text, verdict=word) if word in SENTENCES else text


def _statistics(records: Sequence[Mapping[str, Any]]) -> Section:
    """A row for each statistic of each pair, in the order of the statistics."""
    names = list(dict.fromkeys(name for record in records for name in record["statistics"]))
    rows = []
    shown = [with_bounded_p_values(record) for record in records]
    for name in names:
        for pair, record in zip(pair_names(records), shown, strict=True):
            if stages := record["statistics"].get(name):
                log10_p = (stages.get("non_aligned") or {}).get("log10_p")
                rows.append([name, pair, outcome(stages), p_cell(log10_p)])
    return Section("Statistics", table=table_of(("", "other model", "found", "p, pair as given"), rows))


def _notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The notes of all pairs, each once, with the names of its pairs unless it is of all."""
    found: dict[str, list[str]] = {}
    for name, record in zip(pair_names(records), records, strict=True):
        for note in record.get("notes") or ():
            found.setdefault(note, []).append(name)
    return [note if len(names) == len(records) else f"{', '.join(names)}: {note}" for note, names in found.items()]
