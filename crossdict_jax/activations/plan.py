"""What models will read and which positions become rows: known before any model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from crossdict_jax.activations import pairing
from crossdict_jax.activations.store import Rows, WindowTable
from crossdict_jax.activations.text import SPLITS, Corpus, Document, load_corpus
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel

BLOCK_BYTES = 2**16  # of text that is tokenized at a time: bounds what is held beside the rows


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
      documents: their names.
      provenance: of the text.
      statistics: of all windows together.
      not_rebuilt: per model, windows whose tokens' bytes are not the text.
      too_long: single characters of more tokens than a model reads.
    """

    documents: list[str]
    provenance: dict
    statistics: pairing.PairingStatistics
    not_rebuilt: tuple[int, ...]
    too_long: int


def make_plan(config: Config, lms: Sequence[LanguageModel]) -> Plan:
    """Reads the text, cuts it into windows and pairs their positions.

    Some documents are tokenized at a time; of their windows only the rows and tokens are kept.

    Raises:
      UserError: text that a model cannot read, or a split without a pair.
    """
    corpus = load_corpus(config.text)
    tokenizers = [lm.tokenizer for lm in lms]
    bos = tuple(bos_id(t) for t in tokenizers)
    limits = [
        min(config.text.window_tokens, lm.config.context) - (b is not None)
        for lm, b in zip(lms, bos)
    ]
    found = _Found(models=len(lms))
    for first, documents in _blocks(corpus):
        cut = pairing.windows([d.text for d in documents], tokenizers, limits=limits)
        _check_vocabulary(cut.windows, lms)
        found.add(cut, documents, first=first)
    rows, table = found.rows(), found.table()
    starts = np.searchsorted(rows.window, np.arange(0, len(table), config.extract.shard_windows))
    return Plan(
        text=corpus.provenance["sha256"],
        table=table,
        rows=rows,
        bos=bos,
        shard_windows=config.extract.shard_windows,
        shard_starts=np.append(starts, len(rows)),
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

    def __init__(self, *, models: int):
        self.statistics: pairing.PairingStatistics | None = None
        self.not_rebuilt, self.too_long = [0] * models, 0
        self._models, self._windows = models, 0
        self._rows, self._tables = _Growing(), _Growing()

    def add(self, cut: pairing.Windows, documents: Sequence[Document], *, first: int) -> None:
        """Adds the windows of a block of documents, of which the first has the given number."""
        self.not_rebuilt = [a + b for a, b in zip(self.not_rebuilt, cut.not_rebuilt)]
        self.too_long += cut.too_long
        columns: dict[str, list] = {f.name: [] for f in fields(Rows)}
        for window in cut.windows:
            split = SPLITS.index(documents[window.document].split)
            self._add_window(columns, window, document=first + window.document, split=split)
        if cut.windows:
            self._rows.add({name: np.concatenate(parts) for name, parts in columns.items()})
            self._tables.add(_tokens(cut.windows, first=first))

    def _add_window(self, columns, window: pairing.Window, *, document: int, split: int) -> None:
        ends = [t.ends for t in window.tokens]
        byte_end, position = pairing.pair_many(ends)
        n = len(byte_end)
        columns["window"].append(np.full(n, self._windows, np.int32))
        columns["document"].append(np.full(n, document, np.int32))
        columns["byte_end"].append((byte_end + window.start).astype(np.int32))
        columns["position"].append(position.astype(np.int32))
        token = np.stack([t.ids[p] for t, p in zip(window.tokens, position.T)], axis=-1)
        columns["token"].append(token.astype(np.int32))
        columns["split"].append(np.full(n, split, np.int8))
        columns["keep"].append(np.ones(n, bool))
        here = pairing.pairing_statistics(ends)
        self.statistics = here if self.statistics is None else self.statistics + here
        self._windows += 1

    def rows(self) -> Rows:
        """Returns the rows of all blocks, which are given away: to be called once."""
        if not self._windows:
            raise UserError("The text gave no window that every model can read; use other text.")
        rows = Rows(**self._rows.taken())
        for i, split in enumerate(SPLITS):
            if not (rows.split == i).any():
                raise UserError(f"The {split} documents hold no paired position; use more text.")
        return rows

    def table(self) -> WindowTable:
        """Returns the windows of all blocks, which are given away: to be called once."""
        table = self._tables.taken()
        return WindowTable(
            document=table["document"],
            offsets=tuple(
                np.cumsum(np.append(0, table[f"lengths_{i}"])) for i in range(self._models)
            ),
            ids=tuple(table[f"ids_{i}"] for i in range(self._models)),
        )


class _Growing:
    """Arrays by name that grow where they lie: nothing is held twice, nor in many pieces."""

    def __init__(self):
        self._bytes: dict[str, bytearray] = {}
        self._like: dict[str, np.ndarray] = {}

    def add(self, more: dict[str, np.ndarray]) -> None:
        """Appends to every array; names, types and trailing axes are those of the first call."""
        for name, array in more.items():
            self._like.setdefault(name, array[:0])
            self._bytes.setdefault(name, bytearray()).extend(array.tobytes())

    def taken(self) -> dict[str, np.ndarray]:
        """Returns the arrays, which are given away."""
        bytes_, self._bytes = self._bytes, {}
        return {name: self._array(name, b) if b else self._like[name] for name, b in bytes_.items()}

    def _array(self, name: str, b: bytearray) -> np.ndarray:
        like = self._like[name]
        return np.frombuffer(b, like.dtype).reshape(-1, *like.shape[1:])


def _tokens(windows: Sequence[pairing.Window], *, first: int) -> dict[str, np.ndarray]:
    """What the window table holds of a block's windows."""
    found = {"document": np.asarray([first + w.document for w in windows], np.int32)}
    for i, _ in enumerate(windows[0].tokens):
        ids = [w.tokens[i].ids for w in windows]
        found[f"lengths_{i}"] = np.asarray([len(x) for x in ids])
        found[f"ids_{i}"] = np.concatenate(ids).astype(np.int32)
    return found
