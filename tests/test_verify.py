"""A record on another machine: it fits its schema, and `verify` tells a true one from one that was changed."""

import copy
import json
import shutil

import derived_models as make
import jsonschema
import pytest
from derived_models import derived
from records import SCHEMA, outcomes

from tracing_jax import cli, experiment
from tracing_jax.experiment.verifying import read_records
from tracing_jax.options import COMPARE
from tracing_jax.record import record_digest, with_digest
from tracing_jax.report import record_text


@pytest.fixture(scope="module")
def written(family, tmp_path_factory):
    """A run on copies of two members, the file of its record, and the record."""
    folder = tmp_path_factory.mktemp("verify")
    models = {side: shutil.copytree(family.member(name), folder / side) for side, name in
              (("base", "base"), ("ft", "finetune"))}  # fmt: skip
    asked = COMPARE.as_dict() | {
        "base_model_id": str(models["base"]), "ft_model_id": str(models["ft"]), "stat": ("csu", "mode"),
        "claim": "finetune-of", "save": str(folder / "run.p"), "dataset": str(family.text), "num_tokens": 512,
        "block_size": 64, "eval": True, "mesh": {"data": 1, "model": 1},
    }  # fmt: skip
    record = experiment.trace(asked)
    return folder / "run.json", record


def changed(record, *path, value):
    found = copy.deepcopy(record)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return found


def test_the_schema_is_one_and_says_no_to_what_is_no_record(written):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    _, record = written
    jsonschema.validate(record, SCHEMA)
    for path, value in ((("verdict", "verdict"), "guilty"), (("seed",), "0"), (("extra",), 1),
                        (("models", "base", "files", "config.json"), "abc"), (("format",), 2)):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed(record, *path, value=value), SCHEMA)


@pytest.mark.slow
def test_the_records_of_several_pairs_fit_the_schema(family, tmp_path):
    """That of all statistics is one of the tests of experiments."""
    asked = COMPARE.as_dict() | {
        "base_model_id": str(family.member("base")), "stat": ("csu",), "save": str(tmp_path / "pairs.p"),
        "ft_model_ids": (str(family.member("disguised")), str(family.member("independent"))),
    }  # fmt: skip
    for record in experiment.run(asked):
        jsonschema.validate(record, SCHEMA)
        assert outcomes(record)["record"] == "holds"
    assert len(read_records(tmp_path / "pairs.json")) == 2


def test_a_true_record_holds_and_its_file_is_what_was_returned(written):
    file, record = written
    (read,) = read_records(file)
    assert read == json.loads(json.dumps(record))
    found = outcomes(read)
    assert set(found.values()) == {"holds"}
    assert {"record", "verdict", "files of base", "files of ft", "test csu", "claim", "identical tensors"} == set(found)


def test_a_changed_record_is_told_from_changed_files_and_from_missing_ones(written, tmp_path, family):
    _, record = written
    assert outcomes(changed(record, "seed", value=7))["record"] == "changed"
    # Whoever changes the digest too is found by what does not follow, or does not come out again.
    forged = with_digest(changed(record, "verdict", "verdict", value="no_evidence"))
    assert (outcomes(forged)["record"], outcomes(forged)["verdict"]) == ("holds", "changed")
    test = ("statistics", "csu", "non_aligned")
    forged = changed(record, *test, "log10_p", value=-99.0)
    forged["verdict"] |= {"adjusted_log10_p": -99.0}
    forged["verdict"]["family"] = {"csu": -99.0}
    found = outcomes(with_digest(forged))
    assert (found["record"], found["verdict"], found["test csu"]) == ("holds", "holds", "changed")
    assert record_digest(forged) != record_digest(record)
    other = derived(family.member("finetune"), tmp_path / "other", lambda t: make.adapted(t, 1, 0.1))
    found = outcomes(record, ft=str(other))
    assert (found["files of base"], found["files of ft"]) == ("holds", "changed")
    assert "test csu" not in found
    # Nor does a link to a blob that bears the hash of what was compared, as in the Hub's cache, pass for it.
    weights, recorded = other / "model.safetensors", record["models"]["ft"]["files"]["model.safetensors"]
    blob = tmp_path / "blobs" / recorded
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    assert outcomes(record, ft=str(other))["files of ft"] == "changed"
    found = outcomes(changed(record, "args", "ft_model_id", value=str(tmp_path / "gone")))
    assert found["models"] == "missing"
    assert outcomes({**record, "digest": None})["record"] == "missing"


@pytest.mark.slow
def test_the_exit_status_of_verify(written, tmp_path, capsys):
    file, record = written
    cli.main(["verify", str(file)])
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "the record holds"
    assert shown.startswith(record_text(record, ("Compared", "Verdict")))
    for change, status in (
        ({"seed": 7}, 3),
        ({"models": {}}, 3),
        ({"args": {**record["args"], "ft_model_id": "./no"}}, 3),
    ):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**record, **change}))
        with pytest.raises(SystemExit) as ended:
            cli.main(["verify", str(other)])
        assert ended.value.code == status
    other.write_text(json.dumps(with_digest({**record, "args": {**record["args"], "ft_model_id": "./no"}})))
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", str(other)])
    assert ended.value.code == 4


@pytest.mark.parametrize(("content", "message"), [
    ("{", "no JSON"), ("[]", "no record of a run"), ('{"args": {}}', "no record of a run"),
    ('{"args": {}, "models": {}, "statistics": {}, "verdict": {}, "format": 9}', "this version reads format 1"),
])  # fmt: skip
def test_what_is_no_record_is_named(content, message, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SystemExit, match=message):
        cli.main(["verify", str(tmp_path / "x.json")])
