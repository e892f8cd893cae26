"""Probes carried from one model to the other: accuracy by labelled examples."""

from __future__ import annotations

from pathlib import Path

from crossdict_jax.report.html import fill
from crossdict_jax.report.plots import INK, MUTED, Figure, line_figure, map_line
from crossdict_jax.report.tables import Cell, Column, Table, number, percent
from crossdict_jax.results import by_pair, map_order, site_words

TITLE = "Probes"
REFERENCES = {  # how the probes that no map carries are drawn
    "own": {"color": INK, "linestyle": "-"},
    "source": {"color": INK, "linestyle": ":"},
    "tokens": {"color": MUTED, "linestyle": "-"},
    "majority": {"color": MUTED, "linestyle": ":"},
}


def section(rows: list[dict]) -> str:
    """Returns the html of the page's section, from the rows of probe.jsonl."""
    figures = [figure(group) for group in by_pair(rows).values()]
    template = Path(__file__).with_name("section.html.j2")
    return fill(template, tables=tables(rows), figures=figures)


def tables(rows: list[dict]) -> list[Table]:
    """Returns accuracies, a table for each direction: a row per probe, a column per n."""
    return [_table(group) for group in by_pair(rows).values()]


def _table(rows: list[dict]) -> Table:
    first, counts = rows[0], sorted({row["n"] for row in rows})
    columns = [
        Column("probe", numeric=False),
        *(Column(f"{number(n)} examples, shuffled labels") for n in counts),
        Column("over tokens, at most examples"),
        Column("behind the target’s own"),
    ]
    body = []
    for name, by_n in _by_probe(rows).items():
        cells = []
        for row in (by_n[n] for n in counts):
            shuffled = row["accuracy_shuffled"]
            text = f"{percent(row['accuracy'])} {_ends(row, 'accuracy')}".strip()
            cells.append(Cell(text, "" if shuffled is None else percent(shuffled, 0)))
        last = by_n[counts[-1]]
        gaps = (Cell(percent(last[key]), _ends(last, key)) for key in ("lead_tokens", "behind_own"))
        body.append([Cell(name), *cells, *gaps])
    told = f"{first['n_classes']} labels, {number(first['n_texts'])} held-out texts"
    return Table(f"Accuracy of probes, {_title(first)}: {told}", columns, body)


def figure(rows: list[dict]) -> Figure:
    """Returns accuracy against the number of labelled examples, of one direction."""
    probes, title, lines = _by_probe(rows), _title(rows[0]), {}
    for name, by_n in probes.items():
        style = REFERENCES.get(name) or map_line(name)
        accuracies = [row["accuracy"] for row in by_n.values()]
        lines[name] = (list(by_n), accuracies, {"marker": "o", "markersize": 3, **style})
    largest = max(row["n"] for row in rows)
    scores = (f"{p} {percent(by_n[largest]['accuracy'], 0)}" for p, by_n in probes.items())
    return line_figure(
        lines,
        title=title,
        x="labelled examples",
        y="accuracy on held-out texts",
        words=f"Accuracy of probes by labelled examples, {title}; at {largest}: "
        f"{', '.join(scores)}.",
    )


def _by_probe(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """{probe: {n: row}}, those that a map carries first."""
    references = list(REFERENCES)

    def order(name: str) -> tuple:
        return (1, references.index(name)) if name in references else (0, map_order(name))

    names = sorted(dict.fromkeys(row["probe"] for row in rows), key=order)
    return {name: {row["n"]: row for row in rows if row["probe"] == name} for name in names}


def _title(row: dict) -> str:
    sites = site_words(row["site_source"], row["site_target"])
    return f"{row['source']} → {row['target']}, {sites}"


def _ends(row: dict, key: str) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return "" if low is None else f"[{percent(low, 0)}, {percent(high, 0)}]"
