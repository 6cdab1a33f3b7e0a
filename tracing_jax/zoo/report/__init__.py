"""The report of a zoo: one page for all its pairs, and its data as CSV and JSON."""

from tracing_jax.zoo.report.contents import Contents, contents_of, make_contents
from tracing_jax.zoo.report.page import html, write_report, zoo_sentence

__all__ = ["Contents", "contents_of", "html", "make_contents", "write_report", "zoo_sentence"]
