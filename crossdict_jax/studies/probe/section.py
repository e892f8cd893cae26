"""Probes carried from one model to the other: accuracy by labelled examples."""

from crossdict_jax.report.blocks import Panels, html
from crossdict_jax.report.plots import INK, MUTED, Figure, line_figure, map_line
from crossdict_jax.report.tables import Cell, Table, number, percent, share, table
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
    caption = "Accuracy on held-out texts by the number of labelled examples."
    text = (
        "A linear probe is trained to tell labels of a few texts from what a map predicts of the "
        "target’s features, and used on the target’s own features of held-out texts: the target "
        "needs no labelled text. “own” probes are trained on the target’s own features of the same "
        "texts, “source” ones are trained and used on the source’s; “tokens” know only how often "
        "each of the source’s tokens stands in a text. Small numbers: trained on shuffled labels."
    )
    figures = [figure(group) for group in by_pair(rows).values()]
    return html([text, Panels(figures, caption, "large"), *tables(rows)])


def tables(rows: list[dict]) -> list[Table]:
    """Returns accuracies, a table for each direction: a row per probe, a column per n."""
    made = []
    for group in by_pair(rows).values():
        cells = []
        for name, by_n in _by_probe(group).items():
            line, last = {"probe": name}, by_n[max(by_n)]
            for n, row in sorted(by_n.items()):
                true, shuffled = share(row, "accuracy"), row["accuracy_shuffled"]
                note = "" if shuffled is None else percent(shuffled, 0)
                title = f"{number(n)} examples, shuffled labels"
                line[title] = Cell(f"{true.text} {true.note}".strip(), note)
            line["over tokens, at most examples"] = share(last, "lead_tokens", 1)
            line["behind the target’s own"] = share(last, "behind_own", 1)
            cells.append(line)
        told = f"{group[0]['n_classes']} labels, {number(group[0]['n_texts'])} held-out texts"
        made.append(table(f"Accuracy of probes, {_title(group[0])}: {told}", cells))
    return made


def figure(rows: list[dict]) -> Figure:
    """Returns accuracy against the number of labelled examples, of one direction."""
    title, lines, scores = _title(rows[0]), {}, []
    for name, by_n in _by_probe(rows).items():
        style = {"marker": "o", "markersize": 3, **(REFERENCES.get(name) or map_line(name))}
        lines[name] = (list(by_n), [row["accuracy"] for row in by_n.values()], style)
        scores.append(f"{name} {percent(by_n[max(by_n)]['accuracy'], 0)}")
    words = f"Accuracy of probes by labelled examples, {title}; at most: {', '.join(scores)}."
    axes = {"x": "labelled examples", "y": "accuracy on held-out texts"}
    return line_figure(lines, title=title, words=words, **axes)


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
