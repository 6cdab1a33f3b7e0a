"""Elements of an HTML page: sections, tables, cells; values of a record as tables; and rendering by templates."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from tracing_jax.report.formatting import cell
from tracing_jax.report.maps import Map
from tracing_jax.report.unit_maps import UnitMap

_SHARED = Path(__file__).parent
"""The folder of the templates that all pages share: `head.html`, `parts.html` and `style.css`."""

_HEX = re.compile(r"([0-9a-f]{12})[0-9a-f]{28,52}(-dirty)?")


@dataclass(frozen=True)
class Cell:
    """A cell: its text, the full text as a tooltip if it was shortened, its link, and a verdict that colours it."""

    text: str
    full: str = ""
    link: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, of which the first is the row header, or the whole row; the column headers may be empty."""

    rows: Sequence[Sequence[Cell]]
    headers: Sequence[str] = ()


@dataclass(frozen=True)
class Block:
    """A titled table inside a section, folded or open."""

    title: str
    table: Table
    text: str = ""
    folded: bool = True


@dataclass(frozen=True)
class Section:
    """A section of the page: those of these elements that it has, in this order; `alt` says what its figure shows."""

    title: str
    text: Sequence[str] = ()
    figure: str = ""
    alt: str = ""
    maps: Sequence[Map] = ()
    unit_maps: Sequence[UnitMap] = ()
    banners: Sequence["Banner"] = ()
    table: Table | None = None
    blocks: Sequence[Block] = ()
    code: str = ""


@dataclass(frozen=True)
class Banner:
    """A verdict: one word, its meaning, the facts behind it, and the pair that it is on, where there are several."""

    word: str
    meaning: str
    facts: Mapping[str, str]
    pair: str = ""


@dataclass(frozen=True)
class Page:
    """A page; the title is the model in question and the model that it is compared with."""

    title: tuple[str, str]
    summary: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    banner: Banner | None = None
    first: Sequence[Section] = ()

    def html(self) -> str:
        """The page as one HTML document; everything in it is escaped."""
        return render(_SHARED / "page.html", page=self)


def table_of(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table of values, each formatted by `cell`; values that are a Cell already are kept."""
    return Table([[value if isinstance(value, Cell) else as_cell(value) for value in row] for row in rows], headers)


def facts_table(facts: Mapping[str, Any]) -> Table:
    """Two columns, name and value; each entry of a nested mapping has a row of its own."""
    rows: list[tuple[Cell, Cell]] = []
    for key, value in facts.items():
        name = key.replace("_", " ")
        if isinstance(value, dict):
            rows += [(Cell(f"{name}: {inner}"), as_cell(item)) for inner, item in value.items()]
        else:
            rows.append((Cell(name), as_cell(value)))
    return Table(rows)


def columns_table(columns: Mapping[str, Mapping[str, Any]], names: Mapping[str, str] | None = None) -> Table:
    """A row for each key of any column, named by `names` where given, and a column for each mapping."""
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [
        [Cell((names or {}).get(key, key)), *(as_cell(column.get(key)) for column in columns.values())] for key in keys
    ]
    return Table(rows, ("", *columns))


def as_cell(value: Any) -> Cell:
    """A value as a cell; a long hash is shortened."""
    text = cell(value)
    if found := _HEX.fullmatch(text):
        return Cell(f"{found[1]}…{found[2] or ''}", text)
    return Cell(text)


def render(template: Path, **values: Any) -> str:
    """The template filled in; it may include templates of its folder and the shared ones.

    All values are escaped; a missing one raises `jinja2.UndefinedError`.
    """
    loader = jinja2.FileSystemLoader([template.parent, _SHARED], encoding="utf-8")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(template.name).render(**values)
