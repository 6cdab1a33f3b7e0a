"""The page of several models against one base: verdicts side by side, figure, and links to the page of each pair."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from tracing_jax.record import plain
from tracing_jax.report.family import (
    PAIR_HEADERS,
    adjustment_text,
    figure_of_family,
    pair_names,
    pair_rows,
    path_rows,
)
from tracing_jax.report.judgement import decided_by
from tracing_jax.report.plots import png
from tracing_jax.report.sections import Cell, Page, Section, Table, as_cell, table_of
from tracing_jax.report.wording import asked, outcome, p_cell

_PATH = ("", "path", "base loss", "midpoint", "barrier", "end loss")


def family_html(records: Sequence[Mapping[str, Any]], pages: Sequence[str]) -> str:
    """One HTML page about all the records, which share their base; everything in it is escaped.

    Args:
        records: one for each model held against the base.
        pages: where the page of each record lies, as a link relative to this page.
    """
    records = [plain(record) for record in records]
    figure = base64.b64encode(png(figure_of_family(records))).decode()
    sections = [Section("Loss along the path, and p-values", figure=figure), _statistics(records)]
    if rows := [row[1:] for record in records for row in path_rows(record)]:
        sections.append(Section("Paths", ["Losses in nats per token."], table=table_of(_PATH, rows)))
    sections += [Section("Notes", text=notes)] if (notes := _notes(records)) else []
    return Page(
        title=(f"{len(records)} models", asked(records[0], "base")),
        summary=(),
        sections=sections,
        first=[_pairs(records, pages)],
    ).html()


def _pairs(records: Sequence[Mapping[str, Any]], pages: Sequence[str]) -> Section:
    """The verdict on each pair, and under the table the grounds in words."""
    links = dict(zip(pair_names(records), pages, strict=True))
    judged = {row[0]: row for row in pair_rows(records)}
    rows = [
        [Cell(name, link=link), *(as_cell(value) for value in judged.get(name, [name, *[None] * 5])[1:])]
        for name, link in links.items()
    ]
    text = [adjustment_text(records)] if judged else []
    for name, record in zip(links, records, strict=True):
        if verdict := record.get("verdict"):
            text.append(f"{name}: {verdict['meaning']} ({decided_by(verdict)})")
    return Section("Pairs", text, table=Table(rows, ("", *PAIR_HEADERS[1:])))


def _statistics(records: Sequence[Mapping[str, Any]]) -> Section:
    """A row for each statistic of each pair, in the order of the statistics."""
    names = list(dict.fromkeys(name for record in records for name in record["statistics"]))
    rows = []
    for name in names:
        for pair, record in zip(pair_names(records), records, strict=True):
            if sides := record["statistics"].get(name):
                log10_p = (sides.get("non_aligned") or {}).get("log10_p")
                rows.append([name, pair, outcome(sides), p_cell(log10_p)])
    return Section("Statistics", table=table_of(("", "other model", "found", "p, pair as given"), rows))


def _notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The notes of all pairs, each with the pairs it holds for; those that hold for all once."""
    found: dict[str, list[str]] = {}
    for name, record in zip(pair_names(records), records, strict=True):
        for note in record.get("notes") or ():
            found.setdefault(note, []).append(name)
    return [note if len(names) == len(records) else f"{', '.join(names)}: {note}" for note, names in found.items()]
