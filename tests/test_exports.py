"""Records in the formats of other tools: they fit the schemas of these, and say no more than the record."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jsonschema
import pytest
import yaml
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tracing_jax import cli
from tracing_jax.claims import UNTESTED
from tracing_jax.cli.program import EXPORTS, export_files
from tracing_jax.options import CLAIMS
from tracing_jax.report.exports import FORMATS, exported

ROOT = Path(__file__).parents[1]
DIGEST = "ab" * 32


def record(word="related", claim=None, outcome="holds", files=True):
    hashes = {"config.json": DIGEST, "model.safetensors": DIGEST} if files else {}
    models = {side: {"id": side, "revision": None, "files": hashes} for side in ("base", "ft")}
    verdict = {"verdict": word, "meaning": "as it was found", "statistic": "csu", "adjusted_log10_p": -40.0,
               "level": 1e-3, "effect": "9 of 10 units in place"}  # fmt: skip
    said = claim and {"claim": claim, "outcome": outcome, "because": "x", "asserts": "y", "not_said": "z"}
    return {"args": {"base_model_id": "./my base", "ft_model_id": "./ft"}, "models": models, "verdict": verdict,
            "claim": said, "versions": {"tracing_jax": "0.2.0"}, "seed": 0, "commit": "c"}  # fmt: skip


def of(form, *records, failing=()):
    return json.loads(exported(form, records, failing))


def test_formats_of_the_program_are_those_of_the_report():
    assert set(EXPORTS) == set(FORMATS)


@pytest.mark.parametrize("records", [
    [record()], [record("no_evidence", "from-scratch")], [record(claim="finetune-of"), record(files=False)],
    [record("undecided", "same-as", "not_testable")],
])  # fmt: skip
def test_a_bill_of_materials_fits_the_schema_of_cyclonedx(records):
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(exported("cyclonedx", records))
    assert problem is None, problem


def test_a_bill_of_materials_refers_to_the_record_as_evidence():
    saved = record()
    saved["args"]["save"] = "my runs/x.p"
    (component,) = of("cyclonedx", saved)["components"]
    (reference,) = component["externalReferences"]
    assert (reference["type"], reference["url"]) == ("evidence", "my%20runs/x.json")
    assert "externalReferences" not in of("cyclonedx", record())["components"][0]


# What SARIF 2.1.0 (OASIS, 3.13 to 3.49) and in-toto's Statement version 1 require of the objects that are written, and
# no more. The official schema of SARIF is not part of this repository; logs of every kind below were validated with it.
_TEXT = {"type": "string", "minLength": 1}
_URI = {"type": "string", "format": "uri-reference"}


def _object(**fields):
    return {"type": "object", "required": list(fields), "properties": fields, "additionalProperties": False}


def _list(items, least=1):
    return {"type": "array", "items": items, "minItems": least, "uniqueItems": True}


_MESSAGE = _object(text=_TEXT)
_SARIF_RESULT = _object(
    ruleId=_TEXT, ruleIndex={"type": "integer", "minimum": 0}, message=_MESSAGE, fingerprints={"type": "object"},
    kind={"enum": ["pass", "open", "informational", "notApplicable", "review", "fail"]},
    level={"enum": ["none", "note", "warning", "error"]},
    locations=_list(_object(physicalLocation=_object(artifactLocation=_object(uri=_URI)))),
)  # fmt: skip
_RULE = _object(id=_TEXT, shortDescription=_MESSAGE)
_DRIVER = _object(name=_TEXT, informationUri=_URI, semanticVersion=_TEXT, rules=_list(_RULE))
_REQUIRED = {
    "sarif": _object(**{
        "$schema": _URI, "version": {"const": "2.1.0"},
        "runs": _list(_object(tool=_object(driver=_DRIVER), results=_list(_SARIF_RESULT))),
    }),
    "in-toto": _object(
        _type={"const": "https://in-toto.io/Statement/v1"}, predicateType=_URI, predicate={"type": "object"},
        subject=_list(_object(name=_TEXT, digest=_object(sha256={"type": "string", "pattern": "^[0-9a-f]{64}$"}))),
    ),
}  # fmt: skip


def test_sarif_and_in_toto_have_the_fields_that_their_specifications_require():
    cases = [[record()], [record("no_evidence", "from-scratch")], [record("undecided", "same-as", "not_testable")],
             [record(), record(claim="merge-of", outcome="contradicted"), record(files=False)]]  # fmt: skip
    for records in cases:
        jsonschema.validate(of("sarif", *records), _REQUIRED["sarif"])
        if len(records) == 1:
            jsonschema.validate(of("in-toto", *records), _REQUIRED["in-toto"])


def test_a_base_is_an_ancestor_only_where_a_claim_of_descent_holds():
    for word, claim, outcome, expected in (
        ("related", "finetune-of", "holds", "ancestors"), ("related", None, "", "variants"),
        ("identical", None, "", "variants"), ("related", "merge-of", "not_testable", "variants"),
        ("no_evidence", None, "", None), ("no_evidence", "from-scratch", "holds", None),
        ("related", "adapter-of", "contradicted", "variants"), ("undecided", "finetune-of", "not_testable", None),
    ):  # fmt: skip
        (component,) = of("cyclonedx", record(word, claim, outcome))["components"]
        assert set(component["pedigree"]) == {"notes", expected} - {None}
        assert component["type"] == "machine-learning-model"


def test_an_ancestor_is_listed_with_what_was_not_tested_of_it():
    claimed = record(claim="pruned-of")
    claimed["claim"]["not_said"] = UNTESTED["pruned-of"]
    (component,) = of("cyclonedx", claimed)["components"]
    assert "which of the two was there first" in component["pedigree"]["notes"]
    assert component["pedigree"]["ancestors"]
    for claim in ("finetune-of", "adapter-of", "quantised-of", "pruned-of"):
        assert "which of the two was there first" in UNTESTED[claim]


def test_sarif_has_an_error_where_the_program_fails_and_rules_for_all_results():
    log = of("sarif", record(claim="same-as", outcome="contradicted"), record("no_evidence"),
             record(claim="merge-of", outcome="not_testable"), failing=[True, False, False])  # fmt: skip
    (run,) = log["runs"]
    assert (log["version"], [r["level"] for r in run["results"]]) == ("2.1.0", ["error", "none", "warning"])
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert [rules[r["ruleIndex"]] for r in run["results"]] == [r["ruleId"] for r in run["results"]]
    # SARIF 2.1.0, 3.27.9 and 3.27.10: a result that is no failure has the level none.
    assert all((r["kind"] == "fail") == (r["level"] != "none") for r in run["results"])
    assert run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "ft/config.json"


@pytest.mark.parametrize("folder", ["./my base", "/abs/a#b?c", "../50%/é", "org/name@main", "demo:member", 'a&b"<c>/'])
def test_the_place_of_a_result_is_a_uri_that_leads_back_to_the_file(folder):
    asked = record()
    asked["args"]["ft_model_id"] = folder
    (result,) = of("sarif", asked)["runs"][0]["results"]
    uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert re.fullmatch(r"[A-Za-z0-9._~%/:-]+", uri)  # nothing that would start a query or a fragment
    parts = urlsplit(uri)
    assert parts.scheme == ("file" if folder.startswith("/") else "")
    assert Path(unquote(parts.path)) == Path(folder, "config.json")
    asked["args"]["ft_model_id"] = f"{folder}/model.gguf"
    asked["models"]["ft"]["files"] = {"model.gguf": DIGEST}
    (result,) = of("sarif", asked)["runs"][0]["results"]
    assert unquote(result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]).count("model.gguf") == 1


def test_an_in_toto_statement_is_about_the_files_of_one_model():
    statement = of("in-toto", record(claim="finetune-of"))
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"][1] == {"name": "model.safetensors", "digest": {"sha256": DIGEST}}
    assert statement["predicate"]["claim"]["outcome"] == "holds"
    with pytest.raises(ValueError, match="one model"):
        exported("in-toto", [record(), record()])
    with pytest.raises(ValueError, match="hashes"):
        exported("in-toto", [record(files=False)])


def test_an_export_that_cannot_be_made_is_refused_before_anything_is_read(tmp_path):
    assert export_files(["sarif:a", "sarif:b", "cyclonedx:c:d"]) == {
        Path("a"): "sarif", Path("b"): "sarif", Path("c:d"): "cyclonedx",
    }  # fmt: skip
    with pytest.raises(ValueError, match="sarif goes to that file already"):
        export_files(["sarif:a", "cyclonedx:b/../a"])
    with pytest.raises(ValueError, match="did you mean sarif"):
        export_files(["sarf:x"])
    (tmp_path / "file").touch()
    for argv, message in (
        (["no/ft", "--export", "cyclonedx"], "expected FORMAT:FILE"),
        (["no/ft", "--export", f"sarif:{tmp_path}/file/x"], "file is a file, expected a folder"),
        (["no/ft", "no/other", "--export", "in-toto:x"], "one model"),
    ):
        with pytest.raises(SystemExit, match=message) as ended:
            cli.main(["compare", "no/model", *argv])
        assert ended.value.code == 2


@pytest.mark.slow
def test_compare_writes_exports(family, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["compare", str(family.member("base")), str(family.member("finetune")), "--stat", "csu", "--claim",
              "finetune-of", "--export", "sarif:out/x.sarif,sarif:y.sarif", "--export=cyclonedx:x.json"])  # fmt: skip
    assert Path("out/x.sarif").read_bytes() == Path("y.sarif").read_bytes()
    assert json.loads(Path("out/x.sarif").read_text())["runs"][0]["results"][0]["level"] == "none"
    assert "ancestors" in json.loads(Path("x.json").read_text())["components"][0]["pedigree"]


def test_the_action_and_the_hook_call_what_there_is():
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    for claim in CLAIMS:
        assert claim in action["inputs"]["claim"]["description"]
    install, script = (step["run"] for step in action["runs"]["steps"][1:])
    assert "${{" not in install + script
    assert action["runs"]["steps"][1]["env"]["ACTION"] == "${{ github.action_path }}"
    assert install.endswith('"${VERSION:-$ACTION}"')
    assert not action["inputs"]["version"]["default"]
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert shlex.split(hook["entry"])[:2] == ["tracing-jax", "compare"]


@pytest.mark.parametrize(("inputs", "expected", "status"), [
    ({}, [], 0),
    ({"CLAIM": "finetune-of", "FAIL_ON": "related,undecided"},
     ["--claim", "finetune-of", "--fail_on", "related,undecided"], 3),
    ({"BASE": "a b", "FT": "$(touch ran); `touch ran`", "OPTIONS": "--stat csu  --seed=1 $(touch ran) *"},
     ["--stat", "csu", "--seed=1", "$(touch", "ran)", "*"], 4),
])  # fmt: skip
def test_the_script_of_the_action_passes_its_inputs_on_as_they_are(inputs, expected, status, tmp_path):
    step = yaml.safe_load((ROOT / "action.yml").read_text())["runs"]["steps"][2]
    variables = dict.fromkeys(step["env"], "") | {"BASE": "./base", "FT": "./ft"} | inputs
    assert set(variables) == set(step["env"])
    stub = tmp_path / "bin" / "tracing-jax"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" > called\nexit {status}\n")
    stub.chmod(0o755)
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]  # as GitHub runs `shell: bash`
    path = f"{stub.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        shell, cwd=tmp_path, env=variables | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (status, "")
    called = (tmp_path / "called").read_text().splitlines()
    first = ["compare", variables["BASE"], variables["FT"], "--export", "sarif:runs/compare.sarif"]
    assert called == [*first, *expected]
    assert not (tmp_path / "ran").exists()
    assert export_files([called[4]])


def test_the_command_of_the_hook_takes_the_arguments_of_its_description(tmp_path):
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    given = yaml.safe_load(re.search(r"\[.*\]", hook["description"])[0])
    program, *argv = [*shlex.split(hook["entry"]), *given]
    assert program == "tracing-jax"
    with pytest.raises(SystemExit, match="no folder"):  # every option is known: the first thing missed is the model
        cli.main(argv)
