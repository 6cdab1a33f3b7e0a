"""The parts a page is made of: sections, tables, cells; and how values of a record become tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracing_jax.report.rendering import render
from tracing_jax.report.wording import cell

_HEX = re.compile(r"([0-9a-f]{12})[0-9a-f]{28,52}(-dirty)?")


@dataclass(frozen=True)
class Cell:
    """The text of a table's cell, the full text to show on hovering where it was shortened, and where it leads."""

    text: str
    full: str = ""
    link: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, of which the first names the row; the headers may be empty."""

    rows: Sequence[Sequence[Cell]]
    headers: Sequence[str] = ()


@dataclass(frozen=True)
class Block:
    """A titled table inside a section, folded away or open."""

    title: str
    table: Table
    text: str = ""
    folded: bool = True


@dataclass(frozen=True)
class Section:
    """A part of the page: whichever of these it has, in this order."""

    title: str
    text: Sequence[str] = ()
    figure: str = ""
    table: Table | None = None
    blocks: Sequence[Block] = ()
    code: str = ""


@dataclass(frozen=True)
class Banner:
    """A verdict: one word, what it means, and its grounds by name."""

    word: str
    meaning: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """Everything on a page; the title is what is asked about, and what it is held against."""

    title: tuple[str, str]
    summary: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    banner: Banner | None = None
    first: Sequence[Section] = ()

    def html(self) -> str:
        """The page as one HTML document; everything in it is escaped."""
        return render(Path(__file__).with_name("page.html"), page=self)


def table_of(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table of values, each as `cell` shows it; a cell that is ready stays."""
    return Table([[value if isinstance(value, Cell) else as_cell(value) for value in row] for row in rows], headers)


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Two columns, name and value; a mapping's entries are rows of their own."""
    rows: list[tuple[Cell, Cell]] = []
    for key, value in facts.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            rows += [(Cell(f"{name}: {inner}"), as_cell(item)) for inner, item in value.items()]
        else:
            rows.append((Cell(name), as_cell(value)))
    return Table(rows)


def columns_table(columns: Mapping[str, Mapping[str, Any]], names: Mapping[str, str] | None = None) -> Table:
    """A row for each key of any column, under `names` where given, and a column for each mapping."""
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [
        [Cell((names or {}).get(key, key)), *(as_cell(column.get(key)) for column in columns.values())] for key in keys
    ]
    return Table(rows, ("", *columns))


def as_cell(value: Any) -> Cell:
    """A value as it stands in a table; a long hash is shortened."""
    text = cell(value)
    if found := _HEX.fullmatch(text):
        return Cell(f"{found[1]}…{found[2] or ''}", text)
    return Cell(text)
