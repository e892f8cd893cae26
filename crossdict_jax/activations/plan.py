"""What models will read and which positions become rows: known before any model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np

from crossdict_jax.activations import pairing
from crossdict_jax.activations.column import new_column
from crossdict_jax.activations.store import Rows, WindowTable
from crossdict_jax.activations.text import SPLITS, Corpus, Document, load_corpus
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel

BLOCK_BYTES = 2**16  # of text that is tokenized at a time: bounds what is held


@dataclass(frozen=True)
class Reading:
    """What models read, and which of their positions are rows of the store.

    Attributes:
      text: sha256 of the documents.
      bos: per model the id put in front of every window, or None.
      shard_windows: windows per shard.
      shard_starts: first row of every shard, and the end.
    """

    text: str
    table: WindowTable
    rows: Rows
    bos: tuple[int | None, ...]
    shard_windows: int
    shard_starts: np.ndarray


@dataclass(frozen=True)
class Plan(Reading):
    """All that is known before a model runs: what is read, and what was dropped.

    Attributes:
      of_split: rows of each split.
      documents: their names.
      provenance: of the text.
      statistics: of all windows together.
      not_rebuilt: per model, windows whose tokens' bytes are not the text.
      too_long: single characters of more tokens than a model reads.
    """

    of_split: dict[str, int]
    documents: list[str]
    provenance: dict
    statistics: pairing.PairingStatistics
    not_rebuilt: tuple[int, ...]
    too_long: int


def make_plan(config: Config, lms: Sequence[LanguageModel], directory: Path) -> Plan:
    """Reads the text, cuts it into windows and pairs their positions.

    Some documents are tokenized at a time. Texts, rows and tokens lie in nameless files of
    ``directory``: what is held does not grow with them.

    Raises:
      UserError: text that a model cannot read, or a split without a pair.
    """
    corpus = load_corpus(config.text, directory=directory)
    tokenizers = [lm.tokenizer for lm in lms]
    bos = tuple(bos_id(t) for t in tokenizers)
    limits = [
        min(config.text.window_tokens, lm.config.context) - (b is not None)
        for lm, b in zip(lms, bos)
    ]
    found = _Found(directory, models=len(lms), shard_windows=config.extract.shard_windows)
    for first, documents in _blocks(corpus):
        cut = pairing.windows([d.text for d in documents], tokenizers, limits=limits)
        _check_vocabulary(cut.windows, lms)
        found.add(cut, documents, first=first)
    rows = found.rows()
    return Plan(
        text=corpus.provenance["sha256"],
        table=found.table,
        rows=rows,
        bos=bos,
        shard_windows=config.extract.shard_windows,
        shard_starts=np.asarray([*found.shard_starts, len(rows)]),
        of_split=found.of_split,
        documents=[d.name for d in corpus.documents],
        provenance=corpus.provenance,
        statistics=found.statistics,
        not_rebuilt=tuple(found.not_rebuilt),
        too_long=found.too_long,
    )


def bos_id(tokenizer) -> int | None:
    """Returns the id that the tokenizer itself puts in front of a text, or None."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and with_special[:1] == [bos] and plain[:1] != [bos] else None


def _blocks(corpus: Corpus) -> Iterator[tuple[int, list[Document]]]:
    """Yields (number of the first, consecutive documents) of about BLOCK_BYTES of text."""
    first, block, size = 0, [], 0
    for document in corpus.documents:
        block.append(document)
        size += len(document.text)
        if size >= BLOCK_BYTES:
            yield first, block
            first, block, size = first + len(block), [], 0
    if block:
        yield first, block


def _check_vocabulary(windows: Sequence[pairing.Window], lms: Sequence[LanguageModel]) -> None:
    for i, lm in enumerate(lms):
        highest = max((int(w.tokens[i].ids.max()) for w in windows), default=0)
        if highest >= lm.config.vocab_size:
            raise UserError(
                f"The tokenizer of {lm.name} gives token id {highest}, but the model has only "
                f"{lm.config.vocab_size} (0-{lm.config.vocab_size - 1}); use its own tokenizer."
            )


class _Found:
    """Rows and tokens of the blocks so far, and what is counted of their windows."""

    def __init__(self, directory: Path, *, models: int, shard_windows: int):
        column = partial(new_column, directory)
        self._rows = Rows(
            document=column(np.int32),
            window=column(np.int32),
            byte_end=column(np.int32),
            position=column(np.int32, width=models),
            token=column(np.int32, width=models),
            split=column(np.int8),
            keep=column(bool),
        )
        self.table = WindowTable(
            document=column(np.int32),
            offsets=tuple(column(np.int64) for _ in range(models)),
            ids=tuple(column(np.int32) for _ in range(models)),
        )
        for offsets in self.table.offsets:
            offsets.append(np.zeros(1))
        self.statistics: pairing.PairingStatistics | None = None
        self.not_rebuilt, self.too_long = [0] * models, 0
        self.of_split = dict.fromkeys(SPLITS, 0)
        self.shard_starts: list[int] = []
        self._shard_windows, self._windows = shard_windows, 0

    def add(self, cut: pairing.Windows, documents: Sequence[Document], *, first: int) -> None:
        """Adds the windows of a block of documents, of which the first has the given number."""
        self.not_rebuilt = [a + b for a, b in zip(self.not_rebuilt, cut.not_rebuilt)]
        self.too_long += cut.too_long
        if not cut.windows:
            return
        columns: dict[str, list] = {f.name: [] for f in fields(Rows)}
        before = len(self._rows)
        for window in cut.windows:
            if self._windows % self._shard_windows == 0:
                self.shard_starts.append(before)
            split = documents[window.document].split
            n = self._add_window(columns, window, document=first + window.document, split=split)
            self.of_split[split] += n
            before += n
        for name, parts in columns.items():
            getattr(self._rows, name).append(np.concatenate(parts))
        self._add_tokens(cut.windows, first=first)

    def _add_window(self, columns, window: pairing.Window, *, document: int, split: str) -> int:
        """Adds one window's rows to lists of arrays, and returns how many there are."""
        ends = [t.ends for t in window.tokens]
        byte_end, position = pairing.pair_many(ends)
        n = len(byte_end)
        columns["window"].append(np.full(n, self._windows))
        columns["document"].append(np.full(n, document))
        columns["byte_end"].append(byte_end + window.start)
        columns["position"].append(position)
        columns["token"].append(
            np.stack([t.ids[p] for t, p in zip(window.tokens, position.T)], axis=-1)
        )
        columns["split"].append(np.full(n, SPLITS.index(split)))
        columns["keep"].append(np.ones(n, bool))
        here = pairing.pairing_statistics(ends)
        self.statistics = here if self.statistics is None else self.statistics + here
        self._windows += 1
        return n

    def _add_tokens(self, windows: Sequence[pairing.Window], *, first: int) -> None:
        self.table.document.append(np.asarray([first + w.document for w in windows]))
        for i, (offsets, column) in enumerate(zip(self.table.offsets, self.table.ids)):
            ids = [w.tokens[i].ids for w in windows]
            offsets.append(len(column) + np.cumsum([len(x) for x in ids]))
            column.append(np.concatenate(ids))

    def rows(self) -> Rows:
        """Returns the rows of all blocks.

        Raises:
          UserError: there is no window, or a split without a row.
        """
        if not self._windows:
            raise UserError("The text gave no window that every model can read; use other text.")
        for split, count in self.of_split.items():
            if not count:
                raise UserError(f"The {split} documents hold no paired position; use more text.")
        return self._rows
