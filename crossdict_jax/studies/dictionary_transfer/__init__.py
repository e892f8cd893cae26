"""Dictionary transfer: one model's dictionary used for another, and as a start of training."""

from crossdict_jax.report.blocks import Block, Panels, html
from crossdict_jax.report.plots import SERIES, Figure, line_figure
from crossdict_jax.report.tables import (
    Table,
    captioned,
    number,
    percent,
    score,
    scores,
    share,
    table,
)
from crossdict_jax.results import (
    COUNTS,
    PAIR_COLUMNS,
    POSITIONS,
    describe,
    intervals,
    plain,
    site_words,
)

TITLE = "Moved dictionaries"
TABLE = describe(
    "dictionary_transfer.jsonl",
    "one way to reconstruct the target with a dictionary that was not trained on it",
    *PAIR_COLUMNS,
    *plain(
        dictionary="own: the target's; transferred: the source's through ridge and back; "
        "orthogonal: through a rotation and back; as_is: unchanged; rotated: through a "
        "random rotation; stitch: there and back with no dictionary between",
        l0="active features per row",
    ),
    POSITIONS,
    *COUNTS,
    *intervals(fvu="share of the variance that the reconstruction misses"),
    *intervals(
        "nats",
        ce="cross-entropy of the next token with the reconstruction put in",
        delta_ce="ce, less that of the untouched target",
    ),
)
TRAINING = describe(
    "dictionary_training.jsonl",
    "the target's dictionary trained from random parameters and from the source's",
    *PAIR_COLUMNS,
    *plain(
        error="which training error the curves show, fvu or mse",
        steps="training steps, one per point of the curves: errors are means since the one before",
        random="error from random parameters",
        transferred="error from the source's dictionary",
        fvu_random="of the finished one, on test rows",
        fvu_transferred="of the finished one, on test rows",
        steps_to_reach="first of these steps at which the transferred start is as good as the "
        "random one is in the end; null: never",
        saved="share of the steps that this spares",
    ),
)


def section(rows: list[dict]) -> str:
    """Returns the section's html from the rows of both files."""
    training = [row for row in rows if "steps" in row]
    blocks: list[Block] = [
        "A model’s dictionary used for another model, with no training: activations go through an "
        "affine map into its space, are written as its features, and come back through another. "
        "The stitch alone, ridge there and back with no dictionary between, is about the most that "
        "ridge can reach; a random rotation in place of the maps is what it must beat.",
        *tables([row for row in rows if "steps" not in row]),
    ]
    if training:
        caption = "Training a dictionary from random parameters (dashed) and from another model’s."
        blocks += [savings_table(training), Panels([curves(row) for row in training], caption)]
    return html(blocks)


def tables(rows: list[dict]) -> list[Table]:
    """Returns what each way of reconstructing the target explains, a table for each direction."""
    lines = []
    for row in rows:
        line = {
            "sites": site_words(row["site_source"], row["site_target"]),
            "dictionary": row["dictionary"],
            **scores(row, "fvu", "l0", "ce"),
            "more than clean": score(row, "delta_ce"),
        }
        lines.append((f"Dictionaries of {row['source']}, used for {row['target']}", line))
    return captioned(lines)


def savings_table(rows: list[dict]) -> Table:
    """Returns the steps saved by a start from the other model's dictionary."""
    cells = [
        {
            "from": row["source"],
            "to": row["target"],
            "sites": site_words(row["site_source"], row["site_target"]),
            "steps": number(row["steps"][-1]),
            "to reach it": score(row, "steps_to_reach"),
            "saved": share(row, "saved"),
            "FVU random": score(row, "fvu_random"),
            "FVU moved": score(row, "fvu_transferred"),
        }
        for row in rows
    ]
    every = f"errors are means of {rows[0]['steps'][0]} steps or fewer"
    caption = f"Steps until the moved start is as good as the random one ends; {every}"
    return table(caption, cells)


def curves(row: dict) -> Figure:
    """Returns the training errors from either start."""
    name = f"{row['source']} to {row['target']}, {row['site_target']}"
    saved = "no steps" if row["saved"] is None else f"{percent(row['saved'], 0)} of the steps"
    lines = {
        "random": (row["steps"], row["random"], {"color": SERIES[0], "linestyle": "--"}),
        "moved": (row["steps"], row["transferred"], {"color": SERIES[0]}),
    }
    words, y = f"{name}: the moved start saves {saved}.", f"training {row['error'].upper()}"
    return line_figure(lines, title=name, x="step", y=y, log="", words=words)
