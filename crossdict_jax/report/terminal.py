"""What the commands end with on the terminal: one small table each."""

from collections import Counter

from crossdict_jax.report import shared
from crossdict_jax.report.answer import best
from crossdict_jax.report.inputs import coverage
from crossdict_jax.report.results import Run, read_run, stitchings
from crossdict_jax.report.tables import (
    VERDICTS,
    Cell,
    Table,
    flat_table,
    interval,
    number,
    percent,
    share,
    show,
    table,
)
from crossdict_jax.results import LINEAR_MAPS, map_order, read_if_there
from crossdict_jax.workdir import Workdir, read_json, read_jsonl

WIDTH = 118  # characters, where the output is no terminal


def pairing_table(work: Workdir) -> None:
    """Prints how many token ends of each model are rows."""
    show([coverage(read_json(work.result("pairing.json")))], WIDTH)


def training_table(work: Workdir, folder: str = "dictionaries") -> None:
    """Prints the last metrics of everything that was trained by steps for a folder of a run."""
    rows = []
    for path in sorted((work.root / folder / "training").glob("*/metrics.jsonl")):
        labels = [member["label"] for member in read_json(path.with_name("members.json"))]
        for row in read_jsonl(path)[-1:]:
            for i, label in enumerate(labels):
                values = {k: v[i] if isinstance(v, list) else v for k, v in row.items()}
                rows.append({"member": label} | values)
    show([flat_table(rows, f"Last training metrics: {folder}", ("member",))] if rows else [], WIDTH)


def map_table(work: Workdir) -> None:
    """Prints how many maps of each kind there are, and the last metrics of the trained ones."""
    folders = [f for f in work.maps.glob("*-to-*/*/*") if f.is_dir()]
    kinds = Counter(folder.name.removesuffix("-shuffled") for folder in folders)
    counts = [{"map": kind, "fitted": number(kinds[kind])} for kind in sorted(kinds, key=map_order)]
    training_table(work, "maps")
    show([table("Maps, half of them on shuffled pairs", counts)], WIDTH)


def stitching_table(work: Workdir) -> None:
    """Prints the best stitched map of every direction and layer pair, beside its controls."""
    rows = []
    for s in stitchings(read_if_there(work, "causal.jsonl")):
        if pick := best([s], "loss_recovered"):
            cells = {"direction": s.name, "best map": pick[1]["map"]}
            cells["loss recovered"] = share(pick[1], "loss_recovered", 1)
            cells["shuffled"] = share(pick[1], "shuffled.loss_recovered", 1)
            ends = {"mean": "mean", "own_sae": "own dictionary"}
            cells |= {title: percent(s.reference(name)) for name, title in ends.items()}
            rows.append(cells)
    show([table("Loss recovered in the target by what is predicted [95 %]", rows)], WIDTH)


def gates_table(gates: list[dict]) -> Table:
    """Returns the gates of verify.json: a head for each, then its numbers and their bounds."""
    lines, verdicts = [], {True: "yes", False: "MISS", None: ""}
    for gate in gates:
        lines.append((gate["gate"], f"{gate['what']} {gate['note']}", "", "", gate["passed"]))
        for check in gate["checks"]:
            value = "–" if check["value"] is None else f"{check['value']:.4g}"
            bound = f"{check['relation']} {check['bound']:.4g}" if check["relation"] else ""
            lines.append(("", check["what"], value, bound, check["passed"] if bound else None))
    titles = ("gate", "number", "value", "bound", "pass")
    return table("gates", (dict(zip(titles, (*line, verdicts[p]))) for *line, p in lines))


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
