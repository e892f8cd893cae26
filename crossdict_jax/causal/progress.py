"""What the parts of a long stage gave, kept at once: an interrupted stage goes on behind them."""

from __future__ import annotations

import json
from pathlib import Path

from crossdict_jax.workdir import write_jsonl


class Progress:
    """A file of records by key, for one set of inputs; a line each, a torn last line is dropped.

    Attributes:
      known: {key: record}, what is there already.
    """

    def __init__(self, path: Path, inputs: str):
        """Reads what the same inputs have left at ``path``, or starts anew.

        Args:
          inputs: a digest of everything that the records depend on.
        """
        self._path = path
        self.known: dict[tuple, dict] = {}
        lines, torn = self._read()
        if lines[:1] != [{"inputs": inputs}]:
            write_jsonl(path, [{"inputs": inputs}])
            lines = []
        elif torn:
            write_jsonl(path, lines)
        for line in lines[1:]:
            self.known[tuple(line["key"])] = line["record"]

    def _read(self) -> tuple[list[dict], bool]:
        """The whole lines; and whether the last one was cut off."""
        if not self._path.exists():
            return [], False
        *whole, last = self._path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole], bool(last)

    def keep(self, key: tuple, record: dict) -> None:
        """Appends a record (JSON values) under a key of texts and numbers."""
        self.known[key] = record
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "record": record}) + "\n")

    def done(self) -> None:
        """Takes the file away: the results are written."""
        self._path.unlink(missing_ok=True)
