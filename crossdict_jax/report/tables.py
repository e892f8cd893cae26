"""Tables of the page and of the terminal."""

import dataclasses
from collections.abc import Callable, Iterable

from crossdict_jax.results import BEATS_MEAN, BEATS_TOKEN, NO_BETTER
from crossdict_jax.workdir import spelled

NUMERIC = {*"0123456789−–●◐○", ""}  # how the text of a number begins
# verdict -> (style, sign for who cannot see the colour, colour)
VERDICTS = {
    BEATS_TOKEN: ("strong", "●", "blue"),
    BEATS_MEAN: ("weak", "◐", "ochre"),
    NO_BETTER: ("none", "○", "grey"),
}
TITLES = {
    "width": "features",
    "n_features": "features",
    "cosine_mean_predictor": "cosine of the mean",
    "cosine_centered": "centred cosine",
    "live_source": "live, source",
    "live_target": "live, target",
    "share": "of live",
    "r_train": "r, training",
    "r_test": "r, held out",
    "r_token": "r by the token",
    "loss_recovered_mean": "loss recovered from the mean",
    "specific_random": "over random",
    "specific_shuffled": "over other features",
    "specific_random_at_kl": "over random, equal KL",
    "untrained": "re-initialised",
}
ABBREVIATIONS = {x.lower(): x for x in ("FVU", "L0", "CE", "KL", "CKA", "SVCCA", "RSA", "kNN")}
ABBREVIATIONS |= {"r2": "R²", "top1": "top-1", "sae": "dictionary"}


def number(value, digits: int = 3) -> str:
    """Returns a value as text: thousands apart, a true minus sign, an en dash for undefined."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    digits = digits if abs(value) < 10 else min(digits, 1)
    return f"{value:z,.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """Returns a share in percent, an en dash for undefined."""
    return "–" if value is None else f"{100 * value:z.{digits}f}\u00a0%".replace("-", "−")


def interval(row: dict, key: str, digits: int = 3, text: Callable = number) -> str:
    """Returns "[low, high]" of a score, or nothing when the row has no interval."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return "" if low is None or high is None else f"[{text(low, digits)}, {text(high, digits)}]"


def heading(key: str) -> str:
    """Returns the title of a column of a result file, or of CONTROL.COLUMN."""
    control, _, column = key.rpartition(".")
    stem = column.removesuffix("_normalized")
    title = TITLES.get(stem) or " ".join(ABBREVIATIONS.get(w, w) for w in stem.split("_"))
    title += "" if stem == column else ", normalised"
    return f"{title}, {TITLES.get(control, control)}" if control else title


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry of a table."""

    text: str  # the value as printed
    note: str = ""  # its interval, printed small beside it
    null: str = ""  # the same score where nothing is shared, printed below
    style: str = ""  # a class of the page's style sheet


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    caption: str
    titles: list[str]  # of the columns
    numeric: list[bool]  # which columns are set to the right
    rows: list[list[Cell]]


def table(caption: str, rows: Iterable[dict[str, Cell | str]]) -> Table:
    """Returns a table whose columns are the keys of the rows."""
    rows = list(rows)
    cells = [[c if isinstance(c, Cell) else Cell(c) for c in row.values()] for row in rows]
    numeric = [all(cell.text[:1] in NUMERIC for cell in column) for column in zip(*cells)]
    return Table(caption, list(rows[0]) if rows else [], numeric, cells)


def captioned(lines: Iterable[tuple[str, dict[str, Cell | str]]]) -> list[Table]:
    """Returns a table for each caption, of pairs (caption, row)."""
    rows: dict[str, list[dict]] = {}
    for caption, row in lines:
        rows.setdefault(caption, []).append(row)
    return [table(caption, of_caption) for caption, of_caption in rows.items()]


def score(row: dict, key: str, digits: int = 3, *, null: str = "", text: Callable = number) -> Cell:
    """Returns a number of a result row, its interval if any, and its null, of key ``null``."""
    below = text(row[null], digits) if null in row else ""
    return Cell(text(row.get(key), digits), interval(row, key, digits, text), below)


def share(row: dict, key: str, digits: int = 0, *, null: str = "") -> Cell:
    """Returns a share of a result row in percent, likewise."""
    return score(row, key, digits, null=null, text=percent)


def scores(row: dict, *keys: str, cell: Callable = score, null: str = "") -> dict[str, Cell]:
    """Returns columns of a result row as cells by their titles; nulls have the prefix ``null``."""
    return {heading(key): cell(row, key, null=null and f"{null}{key}") for key in keys}


def show(tables: Iterable[Table], width: int = 160) -> None:
    """Prints tables on the terminal; ``width`` characters wide where it has no width."""
    from rich.console import Console
    from rich.table import Table as Printed
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=width)
    for table in tables:
        printed = Printed(box=None, pad_edge=False)
        for title, numeric in zip(table.titles, table.numeric):
            printed.add_column(title, justify="right" if numeric else "left")
        for row in table.rows:  # notes beside their values
            printed.add_row(*(Text(spelled(f"{cell.text} {cell.note}".strip())) for cell in row))
        console.print(Text(table.caption, style="italic"), printed, sep="\n")
