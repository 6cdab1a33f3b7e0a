"""What people see of a run: figures, a one-file page, and text for the terminal."""

from tracing_jax.report.family import figure_of_family, summary
from tracing_jax.report.family_page import family_html
from tracing_jax.report.page import html
from tracing_jax.report.plots import figure_of_run, path_figure, save_png
from tracing_jax.report.tables import text_table

__all__ = [
    "family_html", "figure_of_family", "figure_of_run", "html", "path_figure", "save_png", "summary", "text_table",
]  # fmt: skip
