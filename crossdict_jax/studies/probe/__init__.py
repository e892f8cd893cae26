"""Probes: labels learned from one model's features, told from the other's."""

from crossdict_jax.report.blocks import Panels, html
from crossdict_jax.report.plots import INK, MUTED, Figure, line_figure, map_line
from crossdict_jax.report.tables import Cell, Table, captioned, number, percent, share
from crossdict_jax.results import (
    PAIR_COLUMNS,
    by_pair,
    describe,
    intervals,
    map_order,
    pair_words,
    plain,
)

TITLE = "Probes"
REFERENCES = {  # of probes without a map
    "own": {"color": INK, "linestyle": "-"},
    "source": {"color": INK, "linestyle": ":"},
    "tokens": {"color": MUTED, "linestyle": "-"},
    "majority": {"color": MUTED, "linestyle": ":"},
}
TABLE = describe(
    "probe.jsonl",
    "one probe trained on n labelled texts, used on held-out texts; intervals over texts",
    *PAIR_COLUMNS,
    *plain(
        probe="a kind of map: trained on what it predicts of the target's features, used "
        "on the target's own; own: trained on these too; source: trained and used on the "
        "source's; tokens: on counts of the source's tokens; majority: the commonest label",
        n="labelled examples",
        n_texts="held-out texts",
        n_classes="different labels",
        accuracy_shuffled="accuracy of the same probe trained on shuffled labels",
    ),
    *intervals(
        accuracy="on held-out texts, mean over draws of the examples",
        lead_tokens="accuracy, less that of tokens",
        behind_own="accuracy of the target's own features, less this",
    ),
)


def section(rows: list[dict]) -> str:
    """Returns the html of the rows of probe.jsonl."""
    caption = "Accuracy on held-out texts by the number of labelled examples."
    text = (
        "A linear probe learns labels of a few texts from what a map predicts of the target’s "
        "features, and is used on the target’s own features of held-out texts: the target needs no "
        "labelled text. “own” probes are trained on the target’s own features, “source” ones "
        "trained and used on the source’s; “tokens” know only how often each of the source’s "
        "tokens stands in a text. Small numbers: trained on shuffled labels."
    )
    figures = [figure(group) for group in by_pair(rows).values()]
    return html([text, Panels(figures, caption, "large"), *tables(rows)])


def tables(rows: list[dict]) -> list[Table]:
    """Returns accuracies, a table for each direction: a row per probe, a column per n."""
    lines = []
    for group in by_pair(rows).values():
        for name, of_probe in _by_probe(group).items():
            line = {"probe": name}
            for row in of_probe:
                true, shuffled = share(row, "accuracy"), row["accuracy_shuffled"]
                note = "" if shuffled is None else percent(shuffled, 0)
                title = f"{number(row['n'])} examples, shuffled labels"
                line[title] = Cell(f"{true.text} {true.note}".strip(), note)
            line["over tokens, at most examples"] = share(row, "lead_tokens", 1)
            line["behind the target’s own"] = share(row, "behind_own", 1)
            told = f"{row['n_classes']} labels, {number(row['n_texts'])} held-out texts"
            lines.append((f"Accuracy of probes, {pair_words(row)}: {told}", line))
    return captioned(lines)


def figure(rows: list[dict]) -> Figure:
    """Returns accuracy against the number of labelled examples, of one direction."""
    title, lines, scores = pair_words(rows[0]), {}, []
    for name, of_probe in _by_probe(rows).items():
        n, accuracy = ([row[key] for row in of_probe] for key in ("n", "accuracy"))
        style = REFERENCES.get(name) or map_line(name)
        lines[name] = (n, accuracy, {"marker": "o", "markersize": 3, **style})
        scores.append(f"{name} {percent(accuracy[-1], 0)}")
    words = f"Accuracy of probes by labelled examples, {title}; at most: {', '.join(scores)}."
    axes = {"x": "labelled examples", "y": "accuracy on held-out texts"}
    return line_figure(lines, title=title, words=words, **axes)


def _by_probe(rows: list[dict]) -> dict[str, list[dict]]:
    """{probe: its rows}, mapped ones first; rows are by ascending n, as in the file."""
    by: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda r: (r["probe"] in REFERENCES, map_order(r["probe"]))):
        by.setdefault(row["probe"], []).append(row)
    return by
