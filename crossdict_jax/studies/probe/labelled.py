"""Files of labelled texts, split into training and test texts."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crossdict_jax import stats
from crossdict_jax.activations import pairing
from crossdict_jax.activations.text import json_lines
from crossdict_jax.errors import UserError

TEST_FRACTION = 0.3  # of the texts


@dataclass(frozen=True)
class Labelled:
    """Texts (NFC, each once), and their labels int [n] as indices into ``classes``."""

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    duplicates: int = 0


def read_labelled(source: str, *, text: str, label: str) -> Labelled:
    """Returns the texts of a file of JSON lines; a label is text, a whole number, true or false.

    Raises:
      UserError: the file is missing, a line is not understood, a text has two labels, or there is
        only one label.
    """
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        raise UserError(
            f"probe.source={source} is no file; name one of labelled texts, as in "
            "--config.probe.source=labelled.jsonl."
        )
    label_of: dict[str, str] = {}
    lines = list(json_lines(path))
    for _, where, row in lines:
        for name, setting, words in ((text, "text", ""), (label, "label", " or a whole number")):
            if name not in row:
                fields = ", ".join(row)
                raise UserError(f"{where} has no field {name}, only {fields}; set probe.{setting}.")
            kinds = (str, int) if words else str
            if not isinstance(row[name], kinds) or not str(row[name]).strip():
                raise UserError(f"{where}: {name} is not text{words}, or blank; mend that line.")
        pairing.check_whole(f"{row[text]}{row[label]}", where)
        content, name = pairing.normalize(row[text]), str(row[label])
        if (first := label_of.setdefault(content, name)) != name:
            raise UserError(
                f"{where} has label {name} for a text that has label {first} above; keep one."
            )
    classes = tuple(sorted(set(label_of.values())))
    if len(classes) < 2:
        reason = f"every label is {classes[0]}" if classes else "it is empty"
        raise UserError(f"{path} has nothing to tell apart: {reason}.")
    labels = np.array([classes.index(c) for c in label_of.values()])
    return Labelled(tuple(label_of), labels, classes, len(lines) - len(label_of))


@dataclass(frozen=True)
class Split:
    """Labels int [n] of all texts, and which texts are for training and for test."""

    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray
    seed: int

    def examples(self, n: int, draw: int) -> np.ndarray:
        """Returns n training texts, each label about at its share and at least once."""
        order = stats.generator(self.seed, draw).permutation(self.train)
        _, first = np.unique(self.labels[order], return_index=True)
        others = np.delete(np.arange(len(order)), first)
        return order[np.concatenate([first, others[: n - len(first)]])]


def split(
    labels: np.ndarray, classes: tuple[str, ...], *, examples: tuple[int, ...], seed: int, left: str
) -> Split:
    """Returns a split of texts with these labels, drawn by the seed.

    Args:
      examples: numbers of training texts that will be drawn.
      left: for errors: how many texts remain of how many, and why.
    """
    order = stats.generator(seed).permutation(len(labels))
    held_out = round(TEST_FRACTION * len(labels))
    test, train = np.sort(order[:held_out]), np.sort(order[held_out:])
    if len(train) < max(examples):
        raise UserError(
            f"probe.examples={max(examples)} is more than the {len(train)} texts to train on: "
            f"{left}, less those held out; ask for fewer, or give more or shorter texts."
        )
    if min(examples) < len(classes):
        raise UserError(
            f"probe.examples={min(examples)} is less than the {len(classes)} different labels; ask "
            "for more, or is probe.label not the field of a label?"
        )
    if missing := set(range(len(classes))) - set(labels[train].tolist()):
        raise UserError(
            f"No text to train on has the label {classes[min(missing)]}: {left}; give more texts "
            "of that label."
        )
    if len(np.unique(labels[test])) < 2:
        raise UserError(
            f"All held-out texts have the label {classes[labels[test[0]]]}: {left}; give more "
            "texts of other labels."
        )
    return Split(labels, train, test, seed)
