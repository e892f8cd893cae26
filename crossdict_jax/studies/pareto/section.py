"""L0 against FVU of every architecture: the section of the report, and its tables."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

from crossdict_jax.report.blocks import Panels, html
from crossdict_jax.report.plots import SERIES, Figure, line_figure
from crossdict_jax.report.tables import Cell, Column, Table, number, show
from crossdict_jax.workdir import Workdir, read_jsonl

TITLE = "Sparsity against what is explained"
TEXT = (
    "Dictionaries of every architecture, equal in width, rows and steps. Along a curve only k or "
    "the coefficient of the penalty differs. FVU is the share of the variance of held-out rows "
    "that is left unexplained, L0 the number of active features a row: lower and further left is "
    "better. Of planted rows every feature’s direction is known: recovery is the mean over "
    "features of the cosine to the decoder row most like it."
)
MARKS = "os^vDP"
LEAST_L0 = 0.1  # what a logarithmic axis shows in place of 0


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of an architecture; means over seeds.

    Attributes:
      cosines: of each seed, to planted directions; empty where nothing is planted.
    """

    setting: str
    k: int | None
    l0: float
    fvu: float
    dead_fraction: float
    cosines: list[float]


@dataclasses.dataclass(frozen=True)
class Curves:
    """What was measured on the same rows: per architecture its points, by ascending L0.

    Attributes:
      planted: active features a row that were planted, where any were.
    """

    place: str
    planted: float | None
    points: dict[str, list[Point]]
    n_rows: int

    @property
    def inner_ks(self) -> list[int]:
        """The values of k between the least and the greatest, which other curves pass too."""
        ks = sorted({p.k for points in self.points.values() for p in points if p.k})
        return ks[1:-1] or ks


def section(rows: list[dict]) -> str:
    """Returns the html of the page's section, from the rows of pareto.jsonl."""
    groups = curves(rows)
    caption = "FVU against L0 on held-out rows, means over seeds."
    listed = [t for group in groups for t in tables(group)]
    return html([TEXT, Panels(list(map(figure, groups)), caption, "large"), *listed])


def curves(rows: list[dict]) -> list[Curves]:
    """Groups rows of pareto.jsonl by the data that they are of."""
    return [_curves(list(group)) for _, group in itertools.groupby(rows, key=_data)]


def _data(row: dict) -> tuple:
    return row["data"], row["model"], row["site"], row["width"]


def _curves(rows: list[dict]) -> Curves:
    first = rows[0]
    same: dict[str, dict[tuple, list[dict]]] = {}
    for row in rows:
        setting = row["k"], row["l1_coefficient"]
        same.setdefault(row["architecture"], {}).setdefault(setting, []).append(row)
    where = f"{first['model']} {first['site']}" if first["planted"] is None else "planted features"
    return Curves(
        place=f"{where}, width {first['width']}",
        planted=first["planted"],
        points={
            name: sorted(map(_point, settings.values()), key=lambda point: point.l0)
            for name, settings in same.items()
        },
        n_rows=first["n_rows"],
    )


def _point(rows: list[dict]) -> Point:
    k, penalty = rows[0]["k"], rows[0]["l1_coefficient"]
    means = (statistics.fmean(row[key] for row in rows) for key in ("l0", "fvu", "dead_fraction"))
    cosines = [row["cosine"] for row in rows if row["cosine"] is not None]
    return Point(f"k {k}" if k else f"penalty {penalty:g}", k, *means, cosines)


def fvu_at(l0: Sequence[float], fvu: Sequence[float], k: float) -> float | None:
    """Returns the FVU of a curve at k active features, linear in log L0; None beyond its ends."""
    points = sorted((math.log(max(x, 1e-9)), y) for x, y in zip(l0, fvu))
    place = math.log(k)
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= place <= right:
            share = (place - left) / (right - left) if right > left else 0.0
            return low + share * (high - low)
    return None


# ---------------------------------------------------------------- tables


def tables(group: Curves) -> list[Table]:
    """Returns every point, FVU at equal L0, and of planted features how well they are found."""
    found = [_at_equal_l0(group), _all_points(group)]
    return [_recovery(group), *found] if group.planted else found


def _recovery(group: Curves) -> Table:
    """Of each architecture the setting whose L0 is nearest to what was planted."""
    columns = [Column("architecture", numeric=False), Column("setting", numeric=False)]
    columns += [Column("L0"), Column("FVU"), Column("cosine"), Column("each seed", numeric=False)]
    rows = []
    for name, points in group.points.items():
        best = min(points, key=lambda p: abs(math.log(max(p.l0, 1e-9) / group.planted)))
        seeds = " ".join(number(value) for value in best.cosines)
        scores = (best.l0, best.fvu, statistics.fmean(best.cosines))
        rows.append([Cell(name), Cell(best.setting), *map(_cell, scores), Cell(seeds)])
    caption = f"Recovery at an L0 near the {group.planted:g} features a row of {group.place}"
    return Table(caption, columns, rows)


def _at_equal_l0(group: Curves) -> Table:
    columns = [Column("architecture", numeric=False)]
    asked = group.inner_ks
    columns += [Column(f"L0 = {k}") for k in asked]
    rows = []
    for name, points in group.points.items():
        curve = [p.l0 for p in points], [p.fvu for p in points]
        rows.append([Cell(name), *(_cell(fvu_at(*curve, k)) for k in asked)])
    return Table(f"FVU at equal L0, {group.place}; – beyond a curve’s ends", columns, rows)


def _all_points(group: Curves) -> Table:
    columns = [Column("architecture", numeric=False), Column("setting", numeric=False)]
    columns += [Column("L0"), Column("FVU"), Column("dead")]
    rows = [
        [Cell(name), Cell(p.setting), *map(_cell, (p.l0, p.fvu, p.dead_fraction))]
        for name, points in group.points.items()
        for p in points
    ]
    return Table(f"Every setting, {group.place}, {number(group.n_rows)} held-out rows",
                 columns, rows)  # fmt: skip


def _cell(value: float | None) -> Cell:
    return Cell(number(value))


# ---------------------------------------------------------------- the figure


def figure(group: Curves) -> Figure:
    """Returns FVU against L0, a curve for every architecture."""
    lines, told = {}, []
    for i, (name, points) in enumerate(group.points.items()):
        style = {"color": SERIES[i % len(SERIES)], "marker": MARKS[i % len(MARKS)]}
        l0, fvu = [max(p.l0, LEAST_L0) for p in points], [p.fvu for p in points]
        lines[name] = (l0, fvu, {**style, "markersize": 3.5})
        told.append(f"{name} " + ", ".join(f"{number(p.l0, 1)}: {number(p.fvu)}" for p in points))
    return line_figure(
        lines,
        title=group.place,
        x="L0: active features a row",
        y="FVU of held-out rows",
        words=f"FVU by L0, {group.place}: {'; '.join(told)}.",
        bottom=0,
    )


def print_tables(work: Workdir) -> None:
    """Prints the tables of ``section``.

    Raises:
      UserError: results/pareto.jsonl is missing or damaged.
    """
    rows = read_jsonl(work.result("pareto.jsonl"))
    show(table for group in curves(rows) for table in tables(group))
