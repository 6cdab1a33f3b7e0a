"""One line of the table: a figure of ours over a figure of the same run that it is to be judged by."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tracing_jax.report import text_table

HEADERS = ("part", "what", "ratio", "of", "ours", "theirs", "unit", "note")


@dataclass(frozen=True)
class Row:
    """A measurement beside its yardstick.

    Attributes:
      part: what was measured, such as `reading`.
      what: how, such as `layer by layer, warm`.
      ours: our figure, in `unit`; for the record, since it belongs to one machine at one time.
      theirs: the yardstick's figure in the same unit, measured in the same run.
      of: what the yardstick is.
      note: what a reader must know of the two.
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
        """Our figure over the yardstick's."""
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


def _text(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
