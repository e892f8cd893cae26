"""Results of a run for people: one self-contained html page, and tables on the terminal."""

from crossdict_jax.report.page import write_report
from crossdict_jax.report.terminal import (
    causal_table,
    map_table,
    pairing_table,
    summary_table,
    training_table,
)

__all__ = [
    "causal_table",
    "map_table",
    "pairing_table",
    "summary_table",
    "training_table",
    "write_report",
]
