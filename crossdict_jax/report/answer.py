"""The answer of a run in words, from its numbers, negative results included."""

from collections.abc import Iterable
from itertools import groupby

from crossdict_jax.report import causal, shared
from crossdict_jax.report.results import DIVERGED, Comparison, Run, at_least
from crossdict_jax.report.tables import interval, number, percent, share
from crossdict_jax.results import BEATS_MEAN, BEATS_TOKEN, NO_BETTER

FEW_DOCUMENTS = 30  # below it an interval over documents says little
Pick = tuple[Comparison, dict]


def answer(run: Run) -> list[tuple[str, str]]:
    """Returns the sentences at the head of the page, each with a heading."""
    return [
        ("How well", _how_well(run.comparisons)),
        ("Against what", _against_what(run.comparisons)),
        ("To what effect", to_what_effect(run.stitchings())),
        *causal.answer(run),
        *shared.answer(run),
    ]


def best(comparisons: Iterable[Comparison], key: str) -> Pick | None:
    """Returns the map with the highest aligned score, and its layer pair."""
    scored = [(c, line) for c in comparisons for line in c.fitted if line.get(key) is not None]
    return max(scored, key=lambda pick: pick[1][key], default=None)


def _score(line: dict, key: str, name: str) -> str:
    """Returns "R² 0.52 [0.50, 0.54]; shuffled pairs −0.006"."""
    text = f"{name} {number(line.get(key))} {interval(line, key)}".strip()
    null = line.get(f"shuffled.{key}")
    return text if null is None else f"{text}; shuffled pairs {number(null)}"


def _how_well(comparisons: list[Comparison]) -> str:
    groups = groupby(comparisons, key=lambda c: (c.source, c.target))  # in their order
    picks = [pick for _, group in groups if (pick := best(group, "r2"))]
    if not picks:
        return "No map was fitted, so nothing is said about shared features."
    if len(picks) > 2:  # the two ends
        picks = sorted(picks, key=lambda pick: -pick[1]["r2"])
        picks = [picks[0], picks[-1]]
    sentences = []
    for comparison, line in picks:
        start, score = f"from {comparison.source} to {comparison.target}", _score(line, "r2", "R²")
        name, token = f"{line['map']} at {comparison.sites}", comparison.score("token", "r2")
        if line.get("verdict") == NO_BETTER:
            text = f"{start} no map predicts held-out features better than their mean does (the "
            sentences.append(f"{text}best, {name}, has {score})")
        else:
            beside = "" if token is None else f"; the source’s token alone {number(token)}"
            text = f"{start} the best map, {name}, explains {percent(line['r2'], 0)} of the "
            sentences.append(f"{text}variance of held-out features ({score}{beside})")
    text = "; ".join(sentences)
    return f"{text[0].upper()}{text[1:]}."


def _against_what(comparisons: list[Comparison]) -> str:
    verdicts = [line.get("verdict") for c in comparisons for line in c.fitted]
    token, mean, n_maps = *map(verdicts.count, (BEATS_TOKEN, BEATS_MEAN)), len(verdicts)
    if token + mean == 0:
        return (
            f"Negative result: none of the {n_maps} fitted maps beats the mean of the target’s "
            "features, so this run shows no shared features."
        )
    rest = {"beat the mean only": mean, "do no better than the mean": n_maps - token - mean}
    counted = ", ".join(f"{n} {verdict}" for verdict, n in rest.items() if n)
    head = f"{token} of {n_maps} fitted maps beat"
    if token == 0:
        head = (
            f"Negative result against the strong baseline: none of the {n_maps} fitted maps beats"
        )
    tail = "the context gain is undefined"
    if pick := best(comparisons, "context_gain"):
        comparison, line = pick
        nothing = "nothing is shown: " if at_least(line, "context_gain") <= 0 else ""
        tail = (
            f"beyond the identity of the current token {nothing}"
            f"{_score(line, 'context_gain', 'the highest context gain is')} ({line['map']}, "
            f"{comparison.source} to {comparison.target}, {comparison.sites})"
        )
    return f"{head} the table of token means{f' ({counted})' if counted else ''}; {tail}."


def to_what_effect(stitchings: list[Comparison]) -> str:
    """Returns the sentence about predicted activations put into the target."""
    if not stitchings:
        return "No causal test was run, so nothing here says that a predicted activation works."

    def of_mean(pick: Pick) -> float:
        """The share of the mean's cost that a map wins back (of zero's, without a mean)."""
        # Where the mean alone recovers most of the loss, every map looks good against zero.
        mean, value = pick[0].reference("mean"), pick[1]["loss_recovered"]
        return value if mean is None or mean >= 1 else (value - mean) / (1 - mean)

    scored = [(s, n) for s in stitchings for n in s.fitted if n["loss_recovered"] is not None]
    if not scored:
        return (
            "The causal test says nothing: at these sites the target hardly needs what was "
            "replaced (zeroing it costs too little loss)."
        )
    pick = max(scored, key=lambda pick: (pick[0].above_controls(pick[1]), of_mean(pick)))
    (s, line), cell = pick, share(pick[1], "loss_recovered", 1)
    form = " (its features, decoded)" if line["stitch_kind"] == "features" else ""
    stitch = (
        f"{line['map']}{form} of {s.source} {s.site_source} put into {s.target} {s.site_target}"
    )
    of_zero = f"{cell.text} {cell.note}".strip() + " of the loss that zeroing costs"
    if s.above_controls(line):
        text = f"The best predicted activation, {stitch}, recovers {of_zero}"
        if (token := s.score("token", "loss_recovered")) is not None:
            more = "more" if at_least(line, "loss_recovered") > token else "no more"
            text += f", {more} than the table of token means ({percent(token)})"
    else:
        text = f"Negative result: even the best predicted activation, {stitch}, recovers only "
        text += f"{of_zero}, no more than its controls"
    beside = {
        "the target’s own dictionary": s.reference("own_sae"),
        "the mean": s.reference("mean"),
        "the same map on shuffled pairs": line.get("shuffled.loss_recovered"),
        "and of what the mean costs it wins back": of_mean(pick),
    }
    words = ", ".join(f"{name} {percent(v)}" for name, v in beside.items() if v is not None)
    return f"{text}; beside it {words}."


def cautions(run: Run) -> list[str]:
    """Returns what a reader must know before believing the numbers."""
    notes = [
        f"On shuffled pairs, where nothing is shared, {line['map']} still “{verdict}” (R² "
        f"{number(line['shuffled.r2'])} {interval(line, 'shuffled.r2')}, {c.name}): something "
        "leaks, do not trust this map."
        for c in run.comparisons
        for line in c.lines
        if (verdict := line.get("shuffled.verdict")) not in (None, NO_BETTER)
    ]
    counts = [n for row in run.rows["transfer"] if (n := row.get("n_documents")) is not None]
    if counts and min(counts) < FEW_DOCUMENTS:
        few = f"Only {min(counts)} held-out documents"
        notes.append(f"{few}: the intervals over documents are rough.")
    rows = run.rows["reconstruction"]
    kinds = (
        ("dead_fraction", 0.5, "More than half of the features are dead in"),
        ("fvu", 0.5, "More than half of the variance is missed by"),
        ("fvu", DIVERGED, "Training has diverged (FVU far above 1), and numbers mean nothing, in"),
    )
    for key, limit, words in kinds:
        over = [r for r in rows if (r.get(key) or 0) > limit]
        shown = [f"{r['model']} {r['site']} {dictionary_name(r)}" for r in over[:3]]
        shown += ["…"] if len(over) > 3 else []
        count = f"{len(over)} of {len(rows)} dictionaries ({', '.join(shown)})"
        notes += [f"{words} {count}."] if over else []
    return notes


def dictionary_name(row: dict) -> str:
    """Returns which of the dictionaries of a model and site a row is about."""
    return row.get("member") or f"seed-{row.get('seed', 0)}"
