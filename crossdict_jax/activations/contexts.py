"""The text around a row of the store, as one model's tokens cut it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crossdict_jax.activations.store import Store

BEFORE, AFTER = 12, 4  # tokens


class Contexts:
    """The tokens before, at and after rows of a store, as text."""

    def __init__(self, store: Store, model: str, pieces: Sequence[bytes]):
        """Args:
        pieces: by token id, the bytes that a token of this model stands for.
        """
        self._store, self._model, self._pieces = store, model, pieces
        self._column = store.models.index(model)

    def snippet(self, row: int) -> dict[str, str]:
        """Returns the text "before", the "token" and the text "after" a row number."""
        before, token, after = self._ids(row)
        parts = {"before": before, "token": token, "after": after}
        return {name: self._bytes(ids).decode(errors="replace") for name, ids in parts.items()}

    def text(self, row: int) -> bytes:
        """Returns the bytes around a row number, its own token among them."""
        return self._bytes(np.concatenate(self._ids(row)))

    def first_tokens(self, text: bytes, row: int) -> list[int]:
        """Returns the tokens around a row number in which the text begins."""
        ids = np.concatenate(self._ids(row))
        ends = np.cumsum([len(self._pieces[i]) for i in ids])
        whole, at, found = self._bytes(ids), -1, []
        while (at := whole.find(text, at + 1)) >= 0:
            found.append(int(ids[np.searchsorted(ends, at, side="right")]))
        return found

    def _ids(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = self._store.window_tokens(self._model, self._store.rows.window[row])
        at = int(self._store.rows.position[row, self._column])
        return tokens[max(0, at - BEFORE) : at], tokens[at : at + 1], tokens[at + 1 :][:AFTER]

    def _bytes(self, ids: np.ndarray) -> bytes:
        return b"".join(self._pieces[i] for i in ids)
