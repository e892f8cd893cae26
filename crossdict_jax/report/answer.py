"""The answer of a run in words, from its numbers, negative results included."""

import math
from collections.abc import Iterable

from crossdict_jax.config import Config
from crossdict_jax.report import causal, shared
from crossdict_jax.report.results import (
    DIVERGED,
    Comparison,
    Run,
    directions,
    highest,
    stitchings,
    surely_above,
)
from crossdict_jax.report.tables import interval, number, percent, score, share
from crossdict_jax.results import BEATS_MEAN, BEATS_TOKEN, NO_BETTER

FEW_DOCUMENTS = 30  # below it an interval over documents says little
DIVERGED_WORDS = (
    "FVU is far above 1, so numbers mean nothing (training has diverged, or a loaded dictionary is "
    "of other activations, or sae.source_codes=relu adds to its code), in"
)
Pick = tuple[Comparison, dict]


def answer(run: Run) -> list[tuple[str, str]]:
    """Returns the sentences at the head of the page, each with a heading."""
    sentences = {
        "How well": _how_well(run.comparisons),
        "Against what": _against_what(run.comparisons),
        "To what effect": to_what_effect(stitchings(run.rows["causal"])),
        "Feature by feature": causal.answer(run),
        "Which features": shared.answer(run),
    }
    return [(heading, sentence) for heading, sentence in sentences.items() if sentence]


def best(comparisons: Iterable[Comparison], key: str) -> Pick | None:
    """Returns the map with the highest aligned score, and its layer pair."""
    picks = [(c, line) for c in comparisons if (line := highest(c.fitted, key))]
    return max(picks, key=lambda pick: pick[1][key], default=None)


def best_by_direction(comparisons: Iterable[Comparison], key: str) -> list[Pick]:
    """Returns the best map of each direction in which one has the score."""
    return [pick for group in directions(comparisons).values() if (pick := best(group, key))]


def _score(line: dict, key: str, name: str) -> str:
    """Returns "R² 0.52 [0.50, 0.54]; shuffled pairs −0.006"."""
    cell = score(line, key, null=f"shuffled.{key}")
    text = f"{name} {cell.text} {cell.note}".strip()
    return f"{text}; shuffled pairs {cell.null}" if cell.null else text


def _how_well(comparisons: list[Comparison]) -> str:
    picks = best_by_direction(comparisons, "r2")
    if not picks:
        return "No map was fitted."
    if len(picks) > 2:  # the two ends
        picks.sort(key=lambda pick: -pick[1]["r2"])
        picks = [picks[0], picks[-1]]
    sentences = []
    for c, line in picks:
        start, r2 = f"from {c.source} to {c.target}", _score(line, "r2", "R²")
        name, token = f"{line['map']} at {c.sites}", c.score("token", "r2")
        if line["verdict"] == NO_BETTER or line["r2"] <= 0:
            sentences.append(
                f"{start} the map with the highest R², {name}, does not surely predict held-out "
                f"features better than their mean does ({r2})"
            )
        else:
            beside = "" if token is None else f"; the source’s token alone {number(token)}"
            sentences.append(
                f"{start} the best map, {name}, explains {percent(line['r2'], 0)} of the variance "
                f"of held-out features ({r2}{beside})"
            )
    text = "; ".join(sentences)
    return f"{text[0].upper()}{text[1:]}."


def _against_what(comparisons: list[Comparison]) -> str:
    of_maps = [line["verdict"] for c in comparisons for line in c.fitted]
    verdicts = [verdict for verdict in of_maps if verdict]
    if not verdicts:
        unjudged = (
            "No map was judged, as one held-out document gives no interval; raise text.documents "
            "or text.test_fraction."
        )
        return unjudged if of_maps else ""
    token, mean, n_maps = *map(verdicts.count, (BEATS_TOKEN, BEATS_MEAN)), len(verdicts)
    none = f"none of the {n_maps} fitted maps beats"
    if token + mean == 0:
        return (
            f"Negative result: {none} the mean of the target’s features, so they show no "
            "shared features."
        )
    rest = {"beat the mean only": mean, "do no better than the mean": n_maps - token - mean}
    counted = ", ".join(f"{n} {verdict}" for verdict, n in rest.items() if n)
    counted = f" ({counted})" if counted else ""
    head = f"{token} of {n_maps} fitted maps beat"
    if not token:
        head = f"Negative result against the strong baseline: {none}"
    tail = "the context gain is undefined"
    if pick := best(comparisons, "context_gain"):
        c, line = pick
        nothing = "" if surely_above(line, "context_gain", 0.0) else "nothing is shown: "
        tail = (
            f"beyond the identity of the current token {nothing}"
            f"{_score(line, 'context_gain', 'the highest context gain is')} ({line['map']}, "
            f"{c.source} to {c.target}, {c.sites})"
        )
    return f"{head} the table of token means{counted}; {tail}."


def to_what_effect(stitched: list[Comparison]) -> str:
    """Returns the sentence about predicted activations put into the target."""
    if not stitched:
        return "No causal test was run, so nothing here says that a predicted activation works."
    if not any(s.fitted for s in stitched):
        return "No fitted map was put into a target, so nothing here says that one works."

    def of_mean(pick: Pick) -> float | None:
        """The share of the mean's cost that a map wins back; None where the mean costs nothing."""
        # Where the mean alone recovers most of the loss, every map looks good against zero.
        mean, value = pick[0].reference("mean"), pick[1]["loss_recovered"]
        return None if mean is None or mean >= 1 else (value - mean) / (1 - mean)

    def rank(pick: Pick) -> tuple:
        won = of_mean(pick)
        above = pick[0].above_controls(pick[1])
        return above, -math.inf if won is None else won, pick[1]["loss_recovered"]

    scored = [(s, n) for s in stitched for n in s.fitted if n["loss_recovered"] is not None]
    if not scored:
        return (
            "The causal test says nothing: at these sites the target hardly needs what was "
            "replaced (zeroing it costs too little loss)."
        )
    pick = max(scored, key=rank)
    (s, line), cell = pick, share(pick[1], "loss_recovered", 1)
    form = " (its features, decoded)" if line["stitch_kind"] == "features" else ""
    end = f"{s.target} {line['site_edited']}"
    stitch = f"{line['map']}{form} of {s.source} {s.site_source} put into {end}"
    of_zero = f"{cell.text} {cell.note}".strip() + " of the loss that zeroing costs"
    if s.above_controls(line):
        text = f"The best predicted activation, {stitch}, recovers {of_zero}"
        if (token := s.score("token", "loss_recovered")) is not None:
            # The table is put in as features, so like is compared with like.
            same = (n for n in s.fitted if n["map"] == line["map"])
            alike = next((n for n in same if n["stitch_kind"] == "features"), line)
            more = "more" if surely_above(alike, "loss_recovered", token) else "not surely more"
            if alike is not line:
                text += f"; its features, decoded, recover {percent(alike['loss_recovered'])}"
            text += f", {more} than the table of token means ({percent(token)})"
    elif line.get("loss_recovered_low") is None:
        text = f"Without an interval nothing is shown: {stitch} recovers {of_zero}"
    else:
        text = f"Negative result: even the best predicted activation, {stitch}, recovers only "
        text += f"{of_zero}, not surely more than its controls"
    beside = {
        "the target’s own dictionary": s.reference("own_sae"),
        "the mean": s.reference("mean"),
        "the same map on shuffled pairs": line.get("shuffled.loss_recovered"),
        "and of what the mean costs it wins back": of_mean(pick),
    }
    words = ", ".join(f"{name} {percent(v)}" for name, v in beside.items() if v is not None)
    return f"{text}; beside it {words}."


def cautions(run: Run, config: Config) -> list[str]:
    """Returns what a reader must know before believing the numbers."""
    notes = [
        f"On shuffled pairs, where nothing is shared, {line['map']} still “{verdict}” (R² "
        f"{number(line['shuffled.r2'])} {interval(line, 'shuffled.r2')}, {c.name}): something "
        "leaks, do not trust this map."
        for c in run.comparisons
        for line in c.lines
        if (verdict := line.get("shuffled.verdict")) not in (None, NO_BETTER)
    ]
    counts = [row["n_documents"] or FEW_DOCUMENTS for row in run.rows["transfer"]]
    n = min(counts, default=FEW_DOCUMENTS)
    if n == 1:
        notes.append("Only one held-out document: there are no intervals, and so no verdicts.")
    elif n < FEW_DOCUMENTS:
        notes.append(f"Only {n} held-out documents: the intervals over documents are rough.")
    rows = run.rows["reconstruction"]
    for key, limit, words in (
        ("dead_fraction", 0.5, "More than half of the features are dead in"),
        ("fvu", 0.5, "More than half of the variance is missed by"),
        ("fvu", DIVERGED, DIVERGED_WORDS),
    ):
        over = ["{model} {site} {member}".format(**r) for r in rows if (r[key] or 0) > limit]
        shown = ", ".join(over[:3] + ["…"] * (len(over) > 3))
        notes += [f"{words} {len(over)} of {len(rows)} dictionaries ({shown})."] if over else []
    if "ceiling" in config.controls and set(config.sae.sources) - {"train"}:
        notes.append(
            "Where dictionaries were loaded (sae.sources), the ceiling reads one that this run "
            "trained, not another seed of theirs: it says little of how much can be shared."
        )
    return notes
