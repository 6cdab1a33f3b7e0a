"""The public API: imported lazily, documented with examples that run, and true to what a user types."""

import doctest
import json
import operator
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import tracing_jax as tj
from tracing_jax.report import summary

ROOT = Path(__file__).parents[1]
_HEAVY = ("jax", "numpy", "flax", "scipy", "transformers", "datasets", "matplotlib", "ml_collections")


def _loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(','.join(name for name in {_HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.strip().split(",")) - {""}


def test_importing_the_package_imports_nothing_heavy():
    assert not _loaded_after("import tracing_jax")


def test_version_and_options_need_no_jax():
    assert "jax" not in _loaded_after("import tracing_jax; tracing_jax.__version__; tracing_jax.RunOptions")


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.split()[-1] == version


def test_every_public_name_exists():
    for name in tj.__all__:
        assert getattr(tj, name) is not None, name
    assert set(tj.__all__) <= set(dir(tj))


def test_unknown_name_is_refused_with_the_public_ones():
    with pytest.raises(AttributeError, match="trace"):
        tj.nonsense  # noqa: B018


@pytest.fixture
def demo_is_the_test_family(family, monkeypatch):
    """Lets `demo:<member>` name the family of the tests, which is trained in seconds."""
    monkeypatch.setattr("tracing_jax.demo.member", family.member)


_WITH_EXAMPLES = [
    *(name for name in tj.__all__ if name not in ("__version__", "rewrites")),
    *(f"rewrites.{name}" for name in re.findall(r"rewrites\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.M)),
]


@pytest.mark.parametrize("name", dict.fromkeys(_WITH_EXAMPLES))
def test_example_of_the_docstring_runs_as_printed(name, demo_is_the_test_family, tmp_path):
    value = operator.attrgetter(name)(tj)
    assert value.__doc__, f"tj.{name} has no docstring"
    found = doctest.DocTestFinder(recurse=False).find(
        value, name, globs={"jax": jax, "np": np, "tj": tj, "tmp": tmp_path}
    )
    (example,) = found
    assert example.examples, f"the docstring of tj.{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    printed: list[str] = []
    runner.run(example, out=printed.append)
    assert not runner.failures, "".join(printed)


@pytest.fixture(scope="module")
def report(family):
    return tj.trace(family.member("base"), family.member("finetune"), "csu")


def test_report_says_what_the_record_says(report, family):
    assert report.verdict == "related"
    assert report.meaning == report.record["verdict"]["meaning"]
    assert report.log10_p == report.record["verdict"]["adjusted_log10_p"] < -3
    assert report.p == pytest.approx(10**report.log10_p, rel=1e-12)
    assert report["csu"]["log10_p"] == report.record["statistics"]["csu"]["non_aligned"]["log10_p"]
    assert repr(report) == summary([report.record])
    assert "RELATED" in repr(report)


def test_report_in_a_notebook_is_the_page(report):
    shown = report._repr_html_()
    assert shown.startswith("<iframe")
    assert "&lt;html" in shown
    assert "<html" not in shown  # escaped: the page cannot end the attribute that it stands in


@pytest.mark.slow
def test_tracing_writes_nothing_until_the_report_is_saved(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = tj.trace(family.member("base"), family.member("finetune"), "csu")
    assert not list(tmp_path.iterdir())
    report.save("found.p")
    assert {file.name for file in tmp_path.iterdir()} == {"found.p", "found.json", "found.png", "found.html"}
    assert json.loads(Path("found.json").read_text("utf-8")) == report.record
    assert pickle.loads(Path("found.p").read_bytes())["non-aligned test stat"] == report.log10_p


@pytest.mark.slow
def test_trace_takes_options_by_name(family):
    found = tj.trace(
        family.member("base"),
        family.member("disguised"),
        ["match"],
        match={"forms": ("weights",), "max_tokens": 300},
        seed=5,
    )
    assert found.record["args"]["match"]["max_tokens"] == 300
    assert found.record["seed"] == 5
    assert found.statistics == ("match",)


def test_trace_refuses_an_option_that_does_not_exist(family):
    with pytest.raises(ValueError, match="max_tokens"):
        tj.trace(family.member("base"), family.member("finetune"), match={"max_tokenz": 1})


@pytest.mark.parametrize("name", ["stat", "save", "base_model_id", "ft_model_id", "ft_model_ids"])
def test_trace_refuses_a_change_that_is_given_elsewhere(name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        tj.trace("nope", "nope", **{name: "csu"})


def test_trace_takes_open_checkpoints_that_are_whole(family):
    base, ft = (tj.open(family.member(name)) for name in ("base", "finetune"))
    found = tj.trace(base, ft, options=tj.RunOptions(stat=("cos",), dataset=None))
    assert (found.record["args"]["base_model_id"], found.statistics) == (base.id, ("cos",))
    with pytest.raises(TypeError, match="open in part"):
        tj.trace(base, ft.first_layers(1))


def _unchecked(function):
    """Returns a function without the checks of types that tests add, as a user calls it."""
    return function.__wrapped__


def test_what_is_no_model_or_no_tokens_is_named(family):
    model, blocks = tj.load(family.member("base")), np.zeros((1, 4), np.int32)
    for function, others in ((tj.load, ()), (tj.logits, (blocks,))):
        with pytest.raises(TypeError, match="InMemory"):
            _unchecked(function)(model.params, *others)
    for function in (tj.token_losses, tj.logits):
        for tokens in (blocks[0], blocks.astype(np.float32), [1, 2]):
            with pytest.raises(ValueError, match=r"expected whole numbers .* \[blocks, tokens"):
                _unchecked(function)(model, tokens)
    with pytest.raises(TypeError, match=r"tj\.save"):
        _unchecked(tj.trace)(model, model)


def test_a_model_in_memory_has_no_tokenizer(family):
    model = tj.load(family.member("base"))
    assert tj.load(model) is model
    with pytest.raises(TypeError, match="name its folder"):
        tj.tokenize(model, "text")
