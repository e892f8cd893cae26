"""The losses of the trained map, alone and left out, as tables for the page and the terminal."""

from __future__ import annotations

from crossdict_jax.report.blocks import html
from crossdict_jax.report.tables import Cell, Column, Table, interval, number, show
from crossdict_jax.results import by_pair
from crossdict_jax.workdir import Workdir, read_jsonl

TITLE = "Losses of the trained map"
TEXT = (
    "The network on features, trained again at the same budget with each loss alone and with each "
    "left out, scored on held-out rows; the mean of the target’s features and ridge regression "
    "beside it."
)
SHOWN = {  # column of ablation.jsonl: (its title, whether it has an interval)
    "r2": ("R²", True),
    "cosine": ("cosine", False),
    "cosine_centered": ("centred cosine", False),
    "l0_predicted": ("L0", False),
    "l0_target": ("of the target", False),
    "rate_correlation": ("rates, correlation", False),
}


def section(rows: list[dict]) -> str:
    """Returns the html of the page's section, from the rows of ablation.jsonl."""
    return html([TEXT, *tables(rows)])


def tables(rows: list[dict]) -> list[Table]:
    """Returns a table for each direction and pair of sites."""
    return [_table(pair, group) for pair, group in by_pair(rows).items()]


def _table(place: tuple[str, ...], rows: list[dict]) -> Table:
    source, target, site_source, site_target = place
    caption = f"{source} {site_source} → {target} {site_target}"
    columns = [Column("losses", numeric=False)] + [Column(title) for title, _ in SHOWN.values()]
    return Table(caption, columns, [_row(row) for row in rows])


def _row(row: dict) -> list[Cell]:
    name = row["losses"] if row["map"] == "mlp" else f"({row['map']})"
    cells = [
        Cell(number(row[key]), note=interval(row, key, 2) if has_interval else "")
        for key, (_, has_interval) in SHOWN.items()
    ]
    return [Cell(name), *cells]


def print_ablation(work: Workdir) -> None:
    """Prints results/ablation.jsonl as a table per direction and pair of sites.

    Raises:
      UserError: the file is missing or damaged.
    """
    show(tables(read_jsonl(work.result("ablation.jsonl"))))
