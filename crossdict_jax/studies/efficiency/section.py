"""What maps are worth in paired rows: the section of the report, and its table on the terminal."""

from __future__ import annotations

import dataclasses
import itertools
import math

from crossdict_jax.report.blocks import Panels, html
from crossdict_jax.report.plots import Figure, line_figure, map_line
from crossdict_jax.report.tables import Cell, Column, Table, interval, number, show
from crossdict_jax.results import PAIR, map_order, site_words
from crossdict_jax.workdir import Workdir, read_jsonl

TITLE = "Worth in paired rows"
TEXT = (
    "How much paired text does a map need? Every map is fitted on the first rows of documents in a "
    "random order. The hypernetwork writes its map from descriptions of both dictionaries: "
    "zero-shot, it was trained without any paired row of this layer pair, or without these "
    "features. Token profiles are its part that needs no training: what each model’s features do "
    "after a token, on texts that the other model’s profiles never read. The ridge of the other "
    "layer pairs is the plain way to do without rows of this one. Means and scales of each model’s "
    "features need no pairs; the maps choose their settings on all validation rows, which are "
    "paired."
)
WORDS = {
    "token_profiles": "token profiles, no pairs at all",
    "ridge_elsewhere": "ridge of the other layer pairs",
    "hypernetwork": "hypernetwork",
}
TASKS = {"all": "a layer pair never trained on", "hidden": "features never trained on"}


@dataclasses.dataclass(frozen=True)
class Curves:
    """Rows of efficiency.jsonl of one direction that are scored on the same target features.

    Attributes:
      scored: "all" target features, or those "hidden" from the hypernetwork.
      few: rung -> its rows by ascending n.
      none: the zero-shot rows, in the order of the file.
    """

    source: str
    target: str
    sites: str
    scored: str
    few: dict[str, list[dict]]
    none: list[dict]

    @property
    def title(self) -> str:
        return f"{self.source} → {self.target}, {self.sites}: {TASKS[self.scored]}"


def section(rows: list[dict]) -> str:
    """Returns the html of the page's section, from the rows of efficiency.jsonl."""
    groups = curves(rows)
    caption = "R² on held-out documents by the number of paired training rows. Level lines: maps "
    return html(
        [
            TEXT,
            Panels(list(map(figure, groups)), f"{caption}that have seen none.", "large"),
            *map(table, groups),
        ]
    )


def curves(rows: list[dict]) -> list[Curves]:
    """Groups rows of efficiency.jsonl by direction and by what is scored."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((*(row[key] for key in PAIR), row["scored"]), []).append(row)
    return [_curves(key, group) for key, group in groups.items()]


def _curves(key: tuple, rows: list[dict]) -> Curves:
    few: dict[str, list[dict]] = {}
    for row in sorted((r for r in rows if not r["zero_shot"]), key=lambda row: row["n"]):
        few.setdefault(row["map"], []).append(row)
    few = {kind: few[kind] for kind in sorted(few, key=map_order)}
    source, target, site_source, site_target, scored = key
    none = [row for row in rows if row["zero_shot"]]
    return Curves(source, target, site_words(site_source, site_target), scored, few, none)


def worth(r2: float, points: list[dict]) -> str:
    """Returns how many paired rows a rung needs for an R², read off its curve, log n in between."""
    if r2 <= points[0]["r2"]:
        return f"< {number(points[0]['n'])}"
    for low, high in itertools.pairwise(points):
        if low["r2"] < r2 <= high["r2"]:
            share = (r2 - low["r2"]) / (high["r2"] - low["r2"])
            n = math.exp(math.log(low["n"]) + share * math.log(high["n"] / low["n"]))
            return f"≈ {number(round(n))}"
    return f"> {number(points[-1]['n'])}"


def table(group: Curves) -> Table:
    """Returns R² by paired rows, a row for each rung; zero-shot maps with what they are worth."""
    counts = sorted({row["n"] for rows in group.few.values() for row in rows})
    columns = [Column("map", numeric=False), Column("0 rows"), *(Column(number(n)) for n in counts)]
    compared = [kind for kind, rows in group.few.items() if len(rows) > 1 and kind != "mean"]
    columns.append(Column("worth in rows", numeric=False))
    lines = []
    for row in group.none:
        worths = (f"{kind} {worth(row['r2'], group.few[kind])}" for kind in compared)
        name = Cell(WORDS.get(row["map"], row["map"]))
        score = Cell(number(row["r2"]), interval(row, "r2", 2))
        lines.append([name, score, *(Cell("") for _ in counts), Cell(", ".join(worths))])
    for kind, rows in group.few.items():
        known = {row["n"]: row for row in rows}
        cells = [Cell(number(known[n]["r2"]) if n in known else "") for n in counts]
        lines.append([Cell(kind), Cell(""), *cells, Cell("")])
    return Table(f"R², {group.title}", columns, lines)


def figure(group: Curves) -> Figure:
    """Returns R² against the number of paired rows; zero-shot maps as level lines."""
    lines = {
        kind: (
            [row["n"] for row in rows],
            [row["r2"] for row in rows],
            {"marker": "o", "markersize": 3, **map_line(kind)},
        )
        for kind, rows in group.few.items()
        if kind != "mean"
    }
    scores = ", ".join(f"{row['map']} {number(row['r2'], 2)}" for row in group.none)
    return line_figure(
        lines,
        title=f"{group.sites}: {TASKS[group.scored]}",
        x="paired training rows",
        y="R² on held-out documents",
        words=f"R² by paired rows, {group.title}; without paired rows: {scores}.",
        levels={f"{row['map']}, 0 rows": row["r2"] for row in group.none},
        bottom=-0.2,
        legend=2,
    )


def print_table(work: Workdir) -> None:
    """Prints R² by paired rows for every direction, zero-shot maps on top.

    Raises:
      UserError: results/efficiency.jsonl is missing or damaged.
    """
    show(table(group) for group in curves(read_jsonl(work.result("efficiency.jsonl"))))
