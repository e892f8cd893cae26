"""What models will read and which positions become rows: known before any model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from crossdict_jax.activations import pairing
from crossdict_jax.activations.store import Column, Rows, WindowTable
from crossdict_jax.activations.text import SPLITS, Document, load_corpus
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel

BLOCK_BYTES = 2**16  # of text that is tokenized at a time: bounds what is held
SHARD_WINDOWS = 512  # windows per file of the store: what a kill can lose


@dataclass(frozen=True)
class Reading:
    """What models read, and which of their positions are rows of the store.

    Attributes:
      text: sha256 of the documents.
      bos: per model the id put in front of every window, or None.
      shard_starts: first row of every shard (of SHARD_WINDOWS windows), and the end.
    """

    text: str
    table: WindowTable
    rows: Rows
    bos: tuple[int | None, ...]
    shard_starts: np.ndarray

    @property
    def shards(self) -> int:
        return len(self.shard_starts) - 1

    def windows(self, shard: int) -> range:
        """Returns the numbers of a shard's windows."""
        first = shard * SHARD_WINDOWS
        return range(first, min(first + SHARD_WINDOWS, len(self.table)))


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
    corpus, models = load_corpus(config.text, directory=directory), range(len(lms))
    tokenizers = [lm.tokenizer for lm in lms]
    bos = tuple(bos_id(t) for t in tokenizers)
    limits = [
        min(config.text.window_tokens, lm.config.context) - (b is not None)
        for lm, b in zip(lms, bos)
    ]
    types = {"split": np.int8, "keep": bool}
    width = {"position": len(lms), "token": len(lms)}
    columns = {
        f.name: Column(directory, types.get(f.name, np.int32), width=width.get(f.name))
        for f in fields(Rows)
    }
    window_document = Column(directory, np.int32)
    offsets, ids = ([Column(directory, t) for _ in models] for t in (np.int64, np.int32))
    for column in offsets:
        column.append([0])
    statistics, not_rebuilt, too_long = None, np.zeros(len(lms), int), 0
    of_split, shard_starts = dict.fromkeys(SPLITS, 0), []
    for first, documents in _blocks(corpus.documents):
        cut = pairing.windows([d.text for d in documents], tokenizers, limits=limits)
        not_rebuilt, too_long = not_rebuilt + cut.not_rebuilt, too_long + cut.too_long
        for window in cut.windows:
            number, document = len(window_document), first + window.document
            if number % SHARD_WINDOWS == 0:
                shard_starts.append(len(columns["keep"]))
            split = documents[window.document].split
            rows = _rows_of(window, number, document, split)
            for name, column in columns.items():
                column.append(getattr(rows, name))
            of_split[split] += len(rows)
            window_document.append([document])
            for i, tokens in enumerate(window.tokens):
                if len(tokens.ids) and tokens.ids.max() >= lms[i].config.vocab_size:
                    raise UserError(
                        f"The tokenizer of {lms[i].name} gives token id {tokens.ids.max()}, but "
                        f"the model has only {lms[i].config.vocab_size} (0-"
                        f"{lms[i].config.vocab_size - 1}); use its own tokenizer."
                    )
                ids[i].append(tokens.ids)
                offsets[i].append([len(ids[i])])
            counts = pairing.pairing_statistics([tokens.ends for tokens in window.tokens])
            statistics = counts if statistics is None else statistics + counts
    if statistics is None:
        raise UserError("The text gave no window that every model can read; use other text.")
    for split, count in of_split.items():
        if not count:
            raise UserError(f"The {split} documents hold no paired position; use more text.")
    return Plan(
        text=corpus.provenance["sha256"],
        table=WindowTable(
            window_document.array(),
            offsets=tuple(column.array() for column in offsets),
            ids=tuple(column.array() for column in ids),
        ),
        rows=Rows(**{name: column.array() for name, column in columns.items()}),
        bos=bos,
        shard_starts=np.asarray([*shard_starts, len(columns["keep"])]),
        of_split=of_split,
        documents=[d.name for d in corpus.documents],
        provenance=corpus.provenance,
        statistics=statistics,
        not_rebuilt=tuple(not_rebuilt.tolist()),
        too_long=too_long,
    )


def bos_id(tokenizer) -> int | None:
    """Returns the id that the tokenizer itself puts in front of a text, or None."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and with_special[:1] == [bos] and plain[:1] != [bos] else None


def _rows_of(window: pairing.Window, number: int, document: int, split: str) -> Rows:
    byte_end, position = pairing.pair_many([tokens.ends for tokens in window.tokens])
    n = len(byte_end)
    return Rows(
        document=np.full(n, document),
        window=np.full(n, number),
        byte_end=byte_end + window.start,
        position=position,
        token=np.stack([t.ids[p] for t, p in zip(window.tokens, position.T)], axis=-1),
        split=np.full(n, SPLITS.index(split)),
        keep=np.ones(n, bool),
    )


def _blocks(documents: Iterable[Document]) -> Iterator[tuple[int, list[Document]]]:
    """Yields (number of the first, consecutive documents) of about BLOCK_BYTES of text."""
    first, block, size = 0, [], 0
    for document in documents:
        block.append(document)
        size += len(document.text)
        if size >= BLOCK_BYTES:
            yield first, block
            first, block, size = first + len(block), [], 0
    if block:
        yield first, block
