"""Published numbers, and how near a run comes to them.

A file of configs/ that reproduces a paper has a ``get_expectations()`` beside its
``get_config()``; ``--expect=FILE`` compares after the work is done.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crossdict_jax.errors import UserError
from crossdict_jax.workdir import Workdir, read_jsonl


@dataclass(frozen=True)
class Expectation:
    """One published number: where it stands in the results, and how near is near enough.

    Attributes:
      what: the number in words.
      file: of WORKDIR/results, JSON lines.
      key: the column; ``KEY - OTHER`` is a difference.
      where: {column: value} that a row must have; the mean over all such rows is compared.
      low, high: what is near enough, both included.
      published: as it was published.
      source: paper and table.
    """

    what: str
    file: str
    key: str
    low: float
    high: float
    published: str
    source: str
    where: dict[str, Any] = field(default_factory=dict)

    def obtained(self, work: Workdir) -> float:
        """Returns the run's number; UserError if no row has it."""
        rows = [row for row in read_jsonl(work.result(self.file)) if self._is_meant(row)]
        values = [value for row in rows if (value := self._value(row)) is not None]
        if not values:
            asked = ", ".join(f"{name}={value}" for name, value in self.where.items())
            raise UserError(
                f"{work.result(self.file)} has no row with {asked} and a {self.key}; run every "
                "stage with the settings of the file that expects it."
            )
        return statistics.fmean(values)

    def met(self, value: float) -> bool:
        """Whether a number is near enough."""
        return self.low <= value <= self.high

    def _is_meant(self, row: dict) -> bool:
        return all(row.get(name) == value for name, value in self.where.items())

    def _value(self, row: dict) -> float | None:
        parts = [row.get(part) for part in self.key.split(" - ")]
        if any(part is None for part in parts):
            return None
        return parts[0] - sum(parts[1:])


def compare(expectations: Sequence[Expectation], work: Workdir) -> int:
    """Prints every number as published and as obtained; returns how many are not near enough."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Expected", title_justify="left", box=None)
    for name in ("what", "published", "allowed", "obtained", "", "source"):
        table.add_column(name)
    missed = 0
    for one in expectations:
        value = one.obtained(work)
        missed += not one.met(value)
        allowed = f"{one.low:g} to {one.high:g}"
        sign = "met" if one.met(value) else "MISSED"
        table.add_row(one.what, one.published, allowed, f"{value:.4g}", sign, one.source)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    return missed
