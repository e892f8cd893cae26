"""L0 against FVU of every architecture: the section of the report, and its tables."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

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
SMALLEST_L0 = 0.1  # what a logarithmic axis shows in place of 0


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of an architecture; means over seeds."""

    setting: str
    k: int | None
    l0: float
    fvu: float
    dead_fraction: float
    cosines: list[float]  # of each seed, to planted directions

    def cells(self, name: str, **others: float) -> dict[str, str]:
        """Returns its line of a table."""
        scores = {"L0": self.l0, "FVU": self.fvu} | others
        shown = {title: number(value) for title, value in scores.items()}
        return {"architecture": name, "setting": self.setting} | shown


@dataclasses.dataclass(frozen=True)
class Curves:
    """What was measured on the same rows: per architecture its points, by ascending L0."""

    title: str
    planted: float | None  # active features a row that were planted, where any were
    points: dict[str, list[Point]]
    n_rows: int


def section(rows: list[dict]) -> str:
    """Returns the html of the page's section, from the rows of pareto.jsonl."""
    groups = curves(rows)
    caption = "FVU against L0 on held-out rows, means over seeds."
    return html([TEXT, Panels([figure(g) for g in groups], caption, "large"), *tables(groups)])


def curves(rows: list[dict]) -> list[Curves]:
    """Groups rows of pareto.jsonl by the data that they are of."""
    made = []
    for _, group in itertools.groupby(
        rows, key=lambda r: [r[k] for k in ("data", "model", "site")]
    ):
        settings: dict[tuple, list[dict]] = {}
        for row in group:
            key = row["architecture"], row["k"], row["l1_coefficient"]
            settings.setdefault(key, []).append(row)
        points: dict[str, list[Point]] = {}
        for (architecture, k, penalty), seeds in settings.items():
            means = (
                statistics.fmean(row[n] for row in seeds) for n in ("l0", "fvu", "dead_fraction")
            )
            cosines = [row["cosine"] for row in seeds if row["cosine"] is not None]
            point = Point(f"k {k}" if k else f"penalty {penalty:g}", k, *means, cosines)
            points.setdefault(architecture, []).append(point)
        first = seeds[0]
        title = "planted features" if first["planted"] else f"{first['model']} {first['site']}"
        points = {name: sorted(p, key=lambda p: p.l0) for name, p in points.items()}
        title = f"{title}, width {first['width']}"
        made.append(Curves(title, first["planted"], points, first["n_rows"]))
    return made


def fvu_at(l0: Sequence[float], fvu: Sequence[float], k: float) -> float | None:
    """Returns the FVU of a curve at k active features, linear in log L0; None beyond its ends."""
    points = sorted((math.log(max(x, 1e-9)), y) for x, y in zip(l0, fvu))
    x = math.log(k)
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= x <= right:
            share = (x - left) / (right - left) if right > left else 0.0
            return low + share * (high - low)
    return None


def tables(groups: list[Curves]) -> list[Table]:
    """Returns FVU at equal L0 and every point, and of planted features how well they are found.

    The last for the setting of each architecture whose L0 is nearest to what was planted.
    """
    made = []
    for group in groups:
        ks = sorted({p.k for points in group.points.values() for p in points if p.k})
        recovered, equal, every = [], [], []
        for name, points in group.points.items():
            curve = [p.l0 for p in points], [p.fvu for p in points]
            at = {f"L0 = {k}": number(fvu_at(*curve, k)) for k in ks[1:-1] or ks}  # all pass these
            equal.append({"architecture": name} | at)
            every += [p.cells(name, dead=p.dead_fraction) for p in points]
            if group.planted:
                best = min(points, key=lambda p: abs(math.log(max(p.l0, 1e-9) / group.planted)))
                line = best.cells(name, cosine=statistics.fmean(best.cosines))
                recovered.append(line | {"each seed": " ".join(map(number, best.cosines))})
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
        style = {"color": SERIES[i % len(SERIES)], "marker": MARKS[i % len(MARKS)]}
        l0, fvu = [max(p.l0, SMALLEST_L0) for p in points], [p.fvu for p in points]
        lines[name] = (l0, fvu, {**style, "markersize": 3.5})
        told.append(f"{name} " + ", ".join(f"{number(p.l0, 1)}: {number(p.fvu)}" for p in points))
    words = f"FVU by L0, {group.title}: {'; '.join(told)}."
    axes = {"x": "L0: active features a row", "y": "FVU of held-out rows"}
    return line_figure(lines, title=group.title, words=words, bottom=0, **axes)
