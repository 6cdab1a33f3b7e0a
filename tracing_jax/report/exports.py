"""A record in the formats of other tools: a CycloneDX ML-BOM, SARIF for annotations in CI, an in-toto statement.

They are plain JSON, and nothing is signed: sign the in-toto statement with `model_signing` or cosign. None of them says
more than the record: a model is an *ancestor* only where a claim that says so was tested and holds, and as a
*variant* where the models are related and nothing is known of who came first.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from tracing_jax.record import RunFiles, record_digest
from tracing_jax.report.formatting import claim_text, requested_model, verdict_word

Record = Mapping[str, Any]

HOME = "https://github.com/tracing-jax/tracing_jax"
PREDICATE = f"{HOME}/record/v1"
"""The type of the in-toto predicate."""

_DESCENT = ("finetune-of", "adapter-of", "quantised-of", "pruned-of")
_RULES = {
    "related": "The weights of two models are not independent.",
    "identical": "All tensors of two models are identical.",
    "no_evidence": "No sign of common weights was found by tests that are invariant under every rewrite.",
    "undecided": "The tests that ran decide nothing.",
    "not_testable": "No test that was asked for applies.",
    "not_asked": "No test was asked for.",
}


def exported(form: str, records: Sequence[Record], failing: Sequence[bool] = ()) -> str:
    """Returns records as text in a format of `FORMATS`.

    Args:
      form: a name of `FORMATS`.
      records: one for each pair.
      failing: for each whether it makes the program end with status 3; only SARIF says so.
    """
    failing = failing or [False] * len(records)
    return json.dumps(FORMATS[form](records, failing), indent=1, ensure_ascii=False) + "\n"


def cyclonedx(records: Sequence[Record], failing: Sequence[bool]) -> dict[str, Any]:
    """Returns a CycloneDX 1.6 bill of materials with a component for each model that was compared with the base."""
    version = records[0]["versions"].get("tracing_jax", "")
    tool = {"type": "application", "name": "tracing_jax", "version": version}
    name = uuid.uuid5(uuid.NAMESPACE_URL, "/".join([PREDICATE, *map(_digest, records)]))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{name}",
        "version": 1,
        "metadata": {"tools": {"components": [tool]}},
        "components": [_compared(record, i) for i, record in enumerate(records)],
    }


def _compared(record: Record, number: int) -> dict[str, Any]:
    verdict, claim = record["verdict"], record.get("claim")
    notes = claim_text(claim) if claim else f"{verdict_word(verdict['verdict'])}: {verdict['meaning']}"
    base = _model(record, "base", f"{number}/base")
    pedigree: dict[str, Any] = {"notes": notes}
    if claim and claim["claim"] in _DESCENT and claim["outcome"] == "holds":
        pedigree["ancestors"] = [base]
    elif verdict["verdict"] in ("related", "identical"):
        pedigree["variants"] = [base]
    facts = {
        "verdict": verdict["verdict"], "statistic": verdict["statistic"], "log10_p": verdict["adjusted_log10_p"],
        "level": verdict["level"], "effect": verdict["effect"], "record.sha256": _digest(record),
        "claim": claim and claim["claim"], "claim.outcome": claim and claim["outcome"],
    }  # fmt: skip
    saved = record["args"].get("save")
    evidence = {
        "type": "evidence",
        "comment": "Record of the comparison, for `tracing-jax verify`; tracing_jax:record.sha256 is its digest.",
    }
    return {
        **_model(record, "ft", f"{number}/ft"),
        "pedigree": pedigree,
        **({"externalReferences": [evidence | {"url": _uri(RunFiles.from_save(saved).json)}]} if saved else {}),
        "properties": [{"name": f"tracing_jax:{k}", "value": str(v)} for k, v in facts.items() if v is not None],
    }


def _model(record: Record, side: str, reference: str) -> dict[str, Any]:
    model = record["models"][side]
    files = [
        {
            "type": "file",
            "bom-ref": f"{reference}/{name}",
            "name": name,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for name, digest in model["files"].items()
    ]
    found: dict[str, Any] = {
        "type": "machine-learning-model", "bom-ref": reference, "name": requested_model(record, side),
    }  # fmt: skip
    if model.get("revision"):
        found["version"] = model["revision"]
    return {**found, "components": files} if files else found


def sarif(records: Sequence[Record], failing: Sequence[bool]) -> dict[str, Any]:
    """Returns a SARIF 2.1.0 log with a result for each pair: an error where it makes the program fail."""
    rules = {rule: text for record in records for rule, text in [_rule(record)]}
    driver = {
        "name": "tracing_jax", "informationUri": HOME, "semanticVersion": records[0]["versions"].get("tracing_jax", ""),
        "rules": [{"id": rule, "shortDescription": {"text": text}} for rule, text in rules.items()],
    }  # fmt: skip
    order = list(rules)
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {"tool": {"driver": driver}, "results": [_sarif_result(r, f, order) for r, f in zip(records, failing)]}
        ],
    }


def _rule(record: Record) -> tuple[str, str]:
    claim, word = record.get("claim"), record["verdict"]["verdict"]
    if claim:
        return f"claim/{claim['claim']}", f"Claim: {claim['asserts']}."
    return f"verdict/{word}", _RULES[word]


def _sarif_result(record: Record, fails: bool, rules: Sequence[str]) -> dict[str, Any]:
    claim, verdict = record.get("claim"), record["verdict"]
    rule, _ = _rule(record)
    pair = f"{requested_model(record, 'ft')} and {requested_model(record, 'base')}"
    text = claim_text(claim) if claim else f"{verdict_word(verdict['verdict'])}: {verdict['meaning']}"
    unsure = (claim or {}).get("outcome") == "not_testable"
    level = "error" if fails else "warning" if unsure else "none"
    files = record["models"]["ft"]["files"] or {"config.json": ""}
    return {
        "ruleId": rule,
        "ruleIndex": rules.index(rule),
        "kind": "fail" if level in ("error", "warning") else "pass",
        "level": level,
        "message": {"text": f"{pair}: {text}"},
        "locations": [
            {"physicalLocation": {"artifactLocation": {"uri": _place(record, name)}}} for name in list(files)[:1]
        ],
        "fingerprints": {"record/v1": _digest(record)},
    }


def _place(record: Record, file: str) -> str:
    model = PurePath(str(record["args"].get("ft_model_id") or "").removeprefix("./"))
    return _uri(model if model.name == file else model / file)  # a GGUF file is a model by itself


def _uri(path: PurePath) -> str:
    """Returns a path as a URI (RFC 3986), relative to the working folder where the path is."""
    return path.as_uri() if path.is_absolute() else quote(path.as_posix(), safe="/")


def in_toto(records: Sequence[Record], failing: Sequence[bool]) -> dict[str, Any]:
    """Returns an in-toto statement (version 1) on the files of the model that was compared with the base; unsigned.

    Raises:
      ValueError: several pairs, or a record without hashes: a statement is about one set of files.
    """
    if len(records) != 1:
        raise ValueError("an in-toto statement is about one model: compare one pair")
    (record,) = records
    files = record["models"]["ft"]["files"]
    if not files:
        raise ValueError("an in-toto statement names the hashes of the files, and this run read a part of them only")
    kept = ("models", "verdict", "claim", "identical", "seed", "commit", "versions")
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in files.items()],
        "predicateType": PREDICATE,
        "predicate": {"recordSha256": _digest(record)} | {key: record[key] for key in kept if key in record},
    }


def _digest(record: Record) -> str:
    return str(record.get("digest") or record_digest(record))


FORMATS: Mapping[str, Callable[[Sequence[Record], Sequence[bool]], dict[str, Any]]] = {
    "cyclonedx": cyclonedx, "sarif": sarif, "in-toto": in_toto,
}  # fmt: skip
"""Name of a format -> what makes it."""
