"""Dictionaries of one model used for another: what they explain there, and what they spare."""

from __future__ import annotations

from crossdict_jax.report.blocks import Block, Panels, html
from crossdict_jax.report.plots import SERIES, Figure, line_figure
from crossdict_jax.report.tables import Table, percent, share, table, value, words
from crossdict_jax.results import site_words

TITLE = "Moved dictionaries"


def section(rows: list[dict]) -> str:
    """Returns the html of the page's section, from the rows of both files."""
    training = [row for row in rows if "steps" in row]
    blocks: list[Block] = [
        "A model’s dictionary used for another model, with no training: activations go through an "
        "affine map into its space, are written as its features, and come back through another. "
        "The stitch alone, there and back with no dictionary between, is the most that this can "
        "reach; a random rotation in place of the maps is what it must beat.",
        *tables([row for row in rows if "steps" not in row]),
    ]
    if training:
        caption = "Training a dictionary from random parameters (dashed) and from another model’s."
        blocks += [savings_table(training), Panels([curves(row) for row in training], caption)]
    return html(blocks)


def tables(rows: list[dict]) -> list[Table]:
    """Returns what each way of reconstructing the target explains, a table for each direction."""
    columns = [
        words("sites", lambda row: site_words(row["site_source"], row["site_target"])),
        words("dictionary", lambda row: row["dictionary"]),
        value("fvu"),
        value("l0", digits=1),
        value("ce"),
        value("delta_ce", "more than clean"),
    ]
    return [
        table(
            f"Dictionaries of {source}, used for {target}",
            columns,
            [row for row in rows if (row["source"], row["target"]) == (source, target)],
        )
        for source, target in dict.fromkeys((row["source"], row["target"]) for row in rows)
    ]


def savings_table(rows: list[dict]) -> Table:
    """Returns how many steps a start from the other model's dictionary saves."""
    columns = [
        words("from", lambda row: row["source"]),
        words("to", lambda row: row["target"]),
        words("sites", lambda row: site_words(row["site_source"], row["site_target"])),
        words("steps", lambda row: str(row["steps"][-1])),
        value("steps_to_reach", "to reach it"),
        share("saved"),
        value("fvu_random", "FVU random"),
        value("fvu_transferred", "FVU moved"),
    ]
    return table("Steps until the moved start is as good as the random one ends", columns, rows)


def curves(row: dict) -> Figure:
    """Returns the training errors from either start."""
    name = f"{row['source']} to {row['target']}, {row['site_target']}"
    saved = "no steps" if row["saved"] is None else f"{percent(row['saved'], 0)} of the steps"
    return line_figure(
        {
            "random": (row["steps"], row["random"], {"color": SERIES[0], "linestyle": "--"}),
            "moved": (row["steps"], row["transferred"], {"color": SERIES[0]}),
        },
        title=name,
        x="step",
        y=f"training {row['error'].upper()}",
        log="",
        words=f"{name}: the moved start saves {saved}.",
    )
