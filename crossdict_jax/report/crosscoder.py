"""The joint codes of a run: what they explain, and whose their latents are."""

from __future__ import annotations

from itertools import groupby

from crossdict_jax.report.plots import OPEN, SERIES, Figure, draw, open_axes
from crossdict_jax.report.tables import Cell, Column, Table, interval, number, percent

COLUMNS = (
    Column("model", numeric=False),
    Column("trained on", numeric=False),
    Column("FVU"),
    Column("from it alone"),
    Column("from the others"),
    Column("L0"),
    Column("dead"),
    Column("shared"),
    Column("confirmed"),
    Column("exclusive"),
    Column("refuted"),
)

INVENTED = 0.2  # share of latents that pass as shared on shuffled rows, from which on it is told


def section(rows: list[dict]) -> dict | None:
    """Returns the tables and figures of crosscoder.jsonl, or None without rows."""
    if not rows:
        return None
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["sites"])]
    return {
        "tables": [_table(group) for group in groups],
        "figures": [norms_figure(row) for row in rows if row["pairing"] == "aligned"],
        "cautions": _cautions(rows),
    }


def _cautions(rows: list[dict]) -> list[str]:
    """Returns what the shuffled controls forbid to read into decoder norms."""
    worst: dict[str, float] = {}
    for row in rows:
        if row["pairing"] == "shuffled" and row["shared"] > INVENTED:
            worst[row["sites"]] = row["shared"]
    return [
        f"Trained on shuffled rows, where nothing is shared, {percent(share, 0)} of the latents "
        f"still pass as shared ({sites}): decoder norms say little here. More steps, or a lower "
        "drop probability, separate them."
        for sites, share in worst.items()
    ]


def _table(rows: list[dict]) -> Table:
    body = [
        [
            Cell(str(row["model"])),
            Cell(str(row["pairing"])),
            *(_scored(row, key) for key in ("fvu", "fvu_alone", "fvu_from_others")),
            Cell(number(row.get("l0"), 1)),
            *(Cell(percent(row.get(key), 0)) for key in ("dead_fraction", "shared")),
            Cell(percent(row.get("shared_confirmed"), 0)),
            Cell(percent(row.get("exclusive"), 0)),
            Cell(percent(row.get("exclusive_refuted"), 0)),
        ]
        for row in rows
    ]
    places = dict.fromkeys(rows[0]["sites"].split())
    return Table(f"One code of all models, {', '.join(places)}", list(COLUMNS), body)


def _scored(row: dict, key: str) -> Cell:
    return Cell(number(row.get(key)), note=interval(row, key))


def norms_figure(row: dict) -> Figure:
    """Returns the histogram of a model's share of each latent's decoder norms."""
    histogram = row["relative_norms"]
    name = f"{row['model']} {row['site']}"

    def paint(axes):
        axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=SERIES[1], alpha=0.7)
        axes.set_title(name)
        open_axes(axes, "share of the decoder norms", "latents")

    drawn = draw(paint, name=f"norms {name} {row['sites']}", width=2.6, height=1.7, margins=OPEN)
    words = (
        f"The share of {name} in the decoder norms of {number(row['n_live'])} latents: "
        f"{percent(row['shared'], 0)} shared by all, {percent(row['exclusive'], 0)} its own."
    )
    return Figure(drawn, words)
