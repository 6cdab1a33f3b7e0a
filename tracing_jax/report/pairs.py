"""One base compared with several models: summary for the terminal, figure, and page with links to each pair's page."""

import base64
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from tracing_jax.record import plain
from tracing_jax.report.bounded_p_values import bounded, with_bounded_p_values
from tracing_jax.report.figures import pairs_figure, png
from tracing_jax.report.formatting import (
    ABSENT,
    caveats,
    cell,
    claim_text,
    decided_by,
    outcome,
    p_cell,
    places_text,
    requested_model,
    results_by_side,
    subject,
    text_table,
    verdict_word,
)
from tracing_jax.report.html_elements import Cell, Page, Section, Table, as_cell, table_of

_SAME_NATS = 0.01  # largest difference at which an aligned curve is left out as equal to the one before
_COLUMNS = 110  # of the terminal

_FOR_THE_LOG = "memory: "
"""Notes on what the run took, which the record, the page and the log have."""

_PATH_HEADERS = ("", "path", "base loss", "midpoint", "barrier", "end loss")
PAIR_HEADERS = ("other model", "verdict", "statistic", "log10 p (pair)", "log10 p (all pairs)", "significant")


def figure_of_pairs(records: Sequence[Mapping[str, Any]]) -> Figure:
    """The loss along the path from the base of the records to each of their models, and the p-values of each pair.

    An aligned curve that alignment did not change is left out; so is a panel for which no record has anything.
    """
    curves: dict[str, Mapping[str, Any]] = {}
    names = pair_names(records)
    for name, record in zip(names, records, strict=True):
        sides = results_by_side(record["statistics"].get("mode", {}))
        before, after = (sides.get(side, {}).get("curve") for side in ("non-aligned", "aligned"))
        if before:
            curves[name] = before
        if after and not (before and _same(before, after)):
            curves[f"{name}, aligned"] = after
    verdicts = [with_bounded_p_values(record).get("verdict") or {} for record in records]
    families = {name: verdict["family"] for name, verdict in zip(names, verdicts, strict=True) if verdict.get("family")}
    level = next((math.log10(verdict["level"]) for verdict in verdicts if verdict), None)
    return pairs_figure(curves, families, base=model_name(records[0], "base"), level=level)


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """The results for the terminal: the verdict on each pair and a line per statistic, then tables."""
    lines = [line for record in records for line in _pair_lines(record)]
    rows = [row for record in records for row in path_rows(record)]
    if rows:
        lines += ["", text_table(rows, ["base", "other model", "path", "base loss", "midpoint", "barrier", "end loss"])]
    if len(records) > 1 and all(record.get("verdict") for record in records):
        lines += ["", text_table(pair_rows(records), PAIR_HEADERS), *_wrapped(adjustment_text(records), "", "")]
    return "\n".join(lines)


def verdict_lines(record: Mapping[str, Any]) -> list[str]:
    """What became of the claim on a pair, if there is one, and the verdict, each on one line however long it is."""
    verdict, claim = record["verdict"], record.get("claim")
    pair = f"{model_name(record, 'base')} and {model_name(record, 'ft')}"
    said = [claim_text(claim)] if claim else []
    return [*said, f"{verdict_word(verdict['verdict'])}  {pair}: {verdict['meaning']}"]


def pair_rows(records: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The verdict on each pair as a row under `PAIR_HEADERS`; records without one are left out."""
    rows = []
    for name, record in zip(pair_names(records), records, strict=True):
        if verdict := record.get("verdict"):
            ps = [verdict["adjusted_log10_p"], verdict.get("over_pairs_log10_p")]
            ps = bounded(ps) if verdict.get("calibrated") else ps
            significant = places_text(verdict["layers"], at_most=2) or ABSENT
            rows.append(
                [
                    name,
                    verdict["verdict"].replace("_", " "),
                    verdict["statistic"] or ABSENT,
                    *map(_two, ps),
                    significant,
                ]
            )
    return rows


def adjustment_text(records: Sequence[Mapping[str, Any]]) -> str:
    """How the p-values of `pair_rows` were adjusted."""
    levels = {record["verdict"]["level"] for record in records if record.get("verdict")}
    level = ", ".join(f"{level:g}" for level in sorted(levels))
    return (
        "pair: p-values after Holm over the statistics of the pair, on which its verdict is based "
        f"(level {level}); all pairs: after Holm over the {len(records)} pairs as well"
    )


def model_name(record: Mapping[str, Any], side: str) -> str:
    """The short name of a model in a report: as requested, without parent folders."""
    return requested_model(record, side).split("/")[-1].removeprefix("demo:")


def pair_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the models other than the base; duplicate names are numbered."""
    names: list[str] = []
    for record in records:
        name = model_name(record, "ft")
        names.append(f"{name}-{len(names) + 1}" if name in names else name)
    return names


def _pair_lines(record: Mapping[str, Any]) -> list[str]:
    pair = f"{model_name(record, 'base')} and {model_name(record, 'ft')}"
    verdict = record.get("verdict")
    lines = [pair]
    if verdict:
        lines = _wrapped(f"{verdict_word(verdict['verdict'])}  {pair}: {verdict['meaning']}", "", "  ")
        if claim := record.get("claim"):
            lines = [*_wrapped(claim_text(claim), "", "  "), *lines]
        lines += _wrapped(verdict["effect"], "  ", "    ") if verdict.get("effect") else []
        lines += _wrapped(decided_by(verdict), "  ", "    ")
        found = verdict["verdict"] in ("related", "identical")
        for name, text in caveats(verdict).items():
            if text and not (found and name == "not seen"):
                lines += _wrapped(f"{name}: {text}", "  ", "    ")
    width = max(map(len, record["statistics"]), default=0)
    for name, sides in record["statistics"].items():
        text = f"{subject(name, sides)}: {outcome(sides)}".removeprefix(name).removeprefix(": ")
        lines += _wrapped(text, f"  {name:<{width}}  ", " " * (width + 4))
    if perplexity := record.get("perplexity"):
        lines += _wrapped(f"perplexity: {', '.join(_perplexity(*side) for side in perplexity.items())}", "  ", "    ")
    notes = [note for note in record["notes"] if not note.startswith(_FOR_THE_LOG)]
    return [*lines, *(line for note in notes for line in _wrapped(f"note: {note}", "  ", "    "))]


def _perplexity(side: str, found: Mapping[str, Any]) -> str:
    per_byte = found.get("perplexity_per_byte")
    text = f"{side} {cell(found.get('perplexity'))}"
    return text if per_byte is None else f"{text} ({cell(per_byte)} per byte)"


def _wrapped(text: str, first: str, following: str) -> list[str]:
    return textwrap.wrap(
        text,
        _COLUMNS,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def path_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    """Base, other model, path, and the losses at its base end, midpoint, barrier and other end; a row for each path."""
    rows = []
    for side, result in results_by_side(record["statistics"].get("mode", {})).items():
        curve = result["curve"]
        ends = [curve["loss"][0], curve["midpoint"], curve["barrier"], curve["loss"][-1]]
        rows.append([model_name(record, "base"), model_name(record, "ft"), side, *map(_three, ends)])
    return rows


def _two(value: float | str | None) -> float | None:
    return None if value is None else round(float(value), 2)


def _three(value: float | str) -> float:
    return round(float(value), 3)


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
    sections = [Section("Loss along the path, and p-values", figure=figure), _statistics(records)]
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
        [Cell(name, link=link), *(as_cell(value) for value in by_name.get(name, [name, *[None] * 5])[1:])]
        for name, link in links.items()
    ]
    text = [adjustment_text(records)] if by_name else []
    for name, record in zip(links, records, strict=True):
        if verdict := record.get("verdict"):
            text.append(f"{name}: {verdict['meaning']} ({decided_by(verdict)})")
    return Section("Pairs", text, table=Table(rows, ("", *PAIR_HEADERS[1:])))


def _statistics(records: Sequence[Mapping[str, Any]]) -> Section:
    """A row for each statistic of each pair, in the order of the statistics."""
    names = list(dict.fromkeys(name for record in records for name in record["statistics"]))
    rows = []
    shown = [with_bounded_p_values(record) for record in records]
    for name in names:
        for pair, record in zip(pair_names(records), shown, strict=True):
            if sides := record["statistics"].get(name):
                log10_p = (sides.get("non_aligned") or {}).get("log10_p")
                rows.append([name, pair, outcome(sides), p_cell(log10_p)])
    return Section("Statistics", table=table_of(("", "other model", "found", "p, pair as given"), rows))


def _notes(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The notes of all pairs, each once, with the names of its pairs unless it is of all."""
    found: dict[str, list[str]] = {}
    for name, record in zip(pair_names(records), records, strict=True):
        for note in record.get("notes") or ():
            found.setdefault(note, []).append(name)
    return [note if len(names) == len(records) else f"{', '.join(names)}: {note}" for note, names in found.items()]
