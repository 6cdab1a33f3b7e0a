"""Writing a zoo's report: `report.html`, `report.csv` and `report.json`, each whole or not at all."""

import csv
import io
from pathlib import Path

from tracing_jax.record import atomic_write, write_json
from tracing_jax.zoo.folder import ZooFolder
from tracing_jax.zoo.report.contents import Contents, contents_of, pair_dict
from tracing_jax.zoo.report.page import html

PAGE, TABLE, DATA = "report.html", "report.csv", "report.json"


def write_report(folder: ZooFolder) -> Path:
    """Writes the report of a zoo into its folder, as far as its pairs are done; returns the page.

    Raises:
      FileNotFoundError: the folder holds no plan.
    """
    contents = contents_of(folder)
    write_json(folder.path / DATA, contents.as_dict())
    atomic_write(folder.path / TABLE, csv_text(contents).encode())
    page = folder.path / PAGE
    atomic_write(page, html(contents, folder.path.name).encode())
    return page


def csv_text(contents: Contents) -> str:
    """Returns a line for every pair of the plan under a line of names; what is not known is empty."""
    rows = [pair_dict(row) for row in contents.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
