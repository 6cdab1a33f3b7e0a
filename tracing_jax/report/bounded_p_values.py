"""Records as people are shown them: no p-value of a calibrated test below 10^-12, since its null is an assumption."""

import copy
from collections.abc import Mapping
from typing import Any

from tracing_jax.record import SMALLEST_CALIBRATED


def bounded(log10_p: Any) -> Any:
    """Returns a decimal logarithm, or a list of them, none below `SMALLEST_CALIBRATED`; None stays None."""
    if isinstance(log10_p, list | tuple):
        return [bounded(item) for item in log10_p]
    return None if log10_p is None else max(float(log10_p), SMALLEST_CALIBRATED)


def is_calibrated(result: Mapping[str, Any]) -> bool:
    """Returns whether the smallest p-value of a result that enters the verdict is that of a calibrated test."""
    tests = [test for test in result.get("tests") or () if test["decides"] and test["log10_p"] is not None]
    return bool(tests) and bool(min(tests, key=lambda test: float(test["log10_p"])).get("calibrated"))


def with_bounded_p_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a record in which the p-values of calibrated tests are bounded, in tests, maps and verdict."""
    shown = copy.deepcopy(dict(record))
    calibrated: dict[str, bool] = {}
    by_test: dict[tuple[str, str], bool] = {}
    for name, stages in shown["statistics"].items():
        for stage, result in stages.items():
            if not isinstance(result, dict):
                continue
            if stage == "non_aligned":
                calibrated[name] = is_calibrated(result)
                by_test |= {(name, test["name"]): test.get("calibrated", False) for test in result.get("tests") or ()}
            _bound_result(result)
    verdict = shown.get("verdict")
    if verdict:
        verdict["family"] = {
            name: bounded(log10_p) if calibrated.get(name) else log10_p for name, log10_p in verdict["family"].items()
        }
        for row in verdict["evidence"]:
            if by_test.get((row["statistic"], row["test"])):
                row["log10_p"] = bounded(row["log10_p"])
    return shown


def _bound_result(result: dict[str, Any]) -> None:
    if is_calibrated(result):
        result |= {key: bounded(result[key]) for key in ("log10_p", "firm_log10_p") if key in result}
    for test in result.get("tests") or ():
        if test.get("calibrated"):
            test |= {key: bounded(test[key]) for key in ("log10_p", "log10_ps", "firm_log10_p") if key in test}
    layer_map = result.get("layer_map")
    if layer_map and any(test.get("calibrated") for test in result.get("tests") or ()):
        layer_map["log10_p"] = bounded(layer_map["log10_p"])
        for pair in [*layer_map["pairs"], *(layer_map.get("copies") or ())]:
            pair["log10_p"] = bounded(pair["log10_p"])
