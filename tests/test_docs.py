"""The commands and snippets of README and docs work as printed.

Every block runs in a folder of its own that has what the pages name: the programs of the repository, the models `base`,
`theirs` and a few more, a list of two of them, a finished zoo, and the text `pages.txt`. These are of the tests'
family, for printed output of the demo; blocks of `tracing-jax` alone and snippets run in this process. Output is
compared but for its numbers: that of a command in a `console` block, and that of a snippet in the `text` block behind
it. A block after `<!-- not run: REASON -->` needs a cluster, the Hub or minutes; its commands are parsed all the same,
so their flags and config fields exist.
"""

import dataclasses
import functools
import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import foreign_layouts
import jax
import numpy as np
import pytest
import yaml
from planted_zoo import planted, write_zoo

import tracing_jax as tj
from tracing_jax import cli
from tracing_jax.alignment import KINDS, WHOLE
from tracing_jax.checkpoint import WeightsOnly, open_checkpoint
from tracing_jax.dataclass_options import options_of
from tracing_jax.demo.cache import _key
from tracing_jax.demo.recipe import DEFAULT
from tracing_jax.options import RunOptions, unknown_option
from tracing_jax.rewrites import DISGUISES
from tracing_jax.tree import map_named

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/RESULTS.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
_NAMED = {
    "base": "base", "theirs": "disguised", "pages.txt": "text.txt", "origin": "base", "a": "finetune",
    "b": "independent", "child": "finetune", "ours": "base", "suspect": "disguised",
}  # fmt: skip
"""What the pages name -> the member of the family, or its text, that it is here."""
_TOOLS = {"pip", "pytest", "ruff", "mypy", "mkdocs", "pre-commit", ".ci/run"}
_NUMBER = re.compile(r"\b[0-9a-f]{16}\b|(10\^)?-?\d[\d.,]*")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run; None if it is."""
    printed: str = ""
    """The `text` block behind a snippet: what it prints."""
    models: tuple[tuple[str, str], ...] = ()
    """The names of folders for which this was printed, and the members of the demo family that they were."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(language: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = text_of(page)
        matches = [*_BLOCK.finditer(text)]
        for match, after in itertools.zip_longest(matches, matches[1:]):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("text"))
                printed, models = "", ()
                if language == "python" and after is not None and after["language"] == "text":
                    between = text[match.end() : after.start()]
                    printed, models = after["text"], tuple(re.findall(r"`demo:(\w+)`\s+as\s+`(\w+)`", between))
                found.append(Block(page, line, language, match["text"], match["reason"], printed, models))
    return found


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yields where each command of a page stands, and its words."""
    for block in [*blocks("bash"), *blocks("console")]:
        text = block.text
        if block.language == "console":
            text = "\n".join(line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ "))
        for words in words_of(text):
            yield str(block), words


def words_of(script: str) -> Iterator[list[str]]:
    """Yields the words of each command of a script."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


COMMANDS = list(commands())


def test_first_block_is_that_of_continuous_integration():
    script = text_of(".ci/run")
    first = blocks("bash")[0].text.splitlines()
    assert len(first) == 2
    for command in first:
        assert command in script


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=[place for place, _ in COMMANDS])
def test_command_can_be_parsed(words):
    while re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if words[0] == "srun":
        words = words[[word.startswith("-") for word in words].index(False, 1) :]
    match words:
        case ["tracing-jax", verb, *arguments]:
            cli.parser_of(verb).parse_args(arguments)
        case ["python", "main.py" | "launch.py" | "generate.py" as program, *arguments]:
            parse_flags(program, arguments)
        case ["python", "-m", module, *arguments] if module.split(".")[0] == "benchmarks":
            assert module_file(module).is_file()
            source = "".join(file.read_text("utf-8") for file in (ROOT / "benchmarks").rglob("*.py"))
            for flag in arguments:
                assert f'"{flag.lstrip("-").split("=")[0]}"' in source
        case ["python", "-m", "tracing_jax.zoo", "report", _]:
            assert module_file("tracing_jax.zoo").is_file()
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["pip", "install", *packages]:
            extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
            assert set(re.findall(r"\[(\w+)\]", " ".join(packages))) <= set(extras)
        case [script, *_] if script.endswith(".sh"):
            assert os.access(ROOT / script, os.X_OK)
        case [tool, *_]:
            assert tool in _TOOLS


@functools.cache
def option_names() -> set[str]:
    """Returns the names of the options of every verb, of the programs at the root, and of the benchmarks."""
    names = {"config", "attn", "emb", *(found.name for found in options_of(RunOptions))}  # those of main.py
    for verb in cli.VERBS:
        parser = cli.parser_of(verb)
        names |= {flag.removeprefix("--") for flag in parser.option_strings()}
    names |= {f"no{name.removeprefix('no-')}" for name in names if name.startswith("no-")}  # as absl has them
    benchmarks = "".join(file.read_text("utf-8") for file in (ROOT / "benchmarks").rglob("*.py"))
    return names | set(re.findall(r'(?:flags\.DEFINE_\w+\(\s*"|add_argument\(\s*"--)(\w+)"', benchmarks))


@pytest.mark.parametrize("page", PAGES)
def test_options_named_in_text_exist(page):
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    for name in re.findall(r"(?<![\w-])--([\w.-]+)", " ".join(re.findall(r"`([^`]+)`", prose))):
        if name.endswith(".") or re.search(r"\b[A-Z]+$", name):  # a section, or a placeholder such as --config.NAME
            continue
        if name.startswith("config."):
            assert unknown_option(f"{name.removeprefix('config.')}=") is None, name
        else:
            assert name in option_names(), name


def test_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 150


_PARSE = """
import runpy, sys
from absl import flags
from tracing_jax.cli import absl_flags
absl_flags.run_program = lambda main, argv, print_help: absl_flags.parse_flags(argv)
parsed = runpy.run_path(sys.argv[0], run_name="__main__")
if "run_options" in parsed:
    parsed["run_options"]()
"""


def parse_flags(program: str, arguments: list[str]) -> None:
    """Parses the command line of a program at the root of the repository, config file included, and runs nothing."""
    code = f"import sys; sys.argv = {[program, *arguments]!r}{_PARSE}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def module_file(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def fill(folder: Path, models: Path) -> Path:
    """Puts the programs of the repository, and models and text of a demo family, into a folder, which is returned."""
    for name in ("main.py", "launch.py", "generate.py", "configs"):
        (folder / name).symlink_to(ROOT / name)
    for name, source in _NAMED.items():
        (folder / name).symlink_to(models / source)
    cache = folder / ".cache" / "tracing_jax"
    cache.mkdir(parents=True)
    for name in ("demo", "demo-text"):  # these models and their text, for programs that look here for those of the demo
        (cache / f"{name}-{_key(DEFAULT)}").symlink_to(models)
    (folder / "models.yaml").write_text("- ./base\n- ./theirs\n")
    write_zoo(folder / "runs" / "finished", *planted([2, 1]))
    return folder


@pytest.fixture(scope="session")
def demo_models() -> Path:
    """The folder of the demo's models, which `python main.py --config=configs/demo.py` has trained or will find."""
    code = "from tracing_jax import demo; print(demo.family().folder)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


def run(script: str, folder: Path) -> str:
    """Runs a block in bash, with `python` and `tracing-jax` those of this test, and returns what it prints."""
    bin_folder = folder / ".bin"
    bin_folder.mkdir()
    (bin_folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bin_folder / "tracing-jax").write_text(f'#!/bin/sh\nexec {sys.executable} -m tracing_jax "$@"\n')
    for file in bin_folder.iterdir():
        file.chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    env["XDG_CACHE_HOME"] = str(folder / ".cache")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks_to_run() -> list[Block]:
    """Returns the blocks of commands that differ; what a console block shows runs there."""
    shown = {block.text.removeprefix("$ ").partition("\n")[0] for block in blocks("console")}
    by_text = {block.text.strip(): block for block in blocks("bash") if not block.reason}
    return [block for text, block in by_text.items() if text not in shown]


def is_script(block: Block) -> bool:
    """Returns whether a block has other commands than `tracing-jax`."""
    return any(words[0] != "tracing-jax" for words in words_of(block.text))


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in blocks_to_run() if is_script(block)], ids=str)
def test_script_runs(block, family, tmp_path):
    run(block.text, fill(tmp_path, family.folder))


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in blocks_to_run() if not is_script(block)], ids=str)
def test_commands_run(block, family, tmp_path, monkeypatch):
    # What starts the command is tested by the blocks with output; here imports and compiled programs are shared.
    monkeypatch.chdir(fill(tmp_path, family.folder))
    monkeypatch.setattr("tracing_jax.demo.member", family.member)
    monkeypatch.setattr("tracing_jax.demo.held_out_text", lambda: family.text)
    for _, *arguments in words_of(block.text):
        cli.main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("console"), ids=str)
def test_output_is_as_printed_but_for_its_numbers(block, demo_models, tmp_path):
    command, _, printed = block.text.removeprefix("$ ").partition("\n")
    output = run(command, fill(tmp_path, demo_models))
    found, *shown = (without_numbers(text) for text in (output, *printed.split("\n...\n")))
    assert found.startswith(shown[0])
    assert found.endswith(shown[-1])
    places = [found.find(part) for part in shown]  # what is left out between them stands as `...`
    assert -1 not in places
    assert places == sorted(places)
    assert len(shown) > 1 or found == shown[0]


def without_numbers(text: str) -> str:
    """Returns a text with one space between words, and one sign for each number and each rule of a table."""
    return re.sub(r"-{2,}", "-", _NUMBER.sub("#", " ".join(text.split())))


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for block in blocks("python") if block.printed], ids=str)
def test_snippet_prints_what_stands_behind_it(block, demo_models, tmp_path, monkeypatch, capsys):
    for member, name in block.models:
        (tmp_path / name).symlink_to(demo_models / member)
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {})
    assert without_numbers(capsys.readouterr().out) == without_numbers(block.printed)


@pytest.mark.slow
def test_shares_of_a_merge_are_printed_as_on_their_page(family, tmp_path, monkeypatch, capsys):
    """Two parents with weights that change from layer to layer, in bfloat16, and a third without a part."""
    monkeypatch.chdir(tmp_path)
    origin = tj.load(family.member("base"))
    rng = np.random.default_rng(0)

    def tuned(leaf):
        return np.asarray(leaf + 0.03 * np.std(leaf) * rng.standard_normal(leaf.shape), np.float32)

    def merged(name, leaf, *others):
        at = int(name.split("/")[1]) if name.startswith("layers/") else 1
        shares = 0.6 - 0.1 * at, 0.2 + 0.1 * at
        return leaf + sum(share * (other - leaf) for share, other in zip(shares, others))

    parents = {name: map_named(lambda _, leaf: tuned(leaf), origin.params) for name in ("a", "b", "c")}
    child = map_named(merged, origin.params, parents["a"], parents["b"])
    for name, params in {**parents, "child": jax.tree.map(lambda x: jax.numpy.asarray(x, "bfloat16"), child)}.items():
        tj.save(name, dataclasses.replace(origin, params=params), family.member("base"))
    cli.main(["merge", "child", "--parents", "a", "b", "c", "--base", str(family.member("base")), "--save", "m.json"])
    (shown,) = [block.text for block in blocks("text") if block.page == "docs/merges.md"]
    found = without_numbers(capsys.readouterr().out)
    assert found.startswith(without_numbers(shown).partition(" layer #")[0])


def test_all_printed_text_is_compared():
    of_snippets = [block.printed for block in blocks("python") if block.printed]
    others = {block.page for block in blocks("text") if block.text not in of_snippets}
    assert others == {"docs/merges.md"}


def test_yaml_is_what_reads_it(tmp_path):
    layout, step, hook = (yaml.safe_load(block.text) for block in sorted(blocks("yaml"), key=str))
    assert set(step[0]["with"]) <= set(yaml.safe_load(text_of("action.yml"))["inputs"])
    assert hook[0]["hooks"][0]["id"] == yaml.safe_load(text_of(".pre-commit-hooks.yaml"))[0]["id"]
    cli.parser_of("compare").parse_args(hook[0]["hooks"][0]["args"])
    (tmp_path / "layout.yaml").write_text(yaml.safe_dump(layout))
    model = foreign_layouts.write(tmp_path / "model", foreign_layouts.chatglm, foreign_layouts.chatglm(0))
    given = open_checkpoint(model, weights_only=WeightsOnly(str(tmp_path / "layout.yaml")))
    found = open_checkpoint(model, weights_only=WeightsOnly())
    for a, b in zip(jax.tree.leaves(given.layer(0)), jax.tree.leaves(found.layer(0)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_snippet_runs(block, family, tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path, family.folder))
    scope = {}
    exec(compile(block.text, str(block), "exec"), scope)
    if "planted" in scope:
        check_restored(scope)
    if "again" in scope:
        check_inverse(scope)
    if "report" in scope:
        assert scope["report"].verdict == "related"
    if "alignment" in scope:
        check_aligned(scope)


def check_restored(scope):
    """A permuted tree computes the same, and its matching restores it bit for bit."""
    leaves = {name: jax.tree.leaves(scope[name]) for name in ("params", "shuffled", "restored")}
    assert all(map(np.array_equal, leaves["params"], leaves["restored"]))
    assert not all(map(np.array_equal, leaves["params"], leaves["shuffled"]))
    outputs = [scope["MLP"]().apply({"params": scope[name]}, scope["x"]) for name in ("params", "shuffled")]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def check_inverse(scope):
    """A disguised model differs from the model, and its inverse gives the model back."""
    for part in ("embed", "head"):
        model, other, again = (jax.tree.leaves(getattr(scope[name], part)()) for name in ("model", "other", "again"))
        assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(model, again, strict=True))
        assert any(np.abs(a - b).max() > 0.1 for a, b in zip(model, other, strict=True))


def check_aligned(scope):
    """The aligned model that was written is, in its embedding, the fine-tune before its disguise."""
    written = tj.open("aligned")
    wanted = tj.open(Path("theirs").resolve().parent / "finetune")
    for a, b in zip(jax.tree.leaves(written.embed()), jax.tree.leaves(wanted.embed()), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def first_column(page: str, heading: str) -> list[str]:
    """Returns the code words in the first column of the table that follows a heading."""
    section = text_of(page).split(f"{heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    return [word for cell in cells for word in re.findall(r"`(\w+)`", cell)]


def test_table_of_disguises_names_all():
    assert first_column("docs/disguises.md", "## Disguise a model") == list(DISGUISES)


def test_table_of_alignment_names_all():
    assert sorted(first_column("docs/disguises.md", "## Align two models")) == sorted((*KINDS, *WHOLE))


def test_table_of_statistics_names_all():
    from tracing_jax.statistics import REGISTRY

    assert sorted(first_column("docs/statistics.md", "# Statistics and nulls")) == sorted(REGISTRY)


def kinds_of_rewrites() -> set[str]:
    """Returns the names of the rewrites that users make: all but those that undo others."""
    undoing = {"GainSetting", "KvGrouping", "LayerRemoval", "UnitGrouping", "Untying"}
    return {name for name in tj.rewrites.__all__ if isinstance(getattr(tj.rewrites, name), type)} - undoing


def test_api_page_has_all_public_names():
    named = re.findall(r"^::: tracing_jax\.(?:\w+\.)*(\w+)$", text_of("docs/api.md"), re.MULTILINE)
    assert sorted(named) == sorted({*tj.__all__, *kinds_of_rewrites()} - {"__version__", "rewrites"})


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    generated = {"options.md", "formats.md"}
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(page)):
        assert target in generated or ((ROOT / page).parent / target).exists() or Path(target).name in generated, target


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_text_exist(page):
    for name in re.findall(r"`((?:tracing_jax|tests|benchmarks|configs|docs|statistics)/[\w./]*)`", text_of(page)):
        assert (ROOT / name).exists() or (ROOT / "tracing_jax" / name).exists(), name
