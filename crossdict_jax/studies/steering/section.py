"""Steered text: what was written with a feature put in, beside what was written without."""

import dataclasses
from collections.abc import Iterator

from crossdict_jax.report.blocks import Block, Details, Facts, Heading, html
from crossdict_jax.report.tables import Cell, Table, number, score, table
from crossdict_jax.results import site_words

TITLE = "Steered text"
PROMPTS, SAMPLES = 4, 2  # shown of each question; all of them are in its file
WORDS = {"none": "no edit", "mapped": "mapped direction", "random": "random direction"}
RATES = {  # column of the file: (its title, by how much it is multiplied)
    "token_rate": ("promoted tokens, %", 100),
    "piece_rate": ("promoted text, per 100 bytes", 1),
    "search_rate": ("searched text, per 100 bytes", 1),
    "nll": ("cost, nats a token", 1),
}
COUNTED = {
    "token_rate": "promoted tokens, in % of the new tokens,",
    "piece_rate": "occurrences of promoted text, per 100 bytes,",
}
NORMS = {
    "residual": "the median norm of the target’s activations",
    "feature": "what the feature adds in the source, as a share of the norm",
    "mapped": "the mapped direction’s own norm",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one file of results/steering says: the feature, the edits, and the texts."""

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
    """Returns the html of the page's section, from the rows of all files of results/steering."""
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


def answers(rows: list[dict]) -> Iterator[Answer]:
    """Yields what each file says; a file begins with the row of its feature."""
    starts = [i for i, row in enumerate(rows) if row["row"] == "feature"]
    for start, end in zip(starts, [*starts[1:], len(rows)]):
        conditions, texts = (
            [row for row in rows[start:end] if row["row"] == kind] for kind in ("condition", "text")
        )
        yield Answer(rows[start], conditions, texts)


def facts(answer: Answer) -> list[tuple[str, str]]:
    """Returns what was put in, in words."""
    f, settings = answer.feature, answer.feature["settings"]
    way = "the target’s own match" if settings["map"] == "match" else f"through {settings['map']}"
    sampling = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
    cosine = f"cosine with the mapped direction {number(f['match_cosine'], 2)}"
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
    """Returns what the largest dose does to the promoted tokens, whatever it is."""
    dose, compared = answer.doses[-1], []
    row = next(r for r in answer.conditions if (r["condition"], r["alpha"]) == ("mapped", dose))
    for rate, title in COUNTED.items():
        low, high = (row[f"{rate}_over_random_{end}"] for end in ("low", "high"))
        if low is None:
            verdict = "one text alone shows nothing"
        elif low > 0:
            verdict = "surely more"
        else:
            verdict = "surely less" if high < 0 else "not surely more: nothing is shown"
        times = RATES[rate][1]
        less = (0, row[f"{rate}_more"], row[f"{rate}_over_random"])
        with_it, without, at_random = (number(times * (row[rate] - v), 2) for v in less)
        bounds = _scaled(row, f"{rate}_over_random", times).note
        compared.append(
            f"{title} are {with_it}, {without} without the edit and {at_random} with a random "
            f"direction of equal norm ({verdict}; difference {bounds})"
        )
    cost = number(row["nll_more"], 2)
    return f"At dose {dose:g} {'; '.join(compared)}. It costs {cost} nats a token."


def tables(answer: Answer) -> list[Table]:
    """Returns what the search found, if one was asked for, and all rates under every edit."""
    candidates = [
        {
            "feature": str(row["feature"]),
            "of its strongest rows": score(row, "share", 2),
            "of all rows": score(row, "base", 2),
            "raises log p, nats": score(row, "promotes", 2),
            "of the token": _quoted([row["token"]]),
        }
        for row in answer.feature["candidates"]
    ]
    searched = f"Features around ‘{answer.feature['settings']['search']}’, and what they promote"
    rates = []
    for row in answer.conditions:
        line = {"edit": WORDS.get(row["condition"], "match"), "dose": f"{row['alpha']:g}"}
        for key, (title, times) in RATES.items():
            if row[key] is not None:
                line[title] = _scaled(row, key, times)
                line[f"{title}, more"] = _scaled(row, f"{key}_more", times)
        rates.append(line)
    n = answer.conditions[0]["n_texts"]
    made = [table(f"{n} texts of every edit, 95 % intervals over texts", rates)]
    return [table(searched, candidates), *made] if candidates else made


def _scaled(row: dict, key: str, times: float) -> Cell:
    keys = (key, f"{key}_low", f"{key}_high")
    return score({k: None if row[k] is None else times * row[k] for k in keys}, key, 2)


def side_by_side(answer: Answer, alpha: float) -> Table:
    """Returns some texts of some prompts at one dose, a column for each edit."""
    edits = {"none": 0.0}
    edits |= {row["condition"]: alpha for row in answer.conditions if row["alpha"] == alpha}
    lines: dict[tuple, dict[str, str]] = {}
    for text in answer.texts:
        prompt, sample, edit = text["prompt"], text["sample"], text["condition"]
        if prompt < PROMPTS and sample < SAMPLES and edits.get(edit) == text["alpha"]:
            line = lines.setdefault((prompt, sample), {"prompt": _one_line(text["before"])})
            line[WORDS.get(edit, "match")] = _one_line(text["text"])
    return table(f"Dose {alpha:g}", lines.values())


def _one_line(text: str) -> str:
    return " ".join(text.replace("\n", " ⏎ ").split())
