"""Single features in tables: which transfer best and worst, where they fire, what drives them."""

from __future__ import annotations

from itertools import groupby

from crossdict_jax.report.results import site_words
from crossdict_jax.report.tables import Cell, Column, Table, number, percent

WORDS = {  # of the bins
    "token_share": "how much of them their own token explains",
    "frequency": "how often they fire",
}


def feature_tables(rows: list[dict], source: str, target: str) -> list[Table]:
    """Returns the tables of one direction, from the rows of feature_transfer.jsonl; maybe none."""
    here = [r for r in rows if (r["source"], r["target"]) == (source, target)]
    binned = [_binned([r for r in here if r["row"] == name], name, target) for name in WORDS]
    shown = [r for r in here if r["row"] == "feature"]
    single = [
        _shown(list(group), source, target)
        for _, group in groupby(shown, key=lambda r: (r["site_source"], r["site_target"]))
    ]
    return [table for table in (*binned, *single) if table]


def _sites(row: dict) -> str:
    return site_words(row["site_source"], row["site_target"])


def _binned(rows: list[dict], name: str, target: str) -> Table | None:
    """Median R² of the features of each bin, a column for every pair of sites."""
    if not rows:
        return None
    sites = list(dict.fromkeys(map(_sites, rows)))
    bins = sorted({(r["low"], r["high"]) for r in rows}, key=lambda ends: ends[1])
    cells = {(_sites(r), r["low"], r["high"]): r for r in rows}
    body = [
        [Cell(_range(*ends)), *(_median(cells.get((site, *ends))) for site in sites)]
        for ends in bins
    ]
    columns = [Column("bin", numeric=False), *map(Column, sites)]
    caption = f"Median R² of {target}’s features by {WORDS[name]}"
    return Table(caption, columns, body)


def _range(low: float | None, high: float) -> str:
    return f"{'below' if low is None else _short(low) + ' to'} {_short(high)}"


def _short(share: float) -> str:
    return percent(share, 0 if share >= 0.01 or share == 0 else 3)


def _median(row: dict | None) -> Cell:
    if row is None:
        return Cell("")
    return Cell(number(row["r2_median"]), note=f"of {number(row['n_features'])}")


def _shown(rows: list[dict], source: str, target: str) -> Table:
    columns = [
        Column(f"feature of {target}", numeric=False),
        Column("R²", hint="on validation rows"),
        Column("correlation"),
        Column("fires on"),
        Column("its token explains"),
        Column("where it fires most", numeric=False),
        Column(f"best match in {source}", numeric=False),
        Column(f"driven by, in {source}", numeric=False),
    ]
    caption = f"Most and least transferable features, {_sites(rows[0])}, by {rows[0]['map']}"
    return Table(f"{caption}, {source} → {target}", columns, [_feature(r) for r in rows])


def _feature(row: dict) -> list[Cell]:
    style = "strong" if row["rank"] == "most" else "none"
    first, *others = [*map(_snippet, row["contexts"]), ""]
    return [
        Cell(f"#{row['feature']}", note=row["rank"], style=style),
        Cell(number(row["r2"]), note=number(row["r2_validation"])),
        Cell(number(row["correlation"], 2)),
        Cell(percent(row["frequency"])),
        Cell(percent(row["token_share"], 0)),
        Cell(first, note=" | ".join(filter(None, others))),
        Cell(f"#{row['match']['feature']}", note=f"r {number(row['match']['correlation'], 2)}"),
        Cell("; ".join(filter(None, map(_driven, row["attributions"]))) or "–"),
    ]


def _snippet(context: dict) -> str:
    """Returns the text around a firing with the token in angle quotes, on one line."""
    text = f"{context['before']}«{context['token']}»{context['after']}"
    return text.replace("\n", "⏎").replace("\t", "⇥")


def _driven(attribution: dict) -> str:
    if not attribution["drivers"]:
        return ""
    words = ", ".join(f"#{d['feature']} {number(d['effect'], 2)}" for d in attribution["drivers"])
    notes = ["exact"] if attribution["exact"] else []
    if attribution["stability"] is not None:
        notes.append(f"stability {number(attribution['stability'], 2)}")
    return f"{attribution['map']}: {words}" + (f" ({', '.join(notes)})" if notes else "")
