"""The text around rows of a store, as tokens and as text."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from crossdict_jax.activations.store import Store
from crossdict_jax.errors import UserError
from crossdict_jax.models import Site
from crossdict_jax.models.run import Passages

BEFORE, AFTER = 12, 4  # tokens of a context


def select_passages(store: Store, model: str, *, documents: int, seed: int) -> Passages:
    """Returns the windows and kept rows of at most ``documents`` test documents.

    For a seed the documents are the same for every model.
    """
    rows = store.select("test")
    present = np.unique(store.rows.document[rows])
    generator = np.random.Generator(np.random.Philox(key=seed))
    rows = rows[np.isin(store.rows.document[rows], generator.permutation(present)[:documents])]
    passages = passages_of(store, model, rows)
    if not passages.scored.any():
        raise UserError(
            f"None of the intervention.documents={documents} test documents has a token after a "
            f"paired position, as {model} reads them; raise it, or use longer text or windows."
        )
    return passages


def passages_of(store: Store, model: str, rows: np.ndarray) -> Passages:
    """Returns the windows that a model reads at row numbers [n] of the store."""
    windows, window = np.unique(store.rows.window[rows], return_inverse=True)
    m, bos = store.models.index(model), store.has_bos(model)
    return Passages(
        tokens=store.table.texts(m, windows, bos),
        window=window,
        position=store.rows.position[rows, m] + (bos is not None),
        rows=rows,
        document=store.rows.document[rows],
    )


def whole_spans(store: Store, model: str, passages: Passages) -> Passages:
    """Returns the passages with all of each span edited, back to the common end before it.

    The tokens inside a span belong to one model alone; unedited, they would let the clean text
    show. They take the replacement of the span's end. Ends dropped as outliers bound spans too. Of
    a window's first span only the end is edited: inside may lie another model's first token.
    """
    rows, window = passages.rows, store.rows.window
    position = store.rows.position[:, store.models.index(model)]
    above = np.maximum(rows - 1, 0)
    in_window = (above < rows) & (window[above] == window[rows])
    front = passages.position - position[rows]  # 1 where there is a BOS
    before = np.where(in_window, position[above], position[rows] - 1) + front
    return dataclasses.replace(passages, first=np.minimum(before + 1, passages.position))


def with_continuations(store: Store, model: str, passages: Passages) -> Passages:
    """Returns passages with spans from the common end before, up to the next one."""
    rows, window = passages.rows, store.rows.window
    position = store.rows.position[:, store.models.index(model)]
    below = np.minimum(rows + 1, len(window) - 1)
    more = np.where(window[below] == window[rows], position[below] - position[rows], 0)
    return dataclasses.replace(whole_spans(store, model, passages), end=passages.position + more)


def train_mean(store: Store, model: str, site: Site) -> np.ndarray:
    """Returns the mean activation, float32 [d_model], of the kept training rows."""
    x = store.read(model, site, store.select("train"))
    return np.mean(x, axis=0, dtype=np.float64).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Contexts:
    """The tokens before, at and after rows of a store, as text."""

    store: Store
    model: str
    pieces: Sequence[bytes]  # by token id, the bytes that a token of this model stands for

    def around(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the token ids before, at and after a row."""
        rows, model = self.store.rows, self.store.models.index(self.model)
        tokens, at = self.store.table.tokens(model, rows.window[row]), rows.position[row, model]
        return tokens[max(0, at - BEFORE) : at], tokens[at : at + 1], tokens[at + 1 :][:AFTER]

    def snippet(self, row: int) -> dict[str, str]:
        """Returns the text "before", the "token" and the text "after" a row."""
        parts = (b"".join(self.pieces[i] for i in ids) for ids in self.around(row))
        parts = (part.decode(errors="replace") for part in parts)
        return dict(zip(("before", "token", "after"), parts))

    def text(self, row: int) -> bytes:
        """Returns the bytes around a row, its own token included."""
        return b"".join(self.pieces[i] for i in np.concatenate(self.around(row)))

    def first_tokens(self, text: bytes, row: int) -> list[int]:
        """Returns the tokens around a row in which ``text`` begins."""
        ids, context = np.concatenate(self.around(row)), self.text(row)
        ends = np.cumsum([len(self.pieces[i]) for i in ids])
        starts = [match.start() for match in re.finditer(b"(?=%b)" % re.escape(text), context)]
        return [int(ids[i]) for i in np.searchsorted(ends, starts, side="right")]
