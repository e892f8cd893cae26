"""What the commands end with on the terminal: one small table each."""

import textwrap
from collections import Counter
from itertools import groupby

from crossdict_jax.report import causal, shared
from crossdict_jax.report.answer import best
from crossdict_jax.report.inputs import coverage, fvu
from crossdict_jax.report.results import Comparison, Run, read_run, stitchings
from crossdict_jax.report.tables import (
    VERDICTS,
    Cell,
    Table,
    interval,
    number,
    percent,
    scores,
    share,
    show,
    table,
)
from crossdict_jax.results import LINEAR_MAPS, map_order, pair_of, read_if_there
from crossdict_jax.workdir import Workdir, read_json, read_jsonl

WIDTH = 118  # characters, where the output is no terminal
MAX_PAIRS = 8  # more do not fit a screen: then each direction's best one


def pairing_table(work: Workdir) -> None:
    """Prints how many token ends of each model are rows."""
    show([coverage(read_json(work.result("pairing.json")))], WIDTH)


def training_table(work: Workdir) -> None:
    """Prints the last metrics of dictionaries, means over those that were trained together."""
    rows, keys = [], ("loss", "fvu", "l0", "dead_fraction")
    for path in sorted((work.dictionaries / "training").glob("*/metrics.jsonl")):
        for last in read_jsonl(path)[-1:]:
            n = len(read_json(path.with_name("members.json"), list))
            means = {key: sum(last[key]) / n for key in keys if isinstance(last.get(key), list)}
            cells = {"trained together": path.parent.name, "members": number(n)}
            cells |= {"steps": number(last["step"] + 1)} | scores(means, *keys)
            rows.append(cells | {"FVU": fvu(means)})
    show([table("Dictionaries: last training metrics, means", rows)] if rows else [], WIDTH)


def map_table(work: Workdir) -> None:
    """Prints how many maps of each kind were fitted, on aligned and on shuffled pairs."""
    fitted = Counter(folder.name for folder in work.maps.glob("*-to-*/*/*") if folder.is_dir())
    kinds = sorted({name.removesuffix("-shuffled") for name in fitted}, key=map_order)
    counts = [
        {
            "map": k,
            "fitted": number(fitted[k]),
            "on shuffled pairs": number(fitted[f"{k}-shuffled"]),
        }
        for k in kinds
    ]
    show([table("Maps", counts)], WIDTH)


def causal_table(work: Workdir) -> None:
    """Prints the best stitched map beside its controls, and how many single features transfer."""
    rows, features = [], {}
    for row in read_if_there(work, "feature_causal_summary.jsonl"):
        if row["direction"] != "match":
            other = features.get(pair_of(row), row)
            features[pair_of(row)] = max(other, row, key=lambda row: row["share_transferring"])
    for s in fitting(stitchings(read_if_there(work, "causal.jsonl")), "loss_recovered"):
        _, line = best([s], "loss_recovered") or (s, {})
        row = features.get((s.source, s.target, s.site_source, s.site_target))
        rows.append(
            {
                "direction": f"{s.source} → {s.target}\n{s.sites}",
                "best map": line.get("map", "–"),
                "recovered": share(line, "loss_recovered"),
                "shuffled": share(line, "shuffled.loss_recovered"),
                "mean": percent(s.reference("mean"), 0),
                "own dictionary": percent(s.reference("own_sae"), 0),
                "single features": "{n_transferring} of {n_features}, {direction}".format(**row)
                if row
                else "–",
            }
        )
    title = "Loss recovered in the target by what is predicted [95 %], and features that transfer"
    show([table(title, rows)], WIDTH)


def fitting(compared: list[Comparison], key: str) -> list[Comparison]:
    """Returns all layer pairs if they fit a screen, else each direction's best one."""
    if len(compared) <= MAX_PAIRS:
        return compared
    groups = groupby(compared, key=lambda c: (c.source, c.target))
    return [pick[0] for _, group in groups if (pick := best(group, key))]


def gates_table(gates: list[dict], *, missed: bool = False) -> Table:
    """Returns the gates of verify.json: a head for each, then its numbers (or those missed)."""
    rows, words = [], {True: "yes", False: "MISS"}
    for gate in gates:
        head = {"gate": gate["gate"], "number": f"{gate['what']} {gate['note']}".strip()}
        rows.append(head | {"value": "", "bound": "", "pass": words[gate["passed"]]})
        for check in (c for c in gate["checks"] if not (missed and c["passed"])):
            value = "–" if check["value"] is None else f"{check['value']:.4g}"
            row = {"gate": "", "number": check["what"], "value": value, "bound": "", "pass": ""}
            if check["relation"]:
                row["bound"] = f"{check['relation']} {check['bound']:.4g}"
                row["pass"] = words[check["passed"]]
            rows.append(row)
    return table("gates", rows)


def summary_table(work: Workdir) -> None:
    """Prints the main result, the run's sentences, and where the numbers are.

    Raises:
      UserError: a result file that it needs is missing or damaged.
    """
    run = read_run(work)
    show([main_table(run)], WIDTH)
    for _, sentence in (*shared.answer(run), *causal.answer(run)):
        print(textwrap.fill(sentence, WIDTH))
    for row in (row for row in run.rows["similarity"] if row["kind"] == "proposal"):
        print(
            f"{row['source']} ↔ {row['target']}: layers most alike by CKA, "
            f"{number(row['cka'], 2)} (this run's {number(row['cka_of_run'], 2)}): "
            f"--config.layer_pairs={row['layer_pairs']}"
        )
    print(f"All numbers: {work.results} (described in crossdict_jax/docs/results.md)")


def main_table(run: Run) -> Table:
    """Returns the main result, a line per direction and layer pair, or per direction at its best.

    R² of the baselines, of the best linear and nonlinear map, of the best fitted map on shuffled
    pairs and of the best ceiling; and the share of the loss that the best stitched map recovers.
    """

    def highest(lines: list[dict], key: str, *, named: bool = False) -> Cell:
        """The highest score of some maps, its interval in a second line."""
        scored = [line for line in lines if line.get(key) is not None]
        line = max(scored, key=lambda line: line[key], default={})
        _, sign = VERDICTS.get(line.get("verdict"), ("", ""))
        name = f" {line.get('map', '')} {sign}" if named else ""
        return Cell(f"{number(line.get(key))}{name}\n{interval(line, key, 2)}")

    compared, stitchings = fitting(run.comparisons, "r2"), {s.name: s for s in run.stitchings()}
    rows = []
    for c in compared:
        stitching = stitchings.get(c.name, c)
        pick = best([stitching], "loss_recovered")
        recovered, mean = pick[1]["loss_recovered"] if pick else None, stitching.reference("mean")
        linear = [line for line in c.fitted if line["map"] in LINEAR_MAPS]
        rest = [line for line in c.fitted if line not in linear]
        ends = {(c.source, c.site_source), (c.target, c.site_target)}
        warning = "⚠ " if ends & run.diverged else ""
        rows.append(
            {
                "direction": f"{warning}{c.source} → {c.target}\n{c.sites}",
                "mean": number(c.score("mean", "r2")),
                "token": highest([line for line in c.lines if line["map"] == "token"], "r2"),
                "best linear": highest(linear, "r2", named=True),
                "best nonlinear": highest(rest, "r2", named=True),
                "shuffled": highest(c.fitted, "shuffled.r2").text.partition("\n")[0],
                "ceiling": highest(c.lines, "ceiling.r2"),
                "loss rec.": f"{percent(recovered, 0)}\nmean {percent(mean, 0)}",
            }
        )
    signs = ", ".join(f"{sign} {words}" for words, (_, sign) in VERDICTS.items())
    signs += ", ⚠ diverged dictionary" if run.diverged else ""
    if len(compared) < len(run.comparisons):
        signs += f"; each direction at the best of {len(run.comparisons)} layer pairs in all"
    return table(f"R² on held-out documents [95 %]; {signs}", rows)
