"""The main result of a run on the terminal: one table that fits a screen."""

from __future__ import annotations

from crossdict_jax.report import shared
from crossdict_jax.report.answer import best
from crossdict_jax.report.results import Comparison, read_run
from crossdict_jax.report.tables import (
    VERDICTS,
    Cell,
    Column,
    interval,
    number,
    percent,
    show,
    table,
    words,
)
from crossdict_jax.results import LINEAR_MAPS
from crossdict_jax.workdir import Workdir

WIDTH = 118  # characters, where the output is no terminal


def summary_table(work: Workdir) -> None:
    """Prints baselines, the best maps and the ceiling of every direction and layer pair.

    Raises:
      UserError: a result file that it needs is missing or damaged.
    """
    run = read_run(work)
    signs = ", ".join(f"{sign} {words}" for words, (_, sign) in VERDICTS.items())
    columns = main_columns({s.name: s for s in run.stitchings()})
    show([table(f"R² on held-out documents [95 %]; {signs}", columns, run.comparisons)], WIDTH)
    for row in shared.funnels(run):
        print(
            f"{shared.pair_name(row)}: {number(row['matched'])} features matched, "
            f"{number(row['confirmed'])} confirmed (shuffled pairs: "
            f"{number(row.get('shuffled.confirmed'))}), {percent(row['share'], 0)} of those that "
            "could"
        )
    for row in shared.proposals(run):
        print(
            f"{row['source']} ↔ {row['target']}: layers most alike by CKA, "
            f"{number(row['cka'], 2)} (this run's {number(row['cka_of_run'], 2)}): "
            f"--config.layer_pairs={row['layer_pairs']}"
        )
    print(f"All numbers: {work.results} (described in crossdict_jax/docs/results.md)")


def main_columns(stitchings: dict[str, Comparison]) -> list[Column]:
    """Returns the columns of the main result: R² of baselines, best maps and ceiling.

    Args:
      stitchings: by the name of the comparison that they belong to.
    """

    def score(row: dict, key: str = "r2", name: str = "") -> Cell:
        return Cell(f"{number(row.get(key))} {name}\n{interval(row, key, 2)}")

    def token(comparison: Comparison) -> Cell:
        return score(next((n for n in comparison.lines if n["map"] == "token"), {}))

    def of_best(title: str, linear: bool) -> Column:
        def cell(comparison: Comparison) -> Cell:
            lines = [n for n in comparison.fitted if (n["map"] in LINEAR_MAPS) == linear]
            line = max(lines, key=lambda line: line["r2"] or 0.0, default={"map": ""})
            _, sign = VERDICTS.get(line.get("verdict"), ("", ""))
            return score(line, name=f"{line['map']} {sign}")

        return Column(title, cell=cell)

    def highest(comparison: Comparison, key: str) -> dict:
        lines = [line for line in comparison.lines if line.get(key) is not None]
        return max(lines, key=lambda line: line[key], default={})

    def shuffled(comparison: Comparison) -> Cell:
        nulls = (line.get("shuffled.r2") for line in comparison.fitted)
        return Cell(number(max((null for null in nulls if null is not None), default=None)))

    def recovered(comparison: Comparison) -> Cell:
        stitching = stitchings.get(comparison.name)
        pick = best([stitching], "loss_recovered") if stitching else None
        if pick is None:
            return Cell("–")
        text = percent(pick[1]["loss_recovered"], 0)
        return Cell(f"{text}\nmean {percent(stitching.reference('mean'), 0)}")

    return [
        words("source → target, site", lambda c: f"{c.source} → {c.target}\n{c.sites}"),
        Column("mean", cell=lambda c: Cell(number(c.score("mean", "r2")))),
        Column("token", cell=token),
        of_best("best linear", True),
        of_best("best nonlinear", False),
        Column("shuffled", cell=shuffled),
        Column("ceiling", cell=lambda c: score(highest(c, "ceiling.r2"), "ceiling.r2")),
        Column("loss rec.", cell=recovered),
    ]
