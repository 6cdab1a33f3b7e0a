"""Comparing records and results: numbers to float tolerance, everything else exactly."""

import json
import math
from importlib import resources
from typing import Any

from tracing_jax.experiment.verifying import verify

SCHEMA = json.loads(resources.files("tracing_jax").joinpath("record-1.schema.json").read_text())


def outcomes(record: dict[str, Any], **where: str) -> dict[str, str]:
    """Returns what `verify` says of each thing that it checks."""
    return {check.name: check.outcome for check in verify(record, **where)}


def assert_same_numbers(one: Any, other: Any, where: str = "", tolerance: float = 2e-4) -> None:
    """Compares plain data leaf by leaf."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_numbers(one[key], other[key], f"{where}/{key}", tolerance)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other)):
            assert_same_numbers(*pair, f"{where}/{i}", tolerance)
    elif isinstance(one, float) and not isinstance(other, str):
        assert math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance), f"{where}: {one} and {other}"
    else:
        assert one == other, f"{where}: {one} and {other}"


def without_circumstances(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record without what may differ between two runs that found the same."""
    kept = {
        key: value
        for key, value in record.items()
        if key not in ("seconds", "args", "notes", "commit", "device", "digest")
    }
    return kept | {"notes": [note for note in record["notes"] if not note.startswith(("memory", "continues"))]}
