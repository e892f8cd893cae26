"""The result files of a run in order: maps at layer pairs, beside their controls."""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from crossdict_jax import results
from crossdict_jax.errors import UserError
from crossdict_jax.results import BASELINES, by_pair, map_order, pair_of, site_words
from crossdict_jax.workdir import Workdir, read_json, read_jsonl

DIVERGED = 2.0  # FVU of a dictionary above which it is of no use; the mean has 1
# Which command writes the files without which there is nothing to report.
WRITTEN_BY = {"pairing.json": "extract_activations"}
WRITTEN_BY |= dict.fromkeys(("reconstruction.jsonl", "transfer.jsonl"), "evaluate")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All maps of one ordered pair of models at one pair of sites.

    A line is the row of a map, with the scores of its controls in the same dict: ``shuffled.r2`` is
    the null of ``r2``, ``ceiling.r2`` and ``untrained.r2`` are those of the controls.
    """

    source: str
    target: str
    site_source: str
    site_target: str
    lines: list[dict]
    # Of a stitching: the target's controls, clean, zero, mean, own_sae -> row.
    references: dict[str, dict] = dataclasses.field(default_factory=dict)

    @property
    def sites(self) -> str:
        return site_words(self.site_source, self.site_target)

    @property
    def name(self) -> str:
        return f"{self.source} → {self.target}, {self.sites}"

    @property
    def fitted(self) -> list[dict]:
        """The maps that read activations."""
        return [line for line in self.lines if line["map"] not in BASELINES]

    def score(self, kind: str, key: str) -> float | None:
        """Returns a score of the first line of a kind of map."""
        return next((line.get(key) for line in self.lines if line["map"] == kind), None)

    def reference(self, control: str) -> float | None:
        """Returns the loss recovered by one of the target's controls."""
        return self.references.get(control, {}).get("loss_recovered")

    def above_controls(self, line: dict) -> bool:
        """Returns whether a stitched map is surely above zeros, the mean and its shuffled null."""
        controls = self.reference("mean"), line.get("shuffled.loss_recovered")
        return surely_above(line, "loss_recovered", 0.0, *controls)


def surely_above(row: dict, key: str, *floors: float | None) -> bool:
    """Whether the whole interval of a score is above all floors; never without an interval."""
    low = row.get(f"{key}_low")
    return low is not None and low > max(floor for floor in floors if floor is not None)


def highest(rows: Iterable[dict], key: str) -> dict:
    """Returns the row with the highest score, an empty one if none has the score."""
    scored = [row for row in rows if row.get(key) is not None]
    return max(scored, key=lambda row: row[key], default={})


def directions(compared: Iterable[Comparison]) -> dict[tuple[str, str], list[Comparison]]:
    """Groups layer pairs by source and target."""
    return {pair: list(c) for pair, c in groupby(compared, lambda c: (c.source, c.target))}


@dataclasses.dataclass(frozen=True)
class Run:
    """All results of a run."""

    pairing: dict
    timing: dict
    curves: list[tuple[str, list[str], list[dict]]]  # (title, labels, metrics) of trainings
    rows: dict[str, list[dict]]  # by file name without its ending

    @property
    def comparisons(self) -> list[Comparison]:
        return comparisons(self.rows["transfer"], self.rows["controls"])

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row["model"] for row in self.rows["reconstruction"]))


def trainings(folder: Path) -> Iterator[tuple[str, list[str], list[dict]]]:
    """Yields (group, labels of its members, rows of metrics.jsonl) of what is trained there."""
    for path in sorted((folder / "training").glob("*/metrics.jsonl")):
        members = read_json(path.with_name("members.json"), list)
        if rows := read_jsonl(path):
            yield path.parent.name, [member["label"] for member in members], rows


def read_run(work: Workdir) -> Run:
    """Returns the results in a work directory.

    Raises:
      UserError: a needed file is missing (its stage is named), or one is damaged.
    """
    for name, stage in WRITTEN_BY.items():
        if not work.result(name).exists():
            raise UserError(
                f"{work.result(name)} is missing; run "
                f"python -m launch.{stage} --workdir={work.root} first."
            )
    timing = read_json(work.timing) if work.timing.exists() else {}
    if work.controls.timing.exists():
        timing |= {f"{k}, controls": v for k, v in read_json(work.controls.timing).items()}
    curves = [
        (f"{folder.name.capitalize()}, group {name}", *curve)
        for folder in (work.dictionaries, work.maps, work.crosscoders)
        for name, *curve in trainings(folder)
    ]
    files = [file for file in results.TABLES if "*" not in file]
    rows = {file.removesuffix(".jsonl"): results.read_if_there(work, file) for file in files}
    return Run(read_json(work.result("pairing.json")), timing, curves, rows)


def comparisons(rows: Iterable[dict], controls: Iterable[dict] = ()) -> list[Comparison]:
    """Groups rows of transfer.jsonl by direction and sites, beside those of controls.jsonl."""
    beside: dict[tuple, dict] = {}
    for row in controls:
        scores = {f"{row['control']}.{key}": score for key, score in row.items()}
        beside.setdefault((*pair_of(row), row["map"]), {}).update(scores)
    return [
        Comparison(*pair, [n | beside.get((*pair, n["map"]), {}) for n in _lines(group)])
        for pair, group in by_pair(rows).items()
    ]


def stitchings(rows: Iterable[dict], *, together: bool = False) -> list[Comparison]:
    """Groups the stitching rows of causal.jsonl likewise, beside the target's controls.

    Those of single layer pairs, or of several together (their sites are joined by +).
    """
    rows = [row for row in rows if bool(row.get("sites")) == together]
    references: dict[tuple, dict] = {}
    for row in rows:
        if row["control"]:
            references.setdefault((row["target"], row["site_target"]), {})[row["control"]] = row
    groups = by_pair(row for row in rows if row["map"])
    return [
        Comparison(*pair, _lines(group), references.get((pair[1], pair[3]), {}))
        for pair, group in groups.items()
    ]


def _lines(rows: list[dict]) -> list[dict]:
    """Returns a line for each kind of map and stitching, aligned scores beside their nulls."""
    lines: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: (map_order(row["map"]), row["map"])):
        line = lines.setdefault((row["map"], row.get("stitch_kind")), {"map": row["map"]})
        null = row["pairing"] == "shuffled"
        line |= {f"shuffled.{k}": v for k, v in row.items()} if null else row
    return list(lines.values())
