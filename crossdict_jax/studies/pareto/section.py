"""L0 against FVU of every architecture: the section of the report, and its tables."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from crossdict_jax.report.blocks import Panels, html
from crossdict_jax.report.plots import SERIES, Figure, line_figure
from crossdict_jax.report.tables import Table, number, table

TITLE = "Sparsity against what is explained"
TEXT = (
    "Dictionaries of every architecture, equal in width, rows and steps; along a curve only k or "
    "the coefficient of the penalty differs. FVU is the share of the variance of held-out rows "
    "that is left unexplained, L0 the number of active features a row. Of planted rows every "
    "feature’s direction is known: recovery is the mean cosine to the decoder row most like it."
)
MARKS = "os^vDP"
SMALLEST_L0 = 0.1  # in place of 0 on a logarithmic axis


@dataclasses.dataclass(frozen=True)
class Curves:
    """What was measured on the same rows."""

    title: str
    planted: float | None  # active features a row that were planted, if any
    n_rows: int
    # By architecture, ascending L0: setting, k, "cosines" of the seeds, and means over seeds of
    # l0, fvu, dead_fraction and cosine.
    points: dict[str, list[dict]]


def section(rows: list[dict]) -> str:
    groups = curves(rows)
    caption = "FVU against L0 on held-out rows, means over seeds."
    return html([TEXT, Panels([figure(g) for g in groups], caption, "large"), *tables(groups)])


def curves(rows: list[dict]) -> list[Curves]:
    """Groups rows of pareto.jsonl by their data."""
    groups: dict[tuple, dict[tuple, list[dict]]] = {}
    for row in rows:
        settings = groups.setdefault((row["data"], row["model"], row["site"]), {})
        key = row["architecture"], row["k"], row["l1_coefficient"]
        settings.setdefault(key, []).append(row)
    made = []
    for (_, model, site), settings in groups.items():
        points: dict[str, list[dict]] = {}
        for (architecture, k, penalty), seeds in settings.items():
            first, setting = seeds[0], f"k {k}" if k else f"penalty {penalty:g}"
            numbers = ("l0", "fvu", "dead_fraction")
            means = {name: statistics.fmean(row[name] for row in seeds) for name in numbers}
            point = {"setting": setting, "k": k, "cosines": [row["cosine"] for row in seeds]}
            points.setdefault(architecture, []).append(point | means)
        points = {name: sorted(p, key=lambda point: point["l0"]) for name, p in points.items()}
        title = "planted features" if first["planted"] else f"{model} {site}"
        title = f"{title}, width {first['width']}"
        made.append(Curves(title, first["planted"], first["n_rows"], points))
    return made


def fvu_at(l0: Sequence[float], fvu: Sequence[float], k: float) -> float | None:
    """Returns the FVU of a curve at k active features, linear in log L0; None beyond its ends."""
    x, order = np.log(np.maximum(l0, 1e-9)), np.argsort(l0)
    value = np.interp(math.log(k), x[order], np.array(fvu)[order], left=np.nan, right=np.nan)
    return None if math.isnan(value) else float(value)


def tables(groups: list[Curves]) -> list[Table]:
    """Returns FVU at equal L0, every point, and recovery of planted features.

    Recovery is of the setting of each architecture whose L0 is nearest to the planted one.
    """
    made = []
    for group in groups:
        ks = sorted({p["k"] for points in group.points.values() for p in points if p["k"]})
        recovered, equal, every = [], [], []
        for name, points in group.points.items():
            curve = [p["l0"] for p in points], [p["fvu"] for p in points]
            at = {f"L0 = {k}": number(fvu_at(*curve, k)) for k in ks[1:-1] or ks}  # all reach these
            equal.append({"architecture": name} | at)
            lines = [
                {"architecture": name, "setting": p["setting"]}
                | {"L0": number(p["l0"]), "FVU": number(p["fvu"])}
                for p in points
            ]
            every += [x | {"dead": number(p["dead_fraction"])} for x, p in zip(lines, points)]
            if group.planted:
                off = [abs(math.log(max(l0, 1e-9) / group.planted)) for l0 in curve[0]]
                best = off.index(min(off))
                cosines = points[best]["cosines"]
                cells = {"cosine": number(statistics.fmean(cosines))}
                recovered.append(
                    lines[best] | cells | {"each seed": " ".join(map(number, cosines))}
                )
        if recovered:
            near = f"{group.planted:g} features a row of {group.title}"
            made.append(table(f"Recovery at an L0 near the {near}", recovered))
        made.append(table(f"FVU at equal L0, {group.title}; – beyond a curve’s ends", equal))
        n = number(group.n_rows)
        made.append(table(f"Every setting, {group.title}, {n} held-out rows", every))
    return made


def figure(group: Curves) -> Figure:
    """Returns FVU against L0, a curve for every architecture."""
    lines, told = {}, []
    for i, (name, points) in enumerate(group.points.items()):
        l0, fvu = [max(p["l0"], SMALLEST_L0) for p in points], [p["fvu"] for p in points]
        style = {"color": SERIES[i % len(SERIES)], "marker": MARKS[i % len(MARKS)]}
        lines[name] = (l0, fvu, style | {"markersize": 3.5})
        told.append(f"{name} " + ", ".join(f"{number(x, 1)}: {number(y)}" for x, y in zip(l0, fvu)))
    words = f"FVU by L0, {group.title}: {'; '.join(told)}."
    axes = {"x": "L0: active features a row", "y": "FVU of held-out rows"}
    return line_figure(lines, title=group.title, words=words, bottom=0, **axes)
