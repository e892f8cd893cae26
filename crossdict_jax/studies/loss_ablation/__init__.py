"""Loss ablation: the trained map with each of its losses alone, and without each."""

from crossdict_jax.results import MAP, PAIR_COLUMNS, PAIRING, SCORES, Column, describe
from crossdict_jax.studies.loss_ablation.section import TITLE, section

__all__ = ["TABLE", "TITLE", "section"]
KEPT = (
    *("r2", "cosine", "cosine_centered", "cosine_mean_predictor", "l0_target", "l0_predicted"),
    *("rate_correlation", "n_rows", "n_documents"),
)
TABLE = describe(
    "ablation.jsonl",
    "the trained map with some of its losses, or a baseline without any",
    *PAIR_COLUMNS,
    MAP,
    PAIRING,
    Column("losses", "all, none, only NAME, or without NAME"),
    *(column for column in SCORES if column.name in KEPT),
)
