"""Efficiency: how many paired rows a map needs, and what a hypernetwork does without any."""

from crossdict_jax.results import COUNTS, MAP, PAIR_COLUMNS, Column, describe, intervals
from crossdict_jax.studies.efficiency.section import TITLE, section

__all__ = ["TABLE", "TITLE", "section"]
TABLE = describe(
    "efficiency.jsonl",
    "one map fitted on n paired rows of the layer pair that is left out, or on none of them",
    *PAIR_COLUMNS,
    MAP,
    Column("n", "paired training rows it was fitted on; 0: none of this layer pair or feature"),
    Column("held_out", "what a zero-shot map has not seen", values=("layer", "features")),
    Column(
        "scored",
        "all features of the target, or those that the hypernetwork has not seen",
        values=("all", "hidden"),
    ),
    Column("n_features", "features that are scored"),
    *COUNTS,
    *intervals(fvu="share of their variance that is missed", r2="1 - fvu"),
)
