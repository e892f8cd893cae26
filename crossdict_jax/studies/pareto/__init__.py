"""Pareto: sparsity against what is explained, for every architecture."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

from crossdict_jax.report.blocks import Panels, html
from crossdict_jax.report.plots import SERIES, Figure, line_figure
from crossdict_jax.report.tables import Table, captioned, number, scores
from crossdict_jax.results import COUNTS, describe, intervals, plain

TITLE = "Sparsity against what is explained"
TEXT = (
    "Dictionaries of every architecture, equal in width, rows and steps; along a curve only k or "
    "the penalty differs. FVU is the share of held-out variance left unexplained, L0 the number of "
    "active features a row. Of planted rows every feature’s direction is known: recovery is the "
    "mean cosine to the decoder row most like it."
)
MARKS = "os^vDP"
SMALLEST_L0 = 0.1  # in place of 0 on a logarithmic axis
TABLE = describe(
    "pareto.jsonl",
    "one dictionary on the curve of its architecture",
    *plain(
        data="planted features, or activations of the run",
        model="whose activations they are",
        site="where they are read",
        architecture="of the dictionary",
        seed="of the dictionary",
        k="active features that the architecture fixes",
        l1_coefficient="of the penalty, where it does not",
        width="number of features",
        steps="of training",
        dead_fraction="share of features that fire in no test row",
        planted="planted features that are active in a row",
        cosine="mean over planted features of the cosine to the nearest decoder row",
    ),
    *COUNTS,
    *intervals(
        l0="active features per row", fvu="share of the variance that the reconstruction misses"
    ),
)


@dataclasses.dataclass(frozen=True)
class Curves:
    """What was measured on the same rows."""

    title: str
    planted: float | None  # active features a row that were planted, if any
    n_rows: int
    # By architecture, ascending L0: setting, k, "cosines" of the seeds, and means over seeds.
    points: dict[str, list[dict]]


def section(rows: list[dict]) -> str:
    """Returns the html of the rows of pareto.jsonl."""
    groups = curves(rows)
    caption = "FVU against L0 on held-out rows, means over seeds."
    return html([TEXT, Panels(list(map(figure, groups)), caption, "large"), *tables(groups)])


def curves(rows: list[dict]) -> list[Curves]:
    """Groups rows of pareto.jsonl by their data."""
    names = ("data", "model", "site", "architecture", "k", "l1_coefficient")
    settings: dict[tuple, list[dict]] = {}
    for row in rows:
        settings.setdefault(tuple(row[name] for name in names), []).append(row)
    groups: dict[tuple, Curves] = {}
    for (*data, architecture, k, penalty), seeds in settings.items():
        first = seeds[0]
        title = "planted features" if first["planted"] else f"{first['model']} {first['site']}"
        title = f"{title}, width {first['width']}"
        point = {"setting": f"k {k}" if k else f"penalty {penalty:g}", "k": k}
        point["cosines"] = [row["cosine"] for row in seeds]
        for name in ("l0", "fvu", "dead_fraction"):
            point[name] = statistics.fmean(row[name] for row in seeds)
        new = Curves(title, first["planted"], first["n_rows"], {})
        group = groups.setdefault(tuple(data), new)
        group.points.setdefault(architecture, []).append(point)
        group.points[architecture].sort(key=lambda point: point["l0"])
    return list(groups.values())


def fvu_at(l0: Sequence[float], fvu: Sequence[float], k: float) -> float | None:
    """Returns the FVU of a curve at k active features, linear in log L0; None beyond its ends."""
    x, order = np.log(np.maximum(l0, 1e-9)), np.argsort(l0)
    value = np.interp(math.log(k), x[order], np.array(fvu)[order], left=np.nan, right=np.nan)
    return None if math.isnan(value) else float(value)


def tables(groups: list[Curves]) -> list[Table]:
    """Returns FVU at equal L0, every point, and recovery of planted features.

    Recovery is of the setting of each architecture whose L0 is nearest to the planted one.
    """
    lines = []
    for group in groups:
        title, planted = group.title, group.planted
        ks = sorted({p["k"] for points in group.points.values() for p in points if p["k"]})
        ks = ks[1:-1] or ks  # every curve reaches these
        for name, points in group.points.items():
            l0, fvu = ([p[key] for p in points] for key in ("l0", "fvu"))
            cells = [
                {"architecture": name, "setting": p["setting"]} | scores(p, "l0", "fvu")
                for p in points
            ]
            if planted:
                off = [abs(math.log(max(x, 1e-9) / planted)) for x in l0]
                best = off.index(min(off))
                cosines = points[best]["cosines"]
                cosine = {"cosine": number(statistics.fmean(cosines))}
                cosine["each seed"] = " ".join(map(number, cosines))
                caption = f"Recovery at an L0 near the {planted:g} features a row of {title}"
                lines.append((caption, cells[best] | cosine))
            at = {f"L0 = {k}": number(fvu_at(l0, fvu, k)) for k in ks}
            caption = f"FVU at equal L0, {title}; – beyond a curve’s ends"
            lines.append((caption, {"architecture": name} | at))
            caption = f"Every setting, {title}, {number(group.n_rows)} held-out rows"
            for p, line in zip(points, cells):
                lines.append((caption, line | {"dead": number(p["dead_fraction"])}))
    return captioned(lines)


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
