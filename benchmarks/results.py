"""RESULTS.md: the tables of the last published run, each between two marks that a run replaces."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.rows import HEADERS, Row

_FOLDER = Path(__file__).parent
PAGE = _FOLDER / "RESULTS.md"


def publish(found: Mapping[str, Any], figure: Path) -> None:
    """Puts the rows of one size, as `benchmarks` measured them, into RESULTS.md, and its figure beside it."""
    name, machine = found["size"], found["machine"]
    rows = [Row(**{key: value for key, value in row.items() if key != "ratio"}) for row in found["rows"]]
    text = f"{machine['summary']}; {found['seconds']} s in all.\n\n"
    text += markdown_table(HEADERS, [row.cells for row in rows])
    if figure.exists():
        shutil.copyfile(figure, _FOLDER / figure.name)
        text += f"\n![Cost of the steps at {name}]({figure.name})\n"
    replace_between(name, text)


def replace_between(mark: str, text: str, page: Path = PAGE) -> None:
    """Replaces what stands between `<!-- mark -->` and `<!-- end of mark -->` in a page.

    Raises:
      ValueError: the page does not have both marks.
    """
    old, start, end = page.read_text("utf-8"), f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    if start not in old or end not in old:
        raise ValueError(f"{page}: no place for {mark}; it needs the lines {start.strip()} and {end.strip()}")
    head, _, rest = old.partition(start)
    page.write_text(f"{head}{start}{text}{end}{rest.partition(end)[2]}", encoding="utf-8")


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows under their headers as a Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)
