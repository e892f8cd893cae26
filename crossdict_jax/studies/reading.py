"""Texts of a user's file as all models of a run read them, and the positions that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crossdict_jax.activations import pairing


@dataclass(frozen=True)
class Reading:
    """Texts that every model can read; a row is a paired position, the same in all models.

    Attributes:
      kept: int [texts], which of the texts that were asked for these are.
      tokens: model name -> per text int32 [tokens], with the BOS where the model wants one.
      text: int [rows], of each row its text, ascending.
      position: model name -> int [rows].
      first: model name -> int [rows], where the span of tokens begins that ends at the position.
      too_long, not_rebuilt: texts left out: longer than a context, or with characters that a
        tokenizer changes.
    """

    kept: np.ndarray
    tokens: Mapping[str, list[np.ndarray]]
    text: np.ndarray
    position: Mapping[str, np.ndarray]
    first: Mapping[str, np.ndarray]
    too_long: int = 0
    not_rebuilt: int = 0

    def take(self, texts: np.ndarray) -> Reading:
        """Returns the reading of some texts alone, int [m] ascending."""
        rows = np.flatnonzero(np.isin(self.text, texts))
        tokens = {model: [of_model[i] for i in texts] for model, of_model in self.tokens.items()}
        text = np.searchsorted(texts, self.text)
        chosen = dataclasses.replace(self, kept=self.kept[texts], tokens=tokens, text=text)
        return chosen.take_rows(rows)

    def take_rows(self, rows: np.ndarray) -> Reading:
        """Returns the same texts with these rows alone."""
        position, first = (
            {model: column[rows] for model, column in columns.items()}
            for columns in (self.position, self.first)
        )
        return dataclasses.replace(self, text=self.text[rows], position=position, first=first)


def read_texts(
    texts: Sequence[str],
    tokenizers: Mapping[str, object],
    *,
    bos: Mapping[str, int | None],
    contexts: Mapping[str, int],
    group: int = 1,
) -> Reading:
    """Returns what all models read of texts.

    Args:
      bos: per model the id put in front of every text, or None.
      contexts: per model its positions, the BOS among them.
      group: so many neighbouring texts are kept or left out, and counted, together.
    """
    cut = {model: pairing.byte_ends_batch(texts, t) for model, t in tokenizers.items()}
    fronts = {model: [] if bos[model] is None else [bos[model]] for model in tokenizers}
    kept, too_long, not_rebuilt = [], 0, 0
    for start in range(0, len(texts), group):
        members = range(start, start + group)
        if any(of_model[i] is None for of_model in cut.values() for i in members):
            not_rebuilt += 1
        elif any(
            len(fronts[model]) + len(of_model[i].ids) > contexts[model]
            for model, of_model in cut.items()
            for i in members
        ):
            too_long += 1
        else:
            kept += members
    pairs = [pairing.pair_many([of_model[i].ends for of_model in cut.values()])[1] for i in kept]
    text = np.repeat(np.arange(len(kept)), list(map(len, pairs)))
    positions = np.concatenate([np.zeros((0, len(cut)), np.int64), *pairs])
    before = np.zeros_like(positions)
    same = text[1:] == text[:-1]
    before[1:][same] = positions[:-1][same]
    first = np.minimum(before + 1, positions)  # the first token of a text is in no span
    front = np.array([len(fronts[model]) for model in cut])
    return Reading(
        np.array(kept, int),
        {
            model: [np.append(fronts[model], of_model[i].ids).astype(np.int32) for i in kept]
            for model, of_model in cut.items()
        },
        text,
        dict(zip(cut, (positions + front[None, :]).T)),
        dict(zip(cut, (first + front[None, :]).T)),
        too_long,
        not_rebuilt,
    )
