"""A user's texts as all models of a run read them, and their paired positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from crossdict_jax.activations import pairing
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.models.run import Passages


@dataclass(frozen=True)
class Reading:
    """Texts that every model can read; a row is a paired position, the same in all models."""

    kept: np.ndarray  # int [texts], indices of the given texts that are read
    passages: Mapping[str, Passages]  # by model, rows by text, with the spans that end at them
    too_long: int = 0  # texts left out: longer than a context
    not_rebuilt: int = 0  # texts left out: with characters that a tokenizer changes

    @property
    def text(self) -> np.ndarray:
        """int [rows], ascending: the text of each row."""
        return next(iter(self.passages.values())).window

    def take(self, texts: np.ndarray) -> Reading:
        """Returns the reading of some texts, int [m] ascending."""
        some = self.take_rows(np.isin(self.text, texts))
        window, passages = np.searchsorted(texts, some.text), {}
        for model, rows in some.passages.items():
            passages[model] = replace(rows, tokens=[rows.tokens[i] for i in texts], window=window)
        return replace(self, kept=self.kept[texts], passages=passages)

    def take_rows(self, rows: np.ndarray) -> Reading:
        """Returns the same texts with these rows alone, indices or a mask."""
        passages = {model: passages.take(rows) for model, passages in self.passages.items()}
        return replace(self, passages=passages)


def read_texts(run: FinishedRun, texts: Sequence[str], *, group: int = 1) -> Reading:
    """Returns what all models read; ``group`` neighbours are kept or left out together."""
    cut = {model: pairing.byte_ends_batch(texts, t) for model, t in run.tokenizers.items()}
    bos = {model: run.store.has_bos(model) for model in cut}
    front = {model: [] if token is None else [token] for model, token in bos.items()}
    shape = {model: run.runner(model).config for model in cut}
    room = {model: shape[model].context - len(front[model]) for model in cut}
    kept, too_long, not_rebuilt = [], 0, 0
    for start in range(0, len(texts), group):
        members = range(start, start + group)
        read = [(model, of_model[i]) for model, of_model in cut.items() for i in members]
        # Some tokenizers have tokens that their model lacks.
        within = all(t.ids.max(initial=0) < shape[model].vocab_size for model, t in read)
        if not within or any(tokens.ends is None for _, tokens in read):
            not_rebuilt += 1
        elif any(len(tokens.ids) > room[model] for model, tokens in read):
            too_long += 1
        else:
            kept += members
    pairs = [pairing.pair_many([of_model[i].ends for of_model in cut.values()])[1] for i in kept]
    text = np.repeat(np.arange(len(kept)), list(map(len, pairs)))
    # A span begins behind the position before; of a text's first one see ``whole_spans``.
    firsts = [np.minimum(np.concatenate([p[:1], p[:-1] + 1]), p) for p in pairs]
    empty, passages = np.zeros((0, len(cut)), np.int64), {}
    position, first = (np.concatenate([empty, *of_texts]) for of_texts in (pairs, firsts))
    for column, (model, of_model) in enumerate(cut.items()):
        tokens = [np.append(front[model], of_model[i].ids).astype(np.int32) for i in kept]
        at = (a[:, column] + len(front[model]) for a in (position, first))
        passages[model] = Passages(tokens, text, *at)
    return Reading(np.array(kept, int), passages, too_long, not_rebuilt)
