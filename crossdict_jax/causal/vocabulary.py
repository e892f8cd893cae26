"""Tokens of one vocabulary in another: the same bytes of text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from crossdict_jax.activations import pairing
from crossdict_jax.errors import UserError

BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Translation:
    """Takes tokens of A to tokens of B that stand for the same text, or for its beginning.

    Attributes:
      pieces_a, pieces_b: by token id, the bytes that a token stands for.
      special_a, special_b: ids that stand for no text (BOS, padding ...).
      fallback_b: ids that stand for single bytes which no other token holds; where another one
        holds the same byte, the model reads and writes that.
      first_token: text -> B's first token of it, None where B's tokenizer cannot say.
    """

    pieces_a: tuple[bytes, ...]
    pieces_b: tuple[bytes, ...]
    special_a: frozenset[int] = frozenset()
    special_b: frozenset[int] = frozenset()
    fallback_b: frozenset[int] = frozenset()
    first_token: Callable[[str], int | None] = lambda text: None
    _ids: dict[bytes, int] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        by_worth = sorted(range(len(self.pieces_b)), key=lambda i: (i in self.fallback_b, i))
        for i in reversed(by_worth):  # of equal ones the first stays
            if self.pieces_b[i] and i not in self.special_b:
                self._ids[self.pieces_b[i]] = i

    @cached_property
    def has_text(self) -> np.ndarray:
        """bool [tokens of A]: which stand for text at all."""
        found = np.array([bool(piece) for piece in self.pieces_a])
        found[[i for i in self.special_a if i < len(found)]] = False
        return found

    def to_b(self, token: int) -> int | None:
        """Returns B's token for one of A's; None if no token of B begins as its text does.

        The token of the same bytes, where B has one. Otherwise B's first token when its own
        tokenizer reads that text; for bytes that are no text, the longest token they begin with.
        """
        if token >= len(self.pieces_a) or not self.has_text[token]:
            return None
        piece = self.pieces_a[token]
        if piece in self._ids:
            return self._ids[piece]
        first = self._first(piece)
        if first is not None:
            return first
        starts = (piece[:size] for size in range(len(piece) - 1, 0, -1))
        return next((self._ids[start] for start in starts if start in self._ids), None)

    def _first(self, piece: bytes) -> int | None:
        try:
            first = self.first_token(piece.decode())
        except UnicodeDecodeError:
            return None
        begins = first is not None and piece.startswith(self.pieces_b[first])
        return first if begins else None

    def text(self, side: str, token: int) -> str:
        """Returns a token of side "a" or "b" as text; bytes that are none as \\xNN."""
        pieces = self.pieces_a if side == "a" else self.pieces_b
        return pieces[token].decode(errors="backslashreplace")


def translation(tokenizer_a, tokenizer_b) -> Translation:
    """Returns the translation between two tokenizers."""

    def first_token(text: str) -> int | None:
        try:
            read = pairing.byte_ends(text, tokenizer_b)
        except UserError:  # B's tokenizer drops or changes some of it
            return None
        return next((int(i) for i, end in zip(read.ids, read.ends) if end > 0), None)

    return Translation(
        pieces_a=pairing.token_bytes(tokenizer_a),
        pieces_b=pairing.token_bytes(tokenizer_b),
        special_a=frozenset(tokenizer_a.all_special_ids),
        special_b=frozenset(tokenizer_b.all_special_ids),
        fallback_b=_fallback(tokenizer_b),
        first_token=first_token,
    )


def _fallback(tokenizer) -> frozenset[int]:
    """The ids of tokens spelled as a byte, like <0x73>."""
    vocabulary = tokenizer.get_vocab()
    return frozenset(i for token, i in vocabulary.items() if BYTE.fullmatch(token))
