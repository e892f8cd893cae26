"""The result files of a run, read and brought into order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from crossdict_jax.errors import UserError
from crossdict_jax.results import BASELINES, site_words
from crossdict_jax.results import PAIR as PLACE
from crossdict_jax.results import map_order as ladder_place
from crossdict_jax.workdir import Workdir, read_json, read_jsonl

# Which command writes the files without which there is nothing to report.
WRITTEN_BY = {
    "pairing.json": "extract_activations",
    "reconstruction.jsonl": "evaluate",
    "transfer.jsonl": "evaluate",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One rung at one layer pair: its row, and the rows of its controls.

    Attributes:
      shuffled: the same rung on shuffled pairs.
      controls: the same rung as skyline and into an untrained target, where they were run.
      way: of a stitched rung what was put in, its "activation" or its decoded "features".
    """

    kind: str
    aligned: dict | None
    shuffled: dict | None
    way: str = ""
    controls: dict[str, dict] = dataclasses.field(default_factory=dict)

    def value(self, key: str) -> float | None:
        return (self.aligned or {}).get(key)

    def null(self, key: str) -> float | None:
        return (self.shuffled or {}).get(key)

    def control(self, name: str, key: str) -> float | None:
        """Returns a score of the skyline or of the untrained target."""
        return self.controls.get(name, {}).get(key)

    def at_least(self, key: str) -> float | None:
        """Returns the lower end of a score's interval, the score where there is no interval."""
        low = self.value(f"{key}_low")
        return self.value(key) if low is None else low


def fitted(lines: tuple[Line, ...]) -> list[Line]:
    """Returns the rungs that are maps and have an aligned row."""
    return [line for line in lines if line.aligned and line.kind not in BASELINES]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One ordered pair of models at one pair of sites."""

    source: str
    target: str
    site_source: str
    site_target: str
    lines: tuple[Line, ...]

    @property
    def direction(self) -> tuple[str, str]:
        return self.source, self.target

    @property
    def sites(self) -> str:
        return site_words(self.site_source, self.site_target)

    @property
    def fitted(self) -> list[Line]:
        return fitted(self.lines)

    @property
    def controlled(self) -> list[Line]:
        """The rungs with a skyline or an untrained target."""
        return [line for line in self.lines if line.controls]

    def line(self, kind: str) -> Line | None:
        return next((line for line in self.lines if line.kind == kind), None)


@dataclasses.dataclass(frozen=True)
class Stitching:
    """What happens to the target when its residual is replaced, at one pair of sites.

    Attributes:
      references: the target on its own: clean, zero, mean, own_sae -> row.
      lines: the rungs whose prediction was put in, once for each way of doing it.
    """

    source: str
    target: str
    site_source: str
    site_target: str
    references: dict[str, dict]
    lines: tuple[Line, ...]

    @property
    def sites(self) -> str:
        return site_words(self.site_source, self.site_target)

    @property
    def fitted(self) -> list[Line]:
        return fitted(self.lines)

    def ways(self, kind: str) -> list[Line]:
        return [line for line in self.lines if line.kind == kind]

    def reference(self, name: str, key: str = "loss_recovered") -> float | None:
        return self.references.get(name, {}).get(key)

    def surely_above_controls(self, line: Line) -> bool:
        """Tells whether a rung's interval lies above zero, the mean and its own shuffled null."""
        controls = (0.0, self.reference("mean"), line.null("loss_recovered"))
        low = line.at_least("loss_recovered")
        return low is not None and low > max(c for c in controls if c is not None)


@dataclasses.dataclass(frozen=True)
class Curves:
    """Losses of one group that was trained together.

    Attributes:
      labels: one per member.
      steps: [points].
      losses: [members][points].
    """

    what: str
    labels: list[str]
    steps: list[int]
    losses: list[list[float]]


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything a run has written; what is optional is empty when its file is not there."""

    pairing: dict
    reconstruction: list[dict]
    transfer: list[dict]
    causal: list[dict]
    controls: list[dict]
    efficiency: list[dict]
    pareto: list[dict]
    matching: list[dict]
    similarity: list[dict]
    features: list[dict]
    feature_transfer: list[dict]
    feature_causal: list[dict]
    feature_causal_summary: list[dict]
    crosscoders: list[dict]
    moved: list[dict]
    warm_starts: list[dict]
    ablation: list[dict]
    timing: dict
    curves: list[Curves]

    @property
    def comparisons(self) -> list[Comparison]:
        return comparisons(self.transfer, self.controls)

    @property
    def stitchings(self) -> list[Stitching]:
        """Of single layer pairs."""
        return stitchings([row for row in self.causal if not row.get("sites")])

    @property
    def stitched_together(self) -> list[Stitching]:
        """Of several layer pairs at once; their sites are joined by +."""
        return stitchings([row for row in self.causal if row.get("sites")])


def read_results(work: Workdir) -> Results:
    """Returns the results in a work directory.

    Raises:
      UserError: a file that every report needs is missing (the stage to run is named), or any
        file is damaged.
    """
    for name, stage in WRITTEN_BY.items():
        if not work.result(name).exists():
            raise UserError(
                f"{work.result(name)} is missing; run "
                f"python -m launch.{stage} --workdir={work.root} first."
            )
    return Results(
        pairing=read_json(work.result("pairing.json")),
        reconstruction=read_jsonl(work.result("reconstruction.jsonl")),
        transfer=read_jsonl(work.result("transfer.jsonl")),
        causal=_optional(work.result("causal.jsonl")),
        controls=_optional(work.result("controls.jsonl")),
        efficiency=_optional(work.result("efficiency.jsonl")),
        pareto=_optional(work.result("pareto.jsonl")),
        matching=_optional(work.result("matching.jsonl")),
        similarity=_optional(work.result("similarity.jsonl")),
        features=_optional(work.result("features.jsonl")),
        feature_transfer=_optional(work.result("feature_transfer.jsonl")),
        feature_causal=_optional(work.result("feature_causal.jsonl")),
        feature_causal_summary=_optional(work.result("feature_causal_summary.jsonl")),
        ablation=_optional(work.result("ablation.jsonl")),
        timing=_timing(work) | {f"{k}, controls": v for k, v in _timing(work.controls).items()},
        crosscoders=_optional(work.result("crosscoder.jsonl")),
        moved=_optional(work.result("dictionary_transfer.jsonl")),
        warm_starts=_optional(work.result("dictionary_training.jsonl")),
        curves=[
            *_curves(work.dictionaries / "training", "Dictionaries"),
            *_curves(work.maps / "training", "Maps"),
            *_curves(work.crosscoders / "training", "Crosscoders"),
        ],
    )


def _timing(work: Workdir) -> dict:
    return read_json(work.timing) if work.timing.exists() else {}


def _optional(path: Path) -> list[dict]:
    return read_jsonl(path) if path.exists() else []


def comparisons(rows: list[dict], controls: Iterable[dict] = ()) -> list[Comparison]:
    """Groups rows of transfer.jsonl by direction and sites; no row is left out.

    Args:
      controls: rows of controls.jsonl.
    """
    of_map: dict[tuple, dict[str, dict]] = {}
    for row in controls:
        key = tuple(row.get(k) for k in (*PLACE, "map"))
        of_map.setdefault(key, {})[row["control"]] = row
    found = []
    for key, group in _by_place(rows).items():
        lines = (
            dataclasses.replace(line, controls=of_map.get((*key, line.kind), {}))
            for line in _lines(group)
        )
        found.append(Comparison(*key, lines=tuple(lines)))
    return found


def stitchings(rows: list[dict]) -> list[Stitching]:
    """Groups the stitching rows of causal.jsonl likewise, beside the target's own references."""
    stitched = _by_place([row for row in rows if row.get("map")])
    return [
        Stitching(*key, references=_references(rows, key[1], key[3]), lines=_lines(group))
        for key, group in stitched.items()
    ]


def _references(rows: list[dict], target: str, site: str) -> dict[str, dict]:
    return {
        row["control"]: row
        for row in rows
        if row.get("control") and (row["target"], row["site_target"]) == (target, site)
    }


def _by_place(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Returns rows by (source, target, site_source, site_target), directions together."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in PLACE), []).append(row)
    order = {direction: i for i, direction in enumerate(dict.fromkeys(k[:2] for k in groups))}
    return {key: groups[key] for key in sorted(groups, key=lambda key: order[key[:2]])}


def _lines(rows: list[dict]) -> tuple[Line, ...]:
    rungs: dict[tuple[str, str], tuple[list, list]] = {}
    for row in rows:
        aligned, shuffled = rungs.setdefault((row["map"], row.get("stitch_kind") or ""), ([], []))
        (shuffled if row["pairing"] == "shuffled" else aligned).append(row)
    return tuple(
        Line(kind, aligned, shuffled, way)
        for kind, way in sorted(rungs, key=lambda rung: ladder_place(rung[0]))
        for aligned, shuffled in zip_longest(*rungs[kind, way])
    )


def _curves(training: Path, what: str) -> list[Curves]:
    groups = sorted(training.glob("*/metrics.jsonl")) if training.is_dir() else []
    return [
        curve for path in groups if (curve := _curve(path, f"{what}, group {path.parent.name}"))
    ]


def _curve(path: Path, what: str) -> Curves | None:
    rows = [row for row in read_jsonl(path) if "loss" in row]
    if not rows:
        return None
    points = [r["loss"] if isinstance(r["loss"], list) else [r["loss"]] for r in rows]
    members = path.with_name("members.json")
    labels = [m["label"] for m in read_json(members)] if members.exists() else []
    labels += [f"member {i}" for i in range(len(labels), len(points[0]))]
    return Curves(what, labels, [r["step"] for r in rows], [list(p) for p in zip(*points)])
