"""Several layers stitched at once: a table for the page, and the same on the terminal."""

from __future__ import annotations

from crossdict_jax.report.results import Line, Results, Stitching
from crossdict_jax.report.tables import Cell, Column, Table, interval, number, percent

COLUMNS = (
    Column("map", numeric=False),
    Column("put in", numeric=False),
    Column("loss recovered"),
    Column("shuffled"),
    Column("KL"),
    Column("highest layer alone"),
)


def section(results: Results) -> list[Table]:
    """Returns a table for each direction: every rung at all layers, and at the highest alone."""
    singles = {(s.source, s.target, s.site_source, s.site_target): s for s in results.stitchings}
    found = []
    for one in results.stitched_together:
        highest = (sites.split("+")[-1] for sites in (one.site_source, one.site_target))
        found.append(_table(one, singles.get((one.source, one.target, *highest))))
    return found


def _table(one: Stitching, highest: Stitching | None) -> Table:
    caption = (
        f"{one.source} → {one.target}, {one.sites} at once; the mean recovers "
        f"{percent(one.reference('mean'), 0)}, the target’s own dictionaries "
        f"{percent(one.reference('own_sae'), 0)}"
    )
    return Table(caption, list(COLUMNS), [_row(one, line, highest) for line in one.lines])


def _row(one: Stitching, line: Line, highest: Stitching | None) -> list[Cell]:
    same = [own for own in highest.ways(line.kind) if own.way == line.way] if highest else []
    recovered = interval(line.aligned or {}, "loss_recovered", 2)
    return [
        Cell(line.kind, style="strong" if one.surely_above_controls(line) else "none"),
        Cell(line.way),
        Cell(number(line.value("loss_recovered")), note=recovered),
        Cell(number(line.null("loss_recovered"))),
        Cell(number(line.value("kl"))),
        Cell(number(same[0].value("loss_recovered")) if same else "–"),
    ]
