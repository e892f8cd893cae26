"""The losses of the trained map, alone and left out, as tables for the page and the terminal."""

from __future__ import annotations

from itertools import groupby

from crossdict_jax.report.results import PLACE
from crossdict_jax.report.tables import Cell, Column, Table, interval, number, show
from crossdict_jax.workdir import Workdir, read_jsonl

SHOWN = {  # column of ablation.jsonl: (its title, whether it has an interval)
    "r2": ("R²", True),
    "cosine": ("cosine", False),
    "cosine_centered": ("centred cosine", False),
    "l0_predicted": ("L0", False),
    "l0_target": ("of the target", False),
    "rate_correlation": ("rates, correlation", False),
}


def section(rows: list[dict]) -> list[Table]:
    """Returns a table for each direction and pair of sites of ablation.jsonl."""
    groups = groupby(rows, key=lambda row: tuple(row[k] for k in PLACE))
    return [_table(place, list(of_place)) for place, of_place in groups]


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
    show(section(read_jsonl(work.result("ablation.jsonl"))))
