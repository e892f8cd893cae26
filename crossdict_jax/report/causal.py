"""Sections about causal tests: stitching, several layers at once, single features."""

from collections.abc import Iterator

import numpy as np

from crossdict_jax.report.blocks import Block, Details, Heading, Panels
from crossdict_jax.report.plots import (
    INK,
    MUTED,
    NONE,
    STRONG,
    Figure,
    drawing,
    score_figure,
    score_limits,
)
from crossdict_jax.report.results import Comparison, Run, directions, stitchings
from crossdict_jax.report.tables import Cell, Table, heading, number, score, scores, share, table
from crossdict_jax.results import by_pair, grouped, pair_of, pair_words

MAX_TOKENS = 5  # that a feature promotes, printed in a row
KEYS = ("alpha", "effect", "random", "random_low", "random_high", "shuffled")  # of a dose


def stitching_section(run: Run) -> Iterator[Block]:
    single, together = (stitchings(run.rows["causal"], together=x) for x in (False, True))
    if not single:
        return
    yield (
        "The target reads held-out text, and at the paired positions its activation is replaced by "
        "what a map predicts from the source: the predicted activation itself, or the predicted "
        "features, decoded by the target’s dictionary. Loss recovered is 1 when the target works "
        "as if untouched and 0 when the replacement is as bad as zeros."
    )
    for (source, target), group in directions(single).items():
        yield Heading(f"{source} → {target}")
        yield Panels(
            list(map(stitching_figure, group)),
            f"Loss recovered in {target} from {source}, with 95 % intervals over documents. "
            "Crosses: the same map on shuffled pairs. Lines: the target with its mean, or its own "
            "dictionary’s reconstruction, in place of its activation. Blue: surely above zero, the "
            "mean and the shuffled pairs.",
        )
    if together:
        yield Heading("Several layers at once")
        yield Panels(
            list(map(stitching_figure, together)),
            "All layer pairs of a direction at once: the target’s layers are replaced in one pass. "
            "In a residual stream a higher layer’s replacement overwrites, at paired positions, "
            "what a lower one made of it; the lower ones reach the output through the positions "
            "that are not paired, by attention. What attention or an MLP adds to it is kept.",
        )
    cells = []
    for s in single + together:
        own = [row | {"map": heading(control)} for control, row in s.references.items()]
        cells += [
            {"sites": s.name, "put in": line["map"], "form": line["stitch_kind"] or "control"}
            | scores(line, "loss_recovered", "ce", "kl", null="shuffled.")
            for line in s.lines + own
        ]
    title = "Loss recovered, CE and KL of every prediction that is put in; ×: on shuffled pairs"
    yield Details(title, [table(title, cells)])


def stitching_figure(stitching: Comparison) -> Figure:
    """Returns the loss recovered per map, beside the target's own controls."""
    key, lines = "loss_recovered", {}
    for line in stitching.lines:
        form = ", features" if line["stitch_kind"] == "features" else ""
        colour = STRONG if stitching.above_controls(line) else NONE
        lines[f"{line['map']}{form}"] = (line, colour)
    several, pair = "+" in stitching.site_target, f"{stitching.source} → {stitching.target}"
    return score_figure(
        lines,
        key,
        title=pair if several else stitching.sites,
        x="loss recovered: 0 zeros, 1 untouched",
        words=f"Loss recovered, {stitching.name}",
        limits=score_limits(stitching.lines, key, -0.6, 1.0),
        references={heading(c): stitching.reference(c) for c in ("mean", "own_sae")},
    )


def feature_causal_section(run: Run) -> Iterator[Block]:
    summary = run.rows["feature_causal_summary"]
    if not summary:
        return
    yield (
        "A feature of the source is added to the source where it fires; the tokens that become "
        "likelier are what it promotes. Then its mapped direction is added to the target at the "
        "same positions, and the change of the log-probability of the same text is measured. "
        "Controls are random directions and other features’ mapped directions, of equal norm; a "
        "feature transfers where it beats both, at the false discovery rate of the settings. "
        "“match” is the target’s own feature that correlates best. Removal r: how alike taking the "
        "feature out of the source, and its mapped direction out of the target, changes the "
        "prediction of the following text."
    )
    tested = by_pair(run.rows["feature_causal"])
    for pair, group in by_pair(summary).items():
        by_kind = grouped(tested.get(pair, []), "direction").values()
        yield Heading(pair_words(group[0]))
        yield Panels(
            list(map(dose_figure, by_kind)),
            "Change of the log-probability of the promoted tokens by dose: every feature (blue "
            "where it transfers), their mean (dots), random directions (band of 95 % of them) and "
            "other features’ mapped directions (dashed).",
        )
        yield summary_table(group)
        for told in map(features_table, by_kind):
            yield Details(told.caption, [told])


def summary_table(rows: list[dict]) -> Table:
    """Returns the means over tested features, a line per kind of mapped direction."""
    cells = [
        {"mapped by": row["direction"]}
        | scores(row, "n_features")
        | {"transfer": share(row, "share_transferring")}
        | scores(row, "effect", "specific_random", "specific_shuffled", "specific_random_at_kl")
        | scores(row, "kl")
        | {"of the match’s": share(row, "of_match")}
        | {"removal r": score(row, "ablation_r", null="ablation_r_shuffled")}
        | {"of features": number(row.get("n_ablation"))}
        for row in rows
    ]
    return table("What holds over the tested features; effects in nats", cells)


def features_table(rows: list[dict]) -> Table:
    """Returns the features tested with one kind of mapped direction, best first."""
    signs = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "␣"})
    cells = []
    for row in sorted(rows, key=lambda row: (row["q"], -row["specific_random"])):
        style, verdict = ("strong", "● transfers") if row["transfers"] else ("none", "○ not shown")
        promoted = [
            " · ".join(token.translate(signs) for token in row[f"promoted_{side}"][:MAX_TOKENS])
            for side in ("source", "target")
        ]
        cells.append(
            {
                "feature": Cell(str(row["feature"]), verdict, style=style),
                "promotes in the source": promoted[0],
                "measured in the target": promoted[1],
                **scores(row, "effect", "specific_random", "specific_shuffled", "kl", "q"),
                "removal r": score(row, "ablation_r", 2, null="ablation_r_shuffled"),
                "match, r": Cell(str(row["match"]), number(row["match_r"], 2)),
            }
        )
    return table(f"Single features, by {rows[0]['direction']}; effects in nats", cells)


def dose_figure(rows: list[dict]) -> Figure:
    """Returns dose curves of one kind of direction: every feature, their mean, the controls."""
    (source, target, *_), kind = pair_of(rows[0]), rows[0]["direction"]
    curves = {key: np.array([[dose[key] for dose in row["doses"]] for row in rows]) for key in KEYS}
    doses, effect, random, low, high, shuffled = (
        curve.mean(0).tolist() for curve in curves.values()
    )
    ends = ", ".join(f"{number(x, 2)}: {number(y, 2)}" for x, y in zip(doses, effect))
    told = (
        f"Mean change of the log-probability of promoted tokens by dose, {kind}, {source} to "
        f"{target}: {ends}; random directions at the largest dose {number(random[-1], 2)}."
    )
    with drawing(told, legend=3) as (axes, figure):
        axes.fill_between(doses, low, high, color=MUTED, alpha=0.25, linewidth=0)
        axes.plot(doses, random, color=MUTED, label="random")
        axes.plot(doses, shuffled, "--", color=MUTED, label="other features")
        for row, curve in zip(rows, curves["effect"]):
            colour = STRONG if row["transfers"] else MUTED
            axes.plot(doses, curve, color=colour, linewidth=0.5, alpha=0.6)
        axes.plot(doses, effect, color=INK, marker="o", markersize=3, label="mapped")
        axes.set(title=kind, xlabel="dose (alpha)", ylabel="change of log p, nats")
        axes.grid(axis="y")
    return figure


def answer(run: Run) -> str:
    """Returns the sentence about single features, "" without a test."""
    summary = run.rows["feature_causal_summary"]
    maps = [row for row in summary if row["direction"] != "match"]
    if not maps:
        return ""
    best = max(maps, key=lambda row: (row["share_transferring"], row["specific_random"] or 0))
    cell, hits = share(best, "share_transferring"), "{n_transferring} of {n_features}"
    match = [r for r in summary if r["direction"] == "match" and pair_of(r) == pair_of(best)]
    beside = "".join(f"; the target’s best matching features: {hits.format(**r)}" for r in match)
    head = "Put" if best["n_transferring"] else "Negative result: put"
    return (
        f"{head} into {best['target']}, the directions to which {best['direction']} maps "
        f"{hits.format(**best)} tested features of {best['source']} make the same text likelier, "
        f"beyond random directions and other features’ ({cell.text} {cell.note}, the best of "
        f"{len(maps)} maps and directions; "
        f"{number(best['specific_random'], 2)} nats over random){beside}."
    )
