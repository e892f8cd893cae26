"""The main result of a run on the terminal: one table that fits a screen."""

from __future__ import annotations

from crossdict_jax.report import shared
from crossdict_jax.report.answer import best
from crossdict_jax.report.results import Run, read_run
from crossdict_jax.report.tables import (
    VERDICTS,
    Cell,
    Table,
    interval,
    number,
    percent,
    show,
    table,
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
    show([main_table(run)], WIDTH)
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


def main_table(run: Run) -> Table:
    """Returns the main result, a line per direction and layer pair.

    R² of the baselines, of the best linear and nonlinear map, of the best fitted map on shuffled
    pairs and of the best ceiling; and the share of the loss that the best stitched map recovers.
    """
    stitchings = {s.name: s for s in run.stitchings()}
    rows = []
    for c in run.comparisons:
        linear = [line for line in c.fitted if line["map"] in LINEAR_MAPS]
        nonlinear = [line for line in c.fitted if line["map"] not in LINEAR_MAPS]
        baselines = {line["map"]: line for line in c.lines}
        stitching = stitchings.get(c.name, c)
        pick = best([stitching], "loss_recovered")
        recovered = pick[1]["loss_recovered"] if pick else None
        mean = percent(stitching.reference("mean"), 0)
        rows.append(
            {
                "direction": f"{c.source} → {c.target}\n{c.sites}",
                "mean": Cell(number(c.score("mean", "r2"))),
                "token": _highest([baselines.get("token", {})], "r2"),
                "best linear": _highest(linear, "r2", named=True),
                "best nonlinear": _highest(nonlinear, "r2", named=True),
                "shuffled": Cell(_highest(c.fitted, "shuffled.r2").text.partition("\n")[0]),
                "ceiling": _highest(c.lines, "ceiling.r2"),
                "loss rec.": Cell(f"{percent(recovered, 0)}\nmean {mean}"),
            }
        )
    signs = ", ".join(f"{sign} {words}" for words, (_, sign) in VERDICTS.items())
    return table(f"R² on held-out documents [95 %]; {signs}", rows)


def _highest(lines: list[dict], key: str, *, named: bool = False) -> Cell:
    """The highest score of some maps, its interval in a second line."""
    scored = [line for line in lines if line.get(key) is not None]
    line = max(scored, key=lambda line: line[key], default={})
    _, sign = VERDICTS.get(line.get("verdict"), ("", ""))
    name = f" {line.get('map', '')} {sign}" if named else ""
    return Cell(f"{number(line.get(key))}{name}\n{interval(line, key, 2)}")
