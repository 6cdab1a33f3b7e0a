"""Reports of runs: figures, self-contained HTML pages, and text for the terminal."""

from tracing_jax.report.figures import figure_of_run, images_of_run, path_figure, save_png
from tracing_jax.report.formatting import text_table
from tracing_jax.report.page import html
from tracing_jax.report.pairs import figure_of_pairs, pairs_html, summary, verdict_lines

__all__ = [
    "figure_of_pairs", "figure_of_run", "html", "images_of_run", "pairs_html", "path_figure", "save_png", "summary",
    "text_table", "verdict_lines",
]  # fmt: skip
