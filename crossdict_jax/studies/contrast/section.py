"""Contrast sets: what models prefer, on which features it rests, and whether these carry over."""

from collections.abc import Iterator

from crossdict_jax.report.blocks import Block, Details, Heading, html
from crossdict_jax.report.tables import (
    Cell,
    Table,
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
        "gradients of the preference; the other half says what it costs to take them out, beside "
        "edits of equal norm: random directions and other features’ directions at the same "
        "positions, and other features where they fire; p is the share of each kind that cost as "
        "much. Then the features’ mapped directions are taken out of the other model, as strongly "
        "as they fire in the first. “own” are its own top features: the most that a mapped "
        "direction can do. Where a model does no better than chance there is no verdict."
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == name]
        transfers = [row for row in of_set if row["what"] == "transfer"]
        blocks += [Heading(name), *sentences(transfers), *tables(of_set)]
        blocks.append(Details("Top features by layer", top_features(of_set)))
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
    preferences = []
    for row in of["preference"]:
        left_out = number(row["n_in_file"] - row["n_pairs"])
        line = {"model": row["model"], "pairs, left out": Cell(number(row["n_pairs"]), left_out)}
        line |= {"accuracy": share(row, "accuracy")}
        line |= {"labels swapped": share(row, "accuracy_swapped")}
        line |= {"token counts": share(row, "accuracy_unigram")}
        line |= {"preference, nats": score(row, "preference")}
        verdict = "above chance" if row["prefers"] else "no preference to move"
        preferences.append(line | {"verdict": verdict})
    lines = {f"{name}: which text of a pair is likelier": preferences}
    for row in of["ablation"]:
        line = {"site": row["site"], "features": number(row["n_features"])}
        line |= _costs(row, {"attribution and cost, r": score(row, "attribution_r", 2)})
        caption = f"{name}: top features of {row['model']} taken out together"
        lines.setdefault(caption, []).append(line)
    for (source, target, *sites), group in by_pair(of["transfer"]).items():
        where = f"{source}’s top features taken out of {target}, {site_words(*sites)}"
        for row in group:
            compared = {"of own features’": share(row, "share_of_own")}
            compared |= {"same pairs, r": score(row, "pair_r", 2)}
            line = {"direction": row["direction"]} | _costs(row, compared)
            lines.setdefault(f"{name}: directions of {where}", []).append(line)
    return [table(caption, cells) for caption, cells in lines.items()]


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


def top_features(rows: list[dict]) -> list[Table]:
    """Returns each model's chosen features by layer."""
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
            lines.setdefault(row["model"], []).append(line)
    title = f"{rows[0]['set']}: top features of"
    return [table(f"{title} {model}", of_model) for model, of_model in lines.items()]
