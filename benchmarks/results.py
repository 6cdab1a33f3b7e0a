"""Rows of measurements, and RESULTS.md: the tables of the last published run, each between two marks."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tracing_jax.report import text_table

_FOLDER = Path(__file__).parent
PAGE = _FOLDER / "RESULTS.md"
HEADERS = ("part", "what", "ratio", "of", "ours", "theirs", "unit", "note")


@dataclass(frozen=True)
class Row:
    """A measurement beside its reference.

    Attributes:
      part: what was measured, such as `reading`.
      what: how, such as `layer by layer, warm`.
      ours: our figure, in `unit`; for the record, since it belongs to one machine at one time.
      theirs: the reference's figure in the same unit, measured in the same run.
      of: what the reference is.
      note: a remark on the two for the reader.
    """

    part: str
    what: str
    ours: float
    theirs: float
    unit: str
    of: str
    note: str = ""

    @property
    def ratio(self) -> float:
        """Our figure over the reference's."""
        return self.ours / self.theirs

    @property
    def cells(self) -> list[str]:
        """The line as text, in the order of `HEADERS`."""
        return [self.part, self.what, _text(self.ratio), self.of, _text(self.ours), _text(self.theirs), self.unit,
                self.note]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """Returns the line as plain data."""
        return {**asdict(self), "ratio": self.ratio}


def table(rows: Sequence[Row]) -> str:
    """Returns the lines for a terminal."""
    return text_table([row.cells for row in rows], HEADERS)


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
    """Replaces what is between `<!-- mark -->` and `<!-- end of mark -->` in a page.

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


def _text(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
