"""The results of one or more pairs in words: what each record says of its pair, and tables of all pairs."""

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from tracing_jax.report.bounded_p_values import bounded
from tracing_jax.report.findings import FindingGroup, Line, findings, model_name
from tracing_jax.report.formatting import ABSENT, cell, curves_of, p_cell, places_text, results_by_stage
from tracing_jax.report.terminal import plain_text, print_in_colour

PAIR_HEADERS = ("other model", "verdict", "statistic", "p (pair)", "p (all pairs)", "significant")


def summary(records: Sequence[Mapping[str, Any]], saved: bool = True) -> str:
    """The results as plain text: what each record says of its pair, part by part, and tables of all pairs.

    Args:
        records: of the runs on one base.
        saved: whether the files that they name were written.
    """
    return plain_text(summary_groups(records, saved))


def record_text(record: Mapping[str, Any], titles: Sequence[str]) -> str:
    """Some parts of what a record says, by their titles, as plain text."""
    return plain_text([part for part in findings(record, saved=False) if part.title in titles])


def print_summary(records: Sequence[Mapping[str, Any]], file: Any, saved: bool = True) -> None:
    """Prints the results: in colour on a terminal, and plain into files and pipes."""
    parts = summary_groups(records, saved)
    if file.isatty():
        print_in_colour(parts, file)
    else:
        file.write(f"{plain_text(parts)}\n")


def summary_groups(records: Sequence[Mapping[str, Any]], saved: bool = True) -> list[FindingGroup]:
    """The parts of `summary`."""
    parts = [part for record in records for part in findings(record, saved)]
    if rows := [row for record in records for row in path_rows(record)]:
        headers = ("base", "other model", "path", "base loss", "midpoint", "barrier", "end loss")
        notes = dict.fromkeys(note for record in records for note in _path_notes(record))
        table = [*_table(headers, rows), *(Line((note,)) for note in notes)]
        parts.append(FindingGroup("Losses along the path (nats per token)", table))
    if len(records) > 1 and all(record.get("verdict") for record in records):
        table = _table(PAIR_HEADERS, pair_rows(records))
        parts.append(FindingGroup("Pairs", [*table, Line((adjustment_text(records),))]))
        parts += [FindingGroup("Files of all pairs", files)] if saved and (files := _files_of_pairs(records)) else []
    return parts


def _table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[Line]:
    return [Line(tuple(headers)), *(Line(tuple(cell(value) for value in row)) for row in rows)]


def _files_of_pairs(records: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The files of a run on several pairs, whose own are in its folder."""
    folders = {PurePath(record["args"]["save"]).parent for record in records if record["args"].get("save")}
    folder = folders.pop() if len(folders) == 1 else PurePath()
    if folder.suffix != ".run":
        return []
    return [Line((name, str(folder.with_suffix(f".{name}")))) for name in ("html", "json", "png", "p")]


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
                    *map(p_cell, ps),
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


def pair_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the models other than the base; duplicate names are numbered."""
    names: list[str] = []
    for record in records:
        name = model_name(record, "ft")
        names.append(f"{name}-{len(names) + 1}" if name in names else name)
    return names


def path_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    """Base, other model, path, and the losses at its base end, midpoint, barrier and other end; a row for each path."""
    rows = []
    for stage, result in results_by_stage(record["statistics"].get("mode", {})).items():
        for name, curve in curves_of(result).items():
            ends = [curve["loss"][0], curve["midpoint"], curve["barrier"], curve["loss"][-1]]
            path = f"{stage}, {name}" if name else stage
            rows.append([model_name(record, "base"), model_name(record, "ft"), path, *map(_three, ends)])
    return rows


def _path_notes(record: Mapping[str, Any]) -> list[str]:
    """What the losses along a path do not show."""
    results = results_by_stage(record["statistics"].get("mode", {})).values()
    return [note for result in results for note in result.get("notes") or ()]


def _three(value: float | str) -> float:
    return round(float(value), 3)
