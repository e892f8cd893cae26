"""Contrast sets: what models prefer, on which features it rests, and whether these carry over."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from pathlib import Path

from crossdict_jax.report.html import fill
from crossdict_jax.report.tables import (
    Cell,
    Column,
    Table,
    flat_table,
    interval,
    number,
    percent,
)
from crossdict_jax.results import pair_of, site_words

TITLE = "Contrast sets"
VERDICTS = {  # of ``moves``: (style, sign and words)
    True: ("strong", "● bears it"),
    False: ("none", "○ like controls"),
    None: ("", "– nothing to bear"),
}
CONTROLS = {
    "random": "random directions, p",
    "shuffled": "other features’, p",
    "others": "other features, p",
}
COSTS = (Column("cost, nats"), *map(Column, CONTROLS.values()), Column("accuracy, then"))


def section(rows: list[dict]) -> str:
    """Returns the html of the page's section, from the rows of contrast.jsonl."""
    sets = []
    for name, group in groupby(rows, key=itemgetter("set")):
        group = list(group)
        transfers = [row for row in group if row["what"] == "transfer"]
        sets.append(
            {
                "name": name,
                "sentences": sentences(transfers),
                "tables": tables(group),
                "circuits": circuits(group),
                "raw": flat_table(transfers, "Every column", ("source", "target")),
            }
        )
    return fill(Path(__file__).with_name("section.html.j2"), sets=sets)


def sentences(transfers: list[dict]) -> list[str]:
    """Returns what each direction says, where both models prefer; a negative result admits it."""
    judged = [row for row in transfers if row["moves"] is not None]
    said = []
    for (source, target, *_), group in groupby(judged, key=pair_of):
        moves = {row["direction"]: row["moves"] for row in group}
        bearing = ", ".join(name for name, moved in moves.items() if moved and name != "own")
        if bearing:
            said.append(
                f"{target}’s preference rests on the {bearing} directions of the features on which "
                f"{source}’s rests: taken out, they cost more than controls."
            )
        else:
            own = {True: "do", False: "do not either", None: "were not found"}[moves.get("own")]
            said.append(
                f"Negative result: {target}’s preference does not rest, beyond controls, on any "
                f"mapped direction of the features on which {source}’s rests; its own top features "
                f"{own}."
            )
    return said


def tables(rows: list[dict]) -> list[Table]:
    """Returns what is asked of every set: preferences, their features, and mapped directions."""
    return [
        table
        for name, group in groupby(rows, key=itemgetter("set"))
        for table in _tables(name, list(group))
    ]


def _tables(name: str, rows: list[dict]) -> list[Table]:
    columns = ["pairs, left out", "accuracy", "labels swapped", "token counts", "preference, nats"]
    columns = [Column("model", numeric=False), *map(Column, columns), Column("", numeric=False)]
    body = [
        [
            Cell(row["model"]),
            Cell(number(row["n_pairs"]), number(row["n_in_file"] - row["n_pairs"])),
            *(
                Cell(percent(row[key]), _percents(row, key))
                for key in ("accuracy", "accuracy_swapped")
            ),
            Cell(percent(row["accuracy_unigram"])),
            Cell(number(row["preference"]), interval(row, "preference")),
            Cell("above chance" if row["prefers"] else "no preference to move"),
        ]
        for row in rows
        if row["what"] == "preference"
    ]
    made = [Table(f"{name}: which text of a pair is likelier", columns, body)]

    columns = [Column("site", numeric=False), Column("features"), *COSTS]
    columns += [Column("attribution and cost, r"), Column("verdict", numeric=False)]
    ablations = [row for row in rows if row["what"] == "ablation"]
    for model, group in groupby(ablations, key=itemgetter("model")):
        body = [
            [
                Cell(row["site"]),
                Cell(number(row["n_features"])),
                *_costs(row),
                Cell(number(row["attribution_r"], 2)),
                _verdict(row),
            ]
            for row in group
        ]
        made.append(Table(f"{name}: top features of {model} taken out together", columns, body))

    columns = [Column("direction", numeric=False), *COSTS, Column("of own features’")]
    columns += [Column("same pairs, r"), Column("verdict", numeric=False)]
    transfers = [row for row in rows if row["what"] == "transfer"]
    for (source, target, *sites), group in groupby(transfers, key=pair_of):
        body = [
            [
                Cell(row["direction"]),
                *_costs(row),
                Cell(percent(row["share_of_own"], 0)),
                Cell(number(row["pair_r"], 2), interval(row, "pair_r", 2)),
                _verdict(row),
            ]
            for row in group
        ]
        what = f"directions of {source}’s top features taken out of {target}"
        made.append(Table(f"{name}: {what}, {site_words(*sites)}", columns, body))
    return made


def _costs(row: dict) -> list[Cell]:
    return [
        Cell(number(row["effect"]), interval(row, "effect")),
        *(Cell(number(row[f"effect_{key}"]), number(row[f"p_{key}"], 2)) for key in CONTROLS),
        Cell(percent(row["accuracy"], 0), percent(row["accuracy_ablated"], 0)),
    ]


def _verdict(row: dict) -> Cell:
    style, words = VERDICTS[row["moves"]]
    return Cell(words, style=style)


def _percents(row: dict, key: str) -> str:
    low, high = row[f"{key}_low"], row[f"{key}_high"]
    return "" if low is None else f"[{percent(low, 0)}, {percent(high, 0)}]"


def circuits(rows: list[dict]) -> list[Table]:
    """Returns each model's chosen features by layer, with what reaches them from the one before."""
    titles = ["feature", "attribution, train half", "attribution, test half", "cost alone"]
    columns = [Column("site", numeric=False), *map(Column, titles), Column("fires at tokens")]
    columns.append(Column("through it, from the site before", numeric=False))
    edges: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["what"] == "edge":
            upper = row["model"], row["site_upper"], row["feature_upper"]
            edges.setdefault(upper, []).append(row)
    features = [row for row in rows if row["what"] == "feature" and row["chosen"] == "top"]
    made = []
    for model, group in groupby(features, key=itemgetter("model")):
        body = []
        for row in group:
            reached = edges.get((model, row["site"], row["feature"]), [])
            reached = sorted(reached, key=lambda edge: -abs(edge["attribution"]))
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
        caption = f"{rows[0]['set']}: circuit of the top features of {model}"
        made.append(Table(caption, columns, body))
    return made
