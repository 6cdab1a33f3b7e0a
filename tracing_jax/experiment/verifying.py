"""A record checked by others: is it as it was written, are the model files, and does the decisive test come out so?"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment import compute
from tracing_jax.experiment.models import open_models
from tracing_jax.options import RunOptions
from tracing_jax.record import RECORD_FORMAT, file_hashes, record_digest
from tracing_jax.statistics import Identity, Result, verdict

CheckOutcome = Literal["holds", "changed", "missing"]

_RELATIVE, _ABSOLUTE = 0.02, 0.1
"""How far log10 p may be from that of the record: other processors add in other orders, and a unit may change place."""


@dataclass(frozen=True)
class Check:
    """One check of a record.

    Attributes:
      name: what was checked: `record`, `verdict`, `files of base`, `test csu` ...
      outcome: `holds`, `changed`: it is not as the record says; `missing`: it cannot be checked.
      text: what was found.
    """

    name: str
    outcome: CheckOutcome
    text: str


def read_records(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSON file: one, or those of several pairs.

    Raises:
      ValueError, OSError: it is no record of this package, or of another version of its format.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no JSON ({error}); expected the .json that a run writes beside its .p") from None
    found = content.get("records", [content]) if isinstance(content, dict) else [content]
    for record in found:
        if not isinstance(record, dict) or not {"args", "models", "statistics", "verdict"} <= record.keys():
            raise ValueError(f"{path}: no record of a run; expected the .json that tracing-jax compare writes")
        if record.get("format") != RECORD_FORMAT:
            raise ValueError(
                f"{path}: a record of format {record.get('format')}, this version reads format {RECORD_FORMAT}"
            )
    return found


def verify(record: Mapping[str, Any], base: str | None = None, ft: str | None = None) -> Iterator[Check]:
    """Yields the checks of a record, the quick ones first; the test that decided is computed again last.

    Args:
      record: plain data, as `read_records` gives it.
      base: where the base model is now, if not where the record says.
      ft: where the other model is.
    """
    yield _digest(record)
    yield _verdict(record)
    found = []
    for check in _files(record, base, ft):
        yield check
        found.append(check)
    # Other weights than those of the record would only show that other weights give other numbers.
    if all(check.outcome == "holds" for check in found):
        yield from _tests(record, base, ft)


def _digest(record: Mapping[str, Any]) -> Check:
    if not record.get("digest"):
        return Check("record", "missing", "it has no digest, by which a change would show")
    if record["digest"] != record_digest(record):
        return Check("record", "changed", "its content is not that of its digest: it was changed after it was written")
    return Check("record", "holds", f"its content is that of its digest, {record['digest'][:16]}...")


def _verdict(record: Mapping[str, Any]) -> Check:
    """Checks that the verdict follows from the p-values of the tests."""
    recorded = record["verdict"]
    try:
        results = {
            name: Result.restored(_numbers(sides["non_aligned"]), {}) for name, sides in record["statistics"].items()
        }
        identical = None if record.get("identical") is None else Identity(**record["identical"])
        found = verdict(results, recorded["level"], identical)
    except (KeyError, TypeError, ValueError) as error:
        return Check("verdict", "changed", f"the results are not those of a run: {type(error).__name__}: {error}")
    if found.verdict != recorded["verdict"] or not _near(
        found.adjusted_log10_p, recorded["adjusted_log10_p"], 1e-9, 1e-9
    ):
        return Check(
            "verdict", "changed", f"by the results of its tests it is {found.verdict}, not {recorded['verdict']}"
        )
    return Check("verdict", "holds", f"{recorded['verdict']}, which follows from the results of its tests")


def _numbers(value: Any) -> Any:
    """Returns plain data with the numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def _files(record: Mapping[str, Any], base: str | None, ft: str | None) -> Iterator[Check]:
    try:
        models = dict(zip(("base", "ft"), open_models(_options(record, base, ft))))
    except (ConfigError, ValueError, OSError) as error:
        yield Check("models", "missing", f"they cannot be opened: {error}")
        return
    for side, model in models.items():
        name, recorded = f"files of {side}", record["models"].get(side, {}).get("files") or {}
        if not recorded:
            yield Check(name, "missing", "the record has no hashes: the run read a part of the files only")
            continue
        files = {path.name: path for path in model.files()}
        if absent := sorted(recorded.keys() - files.keys()):
            yield Check(name, "missing", f"{', '.join(absent)} cannot be found in {model.folder}")
            continue
        found = file_hashes(files[file] for file in recorded)
        changed = sorted(file for file, digest in found.items() if digest != recorded[file])
        changed += sorted(f"{file} (not in the record)" for file in files.keys() - recorded.keys())
        if changed:
            yield Check(name, "changed", f"{', '.join(changed)} in {model.folder}: other content than was compared")
        else:
            yield Check(name, "holds", f"the SHA-256 of {len(found)} files are those of the record")


def _options(record: Mapping[str, Any], base: str | None, ft: str | None) -> RunOptions:
    """Returns the options of the run, on models that may have moved; nothing is written."""
    args = {key: value for key, value in record["args"].items() if key != "hub_token"}
    args |= {"save": None, "align": False, "eval": False, "save_aligned": None, "cache_dir": None}
    args |= {"base_model_id": base or _where(record, "base"), "ft_model_id": ft or _where(record, "ft")}
    return RunOptions.from_config(args)


def _where(record: Mapping[str, Any], side: str) -> str:
    asked, revision = record["args"][f"{side}_model_id"], record["models"].get(side, {}).get("revision")
    return f"{asked.partition('@')[0]}@{revision}" if revision else asked


def _tests(record: Mapping[str, Any], base: str | None, ft: str | None) -> Iterator[Check]:
    """Computes again what the verdict rests on: the test that found something, or all where nothing was found."""
    recorded = record["verdict"]
    names = [recorded["statistic"]] if recorded["verdict"] == "related" else list(recorded["family"])
    if recorded["verdict"] == "identical":
        names = []
    if not names and not record.get("claim") and recorded["verdict"] != "identical":
        return
    args = _options(record, base, ft).as_dict()
    if recorded["verdict"] in ("related", "identical"):
        args |= {"stat": tuple(names) or ("l2",), "l2": {"num_perm": 0}, "verdict": "asked"}
    try:
        found = compute(args).record
    except (ConfigError, ValueError, OSError) as error:
        yield Check("tests", "missing", f"they cannot be computed again: {error}")
        return
    if (record.get("tokens") or {}).get("sha256") != (found.get("tokens") or {}).get("sha256") and found.get("tokens"):
        yield Check("tokens", "changed", "the text, or its tokens, are others than those of the record")
        return
    if record.get("identical"):
        same = found["identical"] == json.loads(json.dumps(record["identical"]))
        text = f"{found['identical']['equal']} of {found['identical']['total']}"
        yield Check("identical tensors", "holds" if same else "changed", text)
    for name in names:
        yield _test(name, record["statistics"][name]["non_aligned"], found["statistics"][name]["non_aligned"])
    if record.get("claim"):
        yield _claim(record, found, bool(names) and len(names) < len(recorded["family"]))


def _test(name: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Check:
    theirs, ours = (_numbers(result["log10_p"]) for result in (recorded, found))
    text = f"log10 p {_shown(ours)}, in the record {_shown(theirs)}"
    holds = _near(ours, theirs, _RELATIVE, _ABSOLUTE)
    return Check(f"test {name}", "holds" if holds else "changed", text)


def _claim(record: Mapping[str, Any], found: Mapping[str, Any], is_part: bool) -> Check:
    recorded, ours = record["claim"], found["claim"]
    text = f"{ours['claim']} {ours['outcome']}, in the record {recorded['outcome']}"
    if ours["outcome"] == recorded["outcome"]:
        return Check("claim", "holds", text)
    # Fewer tests than those of the record can decide less.
    return Check("claim", "missing" if is_part and ours["outcome"] == "not_testable" else "changed", text)


def _near(ours: float | None, theirs: Any, relative: float, absolute: float) -> bool:
    if ours is None or theirs is None:
        return ours is None and theirs is None
    return math.isclose(ours, float(theirs), rel_tol=relative, abs_tol=absolute)


def _shown(log10_p: float | None) -> str:
    return "none" if log10_p is None else f"{log10_p:.2f}"
