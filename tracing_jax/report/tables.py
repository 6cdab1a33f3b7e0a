"""Tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from tracing_jax.report.wording import cell


def text_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """The rows under their headers and a rule, in aligned columns: numbers to the right, words to the left.

    Raises:
        ValueError: a row is longer or shorter than the headers.
    """
    if wrong := [i for i, row in enumerate(rows) if len(row) != len(headers)]:
        raise ValueError(f"rows {wrong} of the table have not the {len(headers)} cells of its headers {list(headers)}")
    columns = [[header, *(cell(row[i]) for row in rows)] for i, header in enumerate(headers)]
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(headers))]
    lines = [_line(line, widths, numeric) for line in zip(*columns, strict=True)]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = (
        text.rjust(width) if right else text.ljust(width)
        for text, width, right in zip(cells, widths, numeric, strict=True)
    )
    return "  ".join(padded).rstrip()
