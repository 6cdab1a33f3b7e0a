"""What the README prints is what runs."""

import re
from pathlib import Path

import jax
import numpy as np

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


def test_every_name_the_examples_import_exists():
    imports = [line for block in blocks("python") for line in block.splitlines() if line.startswith("from tracing_jax")]
    assert imports
    for line in imports:
        exec(line, {})


def test_every_file_and_picture_that_is_named_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
