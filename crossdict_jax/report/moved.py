"""Dictionaries of one model used for another: what they explain there, and what they spare."""

from __future__ import annotations

from itertools import groupby

from crossdict_jax.report.plots import OPEN, SERIES, Figure, draw, open_axes
from crossdict_jax.report.results import site_words
from crossdict_jax.report.tables import Cell, Column, Table, interval, number, percent

COLUMNS = (
    Column("sites", numeric=False),
    Column("dictionary", numeric=False),
    Column("FVU"),
    Column("L0"),
    Column("CE"),
    Column("more than clean"),
)


def section(rows: list[dict], training: list[dict]) -> dict | None:
    """Returns what the page shows of both files of results, or None where both are empty."""
    if not rows and not training:
        return None
    directions = groupby(rows, key=lambda row: (row["source"], row["target"]))
    tables = [_table(*direction, list(group)) for direction, group in directions]
    if training:
        tables.append(_spared(training))
    return {"tables": tables, "curves": [_curves(row) for row in training]}


def _table(source: str, target: str, rows: list[dict]) -> Table:
    body = [
        [
            Cell(site_words(row["site_source"], row["site_target"])),
            Cell(str(row["dictionary"])),
            _scored(row, "fvu"),
            Cell(number(row.get("l0"), 1)),
            *(_scored(row, key) for key in ("ce", "delta_ce")),
        ]
        for row in rows
    ]
    return Table(f"Dictionaries of {source}, used for {target}", list(COLUMNS), body)


def _scored(row: dict, key: str) -> Cell:
    return Cell(number(row.get(key)), note=interval(row, key))


def _spared(rows: list[dict]) -> Table:
    columns = [Column(t, numeric=False) for t in ("from", "to", "sites")]
    columns += [Column(t) for t in ("steps", "to reach it", "saved", "FVU random", "FVU moved")]
    body = [
        [
            *(Cell(str(row[key])) for key in ("source", "target")),
            Cell(site_words(row["site_source"], row["site_target"])),
            *(Cell(number(value)) for value in (row["steps"][-1], row["steps_to_reach"])),
            Cell(percent(row["saved"], 0)),
            *(Cell(number(row[key])) for key in ("fvu_random", "fvu_transferred")),
        ]
        for row in rows
    ]
    caption = "Steps until the moved start is as good as the random one is in the end"
    return Table(caption, columns, body)


def _curves(row: dict) -> Figure:
    name = f"{row['source']} to {row['target']}, {row['site_target']}"

    def paint(axes):
        axes.plot(row["steps"], row["random"], "--", color=SERIES[0], label="random")
        axes.plot(row["steps"], row["transferred"], color=SERIES[0], label="moved")
        axes.set_title(name)
        open_axes(axes, "step", f"training {row['error'].upper()}")
        axes.legend()

    drawn = draw(paint, name=f"moved {name}", margins=OPEN)
    saved = "no steps" if row["saved"] is None else f"{percent(row['saved'], 0)} of the steps"
    return Figure(drawn, f"{name}: the moved start saves {saved}.")
