"""Every result file of a run: its columns, what they mean, and how they are read and written."""

from __future__ import annotations

from dataclasses import dataclass

from crossdict_jax.workdir import Workdir, read_jsonl, write_jsonl


@dataclass(frozen=True)
class Column:
    """One column of a result file.

    Attributes:
      name: as in the file.
      meaning: one line; with the unit where it has one.
      interval: whether NAME_low and NAME_high (95 % over documents) stand beside it.
    """

    name: str
    meaning: str
    interval: bool = False


@dataclass(frozen=True)
class Table:
    """One file of WORKDIR/results: JSON lines, a row each.

    Attributes:
      file: its name, such as ``transfer.jsonl``.
      meaning: what a row is.
    """

    file: str
    meaning: str
    columns: tuple[Column, ...] = ()


TABLES: dict[str, Table] = {}  # file -> table


def write(work: Workdir, file: str, rows: list[dict]) -> None:
    """Writes the rows of a result file, whole or not at all."""
    write_jsonl(work.result(file), rows)


def read(work: Workdir, file: str) -> list[dict]:
    """Returns the rows of a result file; UserError if it is missing or damaged."""
    return read_jsonl(work.result(file))


def read_if_there(work: Workdir, file: str) -> list[dict]:
    """Returns the rows of a result file, none where its stage has not run."""
    return read(work, file) if work.result(file).exists() else []
