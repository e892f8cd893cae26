"""Efficiency: how many paired rows a map needs, and what a hypernetwork does without any."""

import dataclasses
import itertools
import math

from crossdict_jax.report.blocks import Panels, html
from crossdict_jax.report.plots import Figure, line_figure, map_line
from crossdict_jax.report.tables import Cell, Table, number, score, table
from crossdict_jax.results import (
    COUNTS,
    MAP,
    PAIR_COLUMNS,
    Column,
    by_pair,
    describe,
    intervals,
    map_order,
    pair_words,
)

TITLE = "Worth in paired rows"
TEXT = (
    "How much paired text does a map need? Every map is fitted on the first rows of documents in a "
    "random order, its settings chosen on all validation rows. The hypernetwork writes its map "
    "from descriptions of both dictionaries: zero-shot, it was trained without a paired row of "
    "this layer pair, or without these features. Token profiles, what each model’s features do "
    "after a token, are its part without training; ridge of the other layer pairs is the plain way "
    "to do without rows of this one."
)
WORDS = {
    "token_profiles": "token profiles, no pairs at all",
    "ridge_elsewhere": "ridge of the other layer pairs",
}
TASKS = {"all": "a layer pair never trained on", "hidden": "features never trained on"}
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


@dataclasses.dataclass(frozen=True)
class Curves:
    """Rows of one direction that are scored on the same target features."""

    title: str
    few: dict[str, list[dict]]  # by kind of map, ascending n
    none: list[dict]  # zero-shot


def section(rows: list[dict]) -> str:
    """Returns the html of the rows of efficiency.jsonl."""
    groups = curves(rows)
    caption = (
        "R² on held-out documents by the number of paired training rows. Level lines: maps that "
        "have seen none."
    )
    panels = Panels([figure(group) for group in groups], caption, "large")
    return html([TEXT, panels, *map(r2_table, groups)])


def curves(rows: list[dict]) -> list[Curves]:
    """Groups rows of efficiency.jsonl by direction and scored features."""
    made = []
    for of_pair in by_pair(rows).values():
        for scored, task in TASKS.items():
            few: dict[str, list[dict]] = {}
            group = [row for row in of_pair if row["scored"] == scored]
            for row in sorted(group, key=lambda row: (map_order(row["map"]), row["map"], row["n"])):
                if row["n"]:
                    few.setdefault(row["map"], []).append(row)
            title = f"{pair_words(of_pair[0])}: {task}"
            made.append(Curves(title, few, [row for row in group if not row["n"]]))
    return made


def worth(r2: float, points: list[dict]) -> str:
    """Returns how many paired rows a map needs for an R², interpolated in log n."""
    if r2 <= points[0]["r2"]:
        return f"< {number(points[0]['n'])}"
    for low, high in itertools.pairwise(points):
        if low["r2"] < r2 <= high["r2"]:
            share = (r2 - low["r2"]) / (high["r2"] - low["r2"])
            n = math.exp(math.log(low["n"]) + share * math.log(high["n"] / low["n"]))
            return f"≈ {number(round(n))}"
    return f"> {number(points[-1]['n'])}"


def r2_table(group: Curves) -> Table:
    """Returns R² by paired rows, a row per map; zero-shot maps with the rows they are worth."""
    counts = sorted({row["n"] for rows in group.few.values() for row in rows})
    compared = [kind for kind, rows in group.few.items() if len(rows) > 1 and kind != "mean"]
    lines = []
    for row in group.none:
        worths = ", ".join(f"{kind} {worth(row['r2'], group.few[kind])}" for kind in compared)
        line = {"map": WORDS.get(row["map"], row["map"]), "0 rows": score(row, "r2")}
        lines.append(line | {number(n): "" for n in counts} | {"worth in rows": worths})
    for kind, rows in group.few.items():
        by_n = {row["n"]: Cell(number(row["r2"])) for row in rows}
        cells = {number(n): by_n.get(n, "") for n in counts}
        lines.append({"map": kind, "0 rows": "", **cells, "worth in rows": ""})
    return table(f"R², {group.title}", lines)


def figure(group: Curves) -> Figure:
    """Returns R² against the number of paired rows; zero-shot maps as level lines."""
    lines = {}
    for kind, rows in group.few.items():
        if kind != "mean":
            style = {"marker": "o", "markersize": 3, **map_line(kind)}
            lines[kind] = ([row["n"] for row in rows], [row["r2"] for row in rows], style)
    levels = {f"{row['map']}, 0 rows": row["r2"] for row in group.none}
    scores = ", ".join(f"{row['map']} {number(row['r2'], 2)}" for row in group.none)
    words = f"R² by paired rows, {group.title}; without paired rows: {scores}."
    axes = {"x": "paired training rows", "y": "R² on held-out documents", "bottom": -0.2}
    return line_figure(lines, title=group.title, words=words, levels=levels, legend=2, **axes)
