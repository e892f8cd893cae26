"""Contrast sets: on which features a preference between two texts rests, and whether it moves."""

from collections.abc import Iterable, Iterator

from crossdict_jax.report.blocks import Block, Details, Heading, html
from crossdict_jax.report.tables import Cell, Table, captioned, number, percent, score, share
from crossdict_jax.results import (
    PAIR_COLUMNS,
    Column,
    by_pair,
    describe,
    intervals,
    plain,
    site_words,
)

TITLE = "Contrast sets"
JUDGED = 6  # test pairs, for a verdict: of fewer, all have one sign by chance too often
VERDICTS = {  # of ``moves``
    True: Cell("● bears it", style="strong"),
    False: Cell("○ like controls", style="none"),
    None: Cell("– no verdict"),
}
TESTS = ("preference", "ablation", "transfer")
FAMILIES = {  # of controls
    "random": "random directions",
    "shuffled": "other features' directions",
    "others": "other features where they fire",
}
TABLE = describe(
    "contrast.jsonl",
    "a model's preference, one feature, all chosen features taken out together, or mapped "
    "directions taken out of the other model; intervals over pairs of texts",
    Column(
        "what", "what the row is about", values=("preference", "feature", "ablation", "transfer")
    ),
    *PAIR_COLUMNS,
    *plain(
        set="name of the set of pairs",
        model="which model",
        site="where it is edited",
        direction="kind of map; match: the target's matching features; own: its top ones",
        n_pairs="pairs of texts",
        n_in_file="pairs in the file",
        accuracy_ablated="accuracy after the features are taken out",
        prefers="whether the model does better than chance",
        feature="number of a feature, chosen by attribution on the training half",
        n_features="how many",
        firings="tokens at which it fires",
        attribution_train="integrated gradients on the training half",
        moves="whether the effect is above every kind of control; null: no verdict",
        share_of_own="effect, as a share of that of the target's own top features",
        **{f"effect_{f}": f"what taking out {w} costs" for f, w in FAMILIES.items()},
        **{f"p_{f}": f"share of {w} that cost as much" for f, w in FAMILIES.items()},
    ),
    *intervals(
        accuracy="share of pairs whose good text is likelier; exact binomial interval",
        accuracy_unigram="the same by token counts alone; exact binomial interval",
        pair_r="correlation over pairs of what source and target lose",
    ),
    *intervals(
        "nats",
        preference="log p(good) - log p(bad)",
        attribution="integrated gradients on the test half",
        effect="preference that taking out costs",
        **{f"specific_{f}": f"effect above {w}" for f, w in FAMILIES.items()},
    ),
)


def section(rows: list[dict]) -> str:
    """Returns the html of the rows of contrast.jsonl."""
    blocks: list[Block] = [
        "Which of two texts that differ in one point does a model find likelier, and on which "
        "features does that rest? Features are chosen on one half of the pairs, by integrated "
        "gradients; the other half says what taking them out costs, beside edits of equal norm: "
        "random and other features’ directions at the same positions, and other features where "
        "they fire; p is the share of each kind that cost as much. Then their mapped directions "
        "are taken out of the other model, as strongly as they fire in the first; “own” are its "
        "own top features, the most that a mapped direction can do. A model that does no better "
        f"than chance gets no verdict, and neither do fewer than {JUDGED} test pairs."
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        of_set = [row for row in rows if row["set"] == name]
        blocks += [Heading(name), *sentences(of_set), *tables(of_set)]
        blocks.append(Details("Top features by layer", tables(of_set, ["feature"])))
    return html(blocks)


def sentences(rows: list[dict]) -> Iterator[str]:
    """Yields the result of each direction where both models prefer, negative ones included."""
    transfers = [row for row in rows if row["what"] == "transfer"]
    measured = by_pair(row for row in transfers if row["direction"] == "own")
    for pair, group in by_pair(row for row in transfers if row["moves"] is not None).items():
        source, target, *_ = pair
        moves = {row["direction"]: row["moves"] for row in group}
        bearing = ", ".join(name for name, moved in moves.items() if moved and name != "own")
        if bearing:
            yield (
                f"{target}’s preference rests on the {bearing} directions of the features on which "
                f"{source}’s rests: taken out, they cost more than controls."
            )
        else:
            none = "lack controls" if pair in measured else "were not found"
            top = {True: "do", False: "do not either", None: none}[moves.get("own")]
            yield (
                f"Negative result: {target}’s preference does not rest, beyond controls, on any "
                f"mapped direction of the features on which {source}’s rests; its own top features "
                f"{top}."
            )


def tables(rows: list[dict], what: Iterable[str] = TESTS) -> list[Table]:
    """Returns the tables of each set: preferences, their features, mapped directions."""
    lines = []
    for row in (row for row in rows if row["what"] in what):
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
        elif row["what"] == "feature":
            caption = f"top features of {row['model']}"
            line = {
                "site": row["site"],
                "feature": str(row["feature"]),
                "attribution, train half": score(row, "attribution_train"),
                "attribution, test half": score(row, "attribution"),
                "cost alone": score(row, "effect"),
                "fires at tokens": number(row["firings"]),
            }
        else:
            if row["what"] == "ablation":
                caption = f"top features of {row['model']} taken out together"
                line = {"site": row["site"], "features": number(row["n_features"])}
            else:
                sites = site_words(row["site_source"], row["site_target"])
                where = f"{row['source']}’s top features taken out of {row['target']}, {sites}"
                caption, line = f"directions of {where}", {"direction": row["direction"]}
                line["of own features’"] = share(row, "share_of_own")
                line["same pairs, r"] = score(row, "pair_r", 2)
            line["cost, nats"] = score(row, "effect")
            for family, words in FAMILIES.items():
                p = number(row[f"p_{family}"], 2)
                line[f"{words}, p"] = Cell(number(row[f"effect_{family}"]), p)
            ablated = percent(row["accuracy_ablated"], 0)
            line["accuracy, then"] = Cell(percent(row["accuracy"], 0), ablated)
            line["verdict"] = VERDICTS[row["moves"]]
        lines.append((f"{row['set']}: {caption}", line))
    return captioned(lines)
