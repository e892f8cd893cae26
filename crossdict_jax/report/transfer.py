"""Sections about maps between models: transfer, single features, controls."""

from collections.abc import Iterator

from crossdict_jax.report.blocks import Block, Details, Facts, Heading, Panels
from crossdict_jax.report.plots import MUTED, NONE, STRONG, WEAK, Figure, score_figure, score_limits
from crossdict_jax.report.results import Comparison, Run, directions
from crossdict_jax.report.tables import (
    VERDICTS,
    Cell,
    Table,
    heading,
    number,
    score,
    scores,
    share,
    table,
)
from crossdict_jax.results import BASELINES, by_pair, pair_words

COLOURS = {"strong": STRONG, "weak": WEAK, "none": NONE, "": MUTED}
SCORES = (  # of a map, as its table shows them
    *("r2", "context_gain", "cosine", "cosine_mean_predictor", "cosine_centered", "top1"),
    *("mean_rank", "feature_correlation", "sparsity_similarity", "l0_predicted"),
)


def verdict(line: dict) -> tuple[str, str, str]:
    """Returns (style, sign, words) of a map's verdict; baselines have neither style nor sign."""
    if line["map"] in BASELINES:
        return "", "", "baseline"
    style, sign, _ = VERDICTS.get(line["verdict"], ("", "", ""))
    return style, sign, line["verdict"] or "no verdict"


def transfer_section(run: Run) -> Iterator[Block]:
    yield (
        "Every map predicts the target’s features from the source at the same text position, "
        "fitted on training documents and scored on held-out ones. The null (×) is the same map "
        "fitted and scored on shuffled pairs, where nothing is shared. Verdicts compare each map, "
        "by paired bootstrap, with the two that need no activations: the mean, and the table of "
        "token means."
    )
    yield Facts([(f"{sign} {words}", colour) for words, (_, sign, colour) in VERDICTS.items()])
    for (source, target), group in directions(run.comparisons).items():
        token = ", and the source’s token map, which a map must pass to show shared context"
        shown = any(line["map"] == "token" for c in group for line in c.lines)
        yield Heading(f"{source} → {target}")
        yield Panels(
            [r2_figure(c, group) for c in group],
            f"R² of each map from {source} to {target}, with 95 % intervals over documents. "
            f"Crosses: the null. Lines: the mean (R² 0){token if shown else ''}. Colours are "
            "verdicts.",
        )
        yield from map(transfer_table, group)


def transfer_table(comparison: Comparison) -> Table:
    """Returns every score of every map at one layer pair, its shuffled null below it."""
    row, rows = comparison.lines[0], []
    for line in comparison.lines:
        style, sign, text = verdict(line)
        cells = {"map, verdict": Cell(line["map"], f"{sign} {text}".strip(), style=style)}
        rows.append(cells | scores(line, *SCORES, null="shuffled."))
    pool = row["pool"]
    top1, rank = (number(1 / pool, 4), number((pool + 1) / 2, 1)) if pool else ("–", "–")
    caption = (
        f"{comparison.name}: {number(row['n_rows'])} rows of {number(row['n_documents'])} held-out "
        f"documents; retrieval pool {number(pool)}, by chance top-1 {top1} and mean rank {rank}; "
        f"L0 of the source {number(row['l0_source'], 1)}, of the target "
        f"{number(row['l0_target'], 1)}"
    )
    return table(caption, rows)


def r2_figure(comparison: Comparison, group: list[Comparison]) -> Figure:
    """Returns R² of every map, its null and the token's, on one x axis for all of the group."""
    return score_figure(
        {line["map"]: (line, COLOURS[verdict(line)[0]]) for line in comparison.lines},
        "r2",
        title=comparison.sites,
        x="R² on held-out documents",
        words=f"R², {comparison.name}",
        limits=score_limits([line for c in group for line in c.lines], "r2", -0.5, 0.1),
        references={"mean": 0.0, "token": comparison.score("token", "r2")},
    )


def features_section(run: Run) -> Iterator[Block]:
    rows = run.rows["feature_transfer"]
    if not rows:
        return
    yield (
        "Which of the target’s features that fire on at least 20 held-out rows can be computed "
        "from the source, and which cannot, by the map with the highest R² on validation rows? "
        "Extremes of many are flattered by the choice; the small R² is that of validation rows, "
        "which had no part in it. The token that fires is in «»; ⏎ ends a line. A driver’s number "
        "is its effect: by how many standard deviations the feature moves with the source feature, "
        "from the map’s mean Jacobian over held-out rows (exact where it is affine), through the "
        "source’s decoder for a map that reads activations."
    )
    yield from map(features_table, by_pair(r for r in rows if r["row"] == "feature").values())
    bins = [
        {"direction": pair_words(row), "map": row["map"], "bins of": heading(row["row"])}
        | {"from": number(row["low"]), "to": number(row["high"])}
        | scores(row, "n_features", "r2_median")
        for row in rows
        if row["row"] != "feature"
    ]
    title = "Features in bins of firing frequency and of token share"
    yield Details(title, [table(title, bins)])


def features_table(rows: list[dict]) -> Table:
    """Returns single features of one layer pair: their scores, contexts, matches and drivers."""
    source, target, cells = rows[0]["source"], rows[0]["target"], []
    for row in rows:
        texts = [f"{c['before']}«{c['token']}»{c['after']}" for c in row["contexts"]] or [""]
        first, *others = [text.replace("\n", "⏎").replace("\t", "⇥") for text in texts]
        style, match = "strong" if row["rank"] == "most" else "none", row["match"]
        drivers = []
        for driven in (d for d in row["attributions"] if d["drivers"]):
            effects = [f"#{d['feature']} {number(d['effect'], 2)}" for d in driven["drivers"]]
            notes = ["exact"] if driven["exact"] else []
            if driven["stability"] is not None:
                notes.append(f"stability {number(driven['stability'], 2)}")
            note = f" ({', '.join(notes)})" if notes else ""
            drivers.append(f"{driven['map']}: {', '.join(effects)}{note}")
        match_r = f"r {number(match['correlation'], 2)}"
        cells.append(
            {
                f"feature of {target}": Cell(f"#{row['feature']}", row["rank"], style=style),
                "R², on validation rows": Cell(number(row["r2"]), number(row["r2_validation"])),
                "correlation": score(row, "correlation", 2),
                "fires on": share(row, "frequency", 1),
                "its token explains": share(row, "token_share"),
                "where it fires most": Cell(first, " | ".join(others)),
                f"best match in {source}": Cell(f"#{match['feature']}", match_r),
                f"driven by, in {source}": "; ".join(drivers) or "–",
            }
        )
    caption = f"Most and least transferable features, {pair_words(rows[0])}, by {rows[0]['map']}"
    return table(caption, cells)


def controls_section(run: Run) -> Iterator[Block]:
    if not run.rows["controls"]:
        return
    yield (
        "The seed-to-seed ceiling is the same map from a second dictionary of the target, of "
        "another seed, or from its own tokens. The normalised score is 0 at the shuffled pairs and "
        "1 at the ceiling, undefined where they lie closer than 0.05. The re-initialised target "
        "has new weights and a dictionary of its own: tokens explain most of it, so its R² may be "
        "high, but none of its context gain comes from training."
    )
    for c in run.comparisons:
        rows = [
            {"map": line["map"]}
            | scores(line, "r2", "shuffled.r2", "ceiling.r2", "untrained.r2")
            | scores(line, "r2_normalized", "top1_normalized", "context_gain")
            | scores(line, "ceiling.context_gain", "untrained.context_gain")
            for line in c.lines
            if {"ceiling.map", "untrained.map"} & line.keys()
        ]
        if rows:
            yield table(f"Controls, {c.name}", rows)
