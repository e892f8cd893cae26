"""Probes carried from one model to the other: accuracy by labelled examples."""

from __future__ import annotations

import dataclasses
from itertools import groupby

from crossdict_jax.report.plots import (
    INK,
    MUTED,
    OPEN,
    Figure,
    draw,
    open_axes,
    plain_ticks,
    rung_line,
)
from crossdict_jax.report.results import PLACE, ladder_place, site_words
from crossdict_jax.report.tables import Cell, Column, Table, number, percent, show
from crossdict_jax.workdir import Workdir, read_jsonl

REFERENCES = {  # how the probes that are no rung are drawn
    "native": {"color": INK, "linestyle": "-"},
    "source": {"color": INK, "linestyle": ":"},
    "tokens": {"color": MUTED, "linestyle": "-"},
    "majority": {"color": MUTED, "linestyle": ":"},
}


def section(rows: list[dict]) -> dict | None:
    """Returns the tables and figures of the page's section, None without probe.jsonl."""
    if not rows:
        return None
    groups = [list(group) for _, group in groupby(rows, key=_place)]
    return {"tables": [table(g) for g in groups], "figures": [figure(g) for g in groups]}


def _place(row: dict) -> tuple:
    return tuple(row[key] for key in PLACE)


def _by_probe(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """{probe: {n: row}}, rungs first in the order of the ladder."""
    order = sorted({row["probe"] for row in rows}, key=_order)
    return {name: {row["n"]: row for row in rows if row["probe"] == name} for name in order}


def _order(name: str) -> tuple:
    rest = list(REFERENCES)
    return (1, rest.index(name)) if name in rest else (0, ladder_place(name))


def _title(row: dict) -> str:
    sites = site_words(row["site_source"], row["site_target"])
    return f"{row['source']} → {row['target']}, {sites}"


def table(rows: list[dict]) -> Table:
    """Returns the accuracies of one direction: a row for each probe, a column for each n."""
    probes, first = _by_probe(rows), rows[0]
    counts = sorted({row["n"] for row in rows})
    columns = [
        Column("probe", numeric=False),
        *(Column(f"{number(n)} examples, shuffled labels") for n in counts),
        Column("over tokens, at most examples"),
        Column("behind native"),
    ]
    body = []
    for name, known in probes.items():
        shuffled = {n: row["accuracy_shuffled"] for n, row in known.items()}
        cells = [
            Cell(
                f"{percent(known[n]['accuracy'])} {_ends(known[n], 'accuracy')}".strip(),
                "" if shuffled[n] is None else percent(shuffled[n], 0),
            )
            for n in counts
        ]
        last = known[counts[-1]]
        gaps = (
            Cell(percent(last[key]), _ends(last, key)) for key in ("lead_tokens", "behind_native")
        )
        body.append([Cell(name), *cells, *gaps])
    told = f"{first['n_classes']} labels, {number(first['n_texts'])} held-out texts"
    return Table(f"Accuracy of probes, {_title(first)}: {told}", columns, body)


def _ends(row: dict, key: str) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return "" if low is None else f"[{percent(low, 0)}, {percent(high, 0)}]"


def figure(rows: list[dict]) -> Figure:
    """Returns accuracy against the number of labelled examples."""
    probes = _by_probe(rows)

    def paint(axes):
        for name, known in probes.items():
            style = REFERENCES.get(name)
            style = rung_line(name) if style is None else style | {"label": name}
            accuracies = [row["accuracy"] for row in known.values()]
            axes.plot(list(known), accuracies, marker="o", markersize=3, **style)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_title(_title(rows[0]))
        open_axes(axes, "labelled examples", "accuracy on held-out texts")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1.4)

    under = 0.5 + 0.16 * -(-len(probes) // 3)
    margins = dataclasses.replace(OPEN, bottom=under)
    name = f"probes {_title(rows[0])}"
    svg = draw(paint, name=name, width=4.6, height=2.2 + under, margins=margins)
    most = max(row["n"] for row in rows)
    scores = ", ".join(f"{p} {percent(known[most]['accuracy'], 0)}" for p, known in probes.items())
    words = f"Accuracy of probes by labelled examples, {_title(rows[0])}; at {most}: {scores}."
    return Figure(svg, words)


def print_tables(work: Workdir) -> None:
    """Prints the accuracies of every direction.

    Raises:
      UserError: results/probe.jsonl is missing or damaged.
    """
    found = section(read_jsonl(work.result("probe.jsonl")))
    show(found["tables"] if found else [])
