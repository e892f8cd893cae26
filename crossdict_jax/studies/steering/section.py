"""Steered text: what was written with a feature put in, beside what was written without."""

from __future__ import annotations

import dataclasses

from crossdict_jax.report.results import site_words
from crossdict_jax.report.tables import Cell, Column, Table, interval, number, printable
from crossdict_jax.workdir import Workdir, read_json, read_jsonl

FOLDER = "steering"  # of results/
PROMPTS, SAMPLES = 4, 2  # shown of each question; all of them are in its file
PIPE_WIDTH = 160  # columns when the output is no terminal
WORDS = {"none": "no edit", "image": "image", "random": "random direction", "match": "match"}
RATES = {  # column of the file: (its title, by how much it is multiplied)
    "token_rate": ("promoted tokens, %", 100),
    "piece_rate": ("promoted text, per 100 bytes", 1),
    "search_rate": ("searched text, per 100 bytes", 1),
    "nll": ("cost, nats a token", 1),
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """The rows of one file of results/steering."""

    name: str
    feature: dict
    conditions: list[dict]
    texts: list[dict]

    @property
    def title(self) -> str:
        f = self.feature
        sites = site_words(f["site_source"], f["site_target"])
        return f"Feature {f['feature']} of {f['source']} in {f['target']}, {sites}"

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was put in, in words."""
        f, settings = self.feature, self.feature["settings"]
        sampling = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
        return [
            ("Fires at", f"{number(f['firings'])} of {number(f['n_rows'])} training places"),
            ("Promotes in the source", _quoted(f["promoted_source"])),
            ("Counted in the target", _quoted(f["promoted_target"]) or "nothing"),
            (
                "Put in",
                f"{_image(settings['image'])}; a dose of 1 is "
                f"{NORMS[settings['norm']]}; {POSITIONS[settings['positions']]}",
            ),
            (
                "Match in the target",
                f"feature {f['match']}, r {number(f['match_r'], 2)}; cosine of the image and it "
                f"{number(f['match_cosine'], 2)}",
            ),
            (
                "Texts",
                f"{f['new_tokens']} new tokens, {sampling}, seed {f['seed']}; equal random numbers "
                "under every edit",
            ),
        ]

    @property
    def doses(self) -> list[float]:
        """The largest one last."""
        return sorted({r["alpha"] for r in self.conditions if r["condition"] == "image"}, key=abs)

    @property
    def sentence(self) -> str:
        """What the largest dose does to the promoted tokens, whatever it is."""
        row = next(
            r for r in self.conditions if (r["condition"], r["alpha"]) == ("image", self.doses[-1])
        )
        counted = (
            _compared(row, "token_rate", "promoted tokens, in % of the new tokens,"),
            _compared(row, "piece_rate", "places of promoted text, per 100 bytes,"),
        )
        cost = number(row["nll_more"], 2)
        return f"At dose {row['alpha']:g} {'; '.join(counted)}. It costs {cost} nats a token."


def _compared(row: dict, rate: str, what: str) -> str:
    """Returns a rate, without the edit and with a random direction, and whether that says much."""
    times = RATES[rate][1]
    low, high = (row[f"{rate}_over_random_{end}"] for end in ("low", "high"))
    if low is None:
        verdict = "one text alone shows nothing"
    elif low > 0:
        verdict = "surely more"
    else:
        verdict = "surely less" if high < 0 else "not surely more: nothing is shown"
    own = times * row[rate]
    plain, random = (own - times * row[f"{rate}_{other}"] for other in ("more", "over_random"))
    bounds = _times(row, f"{rate}_over_random", times).note
    return (
        f"{what} are {number(own, 2)}, {number(plain, 2)} without the edit and {number(random, 2)} "
        f"with a random direction of equal norm ({verdict}; difference {bounds})"
    )


NORMS = {
    "residual": "the median norm of the target’s activations",
    "feature": "what the feature adds in the source, as a share of the norm",
    "image": "the image’s own norm",
}
POSITIONS = {
    "generated": "wherever a new token is predicted",
    "all": "in the prompt too, but for its first position",
}


def _image(name: str) -> str:
    return "the target’s own match" if name == "match" else f"its image under {name}"


def _quoted(tokens: list[str]) -> str:
    return " ".join(f"‘{_token(token)}’" for token in tokens)


def _token(text: str) -> str:
    return text.replace("\n", "⏎")


def _scaled(value: float | None, times: float) -> float | None:
    return None if value is None else times * value


def read_answer(work: Workdir, name: str) -> Answer:
    """Returns what results/steering/NAME.jsonl says; UserError if it is missing or damaged."""
    kinds: dict[str, list[dict]] = {"feature": [], "condition": [], "text": []}
    for row in read_jsonl(work.result(f"{FOLDER}/{name}.jsonl")):
        kinds[row["row"]].append(row)
    (feature,) = kinds["feature"]
    return Answer(name, feature, kinds["condition"], kinds["text"])


# ---------------------------------------------------------------- tables


def rates_table(answer: Answer) -> Table:
    """Returns how often promoted tokens occur under every edit, with intervals over texts."""
    shown = {k: v for k, v in RATES.items() if answer.conditions[0][k] is not None}
    columns = [Column("edit", numeric=False), Column("dose")]
    for words, _ in shown.values():
        columns += [Column(words), Column("more than without")]
    rows = []
    for row in answer.conditions:
        cells = [Cell(WORDS[row["condition"]]), Cell(f"{row['alpha']:g}")]
        for key, (_, times) in shown.items():
            cells += [_times(row, key, times), _times(row, f"{key}_more", times)]
        rows.append(cells)
    n = answer.conditions[0]["n_texts"]
    return Table(f"{n} texts of every edit, 95 % intervals over texts", columns, rows)


def _times(row: dict, key: str, times: float) -> Cell:
    scaled = {end: _scaled(row[end], times) for end in (key, f"{key}_low", f"{key}_high")}
    return Cell(number(scaled[key], 2), note=interval(scaled, key, 2))


def side_by_side(answer: Answer, alpha: float) -> Table:
    """Returns some texts of some prompts at one dose, a column for each edit."""
    by = {(t["condition"], t["alpha"], t["prompt"], t["sample"]): t for t in answer.texts}
    edits = [("none", 0.0)]
    edits += [(row["condition"], alpha) for row in answer.conditions if row["alpha"] == alpha]
    body = []
    for text in answer.texts:
        place = text["prompt"], text["sample"]
        if text["condition"] == "none" and place[0] < PROMPTS and place[1] < SAMPLES:
            words = (text["before"], *(by[*edit, *place]["text"] for edit in edits))
            body.append([Cell(_one_line(one)) for one in words])
    columns = [Column("prompt", numeric=False)]
    columns += [Column(WORDS[name], numeric=False) for name, _ in edits]
    return Table(f"Dose {alpha:g}", columns, body)


def _one_line(text: str) -> str:
    return " ".join(text.replace("\n", " ⏎ ").split())


def found_table(answer: Answer) -> Table | None:
    """Returns the features that the search found, the one that was taken on top."""
    if not answer.feature["candidates"]:
        return None
    titles = ("of its strongest places", "of all places", "raises log p, nats", "of the token")
    columns = [Column("feature"), *map(Column, titles)]
    body = [
        [
            Cell(str(c["feature"])),
            *(Cell(number(c[key], 2)) for key in ("share", "base", "promotes")),
            Cell(_quoted([c["token"]])),
        ]
        for c in answer.feature["candidates"]
    ]
    searched = answer.feature["settings"]["search"]
    return Table(f"Features around ‘{searched}’, and what they promote", columns, body)


# ---------------------------------------------------------------- shown


def print_answer(work: Workdir, name: str) -> None:
    """Prints what was put in, texts of the largest dose side by side, and all rates.

    Raises:
      UserError: the file is missing or damaged.
    """
    from rich import box
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    answer, timing = read_answer(work, name), _timing(work)
    say = {"markup": False, "highlight": False}
    console.print(answer.title, **say)
    if table := found_table(answer):
        console.print(printable(table))
    for key, words in answer.facts:
        console.print(f"{key}: {words}", **say)
    for context in answer.feature["contexts"]:
        words = f"{context['before']}»{context['token']}«{context['after']}"
        console.print(f"Strong at: {' '.join(words.split())}", **say)
    printed = printable(side_by_side(answer, answer.doses[-1]))
    printed.show_lines, printed.box = True, box.SQUARE
    console.print(printed)
    console.print(printable(rates_table(answer)))
    console.print(answer.sentence, **say)
    if timing:
        console.print(f"{number(timing['tokens_per_s'], 0)} tokens/s after compilation", **say)


def _timing(work: Workdir) -> dict:
    return read_json(work.timing).get("steer", {}) if work.timing.exists() else {}


def section(work: Workdir) -> list[dict]:
    """Returns what the page shows of every question that the run was asked."""
    names = sorted(path.stem for path in work.result(FOLDER).glob("*.jsonl"))
    answers = [read_answer(work, name) for name in names]
    return [
        {
            "name": answer.name,
            "title": answer.title,
            "sentence": answer.sentence,
            "facts": answer.facts,
            "contexts": answer.feature["contexts"],
            "found": found_table(answer),
            "rates": rates_table(answer),
            "texts": [side_by_side(answer, dose) for dose in answer.doses],
        }
        for answer in answers
    ]
