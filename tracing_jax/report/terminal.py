"""Findings as text: plain, the same wherever it goes, or in colour on a terminal by `rich`."""

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from tracing_jax.report.findings import FindingGroup, Line

WIDTH = 80
"""Columns of plain text."""

_INDENT = 2
_LEAST = 32  # columns of text, below which it is put under its name
_STYLES = {
    "identical": "bold red", "related": "bold red", "undecided": "bold yellow", "no_evidence": "bold green",
    "claim_contradicted": "bold red", "claim_holds": "bold green", "claim_not_testable": "bold yellow",
}  # fmt: skip


def plain_text(parts: Sequence[FindingGroup]) -> str:
    """Findings as plain text of at most 80 columns, but for words that are longer."""
    blocks = ["\n".join([part.title, *_plain_rows(part.rows)]) for part in parts]
    return "\n\n".join(blocks)


def wrapped(text: str, indent: int = 0, hanging: int = 0) -> list[str]:
    """Lines of a text; those after the first are indented by `hanging` more."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + hanging),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _plain_rows(rows: Sequence[Line]) -> Iterator[str]:
    for row in rows:
        *names, text = row.cells
        widths = _widths(rows, len(row.cells))
        head = " " * _INDENT + "".join(f"{name:<{width}}  " for name, width in zip(names, widths))
        if WIDTH - len(head) < _room(rows, len(row.cells)):
            yield head.rstrip()
            yield from wrapped(text, _INDENT + 4)
        else:
            first, *more = wrapped(text, len(head), 0 if names else _INDENT) or [""]
            yield (head + first.lstrip()).rstrip()
            yield from more


def _widths(rows: Sequence[Line], cells: int) -> list[int]:
    """The widths of all columns but the last, which rows of as many cells share."""
    return [max(len(row.cells[i]) for row in rows if len(row.cells) == cells) for i in range(cells - 1)]


def _room(rows: Sequence[Line], cells: int) -> int:
    """The columns that the texts of a table need beside its other cells."""
    return min(_LEAST, max(len(row.cells[-1]) for row in rows if len(row.cells) == cells))


def print_in_colour(parts: Sequence[FindingGroup], file: Any, width: int | None = None) -> None:
    """Prints findings on a terminal: bold titles, verdicts in colour, tables as wide as the terminal, at most 120.

    `NO_COLOR` and `TERM=dumb` are respected, by `rich`.
    """
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, width=width, highlight=False)
    console.width = min(console.width, 120)
    for i, part in enumerate(parts):
        console.print(Text(f"\n{part.title}" if i else part.title, "bold cyan"))
        for cells, group in itertools.groupby(part.rows, lambda row: len(row.cells)):
            table = Table.grid(padding=(0, 2))
            widths = _widths(part.rows, cells)
            fits = sum(widths) + 2 * len(widths) + _INDENT + _room(part.rows, cells) <= console.width
            for i_column, column in enumerate([*widths, None]):
                style = "bold" if cells > 1 and i_column == 0 else ""
                table.add_column(overflow="fold", min_width=column if fits else None, style=style)
            for row in group:
                table.add_row(*(Text(text, _STYLES.get(row.tone, "")) for text in row.cells))
            console.print(Padding(table, (0, 0, 0, _INDENT)))
