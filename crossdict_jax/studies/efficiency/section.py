"""What maps are worth in paired rows: the section of the report, and its table on the terminal."""

from __future__ import annotations

import dataclasses
import itertools
import math

from crossdict_jax.report.plots import (
    MUTED,
    OPEN,
    RUNG_COLOURS,
    Figure,
    draw,
    open_axes,
    plain_ticks,
    rung_line,
)
from crossdict_jax.report.results import PLACE, ladder_place, site_words
from crossdict_jax.report.tables import Cell, Column, Table, interval, number, show
from crossdict_jax.workdir import Workdir, read_jsonl

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


def section(rows: list[dict]) -> dict:
    """Returns the tables and figures of the page's section, none without efficiency.jsonl."""
    groups = curves(rows)
    return {"tables": [table(g) for g in groups], "figures": [figure(g) for g in groups]}


def curves(rows: list[dict]) -> list[Curves]:
    """Groups rows of efficiency.jsonl by direction and by what is scored."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((*(row[key] for key in PLACE), row["scored"]), []).append(row)
    return [_curves(key, group) for key, group in groups.items()]


def _curves(key: tuple, rows: list[dict]) -> Curves:
    few: dict[str, list[dict]] = {}
    for row in sorted((r for r in rows if not r["zero_shot"]), key=lambda row: row["n"]):
        few.setdefault(row["map"], []).append(row)
    few = {kind: few[kind] for kind in sorted(few, key=ladder_place)}
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

    def paint(axes):
        for kind, rows in group.few.items():
            if kind != "mean":
                axes.plot(
                    [row["n"] for row in rows],
                    [row["r2"] for row in rows],
                    marker="o",
                    markersize=3,
                    **rung_line(kind),
                )
        for i, row in enumerate(group.none):
            colour = RUNG_COLOURS.get(row["map"], MUTED)
            style = (0, (4, 1 + 2 * i))
            name = f"{row['map']}, 0 rows"
            axes.axhline(row["r2"], color=colour, linestyle=style, linewidth=1.4, label=name)
        axes.set_xscale("log")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if _lowest(group) > -0.2 else -0.2)
        plain_ticks(axes.xaxis)
        axes.set_title(f"{group.sites}: {TASKS[group.scored]}")
        open_axes(axes, "paired training rows", "R² on held-out documents")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, columnspacing=1.4)

    names = len(group.few) + len(group.none)
    under = 0.5 + 0.16 * -(-names // 2)
    margins = dataclasses.replace(OPEN, bottom=under)
    name = f"efficiency {group.title}"
    svg = draw(paint, name=name, width=4.6, height=2.2 + under, margins=margins)
    scores = ", ".join(f"{row['map']} {number(row['r2'], 2)}" for row in group.none)
    return Figure(svg, f"R² by paired rows, {group.title}; without paired rows: {scores}.")


def _lowest(group: Curves) -> float:
    return min(row["r2"] for rows in (*group.few.values(), group.none) for row in rows)


def print_table(work: Workdir) -> None:
    """Prints R² by paired rows for every direction, zero-shot maps on top.

    Raises:
      UserError: results/efficiency.jsonl is missing or damaged.
    """
    show(table(group) for group in curves(read_jsonl(work.result("efficiency.jsonl"))))
