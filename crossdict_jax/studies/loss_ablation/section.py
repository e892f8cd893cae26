"""The loss ablation as tables for the page and the terminal."""

from crossdict_jax.report.blocks import html
from crossdict_jax.report.tables import Cell, Table, number, score, table
from crossdict_jax.results import by_pair, pair_words

TITLE = "Losses of the trained map"
TEXT = (
    "The network on features, trained again at the same budget with each loss alone and with each "
    "left out, scored on held-out rows; the mean of the target’s features and ridge regression "
    "beside it."
)
SHOWN = {  # column of ablation.jsonl: its title
    "cosine": "cosine",
    "cosine_centered": "centred cosine",
    "l0_predicted": "L0",
    "l0_target": "of the target",
    "rate_correlation": "rates, correlation",
}


def section(rows: list[dict]) -> str:
    return html([TEXT, *tables(rows)])


def tables(rows: list[dict]) -> list[Table]:
    """Returns a table for each direction and pair of sites."""
    made = []
    for group in by_pair(rows).values():
        cells = []
        for row in group:
            name = row["losses"] if row["map"] == "mlp" else f"({row['map']})"
            scores = {title: Cell(number(row[key])) for key, title in SHOWN.items()}
            cells.append({"losses": name, "R²": score(row, "r2"), **scores})
        made.append(table(pair_words(group[0]), cells))
    return made
