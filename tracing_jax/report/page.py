"""The page of a run: one self-contained HTML file, without script and without anything from the network."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from tracing_jax.record import plain, total_seconds
from tracing_jax.report.plots import figure_of_run, png
from tracing_jax.report.wording import cell, outcome, results_by_side, subject

_HEX = re.compile(r"([0-9a-f]{12})[0-9a-f]{28,52}(-dirty)?")
_PERPLEXITY = {
    "loss_nats_per_token": "loss (nats per token)",
    "perplexity": "perplexity (per token)",
    "nats_per_byte": "loss (nats per byte)",
    "perplexity_per_byte": "perplexity (per byte)",
    "tokens": "tokens",
    "bytes": "bytes",
}
_CURVE = {
    "midpoint": "loss at α = 0.5 (nats per token)",
    "barrier": "barrier (nats per token)",
    "barrier_alpha": "α of the barrier",
    "end_loss_ft_own": "loss of the fine-tuned model itself (nats per token)",
    "groups": "weights that move",
}


@dataclass(frozen=True)
class Cell:
    """The text of a table's cell, and the full text to show on hovering where it was shortened."""

    text: str
    full: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, of which the first names the row; the headers may be empty."""

    rows: Sequence[Sequence[Cell]]
    headers: Sequence[str] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page: whichever of these it has, in this order."""

    title: str
    text: Sequence[str] = ()
    figure: str = ""
    table: Table | None = None
    more_title: str = ""
    more: Table | None = None
    code: str = ""


def html(record: Mapping[str, Any]) -> str:
    """One HTML page with the headline, figures, numbers and provenance of a run; everything in it is escaped."""
    record = plain(record)
    ids = {side: str(model["id"]) for side, model in record["models"].items()}
    summary = [(subject(name, sides), outcome(sides)) for name, sides in record["statistics"].items()]
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(ids=ids, summary=summary, sections=_sections(record))


def _sections(record: Mapping[str, Any]) -> list[Section]:
    perplexity, alignment = record.get("perplexity"), record.get("alignment")
    found = [_statistic(name, sides) for name, sides in record["statistics"].items()]
    if perplexity:
        found.append(Section("Perplexity", table=_compare(perplexity, _PERPLEXITY)))
    if record.get("disguised"):
        found.append(Section("Disguise before the test", table=_facts(record["disguised"])))
    if record.get("permuted"):
        found.append(Section("Permutation before the test", table=_facts(record["permuted"])))
    if alignment:
        found.append(Section("Alignment", table=_facts(alignment)))
    found.append(_models(record["models"]))
    if record.get("tokens"):
        found.append(Section("Tokens", table=_facts(record["tokens"])))
    found.append(_times(record["seconds"]))
    if record.get("notes"):
        found.append(Section("Notes", text=record["notes"]))
    ran = {key: record.get(key) for key in ("commit", "seed", "versions", "device")}
    code = json.dumps(record["args"], indent=2, ensure_ascii=False)
    return [*found, Section("What ran", table=_facts(ran)), Section("Configuration", code=code)]


def _statistic(name: str, sides: Mapping[str, Any]) -> Section:
    results = results_by_side(sides)
    if not results:
        return Section(name, text=[outcome(sides)])
    reasons = {result["p_reason"]: None for result in results.values() if result.get("p_reason")}
    figure = base64.b64encode(png(figure_of_run({"statistics": {name: sides}}))).decode()
    layers = {side: result["per_layer"] for side, result in results.items() if result.get("per_layer")}
    title = f"Each layer: {next(iter(layers.values()))['label']}" if layers else ""
    text = [f"No p-value: {reason}" for reason in reasons]
    table = _compare({side: _numbers(result) for side, result in results.items()})
    return Section(name, text, figure, table, title, _per_layer(layers) if layers else None)


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    curve = result.get("curve") or {}
    numbers = {"log10 p": result.get("log10_p")} | {words: curve.get(key) for key, words in _CURVE.items()}
    known = {words: number for words, number in numbers.items() if number is not None}
    return {result.get("label") or "value": result.get("headline")} | known


def _per_layer(layers: Mapping[str, Any]) -> Table:
    return _compare({side: {f"layer {i}": x for i, x in enumerate(data["values"])} for side, data in layers.items()})


def _models(models: Mapping[str, Any]) -> Section:
    facts = {}
    for side, model in models.items():
        shape = {key.replace("_", " "): value for key, value in (model.get("shape") or {}).items()}
        facts[side] = {key: model.get(key) for key in ("id", "revision", "family", "parameters")} | shape
    files = [
        [Cell(name), Cell(side), _cell(digest)]
        for side, model in models.items()
        for name, digest in (model.get("files") or {}).items()
    ]
    table = Table(files, ("file", "model", "SHA-256")) if files else None
    return Section("Models", table=_compare(facts), more_title="Files", more=table)


def _times(seconds: Mapping[str, Any]) -> Section:
    steps = {key: value for key, value in seconds.items() if key != "total"}
    return Section("Time (seconds)", table=_facts(steps | {"total": total_seconds(seconds)}))


def _facts(facts: Mapping[str, Any]) -> Table:
    """Two columns, name and value; a mapping's entries are rows of their own."""
    rows: list[tuple[Cell, Cell]] = []
    for key, value in facts.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            rows += [(Cell(f"{name}: {inner}"), _cell(item)) for inner, item in value.items()]
        else:
            rows.append((Cell(name), _cell(value)))
    return Table(rows)


def _compare(columns: Mapping[str, Mapping[str, Any]], names: Mapping[str, str] | None = None) -> Table:
    """A row for each key of any column, under `names` where given, and a column for each mapping."""
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [
        [Cell((names or {}).get(key, key)), *(_cell(column.get(key)) for column in columns.values())] for key in keys
    ]
    return Table(rows, ("", *columns))


def _cell(value: Any) -> Cell:
    text = cell(value)
    if found := _HEX.fullmatch(text):
        return Cell(f"{found[1]}…{found[2] or ''}", text)
    return Cell(text)
