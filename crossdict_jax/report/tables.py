"""Result rows as tables of ready text: what the page's template prints cell by cell."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

from crossdict_jax.report.results import Comparison, Line
from crossdict_jax.results import BASELINES, BEATS_MEAN, BEATS_TOKEN, NO_BETTER

# verdict -> (style, sign); the sign says it again for who cannot see the colour.
VERDICTS = {
    BEATS_TOKEN: ("strong", "●"),
    BEATS_MEAN: ("weak", "◐"),
    NO_BETTER: ("none", "○"),
}
TITLES = {
    "r2": "R²",
    "fvu": "FVU",
    "l0": "L0",
    "l0_source": "L0 source",
    "l0_target": "L0 target",
    "l0_predicted": "L0 predicted",
    "ce": "CE",
    "kl": "KL",
    "ce_clean": "CE clean",
    "ce_zero": "CE zero",
    "ce_mean": "CE mean",
    "ce_sae": "CE dictionary",
    "cosine_mean_predictor": "cosine of the mean",
    "cosine_centered": "centred cosine",
    "top1": "top-1",
    "r2_normalized": "R², normalised",
    "top1_normalized": "top-1, normalised",
    "cosine_centered_normalized": "centred cosine, normalised",
    "feature_correlation_normalized": "feature correlation, normalised",
    "fdr": "FDR",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of a table.

    Attributes:
      text: the value as printed.
      note: its interval, printed small beside it.
      null: the same score on shuffled pairs, printed below.
      style: a class of the page's style sheet.
    """

    text: str
    note: str = ""
    null: str = ""
    style: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
    title: str
    numeric: bool = True
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A caption, columns, and rows of cells; the first cell of a row is its heading."""

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


def show(tables: Iterable[Table]) -> None:
    """Prints tables on the terminal; 160 characters wide where it has no width."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    for one in tables:
        console.print(printable(one))


def printable(table: Table):
    """Returns a table as rich prints it, notes beside their values."""
    from rich.table import Table as Printed
    from rich.text import Text

    printed = Printed(title=Text(table.caption), title_justify="left", box=None)
    for column in table.columns:
        printed.add_column(column.title, justify="right" if column.numeric else "left")
    for row in table.rows:
        printed.add_row(*(Text(f"{cell.text} {cell.note}".strip()) for cell in row))
    return printed


def number(value, digits: int = 3) -> str:
    """Returns a value as text: thousands apart, a true minus sign, an en dash for undefined."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    digits = digits if abs(value) < 100 else min(digits, 1)
    rounded = round(value, digits) or 0.0  # no minus before a zero
    return f"{rounded:,.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}\u00a0%".replace("-", "−")


def interval(row: dict, key: str, digits: int = 3) -> str:
    """Returns "[low, high]" of a score, or nothing when the row has no interval."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if low is None or high is None:
        return ""
    return f"[{number(low, digits)}, {number(high, digits)}]"


def title(key: str) -> str:
    return TITLES.get(key, key.replace("_", " "))


# ---------------------------------------------------------------- any rows


def flat_table(rows: list[dict], caption: str, first: Iterable[str] = ()) -> Table:
    """Returns every column of result rows; ``x_low`` and ``x_high`` become the interval of x.

    Args:
      first: columns to put in front; the rest follow in the order of the file.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    bounds = {f"{key}{end}" for key in keys for end in ("_low", "_high")} & set(keys)
    shown = [k for k in first if k in keys]
    shown += [k for k in keys if k not in bounds and k not in shown]
    columns = [Column(title(k), numeric=_numeric(rows, k)) for k in shown]
    return Table(caption, columns, [[_plain(row, k) for k in shown] for row in rows])


def _numeric(rows: list[dict], key: str) -> bool:
    values = [row.get(key) for row in rows]
    return all(v is None or isinstance(v, (int, float)) for v in values)


def _plain(row: dict, key: str) -> Cell:
    value = row.get(key)
    if isinstance(value, (list, dict)):
        return Cell(json.dumps(value))
    style = VERDICTS.get(value, ("", ""))[0] if isinstance(value, str) else ""
    text = _significant(value) if isinstance(value, float) else number(value)
    return Cell(text, note=interval(row, key, digits=4), style=style)


def _significant(value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "−")


# ---------------------------------------------------------------- pairing


def pairing_table(pairing: dict) -> Table | None:
    """Returns the coverage of every model; the histograms stand in ``spans_table``."""
    rows = [{"model": name, **_plain_entries(m)} for name, m in _models(pairing).items()]
    if not rows:
        return None
    table = flat_table(rows, "Token ends that every model shares", ("model", "ends", "coverage"))
    return _as_percent(table, rows, "coverage")


def spans_table(pairing: dict) -> Table | None:
    """Returns how many tokens each model spends on a span between two shared ends."""
    spans = {
        name: m["tokens_per_span"] for name, m in _models(pairing).items() if "tokens_per_span" in m
    }
    if not spans:
        return None
    bins = list(dict.fromkeys(key for counts in spans.values() for key in counts))
    rows = [[Cell(name), *_shares(counts, bins)] for name, counts in spans.items()]
    columns = [Column("model", numeric=False), *(Column(b) for b in bins)]
    return Table("Tokens in a span between neighbouring shared ends", columns, rows)


def pairing_facts(pairing: dict) -> list[tuple[str, str]]:
    """Returns what pairing.json says beside its models, dotted where it is nested."""
    rest = {k: v for k, v in pairing.items() if k != "models"}
    facts = []
    for key, value in nested(rest):
        words = ", ".join(map(str, value)) if isinstance(value, list) else number(value)
        facts.append((key.replace("_", " "), words))
    return facts


def _models(pairing: dict) -> dict[str, dict]:
    models = pairing.get("models", {})
    return models if isinstance(models, dict) else {}


def _plain_entries(row: dict) -> dict:
    return {k: v for k, v in row.items() if not isinstance(v, (dict, list))}


def _as_percent(table: Table, rows: list[dict], key: str) -> Table:
    place = [c.title for c in table.columns].index(key)
    for cells, row in zip(table.rows, rows):
        cells[place] = Cell(percent(row.get(key)))
    return table


def _shares(counts: dict, bins: list[str]) -> list[Cell]:
    total = sum(counts.values()) or 1
    return [Cell(percent(counts.get(b, 0) / total)) for b in bins]


# ---------------------------------------------------------------- dictionaries


def dictionaries_table(rows: list[dict]) -> Table:
    """Returns the quality of every dictionary."""
    columns = [
        Column("model", numeric=False),
        Column("site", numeric=False),
        Column("dictionary", numeric=False),
        Column("width"),
        Column("L0"),
        Column("FVU"),
        Column("dead"),
        Column("CE clean"),
        Column("CE zero"),
        Column("CE mean"),
        Column("CE dictionary"),
        Column("loss recovered, of zero’s"),
        Column("of the mean’s"),
    ]
    return Table("Every dictionary on held-out text", columns, [_dictionary(r) for r in rows])


def dictionary_name(row: dict) -> str:
    """Returns which of the dictionaries of a model and site a row is about."""
    return row.get("member") or f"seed-{row.get('seed', 0)}"


def _dictionary(row: dict) -> list[Cell]:
    return [
        Cell(str(row["model"])),
        Cell(str(row["site"])),
        Cell(dictionary_name(row)),
        Cell(number(row.get("width"))),
        Cell(number(row.get("l0"), 1)),
        _scored(row, "fvu"),
        Cell(percent(row.get("dead_fraction"))),
        *(Cell(number(row.get(key))) for key in ("ce_clean", "ce_zero", "ce_mean", "ce_sae")),
        _scored(row, "loss_recovered"),
        _scored(row, "loss_recovered_mean"),
    ]


def _scored(row: dict, key: str, digits: int = 3) -> Cell:
    return Cell(number(row.get(key), digits), note=interval(row, key, digits))


# ---------------------------------------------------------------- transfer


def overview_table(group: list[Comparison]) -> Table:
    """Returns R² of every rung at every layer pair of one direction, coloured by verdict."""
    kinds = list(dict.fromkeys(line.kind for c in group for line in c.lines))
    columns = [Column("map", numeric=False), *(Column(c.sites) for c in group)]
    rows = [[Cell(kind), *(_glance(c.line(kind)) for c in group)] for kind in kinds]
    source, target = group[0].direction
    return Table(f"R² of {target}’s features, predicted from {source}", columns, rows)


def _glance(line: Line | None) -> Cell:
    if line is None:
        return Cell("")
    style, sign = _verdict(line)
    text = f"{sign} {number(line.value('r2'))}".strip()
    return Cell(text, null=_null(line, "r2"), style=style)


def _verdict(line: Line) -> tuple[str, str]:
    """Returns the style and the sign of a rung's verdict; baselines have none."""
    if line.kind in BASELINES:
        return "", ""
    return VERDICTS.get(line.value("verdict"), ("", ""))


def verdict_style(line: Line) -> str:
    return _verdict(line)[0]


def verdict_text(line: Line) -> str:
    if line.kind in BASELINES:
        return "baseline"
    return line.value("verdict") or "–"


def transfer_table(comparison: Comparison) -> Table:
    """Returns every score of every rung at one layer pair, its shuffled null below it."""
    row = next(line.aligned or line.shuffled for line in comparison.lines)
    pool = row.get("pool")
    columns = [
        Column("map, verdict", numeric=False),
        Column("R²"),
        Column("context gain"),
        Column("cosine"),
        Column("cosine of the mean"),
        Column("centred cosine"),
        Column("top-1", hint=f"chance {number(1 / pool, 4)}" if pool else ""),
        Column("mean rank", hint=f"chance {number((pool + 1) / 2, 0)}" if pool else ""),
        Column("feature correlation"),
        Column("sparsity similarity"),
        Column("L0 predicted", hint=f"target {number(row.get('l0_target'), 1)}"),
    ]
    rows = [_transfer(line) for line in comparison.lines]
    return Table(_transfer_caption(comparison, row), columns, rows)


def _transfer_caption(comparison: Comparison, row: dict) -> str:
    return (
        f"{comparison.source} {comparison.site_source} → "
        f"{comparison.target} {comparison.site_target}: "
        f"{number(row.get('n_rows'))} rows of {number(row.get('n_documents'))} held-out documents, "
        f"retrieval pool {number(row.get('pool'))}; L0 of the source "
        f"{number(row.get('l0_source'), 1)}, of the target {number(row.get('l0_target'), 1)}"
    )


def _transfer(line: Line) -> list[Cell]:
    style, sign = _verdict(line)
    verdict = f"{sign} {verdict_text(line)}".strip()
    return [
        Cell(line.kind, note=verdict, style=style),
        _compared(line, "r2"),
        _compared(line, "context_gain"),
        _compared(line, "cosine"),
        _compared(line, "cosine_mean_predictor", bounds=False),
        _compared(line, "cosine_centered"),
        _compared(line, "top1"),
        _compared(line, "mean_rank", digits=0, bounds=False),
        _compared(line, "feature_correlation"),
        _compared(line, "sparsity_similarity"),
        _compared(line, "l0_predicted", digits=1, bounds=False),
    ]


def controls_table(comparison: Comparison) -> Table:
    """Returns every rung of one layer pair beside its controls."""
    columns = [
        Column("map", numeric=False),
        Column("R²"),
        Column("shuffled"),
        Column("skyline"),
        Column("normalised", hint="0 shuffled, 1 skyline"),
        Column("top-1, normalised"),
        Column("context gain"),
        Column("skyline’s gain"),
        Column("untrained gain", hint="what training did not make"),
        Column("untrained R²"),
    ]
    place = f"{comparison.source} {comparison.site_source} → "
    caption = f"Controls of {place}{comparison.target} {comparison.site_target}"
    return Table(caption, columns, [_controlled(line) for line in comparison.controlled])


def _controlled(line: Line) -> list[Cell]:
    skyline, untrained = (line.controls.get(name, {}) for name in ("skyline", "untrained"))
    return [
        Cell(line.kind, style=_verdict(line)[0]),
        _scored(line.aligned or {}, "r2"),
        Cell(number(line.null("r2"))),
        _scored(skyline, "r2"),
        _scored(line.aligned or {}, "r2_normalized", 2),
        _scored(line.aligned or {}, "top1_normalized", 2),
        _scored(line.aligned or {}, "context_gain"),
        _scored(skyline, "context_gain"),
        _scored(untrained, "context_gain"),
        _scored(untrained, "r2"),
    ]


def _compared(line: Line, key: str, digits: int = 3, bounds: bool = True) -> Cell:
    note = interval(line.aligned or {}, key, digits) if bounds else ""
    return Cell(number(line.value(key), digits), note=note, null=_null(line, key, digits))


def _null(line: Line, key: str, digits: int = 3) -> str:
    return number(line.null(key), digits) if line.shuffled else ""


# ---------------------------------------------------------------- nested values, timing


def nested(tree: dict, prefix: str = "") -> list[tuple[str, object]]:
    """Returns (dotted name, value) of every leaf."""
    leaves = []
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else key
        leaves += nested(value, path) if isinstance(value, dict) else [(path, value)]
    return leaves


def timing_table(timing: dict) -> Table | None:
    """Returns what each stage took; other entries of timing.json are not stages."""
    rows = [{"stage": k, **v} for k, v in timing.items() if isinstance(v, dict) and "wall_s" in v]
    if not rows:
        return None
    total = sum(row["wall_s"] for row in rows)
    return flat_table(rows, f"Wall time of each stage: {number(total, 1)} s in all", ("stage",))
