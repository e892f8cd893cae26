"""Steering: what one model writes with a feature of another put into it."""

from dataclasses import dataclass

from crossdict_jax.report.blocks import Block, Details, Facts, Heading, html
from crossdict_jax.report.tables import Cell, Table, number, score, table
from crossdict_jax.results import PAIR_COLUMNS, Column, describe, plain, site_words

TITLE = "Steered text"
TOP_P = 0.95  # tokens are drawn among the likeliest of this share of the probability
PROMPTS, SAMPLES = 4, 2  # shown of each question
WORDS = {"none": "no edit", "mapped": "mapped direction", "random": "random direction"}
NORMS = {
    "residual": "the median norm of the target’s activations",
    "feature": "what the feature adds in the source, as a share of the norm",
    "mapped": "the mapped direction’s own norm",
}
RATES = {  # column of the file: its meaning, its unit (none for a share), its title on the page
    "token_rate": ("share of new tokens that the feature promotes", "", "promoted tokens"),
    "search_rate": ("occurrences of the searched text", "per 100 bytes", "searched text"),
    "nll": ("-log p under the unedited target", "nats a token", "cost"),
}
ENDS = {
    "": "",
    "_more": ", less that without an edit",
    "_over_random": ", less that with a random direction of the same dose",
}
TABLE = describe(
    "steering/*.jsonl",
    "what was put in, or all texts of one edit and dose, or one text; intervals over texts",
    Column("row", "what the row is about", values=("feature", "condition", "text")),
    *PAIR_COLUMNS,
    *plain(
        feature="number in the source's dictionary",
        firings="of n_rows training rows on which it fires",
        n_rows="training rows that were read",
        promoted_source="tokens that it makes likelier in the source",
        promoted_target="the same text in the target's tokens",
        contexts="texts around its strongest firings",
        candidates="features that the search found",
        match="the target's best matching feature",
        match_r="correlation of the two",
        match_cosine="cosine of the mapped direction and the match's decoder row",
        settings="the values of config.steer",
        new_tokens="tokens written at most",
        seed="of the random numbers",
        condition="no edit, the mapped direction, a random one of equal norm, the match",
        alpha="dose",
        n_texts="texts of this edit",
        tokens="new tokens",
        prompt="number of the prompt",
        sample="number of the sample",
        before="the prompt",
        text="what was written",
    ),
    *(
        Column(name + end, meaning + more, unit, interval=True)
        for name, (meaning, unit, _) in RATES.items()
        for end, more in ENDS.items()
    ),
)


@dataclass(frozen=True)
class Answer:
    """The rows of one file of results/steering."""

    feature: dict
    conditions: list[dict]
    texts: list[dict]

    @property
    def title(self) -> str:
        f = self.feature
        sites = site_words(f["site_source"], f["site_target"])
        return f"Feature {f['feature']} of {f['source']} in {f['target']}, {sites}"

    @property
    def doses(self) -> list[float]:
        """The largest one last."""
        return sorted({r["alpha"] for r in self.conditions if r["condition"] == "mapped"}, key=abs)


def section(rows: list[dict]) -> str:
    """Returns the html of the rows of all files."""
    blocks: list[Block] = [
        "What does one model write with a feature of another put in? Single texts fool the eye: "
        "every edit stands beside none, a random direction of equal norm and the target’s own best "
        "matching feature, with the same random numbers, and what counts is how often the promoted "
        "tokens occur over all texts. All texts: results/steering/."
    ]
    for answer in answers(rows):
        texts = [side_by_side(answer, dose) for dose in answer.doses]
        blocks += [Heading(answer.title), sentence(answer), Facts(facts(answer))]
        blocks += [*tables(answer), Details("Some of the texts, side by side", texts)]
    return html(blocks)


def answers(rows: list[dict]) -> list[Answer]:
    """Returns the content of each file; a file begins with its feature's row."""
    made: list[Answer] = []
    for row in rows:
        if row["row"] == "feature":
            made.append(Answer(row, [], []))
        else:
            (made[-1].texts if row["row"] == "text" else made[-1].conditions).append(row)
    return made


def facts(answer: Answer) -> list[tuple[str, str]]:
    """Returns what was added, in words."""
    f, settings = answer.feature, answer.feature["settings"]
    way = "the target’s own match" if settings["map"] == "match" else f"through {settings['map']}"
    cosine = f"cosine with the mapped direction {number(f['match_cosine'], 2)}"
    sampling = f"temperature {settings['temperature']:g}, top-p {TOP_P:g}"
    written = f"{f['new_tokens']} new tokens, {sampling}, seed {f['seed']}"
    contexts = (f"{c['before']}»{c['token']}«{c['after']}" for c in f["contexts"])
    return [
        ("Fires at", f"{number(f['firings'])} of {number(f['n_rows'])} training rows"),
        ("Promotes in the source", _quoted(f["promoted_source"])),
        ("Counted in the target", _quoted(f["promoted_target"]) or "nothing"),
        ("Put in", f"{way}, wherever a new token is predicted"),
        ("A dose of 1", NORMS[settings["norm"]]),
        ("Match in the target", f"feature {f['match']}, r {number(f['match_r'], 2)}; {cosine}"),
        ("Texts", f"{written}; equal random numbers under every edit"),
        *(("Strong at", " ".join(text.split())) for text in contexts),
    ]


def _quoted(tokens: list[str]) -> str:
    return " ".join(f"‘{token}’".replace("\n", "⏎") for token in tokens)


def sentence(answer: Answer) -> str:
    """Returns what the largest dose does to the promoted tokens."""
    dose = answer.doses[-1]
    row = next(r for r in answer.conditions if (r["condition"], r["alpha"]) == ("mapped", dose))
    low, high = (row[f"token_rate_over_random_{end}"] for end in ("low", "high"))
    if low is None:
        verdict = "one text alone shows nothing"
    elif low > 0:
        verdict = "surely more"
    else:
        verdict = "surely less" if high < 0 else "not surely more: nothing is shown"
    less = (0, row["token_rate_more"], row["token_rate_over_random"])
    with_it, without, at_random = (number(100 * (row["token_rate"] - v), 2) for v in less)
    bounds = _rate(row, "token_rate_over_random").note
    difference = bounds and f"; difference {bounds}"
    return (
        f"At dose {dose:g} promoted tokens are {with_it} % of the new tokens, {without} % without "
        f"the edit and {at_random} % with a random direction of equal norm ({verdict}{difference})"
        f". It costs {number(row['nll_more'], 2)} nats a token."
    )


def tables(answer: Answer) -> list[Table]:
    """Returns what the search found, if there was one, and all rates under every edit."""
    candidates = [
        {
            "feature": str(row["feature"]),
            "of its activation": score(row, "share", 2),
            "of all rows": score(row, "base", 2),
            "raises log p, nats": score(row, "promotes", 2),
            "of the token": _quoted([row["token"]]),
        }
        for row in answer.feature["candidates"]
    ]
    searched = f"Features around ‘{answer.feature['settings']['search']}’, and what they promote"
    lines = []
    for row in answer.conditions:
        line = {"edit": WORDS.get(row["condition"], "match"), "dose": f"{row['alpha']:g}"}
        for key, (_, unit, title) in RATES.items():
            if row[key] is not None:
                title = f"{title}, {unit or '%'}"
                line |= {title: _rate(row, key), f"{title}, more": _rate(row, f"{key}_more")}
        lines.append(line)
    n = answer.conditions[0]["n_texts"]
    made = [table(f"{n} texts of every edit, 95 % intervals over texts", lines)]
    return [table(searched, candidates), *made] if candidates else made


def _rate(row: dict, key: str) -> Cell:
    times = 100 if key.startswith("token_rate") else 1
    return score({k: v and times * v for k, v in row.items() if k.startswith(key)}, key, 2)


def side_by_side(answer: Answer, alpha: float) -> Table:
    """Returns some texts of some prompts at one dose, a column for each edit."""
    lines: dict[tuple, dict[str, str]] = {}
    for text in answer.texts:
        prompt, sample, edit = text["prompt"], text["sample"], text["condition"]
        shown = prompt < PROMPTS and sample < SAMPLES
        if shown and (edit == "none" or text["alpha"] == alpha):
            before, written = (
                " ".join(text[key].replace("\n", " ⏎ ").split()) for key in ("before", "text")
            )
            line = lines.setdefault((prompt, sample), {"prompt": before})
            line[WORDS.get(edit, "match")] = written
    return table(f"Dose {alpha:g}", lines.values())
