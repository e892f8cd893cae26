"""Contrast sets in the report: preferences, their features, and whether these carry over."""

from collections.abc import Iterator

from crossdict_jax.report.blocks import Block, Details, Heading, html
from crossdict_jax.report.tables import Cell, Table, number, percent, score, share, table
from crossdict_jax.results import by_pair, site_words

TITLE = "Contrast sets"
VERDICTS = {  # of ``moves``
    True: Cell("● bears it", style="strong"),
    False: Cell("○ like controls", style="none"),
    None: Cell("– nothing to bear"),
}
KINDS = ("preference", "feature", "ablation", "transfer")
FAMILIES = {  # of controls
    "random": "random directions",
    "shuffled": "other features' directions",
    "others": "other features where they fire",
}


def section(rows: list[dict]) -> str:
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
    """Yields the result of each direction where both models prefer, negative ones included."""
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
    """Returns a set's tables: preferences, their features, mapped directions."""
    name, lines = rows[0]["set"], {}
    for row in rows:
        if row["what"] == "preference":
            caption = "which text of a pair is likelier"
            left_out = number(row["n_in_file"] - row["n_pairs"])
            line = {
                "model": row["model"],
                "pairs, left out": Cell(number(row["n_pairs"]), left_out),
                "accuracy": share(row, "accuracy"),
                "token counts": share(row, "accuracy_unigram"),
                "preference, nats": score(row, "preference"),
                "verdict": "above chance" if row["prefers"] else "no preference to move",
            }
        elif row["what"] == "ablation":
            caption = f"top features of {row['model']} taken out together"
            line = {"site": row["site"], "features": number(row["n_features"])} | _costs(row)
        elif row["what"] == "transfer":
            where = site_words(row["site_source"], row["site_target"])
            caption = f"directions of {row['source']}’s top features taken out of {row['target']}"
            caption = f"{caption}, {where}"
            more = {"of own features’": share(row, "share_of_own")}
            more |= {"same pairs, r": score(row, "pair_r", 2)}
            line = {"direction": row["direction"]} | more | _costs(row)
        else:
            continue
        lines.setdefault(f"{name}: {caption}", []).append(line)
    return [table(caption, cells) for caption, cells in lines.items()]


def _costs(row: dict) -> dict[str, Cell]:
    controls = {
        f"{words}, p": Cell(number(row[f"effect_{family}"]), number(row[f"p_{family}"], 2))
        for family, words in FAMILIES.items()
    }
    accuracy = Cell(percent(row["accuracy"], 0), percent(row["accuracy_ablated"], 0))
    cost = {"cost, nats": score(row, "effect")} | controls
    return cost | {"accuracy, then": accuracy, "verdict": VERDICTS[row["moves"]]}


def top_features(rows: list[dict]) -> list[Table]:
    """Returns each model's chosen features by layer."""
    lines: dict[str, list[dict]] = {}
    for row in (row for row in rows if row["what"] == "feature"):
        line = {
            "site": row["site"],
            "feature": str(row["feature"]),
            "attribution, train half": score(row, "attribution_train"),
            "attribution, test half": score(row, "attribution"),
            "cost alone": score(row, "effect"),
            "fires at tokens": number(row["firings"]),
        }
        lines.setdefault(f"{row['set']}: top features of {row['model']}", []).append(line)
    return [table(caption, cells) for caption, cells in lines.items()]
