"""What the README prints is what runs."""

import re
from pathlib import Path

import jax
import numpy as np

from tracing_jax.alignment import KINDS, WHOLE
from tracing_jax.checkpoint import open_checkpoint
from tracing_jax.rewrites import DISGUISES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def example_with(text):
    (example,) = (block for block in blocks("python") if text in block)
    return example


def test_the_two_commands_are_those_of_continuous_integration():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = blocks("bash")[0].strip().splitlines()
    assert len(commands) == 2
    for command in commands:
        assert command in script


def test_the_example_on_a_foreign_tree_restores_it_bit_for_bit():
    scope = {}
    exec(example_with("table_from_axes"), scope)
    same = jax.tree.map(np.array_equal, scope["params"], scope["restored"])
    assert all(jax.tree.leaves(same))
    moved = jax.tree.map(np.array_equal, scope["params"], scope["shuffled"])
    assert not all(jax.tree.leaves(moved))
    outputs = [scope["MLP"]().apply({"params": scope[name]}, scope["x"]) for name in ("params", "shuffled")]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_the_example_on_checkpoints_writes_an_aligned_one(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = example_with("align(base, ft")
    for hub_id, member in (("meta-llama/Llama-2-7b-hf", "base"), ("org/their-model", "disguised")):
        assert hub_id in example
        example = example.replace(hub_id, str(family.member(member)))
    exec(example, {})
    written, finetune = (open_checkpoint(str(folder)) for folder in (tmp_path / "aligned", family.member("finetune")))
    distances = [
        np.abs(a - b).max() for a, b in zip(*(map(np.asarray, jax.tree.leaves(c.embed())) for c in (written, finetune)))
    ]
    assert max(distances) == 0


def test_the_example_of_a_disguise_comes_back(family):
    scope = {}
    exec(example_with("draw_rewrites").replace("org/their-model", str(family.member("finetune"))), scope)
    for part in ("embed", "head"):
        model, other, again = (jax.tree.leaves(getattr(scope[name], part)()) for name in ("model", "other", "again"))
        assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(model, again, strict=True))
        assert any(np.abs(a - b).max() > 0.1 for a, b in zip(model, other, strict=True))


def test_the_table_of_disguises_names_them_all():
    assert names_in_table("## Disguises") == list(DISGUISES)


def test_the_table_of_alignment_names_all_that_it_undoes():
    assert sorted(names_in_table("## Undoing disguises")) == sorted((*KINDS, *WHOLE))


def names_in_table(title: str) -> list[str]:
    """Returns the code words that stand in the first column of the tables of a section."""
    section = README.split(f"{title}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    return [word for cell in cells for word in re.findall(r"`(\w+)`", cell)]


def test_every_file_and_picture_that_is_named_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
