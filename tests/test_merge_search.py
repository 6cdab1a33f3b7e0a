"""Parents that are searched for: chosen by held-out entries, and proposed by a scan of a library."""

import json
import shutil
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

from benchmarks import siblings as merging
from tests.test_merges import leaves, model, sibling
from tests.test_verify import SCHEMA
from tracing_jax import cli
from tracing_jax.api import open as open_model
from tracing_jax.api import save
from tracing_jax.dataclass_options import ConfigError
from tracing_jax.experiment import check_config
from tracing_jax.experiment.merge_step import vocabularies_with, with_merge
from tracing_jax.experiment.validation import statistic_names
from tracing_jax.experiment.validation import tests_chosen as chosen_tests
from tracing_jax.library.signature_file import SUFFIX
from tracing_jax.merges import MergeModels, estimate, merge_report, read_sums
from tracing_jax.merges.merge_report import compared
from tracing_jax.merges.selection import restricted, select
from tracing_jax.options import COMPARE, Merge
from tracing_jax.sources import InMemory, in_memory
from tracing_jax.tree import flatten, unflatten

ORIGIN = leaves(0)
CANDIDATES = {name: sibling(ORIGIN, seed) for seed, name in enumerate("ABCDE")}


def candidates_of(shares, noise=0.0, origin=None, **more):
    """A child of these shares and noise, with all candidates."""
    rng = np.random.default_rng(0)
    child = merging.task_arithmetic(ORIGIN, [CANDIDATES[name] for name in shares], list(shares.values()))
    child = {name: leaf + noise * rng.normal(size=leaf.shape) for name, leaf in child.items()}
    named = {name: model(values) for name, values in (CANDIDATES | more).items()}
    return MergeModels(model(child), named, None if origin is None else model(origin))


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_parents_are_chosen_and_no_other_candidate(noise):
    """With the origin, and without: then it may be a candidate itself, of the share that is left."""
    for shares in ({"B": 0.6, "D": 0.3}, {"A": 0.5, "C": 0.1}, {"A": 0.4, "B": 0.3, "C": 0.3}):
        for models, wanted in (
            (candidates_of(shares, noise, ORIGIN), set(shares)),
            (candidates_of(shares, noise, O=ORIGIN), {*shares, *(["O"] if sum(shares.values()) < 0.99 else [])}),
        ):
            found = select(models, read_sums(models))
            assert {models.names[k] for k in found.chosen} == wanted
            assert not found.instead


def test_sums_of_the_chosen_are_those_that_one_pass_over_them_finds():
    for origin, chosen in ((ORIGIN, (1, 3)), (None, (1, 3)), (None, (0, 2))):
        models = candidates_of({"B": 0.6, "D": 0.4}, 0.05, origin)
        kept, own = restricted(models, read_sums(models), chosen)
        again = read_sums(kept)
        assert kept.names == tuple("ABCDE"[k] for k in chosen)
        for one, other in zip(own.tensors, again.tensors, strict=True):
            np.testing.assert_array_equal(one.sample, other.sample)
            np.testing.assert_allclose(one.grams, other.grams, rtol=1e-5, atol=1e-5)
        for layer, matrices in own.units.items():
            np.testing.assert_array_equal(matrices[0], again.units[layer][0])
        np.testing.assert_allclose(estimate(kept, own.tensors).values, estimate(kept, again.tensors).values, atol=1e-6)


def test_p_values_count_all_candidates_and_a_twin_is_named():
    """Of two models that differ from the origin alike, either would do."""
    models = candidates_of({"B": 0.6, "D": 0.3}, 0.03, ORIGIN)
    kept, sums = restricted(models, read_sums(models), (1, 3))
    for part in compared(kept, sums, 0, {}, 5).parts:
        assert part.log10_p < -10
        assert np.log10(4) - 1e-9 <= part.adjusted_log10_p - part.log10_p <= np.log10(5) + 1e-9
    twin = candidates_of({"B": 0.6, "D": 0.3}, 0.03, ORIGIN, F=sibling(CANDIDATES["B"], 9, 0.001))
    found = select(twin, read_sums(twin))
    ((one, (other,)),) = found.instead.items()
    assert {twin.names[one], twin.names[other]} == {"B", "F"}


def test_a_copy_has_a_second_parent_of_no_share():
    """Without the origin there is no share of one model alone."""
    found = merge_report(candidates_of({"E": 1.0}), search=True)
    assert found.shares["E"] == pytest.approx(1, abs=1e-5)
    assert len(found.shares) == 2
    assert sorted(found.parts.values()) == ["none", "part"]
    assert not any("would do" in note for note in found.record["notes"])


@pytest.fixture(scope="module")
def library(family, tmp_path_factory):
    """Signatures of the demo's base, fine-tune and independent model, and of one that is not here any more."""
    folder = tmp_path_factory.mktemp("library")
    for name in ("base", "finetune", "independent"):
        cli.main(["signature", str(family.member(name)), "-o", str(folder / f"{name}{SUFFIX}")])
    cli.main(
        ["signature", str(family.member("base")), "-o", str(folder / f"gone{SUFFIX}"), "--name", str(folder / "x")]
    )
    return str(folder)


@pytest.fixture(scope="module")
def child(family, tmp_path_factory):
    """A checkpoint: .3 of the demo's base and .7 of its fine-tune."""
    base, finetune = (in_memory(open_model(str(family.member(name)))) for name in ("base", "finetune"))
    mixed = {n: 0.3 * np.asarray(leaf) + 0.7 * np.asarray(flatten(finetune.params)[n])
             for n, leaf in flatten(base.params).items()}  # fmt: skip
    folder = tmp_path_factory.mktemp("merged") / "child"
    return str(save(folder, InMemory(base.arch, unflatten(mixed)), family.member("base")))


@pytest.mark.slow
def test_parents_are_proposed_by_a_library(family, library, child, capsys):
    capsys.readouterr()
    cli.main(["merge", child, "--library", library, "--json"])
    record = json.loads(capsys.readouterr().out)
    shares = {part["name"].rsplit("/", 1)[-1]: part["share"] for part in record["parts"]}
    assert shares == {"base": pytest.approx(0.3, abs=1e-4), "finetune": pytest.approx(0.7, abs=1e-4)}
    assert {part["word"] for part in record["parts"]} == {"part"}
    assert len(record["search"]["candidates"]) == 2
    assert any("cannot be opened" in note for note in record["notes"])
    with pytest.raises(SystemExit, match="no parent is proposed by the library") as error:
        cli.main(["merge", str(family.member("independent")), "--library", library])
    assert "name parents with --parents" in str(error.value)


PART = {"name": "a", "word": "part", "share": 0.6, "se": 0.01, "low": 0.58, "high": 0.62}


def merge_of(*words):
    parts = [PART | {"name": name, "word": word} for name, word in zip("abc", words)]
    shares = {"shares": {part["name"]: PART for part in parts}, "unexplained": 0.0, "undefined": None}
    return {"sentence": "merged of", "parts": parts, "by_role": {"mlp": shares, "head": shares}}


@pytest.mark.parametrize(
    ("word", "words", "claimed"),
    [
        ("related", ("part", "part", "none"), ["a", "b"]),
        ("related", ("part", "none"), None),
        ("related", ("part", "reserved"), None),
        ("related", ("one_of", "one_of"), None),
        ("related", ("not_testable", "not_testable"), None),
        ("undecided", ("part", "part"), None),
        ("identical", ("part", "part"), None),
    ],
)
def test_a_merge_is_claimed_of_two_parents_with_a_part_in_a_related_model(word, words, claimed):
    verdict = {"verdict": word, "meaning": "as it was"}
    found = with_merge(verdict, merge_of(*words))
    if claimed is None:
        assert found == verdict | {"merged_of": None}
        return
    assert found["meaning"] == "as it was; merged of"
    assert list(found["merged_of"]["parents"]) == claimed
    tested = {name: part["tested"] for name, part in found["merged_of"]["by_part"].items()}
    assert tested == {"MLPs": True, "head": False}
    assert with_merge(verdict, None) == verdict


@pytest.mark.slow
def test_a_verdict_says_what_a_model_was_merged_of(family, child, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, finetune, other = (str(family.member(name)) for name in ("base", "finetune", "independent"))
    asked = ["compare", base, child, "--stat", "csu,merge", "--save", "runs/one.p"]
    cli.main([*asked, "--merge.parents", f"{finetune},{other}"])
    shown, record = capsys.readouterr().out, json.loads((tmp_path / "runs/one.json").read_text())
    jsonschema.validate(record, SCHEMA)
    assert {"base", "ft", "parent 1", "parent 2"} <= set(record["models"])
    merged = record["verdict"]["merged_of"]
    assert {name: share["share"] for name, share in merged["parents"].items()} == {
        base: pytest.approx(0.3, abs=1e-4), finetune: pytest.approx(0.7, abs=1e-4),
    }  # fmt: skip
    assert {"MLPs", "attention", "embedding", "head", "norms"} == set(merged["by_part"])
    assert merged["sentence"] in record["verdict"]["meaning"]
    assert "MLPs" in shown.split("Shares")[1]
    assert merged["sentence"] in (tmp_path / "runs/one.html").read_text()
    cli.main(
        ["compare", base, finetune, "--stat", "csu,merge", "--merge.base", base, "--merge.parents", other, "--json"]
    )
    record = json.loads(capsys.readouterr().out)
    jsonschema.validate(record, SCHEMA)
    assert record["verdict"]["merged_of"] is None
    assert [part["name"] for part in record["merge"]["parts"]] == [other]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stat": ("merge",)}, "name other models with merge.parents"),
        ({"stat": ("csu",), "merge": {"parents": ("x",)}}, "add merge to stat"),
        ({"stat": ("merge",), "merge": {"parents": ("x",)}, "permute": True}, "leave permute out"),
    ],
)
def test_shares_that_cannot_be_estimated_are_refused_at_once(more, message):
    with pytest.raises(ConfigError, match=message):
        check_config(COMPARE.as_dict() | {"base_model_id": "a", "ft_model_id": "b", "save": None} | more)


def test_merge_alone_runs_the_tests_of_auto():
    alone = replace(COMPARE, stat=("merge",), merge=Merge(parents=("x",)))
    assert statistic_names(alone) == statistic_names(COMPARE)
    assert "fixed before the models were compared, by the options" in chosen_tests(alone)
    assert statistic_names(replace(alone, stat=("csu", "merge"))) == ["csu"]


def test_tokens_of_a_text_are_known_of_parents_of_other_shapes(family, tmp_path):
    """And that they are not, where a tokenizer is missing: what tokens are read decides whose units agree."""
    child, parent = (open_model(str(family.member(name))) for name in ("base", "finetune"))
    found = vocabularies_with(child, {"parent": parent})("parent")
    assert found.in_text.any()
    assert found.text_blocks is not None
    folder = shutil.copytree(family.member("finetune"), tmp_path / "parent")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert vocabularies_with(child, {"parent": open_model(str(folder))})("parent").doubt
