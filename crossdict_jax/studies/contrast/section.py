"""Contrast sets: what models prefer, on which features it rests, and whether these carry over."""

from __future__ import annotations

from collections.abc import Iterable

from crossdict_jax.report.blocks import Block, Details, Heading, html
from crossdict_jax.report.tables import (
    Cell,
    Column,
    Table,
    flat_table,
    number,
    percent,
    share,
    table,
    value,
    words,
)
from crossdict_jax.results import by_pair, site_words

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
        blocks += [Details(summary, circuits(of_set)), Details(raw.caption, [raw])]
    return html(blocks)


def sentences(transfers: list[dict]) -> Iterable[str]:
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
    """Returns what is asked of every set: preferences, their features, and mapped directions."""
    costs = [
        value("effect", "cost, nats"),
        *(_beside(f"effect_{k}", f"p_{k}", title, number) for k, title in CONTROLS.items()),
        _beside("accuracy", "accuracy_ablated", "accuracy, then", percent),
    ]
    verdict = Column("verdict", False, cell=_verdict)
    preferences = [
        words("model", lambda row: row["model"]),
        value("n_pairs", "pairs"),
        value("n_in_file", "of the file"),
        share("accuracy"),
        share("accuracy_swapped", "labels swapped"),
        share("accuracy_unigram", "token counts"),
        value("preference", "preference, nats"),
        words("", lambda row: "above chance" if row["prefers"] else "no preference to move"),
    ]
    ablations = [
        words("site", lambda row: row["site"]),
        value("n_features", "features"),
        *costs,
        value("attribution_r", "attribution and cost, r", 2),
        verdict,
    ]
    transfers = [
        words("direction", lambda row: row["direction"]),
        *costs,
        share("share_of_own", "of own features’"),
        value("pair_r", "same pairs, r", 2),
        verdict,
    ]
    made = []
    for name in dict.fromkeys(row["set"] for row in rows):
        of = {
            kind: [row for row in rows if (row["set"], row["what"]) == (name, kind)]
            for kind in ("preference", "ablation", "transfer")
        }
        caption = f"{name}: which text of a pair is likelier"
        made.append(table(caption, preferences, of["preference"]))
        for model in dict.fromkeys(row["model"] for row in of["ablation"]):
            chosen = [row for row in of["ablation"] if row["model"] == model]
            caption = f"{name}: top features of {model} taken out together"
            made.append(table(caption, ablations, chosen))
        for (source, target, *sites), group in by_pair(of["transfer"]).items():
            caption = f"directions of {source}’s top features taken out of {target}"
            caption = f"{name}: {caption}, {site_words(*sites)}"
            made.append(table(caption, transfers, group))
    return made


def _beside(key: str, note: str, title: str, text) -> Column:
    """A column of one number with another one in small print beside it."""
    digits = (3, 2) if text is number else (0, 0)
    return Column(title, cell=lambda row: Cell(*map(text, (row[key], row[note]), digits)))


def _verdict(row: dict) -> Cell:
    style, text = VERDICTS[row["moves"]]
    return Cell(text, style=style)


def circuits(rows: list[dict]) -> list[Table]:
    """Returns each model's chosen features by layer, with what reaches them from the one before."""
    edges: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["what"] == "edge":
            upper = row["model"], row["site_upper"], row["feature_upper"]
            edges.setdefault(upper, []).append(row)

    def reached(row: dict) -> str:
        into = edges.get((row["model"], row["site"], row["feature"]), [])
        into = sorted(into, key=lambda edge: -abs(edge["attribution"]))
        return ", ".join(f"{e['feature_lower']} ({number(e['attribution'])})" for e in into)

    columns = [
        words("site", lambda row: row["site"]),
        Column("feature", cell=lambda row: Cell(str(row["feature"]))),
        value("attribution_train", "attribution, train half"),
        value("attribution", "attribution, test half"),
        value("effect", "cost alone"),
        value("firings", "fires at tokens"),
        words("through it, from the site before", reached),
    ]
    features = [row for row in rows if row["what"] == "feature" and row["chosen"] == "top"]
    return [
        table(
            f"{features[0]['set']}: circuit of the top features of {model}",
            columns,
            [row for row in features if row["model"] == model],
        )
        for model in dict.fromkeys(row["model"] for row in features)
    ]
