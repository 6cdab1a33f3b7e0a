"""The findings of a record, in the order in which they are shown: everything that shows a record uses this."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from tracing_jax.record import RunFiles
from tracing_jax.report.bounded_p_values import is_calibrated
from tracing_jax.report.formatting import (
    calibrated_p_text,
    caveats,
    cell,
    claim_text,
    decided_by,
    identical_text,
    label,
    outcome,
    p_text,
    requested_model,
    results_by_stage,
    verdict_word,
)

TITLES = ("Compared", "Identical tensors", "Verdict", "Effect sizes", "Shares", "Not tested", "Notes", "Files")
"""The titles of the parts, in their order."""

SENTENCES: Mapping[str, str] = {
    "identical": "The two models hold the same weights: every tensor of one is a tensor of the other.",
    "related": "The two models were not made independently: one was made from the other, or both have a common origin.",
    "no_evidence": "No sign was found that the models have a common origin. This does not prove that they have none.",
    "undecided": "The tests do not decide whether the two models have a common origin.",
    "not_testable": "Whether the two models have a common origin cannot be tested on what is there.",
    "not_asked": "No test was asked for, so nothing is known about whether the two models have a common origin.",
}
"""Verdict -> its meaning, for readers who know no statistics."""

MODEL_PARTS = ("MLPs", "attention", "embedding")
"""Parts of a model that each have tests of their own."""

_FOR_THE_LOG = "memory: "
"""Notes on what the run took, which the record, the page and the log have."""

_GIB, _MIB, _KIB = 2**30, 2**20, 2**10
_HASH_DIGITS = 16
_HASHED_FILES = 2  # named for each model; the record has all


@dataclass(frozen=True)
class Line:
    """A row of a part: cells of a table, or one text; `tone` is a verdict by which it can be coloured."""

    cells: tuple[str, ...]
    tone: str = ""


@dataclass(frozen=True)
class FindingGroup:
    """A titled part: rows of one cell are lines of text, others are rows of a table whose last column is text."""

    title: str
    rows: Sequence[Line]


def model_name(record: Mapping[str, Any], side: str) -> str:
    """The short name of a model in a report: as requested, without parent folders."""
    return requested_model(record, side).split("/")[-1].removeprefix("demo:")


def pair_name(record: Mapping[str, Any]) -> str:
    """The names of both models of a pair."""
    return f"{model_name(record, 'base')} and {model_name(record, 'ft')}"


def findings(record: Mapping[str, Any], saved: bool = True) -> list[FindingGroup]:
    """What a record says of its pair, part by part under `TITLES`; parts that have nothing to say are left out.

    Args:
      record: of the run, as plain data.
      saved: whether the files that it names were written.
    """
    verdict = record.get("verdict")
    found = {
        "Compared": _compared(record),
        "Identical tensors": _identical(record),
        "Verdict": _verdict(record, verdict) if verdict else [],
        "Effect sizes": _effects(record, verdict or {}),
        "Shares": _shares(record, verdict or {}),
        "Not tested": _not_tested(record, verdict or {}),
        "Notes": [Line((note,)) for note in record["notes"] if not note.startswith(_FOR_THE_LOG)],
        "Files": _files(record) if saved else [],
    }
    return [FindingGroup(title, found[title]) for title in TITLES if found[title]]


def verdict_lines(record: Mapping[str, Any]) -> list[str]:
    """What became of the claim on a pair, if there is one, and the verdict, each on one line however long it is."""
    verdict, claim = record["verdict"], record.get("claim")
    lines = [claim_text(claim)] if claim else []
    return [*lines, f"{verdict_word(verdict['verdict'])}  {pair_name(record)}: {verdict['meaning']}"]


def _compared(record: Mapping[str, Any]) -> list[Line]:
    rows = []
    for side, model in record["models"].items():
        asked = str(record["args"].get(f"{side}_model_id") or model["id"])
        commit = f", commit {model['revision']}" if model.get("revision") else ""
        stored = ", ".join(filter(None, (model.get("format"), size_text(model.get("bytes")))))
        facts = f"{asked}{commit}: {model['family']}, {cell(model['parameters'])} parameters"
        rows.append(Line((side, f"{facts}, {stored}" if stored else facts)))
        rows += [Line(("", text)) for text in _hashes(model.get("files") or {})]
    if tokens := record.get("tokens"):
        text = f"{tokens.get('source') or tokens.get('dataset')}, {cell(tokens.get('num_tokens'))} tokens of base"
        rows.append(Line(("text", f"{tokens.get('dataset')}: {text}" if tokens.get("source") else text)))
    rows += [Line((what, how)) for what, how in (record.get("chosen") or {}).items()]
    rows += [Line(("seed", str(record["seed"])))] if record.get("seed") is not None else []
    changed = [word for word in ("disguised", "permuted") if record.get(word)]
    return [*rows, *(Line(("ft", f"was {word} before it was compared")) for word in changed)]


def _hashes(files: Mapping[str, str]) -> Iterator[str]:
    weights = [name for name in files if name != "config.json"]
    for name in weights[:_HASHED_FILES]:
        yield f"SHA-256 {files[name][:_HASH_DIGITS]}... {name}"
    if len(weights) > _HASHED_FILES:
        yield f"and {len(weights) - _HASHED_FILES} more files, whose hashes are in the record"


def size_text(num_bytes: int | None) -> str:
    """A size as text, `2.3 MiB`; empty if it is not known."""
    if not num_bytes:
        return ""
    unit, name = next(((u, n) for u, n in ((_GIB, "GiB"), (_MIB, "MiB")) if num_bytes >= u), (_KIB, "KiB"))
    number = num_bytes / unit
    return f"{number:,.0f} {name}" if number >= 100 else f"{number:.3g} {name}"


def _identical(record: Mapping[str, Any]) -> list[Line]:
    identical = record.get("identical")
    if identical:
        return [Line((identical_text(identical),), "identical" if identical["equal"] == identical["total"] else "")]
    return [Line(("not compared: a model was changed before it was compared, or read in part",))]


def _verdict(record: Mapping[str, Any], verdict: Mapping[str, Any]) -> list[Line]:
    word, claim = verdict["verdict"], record.get("claim")
    rows = [Line((claim_text(claim),), f"claim_{claim['outcome']}")] if claim else []
    rows.append(Line((f"{verdict_word(word)}  {pair_name(record)}",), word))
    rows.append(Line((SENTENCES[word],)))
    decided = verdict["statistic"] or word == "identical"
    facts = {"in detail": verdict["meaning"], "rests on": decided_by(verdict) if decided else ""}
    facts |= caveats(verdict)
    return [*rows, *(Line((name, text)) for name, text in facts.items() if text)]


def _effects(record: Mapping[str, Any], verdict: Mapping[str, Any]) -> list[Line]:
    """The finding on each part of the models, with the effect sizes of its tests beside those of independent models."""
    parts = verdict.get("parts") or {}
    rows: list[Line] = []
    shown: dict[str, str] = {}
    others = {name: stages for name, stages in record["statistics"].items() if results_by_stage(stages)}
    for part, found in parts.items():
        rows.append(Line((f"{part}: {found['verdict'].replace('_', ' ')}",), found["verdict"]))
        if "statistic" not in found:
            rows.append(Line(("  tensors", found["effect"])))
        names = found.get("statistics") or [found.get("statistic")]
        rows += [_effect(name, others.pop(name), shown) for name in names if name in others]
    if others and parts:
        rows.append(Line(("not part of the verdict",)))
    rows += [_effect(name, stages, shown) for name, stages in others.items()]
    if perplexity := record.get("perplexity"):
        rows.append(Line(("perplexity", ", ".join(_perplexity(*side) for side in perplexity.items()))))
    return rows


def _shares(record: Mapping[str, Any], verdict: Mapping[str, Any]) -> list[Line]:
    """Of which models ft was merged: each possible parent, then part by part where a merge is claimed."""
    merge = record.get("merge")
    if not merge:
        return []
    rows = [Line((merge["sentence"],))]
    for part in merge["parts"]:
        p = part["adjusted_log10_p"]
        shown = "" if p is None else calibrated_p_text(float(p))
        why = f"; {part['reason']}" if part.get("reason") else ""
        rows.append(Line((part["name"], shown, f"{part['word'].replace('_', ' ')}, share {share_text(part)}{why}")))
    for name, found in ((verdict.get("merged_of") or {}).get("by_part") or {}).items():
        shares = ", ".join(f"{parent} {share_text(share)}" for parent, share in found["parents"].items())
        tested = "" if found["tested"] else " (estimated; its units were not tested)"
        rows.append(Line((f"  {name}", "", found["undefined"] or f"{shares}{tested}")))
    return rows + [Line(("note", "", note)) for note in merge["notes"]]


def share_text(found: Mapping[str, Any]) -> str:
    """A share with its standard error: `0.565 ± 0.005`."""
    return "not defined" if found["share"] is None else f"{found['share']:.3f} ± {found['se']:.3f}"


def _effect(name: str, stages: Mapping[str, Any], shown: dict[str, str]) -> Line:
    """A statistic with its effect size, then its p-value; what independent models show is printed once."""
    given = stages.get("non_aligned") or {}
    log10_p = given.get("log10_p")
    p = [] if log10_p is None else [(calibrated_p_text if is_calibrated(given) else p_text)(float(log10_p))]
    if not given.get("effect"):
        return Line((f"  {name}", "; ".join([f"{label(stages)}: {outcome(stages, with_p=False)}", *p])))
    found, _, independent = given["effect"].partition("; ")
    first = shown.setdefault(independent, name)
    text = given["effect"] if first == name else f"{found}; independent models: as for {first}"
    if aligned := (stages.get("aligned") or {}).get("headline"):
        text += f"; {label(stages)}: {cell(aligned)} aligned"
    return Line((f"  {name}", "; ".join([text, *p])))


def _perplexity(side: str, found: Mapping[str, Any]) -> str:
    per_byte = found.get("perplexity_per_byte")
    text = f"{side} {cell(found.get('perplexity'))}"
    return text if per_byte is None else f"{text} ({cell(per_byte)} per byte)"


def _not_tested(record: Mapping[str, Any], verdict: Mapping[str, Any]) -> list[Line]:
    """What was not compared, and why: tests that do not apply, parts without a test, changes not detected."""
    reasons: dict[str, list[str]] = {}
    for name, stages in record["statistics"].items():
        given = stages.get("non_aligned") or {}
        if not results_by_stage(stages):
            reasons.setdefault(given.get("not_applicable") or "not run", []).append(name)
    rows = [Line((", ".join(names), why)) for why, names in reasons.items()]
    if verdict.get("family"):
        rows += [
            Line((part, "no test that ran compares it"))
            for part in MODEL_PARTS
            if part not in (verdict.get("parts") or {})
        ]
    if verdict and verdict["verdict"] != "identical" and not record.get("tokens"):
        rows.append(Line(("a text", "none was read: what the models predict and compute on one was not compared")))
    if verdict.get("verdict") != "identical":
        rows += [Line((name, f"does not detect {', '.join(hidden)}")) for name, hidden in _hidden(verdict).items()]
    return rows


def _hidden(verdict: Mapping[str, Any]) -> dict[str, list[str]]:
    """Statistic -> the changes that it does not detect."""
    blind, limits = verdict.get("blind_to") or {}, verdict.get("limits") or {}
    return {name: [*blind.get(name, ()), *limits.get(name, ())] for name in {**blind, **limits}}


def _files(record: Mapping[str, Any]) -> list[Line]:
    save = record["args"].get("save")
    if not save:
        return []
    files = RunFiles.from_save(save)
    named = {"report": files.html, "record": files.json, "figure": files.png, "pickle": files.pickle}
    return [Line((name, str(PurePath(file)))) for name, file in named.items()]
