"""Loss ablation: the trained map with each of its losses alone, and without each."""

from crossdict_jax.report.blocks import html
from crossdict_jax.report.tables import Table, captioned, scores
from crossdict_jax.results import MAP, PAIR_COLUMNS, PAIRING, SCORES, Column, describe, pair_words

TITLE = "Losses of the trained map"
TEXT = (
    "The network on features, trained again at the same budget with each loss alone and with each "
    "left out; beside it the mean of the target’s features and ridge regression. Without mse the "
    "features are rectified: no threshold fits numbers without a scale. The correlation loss alone "
    "has no gradient where training starts, at the mean."
)
SHOWN = ("r2", "cosine", "cosine_centered", "l0_predicted", "l0_target", "rate_correlation")
KEPT = (*SHOWN, "cosine_mean_predictor", "n_rows", "n_documents")
TABLE = describe(
    "ablation.jsonl",
    "the trained map with some of its losses, or a baseline without any",
    *PAIR_COLUMNS,
    MAP,
    PAIRING,
    Column("losses", "all, none, only NAME, or without NAME"),
    *(column for column in SCORES if column.name in KEPT),
)


def section(rows: list[dict]) -> str:
    """Returns the html of the rows of ablation.jsonl."""
    return html([TEXT, *tables(rows)])


def tables(rows: list[dict]) -> list[Table]:
    """Returns a table for each direction and pair of sites."""
    lines = []
    for row in rows:
        name = row["losses"] if row["map"] == "mlp" else f"({row['map']})"
        lines.append((pair_words(row), {"losses": name} | scores(row, *SHOWN)))
    return captioned(lines)
