"""Tokens of one vocabulary in another: the same bytes of text."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from crossdict_jax.activations import pairing
from crossdict_jax.errors import UserError
from crossdict_jax.workdir import spelled

BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # the token of a single byte


@dataclass(frozen=True)
class Translation:
    """Maps tokens of A to tokens of B with the same text, or its beginning."""

    pieces_a: tuple[bytes, ...]  # bytes by token id
    pieces_b: tuple[bytes, ...]
    special_a: frozenset[int] = frozenset()  # ids without text (BOS, padding ...)
    special_b: frozenset[int] = frozenset()
    fallback_b: frozenset[int] = frozenset()  # single bytes, written where no other token fits
    first_token: Callable[[str], int | None] = lambda text: None  # B's first token of a text

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """B's token of each piece: of equal ones the first, a fallback where no other is."""
        ids = reversed(sorted(range(len(self.pieces_b)), key=lambda i: (i in self.fallback_b, i)))
        return {self.pieces_b[i]: i for i in ids if self.pieces_b[i] and i not in self.special_b}

    @cached_property
    def has_text(self) -> np.ndarray:
        """bool [tokens of A]: which stand for text."""
        return np.array([bool(p) and i not in self.special_a for i, p in enumerate(self.pieces_a)])

    def to_b(self, token: int) -> int | None:
        """Returns B's token for one of A's; None if no token of B begins as its text does.

        The token of the same bytes; else the first that B's tokenizer reads in that text; for bytes
        that are no text, the longest token they begin with.
        """
        if token >= len(self.pieces_a) or not self.has_text[token]:
            return None
        piece = self.pieces_a[token]
        if piece in self._ids:
            return self._ids[piece]
        try:
            first = self.first_token(piece.decode())
        except UnicodeDecodeError:
            first = None
        if first is not None and piece.startswith(self.pieces_b[first]):
            return first
        starts = (piece[:size] for size in range(len(piece) - 1, 0, -1))
        return next((self._ids[start] for start in starts if start in self._ids), None)

    def weights_in_b(self, weights: dict[int, float], *, below: int) -> dict[int, float]:
        """Returns {token of B below ``below``: sum of the weights} for {token of A: weight}.

        Tokens without one in B are dropped.
        """
        in_b: dict[int, float] = {}
        for token, weight in weights.items():
            token = self.to_b(token)
            if token is not None and token < below:
                in_b[token] = in_b.get(token, 0.0) + weight
        return in_b

    def text(self, side: str, token: int) -> str:
        """Returns a token of side "a" or "b" as text; bytes that do not print as \\xNN."""
        pieces = self.pieces_a if side == "a" else self.pieces_b
        return spelled(pieces[token].decode(errors="backslashreplace"))


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
        fallback_b=frozenset(
            i for token, i in tokenizer_b.get_vocab().items() if BYTE.fullmatch(token)
        ),
        first_token=first_token,
    )
