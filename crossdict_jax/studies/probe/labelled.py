"""Labelled texts: read from a file, and read by language models at the places that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crossdict_jax import models
from crossdict_jax.activations import pairing
from crossdict_jax.activations.text import json_lines
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.studies.contrast.preference import paired_rows


@dataclass(frozen=True)
class Labelled:
    """Texts (NFC, each once) and what is to be said of them.

    Attributes:
      texts: [n].
      labels: int [n], places in ``classes``.
      classes: the labels as text, sorted.
      duplicates: lines left out because their text stood in the file before: in both halves of a
        split it would be no test.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    duplicates: int = 0


def read_labelled(source: str, *, text: str, label: str) -> Labelled:
    """Returns the texts of a file of JSON lines; a label is text, a whole number, true or false.

    Args:
      text, label: the names of the two fields.

    Raises:
      UserError: there is no such file, a line lacks a field or has another type in it, or all
        labels are one.
    """
    if not source:
        raise UserError(
            "probe.source is empty; name a file of labelled texts, as in "
            "--config.probe.source=labelled.jsonl."
        )
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"probe.source={source} is no file; name one of JSON lines.")
    found: dict[str, str] = {}
    lines = 0
    for _, where, row in json_lines(path):
        words = pairing.normalize(_field(row, text, where, "probe.text", (str,)))
        found.setdefault(words, str(_field(row, label, where, "probe.label", (str, int))))
        lines += 1
    classes = tuple(sorted(set(found.values())))
    if len(classes) < 2:
        what = f"every label is {classes[0]}" if classes else "it is empty"
        raise UserError(f"{path} has nothing to tell apart: {what}.")
    labels = np.array([classes.index(c) for c in found.values()])
    return Labelled(tuple(found), labels, classes, lines - len(found))


def _field(row: dict, name: str, where: str, setting: str, kinds: tuple[type, ...]):
    if name not in row:
        raise UserError(f"{where} has no field {name}, only {', '.join(row)}; set {setting}.")
    if not isinstance(row[name], kinds) or not str(row[name]).strip():
        words = " or a whole number" if int in kinds else ""
        raise UserError(f"{where}: {name} is not text{words}, or blank; mend that line.")
    return row[name]


@dataclass(frozen=True)
class Read:
    """Texts that all models can read; a row is a place of a text, the same in all models.

    Attributes:
      kept: int [texts], which of all texts these are.
      tokens: model name -> per text int32 [tokens], with the BOS where the model wants one.
      text: int [rows], of each row its text, ascending.
      position: model name -> int [rows].
      too_long, not_rebuilt, unpaired: texts left out: longer than a context, with characters that
        a tokenizer changes, or without a place at which all tokenizers end a token.
    """

    kept: np.ndarray
    tokens: Mapping[str, list[np.ndarray]]
    text: np.ndarray
    position: Mapping[str, np.ndarray]
    too_long: int
    not_rebuilt: int
    unpaired: int


def read_texts(
    texts: Sequence[str],
    tokenizers: Mapping[str, object],
    *,
    bos: Mapping[str, int | None],
    contexts: Mapping[str, int],
    last: bool,
) -> Read:
    """Returns what all models read of the texts.

    Args:
      bos: per model the id put in front of every text, or None.
      contexts: per model its positions, the BOS among them.
      last: only the last place of every text is wanted.
    """
    tokens = {name: pairing.byte_ends_batch(texts, t) for name, t in tokenizers.items()}
    fronts = {name: [] if bos[name] is None else [bos[name]] for name in tokenizers}
    kept, too_long, not_rebuilt = [], 0, 0
    for i in range(len(texts)):
        if any(t[i] is None for t in tokens.values()):
            not_rebuilt += 1
        elif any(len(fronts[n]) + len(t[i].ids) > contexts[n] for n, t in tokens.items()):
            too_long += 1
        else:
            kept.append(i)
    text, positions = paired_rows([[t[i].ends for t in tokens.values()] for i in kept])
    positions = positions.reshape(len(text), len(tokenizers))
    wanted = np.append(text[1:] != text[:-1], True)[: len(text)] | (not last)
    text, positions = text[wanted], positions[wanted]
    there = np.unique(text)
    kept, unpaired = np.array(kept, int)[there], len(kept) - len(there)
    return Read(
        kept,
        {
            n: [np.append(fronts[n], t[i].ids).astype(np.int32) for i in kept]
            for n, t in tokens.items()
        },
        np.searchsorted(there, text),
        {name: p + len(fronts[name]) for name, p in zip(tokens, positions.T)},
        too_long,
        not_rebuilt,
        unpaired,
    )


def row_activations(
    lm: LanguageModel, read: Read, name: str, site: Site, *, batch_size: int, dtype: str
) -> np.ndarray:
    """Returns the activations of a model at the rows, float32 [rows, d_model].

    Args:
      name: of the model in ``read``.
      batch_size: texts per forward.
      dtype: of the inputs of matrix products.
    """
    texts, position = read.tokens[name], read.position[name]
    tokens = np.zeros((len(texts) + -len(texts) % batch_size, max(map(len, texts))), np.int32)
    for row, text in zip(tokens, texts):
        row[: len(text)] = text
    parts = []
    for at in range(0, len(tokens), batch_size):
        x = models.capture(lm, tokens[at : at + batch_size], (site,), dtype=dtype)[site]
        rows = np.flatnonzero((read.text >= at) & (read.text < at + batch_size))
        parts.append(np.asarray(x)[read.text[rows] - at, position[rows]])
    return np.concatenate(parts)


def pooled(f: np.ndarray, text: np.ndarray, how: str) -> np.ndarray:
    """Returns one row for each text, [texts, width], of features [rows, width].

    Args:
      text: int [rows], ascending, every text once or more.
      how: "last" (of a text's rows), "max" or "mean" over them.
    """
    first = np.flatnonzero(np.diff(text, prepend=-1))
    if how == "last":
        return f[np.append(first[1:], len(f)) - 1]
    if how == "max":
        return np.maximum.reduceat(f, first)
    counts = np.diff(np.append(first, len(f)))
    return (np.add.reduceat(f, first, dtype=np.float64) / counts[:, None]).astype(np.float32)
