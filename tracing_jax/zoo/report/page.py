"""The files of a zoo's report: one self-contained HTML page, CSV and JSON.

The one script of the page shows the numbers of the cell under the pointer.
"""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tracing_jax.error_messages import counted
from tracing_jax.record import atomic_write, write_json
from tracing_jax.report.formatting import ABSENT, p_cell
from tracing_jax.report.html_elements import Block, Cell, Section, render, table_of
from tracing_jax.zoo.folder import ZooFolder
from tracing_jax.zoo.proposing import LEFT_OUT
from tracing_jax.zoo.report.contents import Contents, contents_of, pair_dict
from tracing_jax.zoo.report.direction import MEASURED
from tracing_jax.zoo.report.heatmap import LEGEND, arcs, heatmap, is_sparse, link
from tracing_jax.zoo.report.pair_rows import BINS, PairRow, Uniformity, uniformity_sentence
from tracing_jax.zoo.report.trees import family_part, merged_from, not_compared

_OPEN_ROWS, _MOST_ROWS = 20, 500
_NAMED_FAMILIES, _NAMES = 6, 90  # of the banner: so many families, and so many letters of each
_HEADERS = ("pair", "verdict", "parts", "units that agree", "p", "after Holm over pairs", "by", "divergence (nats)")
_HEAT_TEXT = (
    "Hue: the verdict, by the p-value of the pair after Holm over all pairs that are done. Depth: of related pairs the "
    "share of MLP units that agree, of pairs without evidence the p-value.",
)
_TRIANGLE = "The name of a model is at the end of its row and above its column; families are framed."
_COLUMN = "An arc joins the two models of a pair; pairs without an arc were not asked for, or were left out."
_FAMILIES_TEXT = (
    "A family is a set of models connected by related pairs. Its tree joins the closest relatives; each line names the "
    "two models and how close they are. An arrow is an estimate of which was made from which, never a proof; a dash "
    "leaves it open. If the ancestor of a family is not among the models, the least trained of them takes its "
    "place. A model that is related to two families, which show no relation to each other, has a parent in each.",
    MEASURED,
)


MISSED = (
    "Of small models, signatures found the base of all 36 descendants of 13 kinds that were tried (docs/scan.md), and "
    "three of six parents of three equal merges of unrelated models; where less than a sixth of the "
    "sampled units is left, or none of the three sampled layers, they do not detect a relation, and compare may."
)
"""What is lost by comparing only pairs in which signatures show a trace; `python -m benchmarks.scan`."""


def html(contents: Contents, title: str) -> str:
    """Returns the page as one HTML document; everything in it is escaped."""
    script = Path(__file__).with_name("hover.js").read_text(encoding="utf-8")
    sparse = is_sparse(contents.order, contents.rows)
    drawn = heatmap(contents.order, contents.families, [] if sparse else contents.rows)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render(
        Path(__file__).with_name("page.html"),
        title=title,
        banner=_banner(contents),
        heat_text=[*_HEAT_TEXT, _COLUMN if sparse else _TRIANGLE],
        heat_alt=_alt(contents),
        heatmap=drawn,
        sparse=arcs(contents.order, contents.rows) if sparse else None,
        legend=LEGEND,
        families_text=_FAMILIES_TEXT if contents.families else ("No two models are related.",),
        families=[family_part(i, contents) for i in range(len(contents.families))],
        alone=contents.alone,
        before=[*_disagreements(contents), *_not_compared(contents), *_left_out(contents), *_not_done(contents)],
        uniformity=_bars(contents.uniformity),
        after=[_pairs(contents.rows), _models(contents)],
        grouped=Markup(_safe_json(_grouped(contents) if drawn.paths else {"names": [], "rows": []})),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )


def zoo_sentence(contents: Contents) -> str:
    """Returns the answer in one sentence: `12 models, 66 pairs: 3 families, 2 models in none`."""
    parts = [counted(len(contents.families), "family", "families")]
    if contents.alone:
        parts.append(f"{counted(len(contents.alone), 'model', 'models')} in none")
    if left := sum(contents.not_compared):
        parts.append(f"{counted(left, 'pair', 'pairs')} inside families not compared")
    undone = sum(count for state, count in contents.states.items() if state != "done")
    if undone:
        parts.append(f"{counted(undone, 'pair', 'pairs')} not done")
    models, pairs = counted(len(contents.ids), "model", "models"), counted(len(contents.rows), "pair", "pairs")
    return f"{models}, {pairs}: {', '.join(parts)}"


def _alt(contents: Contents) -> str:
    """Returns what the figure of all pairs shows, for those who do not see it."""
    counts = ", ".join(f"{count:,} {word.replace('_', ' ')}" for word, count in contents.verdicts.items() if count)
    related = "; ".join(f"family {i}: {_named(members)}" for i, members in enumerate(contents.families, 1))
    return f"The verdict of every pair: {counts or 'none done'}. {related or 'No two models are related'}."


def _banner(contents: Contents) -> dict[str, Any]:
    verdicts = [f"{count:,} {word.replace('_', ' ')}" for word, count in contents.verdicts.items() if count]
    facts = {
        "pairs": ", ".join(f"{count:,} {state}" for state, count in contents.states.items() if count),
        "verdicts": f"{', '.join(verdicts)}, after Holm over all" if verdicts else "none yet",
    }
    for i, members in enumerate(contents.families[:_NAMED_FAMILIES], 1):
        left = not_compared(i - 1, contents)
        facts[f"family {i}"] = _named(members) + merged_from(contents, members) + (f"; {left}" if left else "")
    if (proposal := contents.proposal) is not None:
        facts["not compared"] = (
            f"{proposal.left_out:,} of {proposal.asked:,} pairs, in which signatures show no trace; see below"
        )
    if contents.parents is not None:
        wrong = len(contents.disagreements)
        facts["known tree"] = (
            f"{counted(wrong, 'disagreement', 'disagreements')}, listed below" if wrong else "no disagreement"
        )
    return {
        "word": "related" if contents.families else "undecided",
        "sentence": zoo_sentence(contents),
        "facts": facts,
    }


def _disagreements(contents: Contents) -> list[Section]:
    if contents.parents is None and all(row.known is None for row in contents.rows):
        return []
    links = {row.pair: link(row) for row in contents.rows}
    rows = [
        [line.kind, Cell(line.pair, link=links[line.pair]), line.found, line.known] for line in contents.disagreements
    ]
    text = ["The list of models says what was made from what; this is where the report says otherwise."]
    if not rows:
        text = [
            "None: every verdict, every edge and every direction that was estimated agrees with the list of models."
        ]
    text += [f"Not drawn: {parent} → {child}" for parent, child in contents.missed]
    table = table_of(("", "pair", "found", "known"), rows) if rows else None
    return [Section("Disagreements with the known tree", text, table=table)]


def _not_compared(contents: Contents) -> list[Section]:
    proposal = contents.proposal
    if proposal is None:
        return []
    text = [
        f"{proposal.left_out:,} of {proposal.asked:,} pairs were not compared: signatures of the models show no trace "
        f"of a relation in them ({LEFT_OUT} lists them; --candidates=all compares all). That is less than no evidence. "
        f"{MISSED}"
    ]
    if proposal.closing:
        text.append(
            f"{counted(proposal.closing, 'pair is', 'pairs are')} compared without a trace, since both models have one "
            "in a third: so a model merged from two is distinguished from a relative of both."
        )
    if proposal.not_testable:
        text.append(f"Of {proposal.not_testable:,} of them signatures cannot say anything.")
    if proposal.known_related:
        text.append(f"{proposal.known_related:,} of them are related, by the list of models.")
    rows = [[model, why] for model, why in proposal.unsigned.items()]
    table = table_of(("model without a signature: all its pairs are compared", "why"), rows) if rows else None
    return [Section("Pairs that were not compared", text, table=table)]


def _left_out(contents: Contents) -> list[Section]:
    cells = [[model, why] for model, why in contents.left_out.items()]
    text = ["They are in the list of models, could not be read, and are in no pair."]
    return [_folded("Models left out", text, ("model", "why"), cells)] if cells else []


def _not_done(contents: Contents) -> list[Section]:
    rows = [row for row in contents.rows if row.state != "done"]
    if not rows:
        return []
    cells = [[row.pair, row.state, row.error or ABSENT] for row in rows[:_MOST_ROWS]]
    text = [", ".join(f"{count:,} {state}" for state, count in contents.states.items() if count)]
    if len(rows) > _MOST_ROWS:
        text.append(f"The first {_MOST_ROWS}; report.csv has all of them.")
    return [_folded("Pairs that are not done", text, ("pair", "state", "error"), cells)]


def _pairs(rows: Sequence[PairRow]) -> Section:
    done = [row for row in rows if row.state == "done"]
    cells = [
        [Cell(row.pair, link=link(row)), Cell(row.word, verdict=row.verdict or ""),
         row.parts_text, None if row.units is None else f"{row.units:.0%}", *map(p_cell, row.shown_log10_ps),
         row.statistic, row.jsd]
        for row in done[:_MOST_ROWS]
    ]  # fmt: skip
    text = [
        "Strongest evidence first. p is after Holm over the statistics of a pair, then over all pairs as well. Parts "
        "are those of related pairs, each judged by its own p after Bonferroni over all pairs."
    ]
    if len(done) > _MOST_ROWS:
        text.append(f"The first {_MOST_ROWS} of {len(done):,}; report.csv and report.json have all of them.")
    return _folded("Pairs by evidence", text, _HEADERS, cells)


def _models(contents: Contents) -> Section:
    rows = [
        [
            name,
            contents.family_of(name),
            contents.ids[name],
            "measured" if name in contents.measured else "not measured",
        ]
        for name in contents.order
    ]
    return _folded("Models", [], ("", "family", "id", "weights"), rows)


def _folded(title: str, text: Sequence[str], headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Section:
    more = rows[_OPEN_ROWS:]
    blocks = [Block(f"{len(more)} more", table_of(headers, more))] if more else []
    return Section(title, text, table=table_of(headers, rows[:_OPEN_ROWS]), blocks=blocks)


def _bars(found: Uniformity) -> dict[str, Any]:
    top = max(max(found.counts), sum(found.counts) / BINS, 1)
    bars = [
        {"x": 10.5 + 30 * i, "y": 110 - 100 * count / top, "height": 100 * count / top,
         "title": f"p from {i / BINS:g} to {(i + 1) / BINS:g}: {count}"}
        for i, count in enumerate(found.counts)
    ]  # fmt: skip
    uniform = None if found.selected else 110 - 100 * sum(found.counts) / BINS / top
    return {"bars": bars, "uniform_y": uniform, "text": uniformity_sentence(found), "any": any(found.counts)}


def _grouped(contents: Contents) -> Mapping[str, Any]:
    """Returns what the script needs for cells that are no elements of their own: see `hover.js`."""
    at = {name: i for i, name in enumerate(contents.order)}
    rows: list[list[int | None]] = [[None] * i for i in range(len(at))]
    for row in contents.rows:
        if row.verdict == "no_evidence":
            left, top = sorted((at[row.base], at[row.ft]))
            rows[top][left] = 2 * round(-100 * (row.log10_p or 0.0)) + (at[row.base] == top)
    return {"names": list(contents.order), "rows": rows}


def _safe_json(content: Mapping[str, Any]) -> str:
    """Returns JSON that cannot end the script element around it."""
    text = json.dumps(content, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _named(members: Sequence[str]) -> str:
    """Returns the first names of a family, as many as fit, and how many more there are."""
    shown = next((i for i in range(1, len(members)) if len(", ".join(members[: i + 1])) > _NAMES), len(members))
    return ", ".join([*members[:shown], *([f"and {len(members) - shown} more"] if shown < len(members) else [])])


PAGE, TABLE, DATA = "report.html", "report.csv", "report.json"


def write_report(folder: ZooFolder) -> Path:
    """Writes the report of a zoo into its folder, as far as its pairs are done; returns the page.

    Raises:
      FileNotFoundError: the folder holds no plan.
    """
    contents = contents_of(folder)
    write_json(folder.path / DATA, contents.as_dict())
    atomic_write(folder.path / TABLE, csv_text(contents).encode())
    page = folder.path / PAGE
    atomic_write(page, html(contents, folder.path.name).encode())
    return page


def csv_text(contents: Contents) -> str:
    """Returns a row for every pair of the plan under a header; unknown values are empty."""
    rows = [pair_dict(row) | {"parts": row.parts_text} for row in contents.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
