"""The answer of a run in words: sentences made from its numbers, negative results included."""

from __future__ import annotations

from crossdict_jax.report.results import Comparison, Line, Results, Stitching
from crossdict_jax.report.tables import (
    BEATS_MEAN,
    BEATS_TOKEN,
    NO_BETTER,
    dictionary_name,
    interval,
    number,
    percent,
)

FEW_DOCUMENTS = 30  # below it an interval over documents says little
Pick = tuple[Comparison, Line]


def question(models: list[str]) -> str:
    return (
        f"Which sparse features do {names(models)} share, how well can one model’s features be "
        "computed from another’s at the same place of the same text, and does a translated state "
        "do the same work when it is put into the other model?"
    )


def answer(results: Results) -> list[tuple[str, str]]:
    """Returns three sentences, each with a heading."""
    return [
        ("How well", _how_well(results.comparisons)),
        ("Against what", _against_what(results.comparisons)),
        ("To what effect", _to_what_effect(results.stitchings)),
    ]


def names(models: list[str]) -> str:
    """Returns "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(models[:-1]), models[-1]]))


# ---------------------------------------------------------------- first sentence


def _how_well(comparisons: list[Comparison]) -> str:
    groups: dict[tuple, list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.direction, []).append(comparison)
    picks = [p for group in groups.values() if (p := best(group, "r2"))]
    if not picks:
        return "No map was fitted, so nothing is said about shared features."
    if len(picks) > 2:
        picks = [max(picks, key=_r2), min(picks, key=_r2)]
    text = "; ".join(_one_direction(*pick) for pick in picks)
    return text[0].upper() + text[1:] + "."


def best(comparisons: list[Comparison], key: str) -> Pick | None:
    """Returns the fitted rung with the highest aligned score, and where it stands."""
    scored = [(c, n) for c in comparisons for n in c.fitted if n.value(key) is not None]
    return max(scored, key=lambda pick: pick[1].value(key), default=None)


def _r2(pick: Pick) -> float:
    return pick[1].value("r2")


def _one_direction(comparison: Comparison, line: Line) -> str:
    where = f"from {comparison.source} to {comparison.target}"
    score = _score(line, "r2", "R²")
    if line.value("verdict") == NO_BETTER:
        return (
            f"{where} no map predicts held-out features better than their mean does "
            f"(the best, {line.kind} at {comparison.sites}, has {score})"
        )
    return (
        f"{where} the best map, {line.kind} at {comparison.sites}, explains "
        f"{percent(line.value('r2'), 0)} of the variance of held-out features "
        f"({score}{_token_beside(comparison)})"
    )


def _score(line: Line, key: str, name: str) -> str:
    """Returns "R² 0.52 [0.50, 0.54]; shuffled pairs −0.006"."""
    text = f"{name} {number(line.value(key))} {interval(line.aligned, key)}".strip()
    shuffled = line.null(key)
    return text + (f"; shuffled pairs {number(shuffled)}" if shuffled is not None else "")


def _token_beside(comparison: Comparison) -> str:
    token = comparison.line("token")
    if not token or token.value("r2") is None:
        return ""
    return f"; the source’s token alone {number(token.value('r2'))}"


# ---------------------------------------------------------------- second sentence


def _against_what(comparisons: list[Comparison]) -> str:
    fitted = [line for c in comparisons for line in c.fitted]
    verdicts = [line.value("verdict") for line in fitted]
    token, mean = verdicts.count(BEATS_TOKEN), verdicts.count(BEATS_MEAN)
    gain = best(comparisons, "context_gain")
    rest = len(fitted) - token - mean
    if token + mean == 0:
        return (
            f"Negative result: none of the {len(fitted)} fitted maps beats the mean of the "
            "target’s features, so this run shows no shared features."
        )
    if token == 0:
        head = (
            f"Negative result against the strong baseline: none of the {len(fitted)} fitted maps "
            f"beats the table of token means ({_counted(mean, rest)})"
        )
    else:
        head = f"{token} of {len(fitted)} fitted maps beat the table of token means" + (
            f" ({_counted(mean, rest)})" if mean + rest else ""
        )
    return f"{head}; {_beyond_the_token(gain)}."


def _counted(mean: int, rest: int) -> str:
    parts = [f"{mean} beat the mean only"] if mean else []
    parts += [f"{rest} do no better than the mean"] if rest else []
    return ", ".join(parts)


def _beyond_the_token(gain: Pick | None) -> str:
    if gain is None:
        return "the context gain is undefined here"
    comparison, line = gain
    score = _score(line, "context_gain", "the highest context gain is")
    where = f"{line.kind}, {comparison.source} to {comparison.target}, {comparison.sites}"
    if line.at_least("context_gain") <= 0:
        return f"beyond the identity of the current token nothing is shown: {score} ({where})"
    return f"beyond the identity of the current token {score} ({where})"


# ---------------------------------------------------------------- third sentence


def _to_what_effect(stitchings: list[Stitching]) -> str:
    if not stitchings:
        return "No causal test was run, so nothing here says that a translated state does the same."
    scored = [(s, n) for s in stitchings for n in s.fitted if n.value("loss_recovered") is not None]
    if not scored:
        return (
            "The causal test says nothing: at these places the target hardly needs what was "
            "replaced (zeroing it costs too little loss)."
        )
    stitching, line = max(scored, key=_above_controls_first)
    return f"{_recovered(stitching, line)}{_beside(stitching, line)}."


def _above_controls_first(pick: tuple[Stitching, Line]) -> tuple[bool, float]:
    stitching, line = pick
    return stitching.surely_above_controls(line), _of_mean(stitching, line)


def _of_mean(stitching: Stitching, line: Line) -> float:
    """Returns the share of what the mean costs that a rung wins back (of zero, without a mean).

    Where the mean alone recovers most of the loss, every rung looks good against zero.
    """
    mean, value = stitching.reference("mean"), line.value("loss_recovered")
    return value if mean is None or mean >= 1 else (value - mean) / (1 - mean)


def _recovered(stitching: Stitching, line: Line) -> str:
    form = " (its features, decoded)" if line.way == "features" else ""
    what = (
        f"{line.kind}{form} of {stitching.source} {stitching.site_source} put into "
        f"{stitching.target} {stitching.site_target}"
    )
    share = f"{percent(line.value('loss_recovered'))} {_percent_interval(line.aligned)}".strip()
    if not stitching.surely_above_controls(line):
        return (
            f"Negative result: even the best translated state, {what}, recovers only {share} of "
            "the loss that zeroing costs, no more than its controls"
        )
    return (
        f"Put to work, the best translated state, {what}, recovers {share} of the loss that "
        f"zeroing costs{_against_token(stitching, line)}"
    )


def _against_token(stitching: Stitching, line: Line) -> str:
    token = next((n.value("loss_recovered") for n in stitching.ways("token")), None)
    if token is None:
        return ""
    more = "more" if line.at_least("loss_recovered") > token else "no more"
    return f", {more} than the table of token means ({percent(token)})"


def _beside(stitching: Stitching, line: Line) -> str:
    values = {
        "the target’s own dictionary": stitching.reference("own_sae"),
        "the mean": stitching.reference("mean"),
        "the same map on shuffled pairs": line.null("loss_recovered"),
        "and of what the mean costs it wins back": _of_mean(stitching, line),
    }
    words = [f"{name} {percent(v)}" for name, v in values.items() if v is not None]
    return f"; beside it {', '.join(words)}" if words else ""


def _percent_interval(row: dict) -> str:
    low, high = row.get("loss_recovered_low"), row.get("loss_recovered_high")
    return f"[{percent(low)}, {percent(high)}]" if low is not None else ""


# ---------------------------------------------------------------- what to be careful with


def cautions(results: Results) -> list[str]:
    """Returns what a reader must know before believing the numbers, found in the numbers."""
    return [
        *_shuffled_above_mean(results.comparisons),
        *_few_documents(results.transfer),
        *_poor_dictionaries(results.reconstruction),
    ]


def _shuffled_above_mean(comparisons: list[Comparison]) -> list[str]:
    return [
        f"On shuffled pairs, where nothing is shared, {line.kind} still “{verdict}” (R² "
        f"{number(line.null('r2'))} {interval(line.shuffled, 'r2')}, {c.source} {c.site_source} → "
        f"{c.target} {c.site_target}): something leaks, do not trust this rung."
        for c in comparisons
        for line in c.lines
        if (verdict := line.null("verdict")) not in (None, NO_BETTER)
    ]


def _few_documents(rows: list[dict]) -> list[str]:
    counts = [row["n_documents"] for row in rows if row.get("n_documents") is not None]
    if not counts or min(counts) >= FEW_DOCUMENTS:
        return []
    return [
        f"Only {min(counts)} held-out documents: the intervals, taken over documents, are rough."
    ]


def _poor_dictionaries(rows: list[dict]) -> list[str]:
    dead = [row for row in rows if (row.get("dead_fraction") or 0) > 0.5]
    poor = [row for row in rows if (row.get("fvu") or 0) > 0.5]
    found = []
    if dead:
        found.append(f"More than half of the features are dead in {_listed(dead, rows)}.")
    if poor:
        found.append(f"More than half of the variance is missed by {_listed(poor, rows)}.")
    return found


def _listed(some: list[dict], rows: list[dict]) -> str:
    shown = [f"{r['model']} {r['site']} {dictionary_name(r)}" for r in some[:3]]
    more = ", …" if len(some) > 3 else ""
    return f"{len(some)} of {len(rows)} dictionaries ({', '.join(shown)}{more})"
