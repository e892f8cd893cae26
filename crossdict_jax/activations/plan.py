"""The texts that models will read and the positions that become rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from crossdict_jax.activations import pairing
from crossdict_jax.activations.store import Column, Rows, WindowTable
from crossdict_jax.activations.text import SPLITS, load_corpus
from crossdict_jax.config import Config
from crossdict_jax.errors import UserError
from crossdict_jax.models import LanguageModel
from crossdict_jax.workdir import say

BLOCK_DOCUMENTS = 32  # that are tokenized at a time: bounds what is held
SHARD_WINDOWS = 512  # windows per file of the store: what a kill can lose
DROPPED = 0.1  # of the kept windows: more that a tokenizer does not rebuild are told
END = 2**31 - 1  # beyond every byte of a document


@dataclass(frozen=True)
class Reading:
    """The texts that models read, and the positions that are rows of the store."""

    text: str  # sha256 of the documents
    table: WindowTable
    rows: Rows
    bos: tuple[int | None, ...]  # per model the id put in front of every window, or None
    shard_starts: np.ndarray  # first row of every shard (of SHARD_WINDOWS windows), and the end

    def windows(self, shard: int) -> range:
        """Returns the window numbers of a shard."""
        first = shard * SHARD_WINDOWS
        return range(first, min(first + SHARD_WINDOWS, len(self.table)))


@dataclass(frozen=True)
class Plan(Reading):
    """What is read and what was dropped (as in ``pairing.Windows``), before any model runs."""

    documents: list[str]  # their names
    provenance: dict  # of the text
    statistics: pairing.PairingStatistics  # of all windows together
    not_rebuilt: tuple[int, ...]
    too_long: int
    control_tokens: tuple[int, ...]  # per model, how many the texts spell


def make_plan(config: Config, lms: Sequence[LanguageModel], directory: Path) -> Plan:
    """Reads the text, cuts it into windows and pairs their positions.

    All lie in nameless files of ``directory``, so memory does not grow with them.

    Raises:
      UserError: text that a model cannot read.
    """
    corpus, models = load_corpus(config.text, directory=directory), range(len(lms))
    tokenizers = [lm.tokenizer for lm in lms]
    bos = tuple(bos_id(t) for t in tokenizers)
    limits = [
        min(config.text.window_tokens, lm.config.context) - (b is not None)
        for lm, b in zip(lms, bos)
    ]
    columns = {f.name: Column(directory, np.int32) for f in fields(Rows)}
    columns |= {"split": Column(directory, np.int8), "keep": Column(directory, bool)}
    columns |= {n: Column(directory, np.int32, width=len(lms)) for n in ("position", "token")}
    window_document, shard_starts = Column(directory, np.int32), []
    offsets, ids = ([Column(directory, t) for _ in models] for t in (np.int64, np.int32))
    for column in offsets:
        column.append([0])
    statistics, not_rebuilt, too_long = None, np.zeros(len(lms), int), 0
    control, spelled = [pairing.control_ids(t) for t in tokenizers], np.zeros(len(lms), int)
    for first in range(0, len(corpus), BLOCK_DOCUMENTS):
        last = min(first + BLOCK_DOCUMENTS, len(corpus))
        documents = [corpus[i] for i in range(first, last)]
        cut = pairing.windows([d.text for d in documents], tokenizers, limits=limits)
        not_rebuilt, too_long = not_rebuilt + cut.not_rebuilt, too_long + cut.too_long
        for window in cut.windows:
            number, document = len(window_document), first + window.document
            if number % SHARD_WINDOWS == 0:
                shard_starts.append(len(columns["keep"]))
            ends = [tokens.ends for tokens in window.tokens]
            byte_end, position, counts = pairing.pair_many(ends)
            is_control = [np.isin(t.ids, ids) for t, ids in zip(window.tokens, control)]
            spelled += [of_model.sum() for of_model in is_control]
            # One model reads a control token where another may read its characters as text.
            reached = min(e[at].min(initial=END) for e, at in zip(ends, is_control))
            keep = (byte_end < reached) | (config.extract.control_tokens == "keep")
            n, split = len(byte_end), SPLITS.index(documents[window.document].split)
            entries = Rows(
                document=np.full(n, document),
                window=np.full(n, number),
                byte_end=byte_end + window.start,
                position=position,
                token=np.stack([t.ids[p] for t, p in zip(window.tokens, position.T)], axis=-1),
                split=np.full(n, split),
                keep=keep,
            )
            for name, column in columns.items():
                column.append(getattr(entries, name))
            window_document.append([document])
            for i, tokens in enumerate(window.tokens):
                ids[i].append(tokens.ids)
                offsets[i].append([len(ids[i])])
                size, highest = lms[i].config.vocab_size, tokens.ids.max(initial=0)
                if highest >= size:
                    raise UserError(
                        f"The tokenizer of {lms[i].name} gives token id {highest}, but the model "
                        f"has only {size} (0-{size - 1}); use its own tokenizer."
                    )
            statistics = counts if statistics is None else statistics + counts
    for lm, dropped in zip(lms, not_rebuilt):
        if dropped > DROPPED * len(window_document):
            changes = (
                f"the tokenizer of {lm.name} changes the text of {dropped} windows (as by lower "
                f"case or unknown characters), which are left out; {len(window_document)} are kept"
            )
            if statistics is None:
                raise UserError(f"No window can be read: {changes}; use other models or text.")
            say(f"extract_activations: {changes}")
    if statistics is None:
        raise UserError("The text gave no window that every model can read; use other text.")
    rows = Rows(**{name: column.array() for name, column in columns.items()})
    of_models = (tuple(c.array() for c in per_model) for per_model in (offsets, ids))
    return Plan(
        text=corpus.provenance["sha256"],
        table=WindowTable(window_document.array(), *of_models),
        rows=rows,
        bos=bos,
        shard_starts=np.asarray([*shard_starts, len(rows)]),
        documents=[d.name for d in corpus],
        provenance=corpus.provenance,
        statistics=statistics,
        not_rebuilt=tuple(not_rebuilt.tolist()),
        too_long=too_long,
        control_tokens=tuple(spelled.tolist()),
    )


def bos_id(tokenizer) -> int | None:
    """Returns the id that the tokenizer itself puts in front of a text, or None."""

    def probes() -> Iterator[str]:
        yield "a"
        for piece in pairing.token_bytes(tokenizer):  # of one that has no "a" and drops it
            yield piece.decode(errors="ignore")

    for probe in probes():
        ids = tokenizer(probe)["input_ids"]
        if text := tokenizer(probe, add_special_tokens=False)["input_ids"]:
            break
    starts = (n for n in range(len(ids)) if ids[n : n + len(text)] == text)
    front = ids[: next(starts, 0)]
    if len(front) > 1:
        raise UserError(
            f"{tokenizer.name_or_path} puts the tokens {front} in front of a text, where one at "
            "most is read; change the post_processor of its tokenizer.json."
        )
    return front[0] if front else None
