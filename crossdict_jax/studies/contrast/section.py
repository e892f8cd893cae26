"""Contrast sets: what models prefer, on which features it rests, and whether these carry over."""

from __future__ import annotations

from collections.abc import Iterator

from crossdict_jax.report.blocks import Block, Details, Heading, hidden, html
from crossdict_jax.report.tables import (
    Cell,
    Table,
    flat_table,
    number,
    percent,
    score,
    share,
    table,
)
from crossdict_jax.results import by_pair, site_words

TITLE = "Contrast sets"
VERDICTS = {  # of ``moves``: (style, sign and words)
    True: ("strong", "● bears it"),
    False: ("none", "○ like controls"),
    None: ("", "– nothing to bear"),
}
KINDS = ("preference", "ablation", "transfer")
CONTROLS = {
    "random": "random directions, p",
    "shuffled": "other features’, p",
    "others": "other features, p",
}


def section(rows: list[dict]) -> str:
    """Returns the html of the page's section, from the rows of contrast.jsonl."""
    blocks: list[Block] = [
        "Of two texts that differ in one point, which does a model find likelier, and on which "
        "features does that rest? Features are chosen on one half of the pairs, by integrated "
        "gradients of the preference; the other half says what it costs to take them out. Controls "
        "take out as much, in equal norm: random directions and other features’ directions at the "
        "same positions, and other features where they fire themselves; p is the share of each "
        "kind that cost as much. Then the features’ mapped directions are taken out of the other "
        "model, while it reads the same texts, at the positions and as strongly as the features "
        "fire in the first. “own” are the other model’s own top features: the most that a mapped "
        "direction can do. Where a model does no better than chance there is no preference to "
        "move, and no verdict."
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == name]
        transfers = [row for row in of_set if row["what"] == "transfer"]
        summary = "Circuits: features by layer, and what reaches them from the layer before"
        raw = flat_table(transfers, "Every column of the mapped directions’ rows", ("source",))
        blocks += [Heading(name), *sentences(transfers), *tables(of_set)]
        blocks += [Details(summary, circuits(of_set)), hidden(raw)]
    return html(blocks)


def sentences(transfers: list[dict]) -> Iterator[str]:
    """Yields what each direction says, where both models prefer; a negative result admits it."""
    judged = [row for row in transfers if row["moves"] is not None]
    for (source, target, *_), group in by_pair(judged).items():
        moves = {row["direction"]: row["moves"] for row in group}
        bearing = ", ".join(name for name, moved in moves.items() if moved and name != "own")
        if bearing:
            yield (
                f"{target}’s preference rests on the {bearing} directions of the features on which "
                f"{source}’s rests: taken out, they cost more than controls."
            )
        else:
            top = {True: "do", False: "do not either", None: "were not found"}[moves.get("own")]
            yield (
                f"Negative result: {target}’s preference does not rest, beyond controls, on any "
                f"mapped direction of the features on which {source}’s rests; its own top features "
                f"{top}."
            )


def tables(rows: list[dict]) -> list[Table]:
    """Returns what is asked of a set: preferences, their features, and mapped directions."""
    name, of = rows[0]["set"], {kind: [r for r in rows if r["what"] == kind] for kind in KINDS}
    preferences = [
        {
            "model": row["model"],
            "pairs, left out": Cell(
                number(row["n_pairs"]), number(row["n_in_file"] - row["n_pairs"])
            ),
            "accuracy": share(row, "accuracy"),
            "labels swapped": share(row, "accuracy_swapped"),
            "token counts": share(row, "accuracy_unigram"),
            "preference, nats": score(row, "preference"),
            "verdict": "above chance" if row["prefers"] else "no preference to move",
        }
        for row in of["preference"]
    ]
    made = [table(f"{name}: which text of a pair is likelier", preferences)]
    ablations: dict[str, list[dict]] = {}
    for row in of["ablation"]:
        line = {"site": row["site"], "features": number(row["n_features"])}
        line |= _costs(row, {"attribution and cost, r": score(row, "attribution_r", 2)})
        ablations.setdefault(row["model"], []).append(line)
    for model, lines in ablations.items():
        made.append(table(f"{name}: top features of {model} taken out together", lines))
    for (source, target, *sites), group in by_pair(of["transfer"]).items():
        lines = []
        for row in group:
            compared = {"of own features’": share(row, "share_of_own")}
            compared |= {"same pairs, r": score(row, "pair_r", 2)}
            lines.append({"direction": row["direction"]} | _costs(row, compared))
        where = f"directions of {source}’s top features taken out of {target}, {site_words(*sites)}"
        made.append(table(f"{name}: {where}", lines))
    return made


def _costs(row: dict, more: dict[str, Cell]) -> dict[str, Cell]:
    """What taking out costs, beside controls, with the verdict at the end."""
    controls = {
        title: Cell(number(row[f"effect_{family}"]), number(row[f"p_{family}"], 2))
        for family, title in CONTROLS.items()
    }
    accuracy = Cell(percent(row["accuracy"], 0), percent(row["accuracy_ablated"], 0))
    style, words = VERDICTS[row["moves"]]
    cost = {"cost, nats": score(row, "effect")} | controls | {"accuracy, then": accuracy}
    return cost | more | {"verdict": Cell(words, style=style)}


def circuits(rows: list[dict]) -> list[Table]:
    """Returns each model's chosen features by layer, with what reaches them from the one before."""
    edges = [row for row in rows if row["what"] == "edge"]
    edges.sort(key=lambda row: -abs(row["attribution"]))
    through: dict[tuple, list[str]] = {}
    for row in edges:
        words = f"{row['feature_lower']} ({number(row['attribution'])})"
        upper = row["model"], row["site_upper"], row["feature_upper"]
        through.setdefault(upper, []).append(words)
    lines: dict[str, list[dict]] = {}
    for row in rows:
        if row["what"] == "feature" and row["chosen"] == "top":
            line = {
                "site": row["site"],
                "feature": str(row["feature"]),
                "attribution, train half": score(row, "attribution_train"),
                "attribution, test half": score(row, "attribution"),
                "cost alone": score(row, "effect"),
                "fires at tokens": number(row["firings"]),
            }
            upper = row["model"], row["site"], row["feature"]
            line["through it, from the site before"] = ", ".join(through.get(upper, ()))
            lines.setdefault(row["model"], []).append(line)
    title = f"{rows[0]['set']}: circuit of the top features of"
    return [table(f"{title} {model}", of_model) for model, of_model in lines.items()]
