"""What the README prints is what runs."""

import re
from pathlib import Path

import jax
import numpy as np

from tracing_jax.checkpoint import open_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_two_commands_are_those_of_continuous_integration():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = blocks("bash")[0].strip().splitlines()
    assert len(commands) == 2
    for command in commands:
        assert command in script


def test_the_example_on_a_foreign_tree_restores_it_bit_for_bit():
    scope = {}
    exec(blocks("python")[0], scope)
    same = jax.tree.map(np.array_equal, scope["params"], scope["restored"])
    assert all(jax.tree.leaves(same))
    moved = jax.tree.map(np.array_equal, scope["params"], scope["shuffled"])
    assert not all(jax.tree.leaves(moved))
    outputs = [scope["MLP"]().apply({"params": scope[name]}, scope["x"]) for name in ("params", "shuffled")]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_the_example_on_checkpoints_writes_an_aligned_one(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = blocks("python")[1]
    for hub_id, member in (("meta-llama/Llama-2-7b-hf", "base"), ("org/their-model", "disguised")):
        assert hub_id in example
        example = example.replace(hub_id, str(family.member(member)))
    exec(example, {})
    written, finetune = (open_checkpoint(str(folder)) for folder in (tmp_path / "aligned", family.member("finetune")))
    distances = [
        np.abs(a - b).max() for a, b in zip(*(map(np.asarray, jax.tree.leaves(c.embed())) for c in (written, finetune)))
    ]
    assert max(distances) == 0


def test_every_file_and_picture_that_is_named_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
