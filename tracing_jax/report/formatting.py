"""Numbers, results and verdicts as text, the same in figures, on pages and in the terminal."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tracing_jax.record import SMALLEST_CALIBRATED
from tracing_jax.report.bounded_p_values import is_calibrated

STAGES = {"non_aligned": "non-aligned", "aligned": "aligned"}
ABSENT = "–"
FURTHER_CURVES = {"bezier": "Bézier curve", "calibrated": "calibrated"}
"""Name of a further curve of a path in a record -> how it is called."""

_NUMBER = re.compile(r"\d+")
_READABLE = -4.0  # log10 p, below which a p-value is written as a power of ten


def cell(value: Any) -> str:
    """A value of a record as text: five significant digits, a thousands separator, a dash for None."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value + 0.0:.5g}"  # -0.0 is 0
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) or ABSENT
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value)) or ABSENT
    return str(value)


def p_text(log10_p: float) -> str:
    """A p-value from its decimal logarithm: `p = 0.031`, or `p = 10^-4312.7` below 10^-4."""
    return f"p = {p_cell(log10_p)}"


def p_cell(log10_p: Any) -> str:
    """A p-value as text for a table, from its decimal logarithm, written as in `p_text`; a dash for None."""
    if log10_p is None:
        return ABSENT
    exponent = float(log10_p)
    if exponent == SMALLEST_CALIBRATED:
        return f"< 10^{SMALLEST_CALIBRATED:.0f}"
    return f"{10**exponent:.2g}" if exponent > _READABLE else f"10^{exponent:.1f}"


def places_text(places: Sequence[str], at_most: int = 6) -> str:
    """Places with runs of numbers as ranges, `layers 0-3, 7`; runs beyond `at_most` are counted.

    In a run all numbers of a place grow by one: `layer 2 : layer 3` and `layer 3 : layer 4` are a run too.
    """
    by_pattern: dict[str, list[tuple[int, ...]]] = {}
    for place in places:
        numbers = tuple(map(int, _NUMBER.findall(place)))
        by_pattern.setdefault(_NUMBER.sub("{}", place.replace("{", "(").replace("}", ")")), []).append(numbers)
    words = []
    for pattern, found in by_pattern.items():
        runs = _runs(sorted(found))
        if pattern == "layer {}":
            words.append(f"layer{'s' if len(found) > 1 else ''} {', '.join(run for (run,) in runs)}")
        else:
            words += [pattern.format(*run) for run in runs]
    return ", ".join([*words[:at_most], f"and {len(words) - at_most} more"] if len(words) > at_most else words)


def _runs(numbers: Sequence[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Each run of tuples that grow by one in every element, as ranges; a tuple without numbers is a run of its own."""
    groups = itertools.groupby(enumerate(numbers), lambda item: tuple(n - item[0] for n in item[1]) or item[0])
    runs = [[found for _, found in group] for _, group in groups]
    return [tuple(f"{a}-{b}" if a != b else str(a) for a, b in zip(run[0], run[-1], strict=True)) for run in runs]


def requested_model(record: Mapping[str, Any], side: str) -> str:
    """The model that a run was asked to compare: `demo:disguised`, a Hub id, or the last part of a local path."""
    name = str(record["args"].get(f"{side}_model_id") or record["models"][side]["id"]).rstrip("/")
    return name.split("/")[-1] if name.startswith(("/", "~", ".")) else name


def results_by_stage(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a statistic that was applicable, keyed `non-aligned` and `aligned`."""
    results = {word: stages.get(stage) for stage, word in STAGES.items()}
    return {word: result for word, result in results.items() if result and not result.get("not_applicable")}


def curves_of(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The loss along the path of a result under an empty name, and the further curves by how they are called."""
    curve = result.get("curve")
    if not curve:
        return {}
    return {"": curve} | {FURTHER_CURVES.get(name, name): more for name, more in (curve.get("more") or {}).items()}


def subject(name: str, stages: Mapping[str, Any]) -> str:
    """A statistic and what it measures: `mode: midpoint loss (nats per token)`."""
    measured = label(stages)
    return f"{name}: {measured}" if measured else name


def label(stages: Mapping[str, Any]) -> str:
    """What a statistic measures; empty where it has no result."""
    labels = (result.get("label") for result in results_by_stage(stages).values())
    return next((label for label in labels if label), "")


def outcome(stages: Mapping[str, Any], with_p: bool = True) -> str:
    """The value of a statistic at each stage, `9.13 non-aligned, 2.33 aligned`, or the reason why there is none."""
    if results := results_by_stage(stages):
        return ", ".join(f"{_value(result, with_p)} {word}" for word, result in results.items())
    reasons = [(stages.get(stage) or {}).get("not_applicable") for stage in STAGES]
    return next((f"not applicable, {reason}" for reason in reasons if reason), "not run")


def _value(result: Mapping[str, Any], with_p: bool) -> str:
    log10_p = result.get("log10_p")
    value = cell(result.get("headline"))
    if log10_p is None or not with_p:
        return value
    return f"{value} ({(calibrated_p_text if is_calibrated(result) else p_text)(float(log10_p))})"


BY_TENSORS = "the tensors themselves, which are compared before any statistic"
"""What decides that two models are identical."""


def verdict_word(word: str) -> str:
    """A verdict as it is shown: `NO EVIDENCE`."""
    return word.replace("_", " ").upper()


def claim_text(claim: Mapping[str, Any]) -> str:
    """A claim, what became of it and why: `CLAIM HOLDS  finetune-of: ... (not tested: ...)`."""
    text = f"CLAIM {verdict_word(claim['outcome'])}  {claim['claim']}: {claim['because']}"
    return f"{text} (not tested: {claim['not_said']})" if claim["outcome"] == "holds" else text


def verdict_p_text(verdict: Mapping[str, Any]) -> str:
    """The p-value of a verdict; a calibrated one never below 10^-12, with the assumption that it rests on."""
    log10_p = float(verdict["adjusted_log10_p"])
    if not verdict.get("calibrated"):
        return p_text(log10_p)
    assumed = "if no more units agree by convergence than is allowed for, 5 % unless control models say more"
    return f"{calibrated_p_text(log10_p)} (calibrated: {assumed})"


def calibrated_p_text(log10_p: float) -> str:
    """A calibrated p-value: never below 10^-12, since its null is an assumption."""
    return f"p < 10^{SMALLEST_CALIBRATED:.0f}" if log10_p <= SMALLEST_CALIBRATED else p_text(log10_p)


def decided_by(verdict: Mapping[str, Any]) -> str:
    """The test behind a verdict: `csu, p = 10^-41.3 after Holm over csu and match; level 0.001; layer 3`."""
    if verdict["verdict"] == "identical":
        return BY_TENSORS
    if verdict["statistic"] is None:
        return f"level {verdict['level']:g}"
    parts = [f"{verdict['statistic']}, {verdict_p_text(verdict)} {after_holm(verdict)}", f"level {verdict['level']:g}"]
    if verdict["layers"]:
        parts.append(places_text(verdict["layers"]))
    return "; ".join(parts)


def after_holm(verdict: Mapping[str, Any]) -> str:
    """How the p-value of a verdict was adjusted: `after Holm over csu, csh and match`."""
    names = list(verdict["family"])
    if len(names) == 1:
        return "(the only statistic in the verdict)"
    return f"after Holm over {', '.join(names[:-1])} and {names[-1]}"


def verdict_facts(verdict: Mapping[str, Any]) -> dict[str, str]:
    """The test behind a verdict as named facts, for the page."""
    if verdict["verdict"] == "identical":
        return {"in detail": verdict["meaning"], "decided by": BY_TENSORS}
    found = {"level": f"{verdict['level']:g}"}
    if verdict["statistic"] is None:
        return {"in detail": verdict["meaning"]} | found
    if verdict.get("effect"):
        found = {"effect": verdict["effect"]} | found
    found |= {"decided by": verdict["statistic"]} | {
        "adjusted p": f"{verdict_p_text(verdict)} {after_holm(verdict)}",
    }
    if verdict["layers"]:
        found["significant"] = f"{places_text(verdict['layers'])}, each by itself, after Bonferroni over all places"
    return {"in detail": verdict["meaning"]} | found | caveats(verdict)


def caveats(verdict: Mapping[str, Any]) -> dict[str, str]:
    """What a verdict can mean, and what it does not rest on; without those that have nothing to say."""
    found = {
        "can mean": "; or ".join(verdict.get("explanations") or ()),
        "reserved": "; ".join(f"{name}: {why}" for name, why in (verdict.get("reservations") or {}).items()),
    }
    return {name: text for name, text in found.items() if text}


def identical_text(identical: Mapping[str, Any]) -> str:
    """How many tensors are identical: `3 of 57 (norms 3 of 9)`."""
    parts = [f"{part} {n} of {of}" for part, (n, of) in (identical.get("by_part") or {}).items() if n]
    return f"{identical['equal']} of {identical['total']}" + (f" ({', '.join(parts)})" if parts else "")


def text_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A table for the terminal: rows under headers and a rule, numbers right-aligned, text left-aligned.

    Raises:
        ValueError: a row whose length differs from that of the headers.
    """
    if wrong := [i for i, row in enumerate(rows) if len(row) != len(headers)]:
        raise ValueError(f"rows {wrong} of the table do not have {len(headers)} cells like its headers {list(headers)}")
    columns = [[header, *(cell(row[i]) for row in rows)] for i, header in enumerate(headers)]
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    lines = [_line(line, widths, numeric) for line in zip(*columns, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = (
        text.rjust(width) if right else text.ljust(width)
        for text, width, right in zip(cells, widths, numeric, strict=True)
    )
    return "  ".join(padded).rstrip()
