"""Results of a run, shown to people: one self-contained html page and a table on the terminal."""

from crossdict_jax.report.page import write_report
from crossdict_jax.report.terminal import summary_table

__all__ = ["summary_table", "write_report"]
