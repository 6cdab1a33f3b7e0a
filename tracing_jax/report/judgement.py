"""The verdict of a run in words: what was decided, by which statistic, at which level, and on what evidence."""

from collections.abc import Mapping
from typing import Any

from tracing_jax.report.wording import p_text, places_text

COMPARED = {"related": "below", "undecided": "not below", "independent": "not below"}


def decided_by(judged: Mapping[str, Any]) -> str:
    """The grounds of a verdict in a line: `match, p = 10^-41.3 after Holm over csu and match; level 0.001; layer 3`."""
    if judged["statistic"] is None:
        return f"level {judged['level']:g}"
    p = p_text(float(judged["adjusted_log10_p"]))
    grounds = [f"{judged['statistic']}, {p} {after_holm(judged)}", f"level {judged['level']:g}"]
    if judged["layers"]:
        grounds.append(places_text(judged["layers"]))
    return "; ".join(grounds)


def after_holm(judged: Mapping[str, Any]) -> str:
    """How the p-value of a verdict was adjusted: `after Holm over csu, csh and match`."""
    names = list(judged["family"])
    if len(names) == 1:
        return "(the only statistic with a say)"
    return f"after Holm over {', '.join(names[:-1])} and {names[-1]}"


def facts(judged: Mapping[str, Any]) -> dict[str, str]:
    """The grounds of a verdict by name, for the page."""
    found = {"level": f"{judged['level']:g}"}
    if judged["statistic"] is None:
        return found
    log10_p = float(judged["adjusted_log10_p"])
    found = {"decided by": judged["statistic"]} | {
        "adjusted p": f"{p_text(log10_p)} {after_holm(judged)}; log10 p = {log10_p:.2f}",
        "level": f"{judged['level']:g}; the adjusted p is {COMPARED.get(judged['verdict'], 'compared with')} it",
    }
    if judged["layers"]:
        found["carried by"] = (
            f"{places_text(judged['layers'])}, each below the level alone, after Bonferroni over all places"
        )
    return found
