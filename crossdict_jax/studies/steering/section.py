"""Steered text: what was written with a feature put in, beside what was written without."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from crossdict_jax.report.html import fill
from crossdict_jax.report.tables import Cell, Column, Table, interval, number
from crossdict_jax.results import site_words

TITLE = "Steered text"
PROMPTS, SAMPLES = 4, 2  # shown of each question; all of them are in its file
WORDS = {
    "none": "no edit",
    "mapped": "mapped direction",
    "random": "random direction",
    "match": "match",
}
RATES = {  # column of the file: (its title, by how much it is multiplied)
    "token_rate": ("promoted tokens, %", 100),
    "piece_rate": ("promoted text, per 100 bytes", 1),
    "search_rate": ("searched text, per 100 bytes", 1),
    "nll": ("cost, nats a token", 1),
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
    shown = [
        {
            "title": answer.title,
            "sentence": sentence(answer),
            "facts": facts(answer),
            "tables": tables(answer),
            "texts": [side_by_side(answer, dose) for dose in answer.doses],
        }
        for answer in answers(rows)
    ]
    return fill(Path(__file__).with_name("section.html.j2"), answers=shown)


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
    return [
        ("Fires at", f"{number(f['firings'])} of {number(f['n_rows'])} training rows"),
        ("Promotes in the source", _quoted(f["promoted_source"])),
        ("Counted in the target", _quoted(f["promoted_target"]) or "nothing"),
        ("Put in", f"{way}, wherever a new token is predicted"),
        ("A dose of 1", NORMS[settings["norm"]]),
        (
            "Match in the target",
            f"feature {f['match']}, r {number(f['match_r'], 2)}; cosine with the mapped direction "
            f"{number(f['match_cosine'], 2)}",
        ),
        (
            "Texts",
            f"{f['new_tokens']} new tokens, {sampling}, seed {f['seed']}; equal random numbers "
            "under every edit",
        ),
        *(
            ("Strong at", " ".join(f"{c['before']}»{c['token']}«{c['after']}".split()))
            for c in f["contexts"]
        ),
    ]


def _quoted(tokens: list[str]) -> str:
    return " ".join(f"‘{token}’".replace("\n", "⏎") for token in tokens)


def sentence(answer: Answer) -> str:
    """Returns what the largest dose does to the promoted tokens, whatever it is."""
    dose = answer.doses[-1]
    row = next(r for r in answer.conditions if (r["condition"], r["alpha"]) == ("mapped", dose))
    compared = []
    for rate, what in (
        ("token_rate", "promoted tokens, in % of the new tokens,"),
        ("piece_rate", "occurrences of promoted text, per 100 bytes,"),
    ):
        low, high = (row[f"{rate}_over_random_{end}"] for end in ("low", "high"))
        if low is None:
            verdict = "one text alone shows nothing"
        elif low > 0:
            verdict = "surely more"
        else:
            verdict = "surely less" if high < 0 else "not surely more: nothing is shown"
        value, times = row[rate], RATES[rate][1]
        plain, random = (value - row[f"{rate}_{other}"] for other in ("more", "over_random"))
        with_it, without, at_random = (number(times * v, 2) for v in (value, plain, random))
        bounds = _scaled(row, f"{rate}_over_random", times).note
        compared.append(
            f"{what} are {with_it}, {without} without the edit and {at_random} with a random "
            f"direction of equal norm ({verdict}; difference {bounds})"
        )
    cost = number(row["nll_more"], 2)
    return f"At dose {dose:g} {'; '.join(compared)}. It costs {cost} nats a token."


def tables(answer: Answer) -> list[Table]:
    """Returns what the search found, if one was asked for, and all rates under every edit."""
    made = []
    if answer.feature["candidates"]:
        titles = ("of its strongest rows", "of all rows", "raises log p, nats", "of the token")
        body = [
            [
                Cell(str(c["feature"])),
                *(Cell(number(c[key], 2)) for key in ("share", "base", "promotes")),
                Cell(_quoted([c["token"]])),
            ]
            for c in answer.feature["candidates"]
        ]
        searched = answer.feature["settings"]["search"]
        caption = f"Features around ‘{searched}’, and what they promote"
        made.append(Table(caption, [Column("feature"), *map(Column, titles)], body))

    rates = {k: v for k, v in RATES.items() if answer.conditions[0][k] is not None}
    columns = [Column("edit", numeric=False), Column("dose")]
    for title, _ in rates.values():
        columns += [Column(title), Column("more than without")]
    body = [
        [
            Cell(WORDS[row["condition"]]),
            Cell(f"{row['alpha']:g}"),
            *(
                _scaled(row, key + end, times)
                for key, (_, times) in rates.items()
                for end in ("", "_more")
            ),
        ]
        for row in answer.conditions
    ]
    n = answer.conditions[0]["n_texts"]
    made.append(Table(f"{n} texts of every edit, 95 % intervals over texts", columns, body))
    return made


def _scaled(row: dict, key: str, times: float) -> Cell:
    ends = (key, f"{key}_low", f"{key}_high")
    scaled = {end: None if row[end] is None else times * row[end] for end in ends}
    return Cell(number(scaled[key], 2), note=interval(scaled, key, 2))


def side_by_side(answer: Answer, alpha: float) -> Table:
    """Returns some texts of some prompts at one dose, a column for each edit."""
    written = {(t["condition"], t["alpha"], t["prompt"], t["sample"]): t for t in answer.texts}
    edits = [("none", 0.0)]
    edits += [(row["condition"], alpha) for row in answer.conditions if row["alpha"] == alpha]
    body = []
    for text in answer.texts:
        prompt, sample = text["prompt"], text["sample"]
        if text["condition"] == "none" and prompt < PROMPTS and sample < SAMPLES:
            words = (text["before"], *(written[*e, prompt, sample]["text"] for e in edits))
            body.append([Cell(" ".join(one.replace("\n", " ⏎ ").split())) for one in words])
    columns = [Column("prompt", numeric=False)]
    columns += [Column(WORDS[name], numeric=False) for name, _ in edits]
    return Table(f"Dose {alpha:g}", columns, body)
