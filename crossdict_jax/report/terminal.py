"""What the commands end with on the terminal: one small table each."""

import textwrap
from collections import Counter
from pathlib import Path

import crossdict_jax
from crossdict_jax.report import causal, shared
from crossdict_jax.report.answer import best_by_direction
from crossdict_jax.report.inputs import coverage, fvu
from crossdict_jax.report.results import (
    DIVERGED,
    Comparison,
    Run,
    highest,
    read_run,
    stitchings,
    trainings,
)
from crossdict_jax.report.tables import (
    VERDICTS,
    Table,
    interval,
    number,
    percent,
    scores,
    share,
    show,
    table,
)
from crossdict_jax.results import LINEAR_MAPS, by_pair, map_order, read_if_there
from crossdict_jax.workdir import Workdir, read_json

WIDTH = 118  # characters, where the output is no terminal
MAX_PAIRS = 8  # more do not fit a screen: then each direction's best one


def pairing_table(work: Workdir) -> None:
    """Prints how many token ends of each model are rows."""
    show([coverage(read_json(work.result("pairing.json")))], WIDTH)


def training_table(work: Workdir) -> None:
    """Prints the last metrics of dictionaries, means over those that were trained together."""
    rows, keys = [], ("loss", "fvu", "l0", "dead_fraction")
    for group, labels, (*_, last) in trainings(work.dictionaries):
        means = {key: sum(last[key]) / len(labels) for key in keys if key in last}
        cells = {"trained together": group, "members": number(len(labels))}
        cells |= {"steps": number(last["step"] + 1)} | scores(means, *keys)
        rows.append(cells | {"FVU": fvu(means)})
    show([table("Dictionaries: last training metrics, means", rows)] if rows else [], WIDTH)


def map_table(work: Workdir) -> None:
    """Prints how many maps of each kind were fitted, on aligned and on shuffled pairs."""
    fitted = Counter(folder.name for folder in work.maps.glob("*-to-*/*/*") if folder.is_dir())
    kinds = sorted({name.removesuffix("-shuffled") for name in fitted}, key=map_order)
    names = {"fitted": "", "on shuffled pairs": "-shuffled"}
    counts = [
        {"map": k} | {title: number(fitted[k + end]) for title, end in names.items()} for k in kinds
    ]
    show([table("Maps", counts)], WIDTH)


def causal_table(work: Workdir) -> None:
    """Prints the best stitched map beside its controls, and how many single features transfer."""
    summary, rows = read_if_there(work, "feature_causal_summary.jsonl"), []
    tested = by_pair(row for row in summary if row["direction"] != "match")
    for s in fitting(stitchings(read_if_there(work, "causal.jsonl")), "loss_recovered"):
        line = highest(s.fitted, "loss_recovered")
        pair = (s.source, s.target, s.site_source, s.site_target)
        single = highest(tested.get(pair, []), "share_transferring")
        rows.append(
            {
                "direction": f"{s.source} → {s.target}\n{s.sites}",
                "best map": line.get("map", "–"),
                "recovered": share(line, "loss_recovered"),
                "shuffled": share(line, "shuffled.loss_recovered"),
                "mean": percent(s.reference("mean"), 0),
                "own dictionary": percent(s.reference("own_sae"), 0),
                "single features": "{n_transferring} of {n_features}, {direction}".format(**single)
                if single
                else "–",
            }
        )
    title = "Loss recovered in the target by what is predicted [95 %], and features that transfer"
    show([table(title, rows)], WIDTH)


def fitting(compared: list[Comparison], key: str) -> list[Comparison]:
    """Returns all layer pairs if they fit a screen, else each direction's best one."""
    if len(compared) <= MAX_PAIRS:
        return compared
    return [comparison for comparison, _ in best_by_direction(compared, key)]


def gates_table(gates: list[dict], *, missed: bool = False) -> Table:
    """Returns the gates of verify.json: a head for each, then its numbers (or those missed)."""
    rows, words = [], {True: "yes", False: "MISS"}
    for gate in gates:
        head = {"gate": gate["gate"], "number": f"{gate['what']} {gate['note']}".strip()}
        rows.append(head | {"value": "", "bound": "", "pass": words[gate["passed"]]})
        for check in (c for c in gate["checks"] if not (missed and c["passed"])):
            value, bounded = check["value"], check["relation"]
            rows.append(
                {
                    "gate": "",
                    "number": check["what"],
                    "value": "–" if value is None else f"{value:.4g}",
                    "bound": f"{bounded} {check['bound']:.4g}" if bounded else "",
                    "pass": words[check["passed"]] if bounded else "",
                }
            )
    return table("gates", rows)


def summary_table(work: Workdir) -> None:
    """Prints the main result, the run's sentences, and where the numbers are.

    Raises:
      UserError: a result file that it needs is missing or damaged.
    """
    run = read_run(work)
    show([main_table(run)], WIDTH)
    for sentence in filter(None, (shared.answer(run), causal.answer(run))):
        print(textwrap.fill(sentence, WIDTH))
    alone = " alone" if len(run.pairing["models"]) > 2 else ""
    for row in shared.better_layers(run):
        print(
            f"{row['source']} ↔ {row['target']}{alone}: layers most alike by CKA, "
            f"{number(row['cka'], 2)} (this run's {number(row['cka_of_run'], 2)}): "
            f"--config.layer_pairs={row['layer_pairs']}"
        )
    described = Path(crossdict_jax.__file__).parent / "docs/results.md"
    print(f"All numbers: {work.results} (described in {described})")


def main_table(run: Run) -> Table:
    """Returns the main result, a line per direction and layer pair, or per direction at its best.

    R² of the baselines and of the best linear and nonlinear map; the highest that a fitted map has
    on shuffled pairs, and as its ceiling; and the share of the loss that the best stitched map
    recovers.
    """

    def best(lines: list[dict], key: str = "r2", *, named: bool = False) -> str:
        """The highest score of some maps, its interval in a second line."""
        line = highest(lines, key)
        _, sign, _ = VERDICTS.get(line.get("verdict"), ("", "", ""))
        name = f" {line.get('map', '')} {sign}" if named else ""
        return f"{number(line.get(key))}{name}\n{interval(line, key, 2)}"

    compared, rows = fitting(run.comparisons, "r2"), []
    stitched = {s.name: s for s in stitchings(run.rows["causal"])}
    dictionaries = run.rows["reconstruction"]
    diverged = {(d["model"], d["site"]) for d in dictionaries if (d["fvu"] or 0) > DIVERGED}
    for c in compared:
        stitching = stitched.get(c.name, c)
        recovered = highest(stitching.fitted, "loss_recovered").get("loss_recovered")
        linear = [line for line in c.fitted if line["map"] in LINEAR_MAPS]
        rest = [line for line in c.fitted if line not in linear]
        ends = {(c.source, c.site_source), (c.target, c.site_target)}
        warning = "⚠ " if ends & diverged else ""
        rows.append(
            {
                "direction": f"{warning}{c.source} → {c.target}\n{c.sites}",
                "mean": number(c.score("mean", "r2")),
                "token": best([line for line in c.lines if line["map"] == "token"]),
                "best linear": best(linear, named=True),
                "best nonlinear": best(rest, named=True),
                "shuffled": number(highest(c.fitted, "shuffled.r2").get("shuffled.r2")),
                "ceiling": best(c.fitted, "ceiling.r2"),
                "loss rec.": f"{percent(recovered, 0)}\n"
                f"mean {percent(stitching.reference('mean'), 0)}",
            }
        )
    signs = ", ".join(f"{sign} {words}" for words, (_, sign, _) in VERDICTS.items())
    signs += f", ⚠ dictionary with an FVU above {DIVERGED:g}" if diverged else ""
    if len(compared) < len(run.comparisons):
        signs += f"; each direction at the best of {len(run.comparisons)} layer pairs in all"
    return table(f"R² on held-out documents [95 %]; {signs}", rows)
