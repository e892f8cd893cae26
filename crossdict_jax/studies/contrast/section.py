"""Contrast sets: what models prefer, on which features it rests, and what their images do."""

from __future__ import annotations

from itertools import groupby

from crossdict_jax.report.results import PLACE, site_words
from crossdict_jax.report.tables import (
    Cell,
    Column,
    Table,
    flat_table,
    interval,
    number,
    percent,
    show,
)
from crossdict_jax.workdir import Workdir, read_jsonl

VERDICTS = {  # of ``moves``: (style, sign and words)
    True: ("strong", "● bears it"),
    False: ("none", "○ like controls"),
    None: ("", "– nothing to bear"),
}
CONTROLS = (
    ("random", "random directions, p"),
    ("shuffled", "other features’, p"),
    ("others", "other features, p"),
)
COSTS = (
    Column("cost, nats"),
    *(Column(title) for _, title in CONTROLS),
    Column("accuracy, then"),
)


def section(rows: list[dict]) -> list[dict]:
    """Returns the tables of every set that the page shows; none without contrast.jsonl."""
    return [_set(name, list(group)) for name, group in groupby(rows, key=lambda row: row["set"])]


def answer(rows: list[dict]) -> list[tuple[str, str]]:
    """Returns (heading, sentence) for every set and direction in which both models prefer."""
    judged = [row for row in rows if row["what"] == "transfer" and row["moves"] is not None]
    place = ("set", *PLACE)
    sentences = []
    for _, group in groupby(judged, key=lambda row: tuple(row[key] for key in place)):
        group = list(group)
        sentences.append(_sentence(group[0], {row["image"]: row["moves"] for row in group}))
    return sentences


def _sentence(first: dict, moves: dict[str, bool]) -> tuple[str, str]:
    heading = f"Contrast set {first['set']}"
    bearing = [name for name, does in moves.items() if does and name != "native"]
    own = {True: "do", False: "do not either", None: "were not found"}[moves.get("native")]
    where = f"on the pairs of {first['set']}, {first['target']}’s preference"
    what = f"of the features on which {first['source']}’s rests"
    if bearing:
        words = f"{where[0].upper()}{where[1:]} rests on the {', '.join(bearing)} images {what}"
        return heading, f"{words}: taken out, they cost more than controls."
    words = f"Negative result: {where} does not rest on any image {what}, beyond controls"
    return heading, f"{words}; its own top features {own}."


def _set(name: str, rows: list[dict]) -> dict:
    def of(what: str) -> list[dict]:
        return [row for row in rows if row["what"] == what]

    edges = of("edge")
    tables = [_preferences(name, of("preference"))]
    for model, own in groupby(of("ablation"), key=lambda row: row["model"]):
        tables.append(_ablations(name, model, list(own)))
    for _, group in groupby(of("transfer"), key=lambda row: tuple(row[key] for key in PLACE)):
        tables.append(_transfers(name, list(group)))
    circuits = [
        _circuit(name, model, list(own), edges)
        for model, own in groupby(of("feature"), key=lambda row: row["model"])
    ]
    raw = flat_table(of("transfer"), "Every column of the images’ rows", ("source", "target"))
    return {"name": name, "tables": tables, "circuits": circuits, "raw": raw}


def _preferences(name: str, rows: list[dict]) -> Table:
    columns = [
        Column("model", numeric=False),
        Column("pairs, left out"),
        Column("accuracy"),
        Column("labels swapped"),
        Column("token counts"),
        Column("preference, nats"),
        Column("", numeric=False),
    ]
    body = [
        [
            Cell(row["model"]),
            Cell(number(row["n_pairs"]), number(row["n_in_file"] - row["n_pairs"])),
            Cell(percent(row["accuracy"]), _shares(row, "accuracy")),
            Cell(percent(row["accuracy_swapped"]), _shares(row, "accuracy_swapped")),
            Cell(percent(row["accuracy_unigram"])),
            Cell(number(row["preference"]), interval(row, "preference")),
            Cell("above chance" if row["prefers"] else "no preference to move"),
        ]
        for row in rows
    ]
    return Table(f"{name}: which text of a pair is likelier", columns, body)


def _shares(row: dict, key: str) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return "" if low is None else f"[{percent(low, 0)}, {percent(high, 0)}]"


def _costs(row: dict) -> list[Cell]:
    controls = (
        Cell(number(row[f"effect_{key}"]), number(row[f"p_{key}"], 2)) for key, _ in CONTROLS
    )
    return [
        Cell(number(row["effect"]), interval(row, "effect")),
        *controls,
        Cell(percent(row["accuracy"], 0), percent(row["accuracy_ablated"], 0)),
    ]


def _verdict(row: dict) -> Cell:
    style, words = VERDICTS[row["moves"]]
    return Cell(words, style=style)


def _ablations(name: str, model: str, rows: list[dict]) -> Table:
    columns = [Column("site", numeric=False), Column("features"), *COSTS]
    columns += [Column("attribution and cost, r"), Column("verdict", numeric=False)]
    body = [
        [
            Cell(row["site"]),
            Cell(number(row["n_features"])),
            *_costs(row),
            Cell(number(row["attribution_r"], 2)),
            _verdict(row),
        ]
        for row in rows
    ]
    return Table(f"{name}: top features of {model} taken out together", columns, body)


def _transfers(name: str, rows: list[dict]) -> Table:
    first = rows[0]
    columns = [Column("image", numeric=False), *COSTS, Column("of native")]
    columns += [Column("same pairs, r"), Column("verdict", numeric=False)]
    body = [
        [
            Cell(row["image"]),
            *_costs(row),
            Cell(percent(row["share_of_native"], 0)),
            Cell(number(row["pair_r"], 2), interval(row, "pair_r", 2)),
            _verdict(row),
        ]
        for row in rows
    ]
    sites = site_words(first["site_source"], first["site_target"])
    where = f"top features of {first['source']} taken out of {first['target']}, {sites}"
    return Table(f"{name}: images of the {where}", columns, body)


def _circuit(name: str, model: str, rows: list[dict], edges: list[dict]) -> Table:
    """The chosen features by layer, each with what reaches it from the layer before."""
    columns = [
        Column("site", numeric=False),
        Column("feature"),
        Column("attribution, train half"),
        Column("attribution, test half"),
        Column("cost alone"),
        Column("fires at tokens"),
        Column("through it, from the site before", numeric=False),
    ]
    body = []
    for row in rows:
        if row["chosen"] != "top":
            continue
        reached = [
            e
            for e in edges
            if (e["model"], e["site_upper"], e["feature_upper"])
            == (model, row["site"], row["feature"])
        ]
        reached.sort(key=lambda e: -abs(e["attribution"]))
        words = (f"{e['feature_lower']} ({number(e['attribution'])})" for e in reached)
        body.append(
            [
                Cell(row["site"]),
                Cell(str(row["feature"])),
                Cell(number(row["attribution_train"])),
                Cell(number(row["attribution"]), interval(row, "attribution")),
                Cell(number(row["effect"]), interval(row, "effect")),
                Cell(number(row["firings"])),
                Cell(", ".join(words)),
            ]
        )
    return Table(f"{name}: circuit of the top features of {model}", columns, body)


def print_tables(work: Workdir) -> None:
    """Prints the tables of every set.

    Raises:
      UserError: results/contrast.jsonl is missing or damaged.
    """
    for one in section(read_jsonl(work.result("contrast.jsonl"))):
        show([*one["tables"], *one["circuits"]])
