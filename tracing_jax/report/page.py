"""The page of a run: one self-contained HTML file, without scripts or network access."""

import base64
import json
from collections.abc import Mapping
from typing import Any

from tracing_jax.record import plain, total_seconds
from tracing_jax.report.bounded_p_values import with_bounded_p_values
from tracing_jax.report.evidence_tables import map_blocks, null_blocks, place_blocks, tests_blocks
from tracing_jax.report.figures import RunImages, images_of_run
from tracing_jax.report.findings import SENTENCES, FindingGroup, findings
from tracing_jax.report.formatting import (
    curves_of,
    outcome,
    p_cell,
    requested_model,
    results_by_stage,
    subject,
    verdict_facts,
)
from tracing_jax.report.html_elements import (
    Banner,
    Block,
    Cell,
    Page,
    Section,
    Table,
    as_cell,
    columns_table,
    facts_table,
    table_of,
)
from tracing_jax.report.maps import maps
from tracing_jax.report.unit_maps import unit_maps

_AS_PRINTED = ("Compared", "Identical tensors", "Effect sizes", "Shares", "Not tested")
"""Parts that the page shows as they are printed; the others have sections of their own."""

_SHOWN = 8  # rows of the evidence that are not folded
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
    "temperature": "temperature at each α",
    "best_step": "step of the training whose middle point was taken",
}


def html(record: Mapping[str, Any], images: RunImages | None = None) -> str:
    """One HTML page with the verdict, figures, numbers and provenance of a run; everything in it is escaped.

    Args:
      record: of the run.
      images: of the record, where they have been drawn.
    """
    record = plain(record)
    images = images or images_of_run(record)
    record = with_bounded_p_values(record)
    verdict = record.get("verdict")
    summary = [(subject(name, stages), outcome(stages)) for name, stages in record["statistics"].items()]
    return Page(
        title=(requested_model(record, "ft"), requested_model(record, "base")),
        summary=summary,
        sections=_sections(record, images),
        banner=verdict_banner(verdict) if verdict else None,
        first=[
            *_claim_sections(record.get("claim")),
            *map(_group_section, (part for part in findings(record) if part.title in _AS_PRINTED)),
            *_map_sections(record),
            *(_verdict_sections(verdict) if verdict else ()),
        ],
    ).html()


def verdict_banner(verdict: Mapping[str, Any], pair: str = "") -> Banner:
    """The verdict in a sentence, and what it rests on."""
    return Banner(verdict["verdict"], SENTENCES[verdict["verdict"]], verdict_facts(verdict), pair)


def _group_section(part: FindingGroup) -> Section:
    """A part of what is printed of a record, as a table; rows of one cell are as wide as it is."""
    rows = [[Cell(text.strip(), verdict=row.tone if len(row.cells) == 1 else "") for text in row.cells]
            for row in part.rows]  # fmt: skip
    return Section(part.title, table=Table(rows))


def _map_sections(record: Mapping[str, Any]) -> list[Section]:
    """Where the two models agree."""
    text = "Point at a cell for its numbers. Tests differ in the rewrites that they do not detect."
    found, units = maps(record), unit_maps(record)
    return [Section("Where they agree", [text], maps=found, unit_maps=units)] if found or units else []


def _claim_sections(claim: Mapping[str, Any] | None) -> list[Section]:
    """What was claimed of the pair, and what became of it."""
    if not claim:
        return []
    rows = [
        ("says", claim["asserts"]),
        (claim["outcome"].replace("_", " "), claim["because"]),
        ("not tested", claim["not_said"]),
    ]
    return [Section(f"Claim: {claim['claim']}", table=table_of(("", ""), rows))]


def _verdict_sections(verdict: Mapping[str, Any]) -> list[Section]:
    """The statistics that enter the verdict, and the places of smallest p-value."""
    found = []
    if verdict["family"]:
        rows = [[name, p_cell(log10_p)] for name, log10_p in verdict["family"].items()]
        text = [
            "Only statistics with an exact or a calibrated null enter the verdict, on the pair as given. The options "
            "fix which these are, before the models are read; Holm's correction is over all of them. The p-value of a "
            "calibrated test is shown no smaller than 10^-12, since its null rests on an allowance for units that "
            "agree by convergence; the record has what was computed."
        ]
        found.append(Section("Statistics in the verdict", text, table=table_of(("", "p"), rows)))
    if evidence := verdict["evidence"]:
        headers = ("statistic", "test", "place", "p")
        rows = [[row["statistic"], row["test"], row["place"], p_cell(row["log10_p"])] for row in evidence]
        text = ["Places of smallest p-value, not corrected for the number of places."]
        more = [Block(f"{len(rows) - _SHOWN} more", table_of(headers, rows[_SHOWN:]))] if len(rows) > _SHOWN else []
        found.append(Section("Strongest evidence", text, table=table_of(headers, rows[:_SHOWN]), blocks=more))
    return found


def _sections(record: Mapping[str, Any], images: RunImages) -> list[Section]:
    perplexity, alignment = record.get("perplexity"), record.get("alignment")
    found = [_statistic(name, stages, images) for name, stages in record["statistics"].items()]
    if perplexity:
        found.append(Section("Perplexity", table=columns_table(perplexity, _PERPLEXITY)))
    if record.get("disguised"):
        found.append(Section("Disguise before the test", table=facts_table(record["disguised"])))
    if record.get("permuted"):
        found.append(Section("Permutation before the test", table=facts_table(record["permuted"])))
    if alignment:
        found.append(Section("Alignment", table=facts_table(alignment)))
    found.append(_models(record["models"]))
    if record.get("tokens"):
        found.append(Section("Tokens", table=facts_table(record["tokens"])))
    if record.get("notes"):
        found.append(Section("Notes", text=record["notes"]))
    code = json.dumps(record["args"], indent=2, ensure_ascii=False)
    return [*found, _circumstances(record), Section("Configuration", code=code)]


def _statistic(name: str, stages: Mapping[str, Any], images: RunImages) -> Section:
    results = results_by_stage(stages)
    if not results:
        return Section(name, text=[outcome(stages)])
    figure = base64.b64encode(images.by_statistic.get(name, b"")).decode()
    table = columns_table({stage: _numbers(result) for stage, result in results.items()})
    blocks = [*tests_blocks(results), *null_blocks(results), *map_blocks(results), *place_blocks(results)]
    layers = {stage: result["per_layer"] for stage, result in results.items() if result.get("per_layer")}
    if layers and not any(result.get("tests") for result in results.values()):
        blocks.append(Block(f"Each layer: {next(iter(layers.values()))['label']}", _per_layer(layers)))
    alt = f"{subject(name, stages)}: {outcome(stages)}"
    return Section(name, _remarks(results), figure, alt, table=table, blocks=blocks)


def _remarks(results: Mapping[str, Any]) -> list[str]:
    """Reasons why there is no p-value, and notes; each once, with its stages unless it is of all."""
    found: dict[str, list[str]] = {}
    for stage, result in results.items():
        reasons = [f"No p-value: {result['p_reason']}"] if result.get("p_reason") else []
        for line in [*_evidence(result), *reasons, *(result.get("notes") or ())]:
            found.setdefault(line, []).append(stage)
    everywhere = len(results)
    return [line if len(stages) == everywhere else f"{', '.join(stages)}: {line}" for line, stages in found.items()]


def _evidence(result: Mapping[str, Any]) -> list[str]:
    """The effect size, the premises of the null and whether they hold, and what a reservation leaves."""
    lines = [result["effect"]] if result.get("effect") else []
    lines += [
        f"Premise, {premise['needed']}: {premise['premise']}: {'holds' if premise['holds'] else 'does not hold'}"
        for premise in result.get("premises") or ()
    ]
    if result.get("reservation"):
        left = p_cell(result.get("firm_log10_p"))
        lines.append(f"Reserved: {result['reservation']}; p without reservation {left}")
    return lines


def _numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    headline, log10_p = result.get("headline"), result.get("log10_p")
    numbers = {
        f"{name}: {words}" if name else words: curve.get(key)
        for name, curve in curves_of(result).items()
        for key, words in _CURVE.items()
        if key != "midpoint" or name or curve.get(key) != headline
    }
    if log10_p is not None:
        numbers = {"p": p_cell(log10_p)} | numbers
    known = {words: number for words, number in numbers.items() if number is not None}
    return {result.get("label") or "value": headline} | known


def _per_layer(layers: Mapping[str, Any]) -> Table:
    return columns_table(
        {stage: {f"layer {i}": x for i, x in enumerate(data["values"])} for stage, data in layers.items()}
    )


def _models(models: Mapping[str, Any]) -> Section:
    facts = {}
    for side, model in models.items():
        shape = {key.replace("_", " "): value for key, value in (model.get("shape") or {}).items()}
        facts[side] = {key: model.get(key) for key in ("id", "revision", "family", "parameters")} | shape
    files = [
        [Cell(name), Cell(side), as_cell(digest)]
        for side, model in models.items()
        for name, digest in (model.get("files") or {}).items()
    ]
    blocks = [Block("Files", Table(files, ("file", "model", "SHA-256")))] if files else []
    return Section("Models", table=columns_table(facts), blocks=blocks)


def _circumstances(record: Mapping[str, Any]) -> Section:
    """By which program, on what, from which seed, in what time, and who chose the tests."""
    seconds = record["seconds"]
    facts = {
        "program": f"tracing_jax {record['versions'].get('tracing_jax', '')}".strip(),
        "commit": record.get("commit"),
        "seed": record.get("seed"),
        "device": record.get("device"),
        "seconds": total_seconds(seconds),
        **{f"{what} were chosen": who for what, who in (record.get("chosen") or {}).items()},
    }
    steps = {key: value for key, value in seconds.items() if key != "total"} | {"total": total_seconds(seconds)}
    blocks = [Block("Seconds of each step", facts_table(steps)), Block("Versions", facts_table(record["versions"]))]
    return Section("Circumstances", table=facts_table(facts), blocks=blocks)
