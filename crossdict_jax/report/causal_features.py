"""Single features of one model put into another: dose curves, verdicts, tokens, for the page."""

from __future__ import annotations

from itertools import groupby

from crossdict_jax.report.plots import INK, MUTED, OPEN, STRONG, Figure, draw, open_axes
from crossdict_jax.report.results import PLACE, site_words
from crossdict_jax.report.tables import Cell, Column, Table, flat_table, interval, number, percent

MOST_TOKENS = 5  # of those that a feature promotes, printed in a row
SUMMARY = (
    Column("direction", numeric=False),
    Column("features"),
    Column("transfer"),
    Column("effect, nats"),
    Column("specific, over random"),
    Column("over other features"),
    Column("over random, equal KL"),
    Column("KL"),
    Column("of the match’s"),
    Column("removal r"),
)
FEATURES = (
    Column("feature"),
    Column("promotes in the source", numeric=False),
    Column("measured in the target", numeric=False),
    Column("effect, nats"),
    Column("specific, over random"),
    Column("over other features"),
    Column("KL"),
    Column("q"),
    Column("removal r"),
    Column("match", hint="r"),
)


def section(rows: list[dict], summary: list[dict]) -> list[dict]:
    """Returns, for every direction and layer pair, the figures and tables that the page shows."""
    return [_group(list(group), rows) for _, group in groupby(summary, key=_place)]


def _place(row: dict) -> tuple:
    return tuple(row[key] for key in PLACE)


def _group(summary: list[dict], rows: list[dict]) -> dict:
    first = summary[0]
    here = [row for row in rows if _place(row) == _place(first)]
    of_directions = [[r for r in here if r["direction"] == s["direction"]] for s in summary]
    return {
        "title": f"{first['source']} → {first['target']}, "
        f"{site_words(first['site_source'], first['site_target'])}",
        "figures": [dose_figure(own) for own in of_directions if own],
        "summary": _summary_table(summary),
        "tables": [_feature_table(own) for own in of_directions if own],
        "raw": flat_table(
            [{k: v for k, v in row.items() if k != "doses"} for row in here],
            "Every column of feature_causal.jsonl but the dose curves",
            ("direction", "feature"),
        ),
    }


def dose_figure(rows: list[dict]) -> Figure:
    """Returns the dose curves of one map (or the match): features, their mean, the controls."""
    doses = [dose["alpha"] for dose in rows[0]["doses"]]

    def mean(key: str) -> list[float]:
        return [sum(r["doses"][i][key] for r in rows) / len(rows) for i in range(len(doses))]

    def paint(axes):
        low, high = mean("random_low"), mean("random_high")
        axes.fill_between(doses, low, high, color=MUTED, alpha=0.25, linewidth=0)
        axes.plot(doses, mean("random"), color=MUTED, label="random")
        axes.plot(doses, mean("shuffled"), "--", color=MUTED, label="other features")
        for row in rows:
            curve = [dose["effect"] for dose in row["doses"]]
            colour = STRONG if row["transfers"] else MUTED
            axes.plot(doses, curve, color=colour, linewidth=0.5, alpha=0.6)
        axes.plot(doses, mean("effect"), color=INK, marker="o", markersize=3, label="direction")
        axes.set_title(rows[0]["direction"])
        open_axes(axes, "dose (alpha)", "change of log p, nats")
        axes.legend(loc="upper left")

    name = f"doses {' '.join(_place(rows[0]))} {rows[0]['direction']}"
    ends = ", ".join(f"{number(x, 2)}: {number(y, 2)}" for x, y in zip(doses, mean("effect")))
    words = (
        f"Mean change of the log-probability of promoted tokens by dose, {rows[0]['direction']}, "
        f"{rows[0]['source']} to {rows[0]['target']}: {ends}; random directions at the largest "
        f"dose {number(mean('random')[-1], 2)}."
    )
    return Figure(draw(paint, name=name, margins=OPEN), words)


def _summary_table(summary: list[dict]) -> Table:
    return Table("What holds over the tested features", list(SUMMARY), [_over(s) for s in summary])


def _over(row: dict) -> list[Cell]:
    low, high = (row[f"share_transferring_{end}"] for end in ("low", "high"))
    share = f"[{percent(low, 0)}, {percent(high, 0)}]"
    style = "strong" if row["n_transferring"] else "none"
    removal = number(row["ablation_r_shuffled"])
    return [
        Cell(row["direction"]),
        Cell(number(row["n_features"])),
        Cell(percent(row["share_transferring"], 0), note=share, style=style),
        _scored(row, "effect"),
        _scored(row, "specific_random"),
        _scored(row, "specific_shuffled"),
        _scored(row, "specific_random_at_kl"),
        Cell(number(row["kl"])),
        Cell(percent(row["of_match"], 0)),
        Cell(number(row["ablation_r"]), note=interval(row, "ablation_r"), null=removal),
    ]


def _feature_table(rows: list[dict]) -> Table:
    ordered = sorted(rows, key=lambda row: (row["q"], -row["specific_random"]))
    caption = f"Single features, by {rows[0]['direction']}"
    return Table(caption, list(FEATURES), [_feature(row) for row in ordered])


def _feature(row: dict) -> list[Cell]:
    verdict = ("strong", "● transfers") if row["transfers"] else ("none", "○ not shown")
    return [
        Cell(str(row["feature"]), note=verdict[1], style=verdict[0]),
        Cell(_tokens(row["promoted_source"])),
        Cell(_tokens(row["promoted_target"])),
        _scored(row, "effect"),
        _scored(row, "specific_random"),
        _scored(row, "specific_shuffled"),
        Cell(number(row["kl"])),
        Cell(number(row["q"])),
        Cell(number(row["ablation_r"], 2), null=number(row["ablation_r_shuffled"], 2)),
        Cell(str(row["match"]), note=number(row["match_r"], 2)),
    ]


def _tokens(tokens: list[str]) -> str:
    shown = [token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") for token in tokens]
    return " · ".join(shown[:MOST_TOKENS])


def _scored(row: dict, key: str) -> Cell:
    return Cell(number(row[key]), note=interval(row, key))


def answer(summary: list[dict]) -> list[tuple[str, str]]:
    """Returns the sentence about single features, with its heading; none without a test."""
    maps = [row for row in summary if row["direction"] != "match"]
    if not maps:
        return []
    best = max(maps, key=lambda row: (row["share_transferring"], row["specific_random"] or 0))
    low, high = (percent(best[f"share_transferring_{end}"], 0) for end in ("low", "high"))
    match = next(
        (s for s in summary if s["direction"] == "match" and _place(s) == _place(best)), None
    )
    beside = f"; the target’s best matching features: {_hits(match)}" if match else ""
    head = "Put" if best["n_transferring"] else "Negative result: put"
    return [
        (
            "Feature by feature",
            f"{head} into {best['target']}, the {best['direction']} directions of {_hits(best)} "
            f"tested features of {best['source']} make the same text likelier, beyond random "
            "directions and other features’ directions "
            f"({percent(best['share_transferring'], 0)} [{low}, {high}]; "
            f"{number(best['specific_random'], 2)} nats over random){beside}.",
        )
    ]


def _hits(row: dict) -> str:
    return f"{row['n_transferring']} of {row['n_features']}"
