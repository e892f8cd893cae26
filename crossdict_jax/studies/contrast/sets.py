"""Files of minimal pairs: two texts of which a language model should find one likelier."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crossdict_jax.activations.pairing import check_whole, normalize
from crossdict_jax.activations.text import json_lines
from crossdict_jax.errors import UserError

SUFFIXES = (".jsonl", ".json")
# The fields of a line (before both, good, bad); the first spelling that fits counts.
SPELLINGS = (
    ("clean_prefix", "clean_answer", "patch_answer"),  # feature circuits, Marks et al. 2024
    ("", "sentence_good", "sentence_bad"),  # BLiMP, Warstadt et al. 2020
    ("prefix", "good", "bad"),
    ("", "good", "bad"),
    ("prefix", "clean", "corrupt"),
    ("", "clean", "corrupt"),
)


@dataclass(frozen=True)
class ContrastSet:
    """A file of pairs of whole texts, NFC; a common beginning says nothing about a preference."""

    name: str  # of the file, without its ending
    good: tuple[str, ...]
    bad: tuple[str, ...]
    duplicates: int = 0  # left out: a pair in both halves of a split is no test


def read_sets(sources: Sequence[str]) -> list[ContrastSet]:
    """Returns a set for each file of ``sources``: JSON lines, or folders of such files.

    Raises:
      UserError: there is none, or a file, a line or a name is invalid.
    """
    if not sources:
        raise UserError(
            "contrast.source is empty; name files or folders of pairs, as in "
            "--config.contrast.source=pairs.jsonl."
        )
    sets: dict[str, ContrastSet] = {}
    for source in sources:
        path = Path(os.path.expanduser(source))
        if not path.exists():
            raise UserError(f"contrast.source={source} does not exist; name a file or a folder.")
        files = [path]
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"contrast.source={source} holds no file ending in .jsonl or .json.")
        for file in files:
            if file.stem in sets:
                raise UserError(
                    f"contrast.source={','.join(sources)} holds two sets called {file.stem}; "
                    "rename one, results speak of sets by name."
                )
            pairs = [_pair(row, where) for _, where, row in json_lines(file)]
            if not pairs:
                raise UserError(f"{file} holds no pair: it is empty.")
            distinct = dict.fromkeys(pairs)
            duplicates = len(pairs) - len(distinct)
            sets[file.stem] = ContrastSet(file.stem, *zip(*distinct), duplicates)
    return list(sets.values())


def _pair(row: dict, where: str) -> tuple[str, str]:
    spelling = next((s for s in SPELLINGS if all(f in row for f in s if f)), None)
    if spelling is None:
        allowed = "; ".join(", ".join(filter(None, s)) for s in SPELLINGS)
        raise UserError(f"{where} has fields {', '.join(row) or 'none'}; known are {allowed}.")
    for field in filter(None, spelling):
        if not isinstance(row[field], str) or not row[field].strip():
            raise UserError(f"{where}: {field} is not text, or blank; mend or remove that line.")
        check_whole(row[field], f"{where}: {field}")
    front, *ends = (row[field] if field else "" for field in spelling)
    good, bad = (normalize(front + end) for end in ends)
    if good == bad:
        raise UserError(
            f"{where}: {spelling[1]} and {spelling[2]} are the same text; remove that line."
        )
    return good, bad
