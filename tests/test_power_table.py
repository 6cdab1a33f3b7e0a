"""The published table of detection rates is data: what is not measured anew comes back from it as it was."""

from pathlib import Path

from benchmarks.power import COLUMNS
from benchmarks.power_table import Rates, figure, from_markdown, to_markdown

TABLE = {
    "as it was": Rates(20, {"csu": 1.0, "csh": 0.05, "verdict": 1.0}),
    "in another shape": Rates(20, {"csu": None, "verdict": 0.0}),
}


def test_a_table_comes_back_from_markdown():
    assert from_markdown(to_markdown(TABLE, ("csu", "csh", "verdict"))) == TABLE
    assert from_markdown("") == {}


def test_what_does_not_apply_and_what_was_not_measured_are_told_apart():
    lines = to_markdown(TABLE, ("csu", "csh")).splitlines()
    assert lines[3] == "| in another shape | 20 | – |  |"
    (axes,) = figure(TABLE, ("csu", "csh"), "title").axes
    assert [text.get_text() for text in axes.texts] == ["100", "5", "–", ""]


def test_the_docs_hold_the_table_that_the_benchmark_would_write():
    text = (Path(__file__).parents[1] / "docs" / "power.md").read_text("utf-8")
    table = text.partition("<!-- table -->\n")[2].partition("<!-- end of table -->\n")[0]
    assert to_markdown(from_markdown(table), COLUMNS) == table
