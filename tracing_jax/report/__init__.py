"""Reports of runs: figures, self-contained HTML pages, and text. Only what is asked for is imported."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracing_jax.report.figures import figure_of_run, images_of_run, save_png
    from tracing_jax.report.findings import verdict_lines
    from tracing_jax.report.formatting import text_table
    from tracing_jax.report.page import html
    from tracing_jax.report.pairs import figure_of_pairs, pairs_html
    from tracing_jax.report.printed import print_summary, record_text, summary

_HOMES = {
    "figures": ("figure_of_run", "images_of_run", "save_png"),
    "findings": ("verdict_lines",),
    "formatting": ("text_table",),
    "page": ("html",),
    "pairs": ("figure_of_pairs", "pairs_html"),
    "printed": ("print_summary", "record_text", "summary"),
}

__all__ = [
    "figure_of_pairs", "figure_of_run", "html", "images_of_run", "pairs_html", "print_summary",
    "record_text", "save_png", "summary", "text_table", "verdict_lines",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a name when it is used: text needs no matplotlib."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"tracing_jax.report.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
