"""Published numbers, and how near a run comes to them.

A file of configs/ for a paper has a ``get_expectations()``, which ``--expect=FILE`` reads.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from crossdict_jax.errors import UserError
from crossdict_jax.workdir import Workdir, read_jsonl


@dataclass(frozen=True)
class Expectation:
    """One published number: its column in the results, and how near is near enough.

    Attributes:
      words: the number in words.
      file: of WORKDIR/results, JSON lines.
      key: the column; ``KEY - OTHER`` is a difference.
      where: {column: value} of the rows, whose mean is compared.
      low, high: what is near enough, both included.
      source: paper and table.
    """

    words: str
    file: str
    key: str
    low: float
    high: float
    published: str
    source: str
    where: dict[str, Any] = field(default_factory=dict)

    def obtained(self, work: Workdir) -> float | None:
        """Returns the run's number, None if it is undefined; UserError if no row has it."""
        first, *others = keys = self.key.split(" - ")
        rows = [r for r in read_jsonl(work.result(self.file)) if self.where.items() <= r.items()]
        rows = [row for row in rows if row.keys() >= {*keys}]
        if not rows:
            asked = ", ".join(f"{name}={value}" for name, value in self.where.items())
            raise UserError(
                f"{work.result(self.file)} has no row with {asked} and a {self.key}; run every "
                "stage with the settings of the file that expects it, in a --workdir of its own."
            )
        values = [
            row[first] - sum(row[other] for other in others)
            for row in rows
            if all(row[key] is not None for key in keys)
        ]
        return statistics.fmean(values) if values else None
