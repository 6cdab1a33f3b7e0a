"""The example notebook runs from its first cell to its last, and holds no output of anybody's machine."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "examples" / "compare.ipynb"


def cells(kind: str) -> list[str]:
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def shown(source: str, names: dict[str, Any]) -> Any:
    """Runs a cell as a notebook does, and returns the value of its last line if that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names)


def test_the_notebook_has_no_outputs():
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in found if cell["cell_type"] == "code")
    assert len(cells("markdown")) > 4


@pytest.mark.slow
def test_every_cell_runs(family, monkeypatch, tmp_path):
    monkeypatch.setattr("tracing_jax.demo.member", family.member)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    values = [shown(source, names) for source in cells("code")]
    assert "<iframe" in values[1]._repr_html_()
    assert not list(tmp_path.iterdir())
