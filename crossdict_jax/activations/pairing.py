"""Text positions that several tokenizers share: byte ends of tokens, pairs, windows."""

from __future__ import annotations

import functools
import itertools
import json
import operator
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from crossdict_jax.errors import UserError

MAX_SPAN = 8  # the last bin of a span-length histogram holds this many tokens or more
_ENCODE_BATCH = 1024  # texts per call of a tokenizer: bounds the memory of its answers


class TokenEnds(NamedTuple):
    """The tokens of a text, and the byte of its NFC UTF-8 form at which each one ends."""

    ids: np.ndarray  # int32 [n]
    # int32 [n], non-decreasing; 0 for a token of invented bytes alone. None where the tokens do not
    # rebuild the text.
    ends: np.ndarray | None


class Pairing(NamedTuple):
    """The positions at which two tokenizers end a token at the same byte of a text."""

    position_a: np.ndarray  # int32 [n], into tokenizer_a(text, add_special_tokens=False)
    position_b: np.ndarray  # int32 [n]
    byte_end: np.ndarray  # int32 [n], ascending, in the NFC text
    coverage_a: float  # common ends / ends of A, the first position included
    coverage_b: float


class _Reader(NamedTuple):
    """A private copy of a tokenizer, and the bytes of text that each token stands for."""

    backend: object  # tokenizers.Tokenizer, neither truncating nor padding
    pieces: tuple[bytes, ...]  # by token id
    sizes: np.ndarray  # int32 [vocabulary], length of each piece
    added: frozenset[int]  # special and added tokens
    special: tuple[int, ...]  # those of them that are control tokens, as <|endoftext|>
    invents_prefix: bool  # whether a space is put before the text, or after an added token


def token_bytes(tokenizer) -> tuple[bytes, ...]:
    """Returns, by token id, the bytes of text that each token stands for.

    Byte-level tokens through the GPT-2 byte alphabet; "▁" as a space and <0xNN> as a byte where
    the tokenizer uses them; other tokens as their UTF-8 text.

    Raises:
      UserError: `tokenizer` has no `tokenizers` backend.
    """
    return _reader(tokenizer).pieces


def control_ids(tokenizer) -> tuple[int, ...]:
    """Returns the ids of the control tokens, each of which stands for its spelling in a text."""
    return _reader(tokenizer).special


def _reader(tokenizer) -> _Reader:
    import tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UserError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: use one with a tokenizer.json."
        )
    split_special = getattr(tokenizer, "split_special_tokens", backend.encode_special_tokens)
    added = tuple((i, repr(t)) for i, t in sorted(backend.get_added_tokens_decoder().items()))
    steps = repr((backend.normalizer, backend.pre_tokenizer, backend.decoder))
    return _build_reader(backend, (*added, steps), split_special)


@functools.lru_cache(maxsize=16)
def _build_reader(backend, changeable: tuple, split_special: bool) -> _Reader:
    """Reads a tokenizer's description; `changeable` renews the cache when a part is changed."""
    import tokenizers

    description = backend.to_str()
    try:
        copy = tokenizers.Tokenizer.from_str(description)
    except Exception as error:  # the Rust library has no class of its own
        raise UserError(
            f"A tokenizer contradicts itself ({error!s:.200}); copy its files again."
        ) from error
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = split_special
    spec = json.loads(description)
    added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    pieces = _spelled(spec, backend.get_vocab(with_added_tokens=True), added)
    # Metaspace says so in its newer or its older key, ByteLevel in the older; Prepend always does.
    said = [
        step.get("prepend_scheme", step.get("add_prefix_space", step["type"] == "Prepend"))
        for step in _steps(spec, "normalizer", "pre_tokenizer")
    ]
    prefix = any(value not in (False, "never") for value in said)
    sizes = np.array([len(piece) for piece in pieces], np.int32)
    special = tuple(token["id"] for token in spec["added_tokens"] if token["special"])
    return _Reader(copy, pieces, sizes, frozenset(added), special, prefix)


def _spelled(spec: dict, vocabulary: dict[str, int], added: dict[int, str]) -> tuple[bytes, ...]:
    """Returns the bytes of every token by its id; ``added`` ones are spelled as they are."""
    steps, alphabet = list(_steps(spec, "normalizer", "pre_tokenizer", "decoder")), {}
    if any(step["type"] == "ByteLevel" for step in steps):
        # GPT-2's alphabet: printable bytes as themselves, the others above.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in set(printable)]
        alphabet = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    marks = [
        step.get("replacement", step.get("content"))
        for step in steps
        if step["type"] == "Metaspace" or step.get("pattern") == {"String": " "}
    ]
    space = " " if alphabet else next(filter(None, marks), " ")
    byte_fallback = not alphabet and spec["model"].get("byte_fallback")
    pieces = [b""] * (1 + max(vocabulary.values(), default=0))
    for token, index in vocabulary.items():
        if index in added:
            pieces[index] = added[index].encode()
        elif alphabet.keys() >= set(token):
            pieces[index] = bytes(alphabet[character] for character in token)
        elif byte_fallback and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
            pieces[index] = bytes.fromhex(match[1])
        else:
            pieces[index] = token.replace(space, " ").encode()
    return tuple(pieces)


def _steps(spec: dict, *parts: str) -> Iterator[dict]:
    """Yields every step of the named parts of a tokenizer.json, sequences unfolded."""
    for step in filter(None, map(spec.get, parts)):
        yield step
        for key in ("normalizers", "pretokenizers", "decoders"):
            for inner in step.get(key, ()):
                yield from _steps({"inner": inner}, "inner")


def byte_ends(text: str, tokenizer) -> TokenEnds:
    """Returns the tokens of the NFC of `text`, without BOS, and their byte ends.

    Ends may lie inside a character. An invented prefix counts 0 bytes.

    Raises:
      UserError: the tokenizer drops or changes characters of this text, or one is half there.
    """
    if not isinstance(text, str):
        raise UserError(f"A text is a str, not {type(text).__name__}.")
    check_whole(text, ascii(text[:40]))
    (tokens,) = byte_ends_batch([text], tokenizer)
    if tokens.ends is None:
        raise UserError(
            f"{type(tokenizer).__name__} drops or changes characters of {text[:40]!r}: positions "
            "of this text cannot be paired; use other text or another tokenizer."
        )
    return tokens


def check_whole(text: str, where: str) -> None:
    """Raises UserError that names ``where`` if ``text`` has half of a surrogate pair."""
    if re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where} has half a character; mend it.")


def normalize(text: str) -> str:
    """Returns the NFC of `text`, which tokenizers read and byte offsets count in."""
    return unicodedata.normalize("NFC", text)


def byte_ends_batch(texts: Sequence[str], tokenizer) -> list[TokenEnds]:
    """Returns `byte_ends` of many texts; `ends` is None where tokens do not rebuild the text."""
    read, reader = [], _reader(tokenizer)
    for start in range(0, len(texts), _ENCODE_BATCH):
        batch = [normalize(text) for text in texts[start : start + _ENCODE_BATCH]]
        encodings = reader.backend.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings):
            ids, data = encoding.ids, text.encode()
            pieces = [reader.pieces[i] for i in ids]
            sizes, invented = reader.sizes[ids], []
            if b"".join(pieces) != data:
                bounds = [i for i, token in enumerate(ids) if token in reader.added]
                may = reader.invents_prefix
                invented = _invented_spaces(data, pieces, bounds) if may else None
            if invented:
                sizes[invented] -= 1
            ends = None if invented is None else np.cumsum(sizes, dtype=np.int32)
            read.append(TokenEnds(np.array(ids, np.int32), ends))
    return read


def _invented_spaces(text: bytes, pieces: list[bytes], bounds: list[int]) -> list[int] | None:
    """Returns the tokens whose first byte is an invented space; None if that explains nothing.

    At most one space is invented before each run of ordinary tokens: at the start of the text and
    after each added token (``bounds``).
    """
    invented, offset = [], 0
    for before, stop in itertools.pairwise([-1, *bounds, len(pieces)]):
        run, behind = b"".join(pieces[before + 1 : stop]), b"".join(pieces[stop : stop + 1])
        for spelling in (run, run.removeprefix(b" ")):
            end = offset + len(spelling + behind)
            if text[offset:end] == spelling + behind and (behind or end == len(text)):
                break
        else:
            return None
        if len(spelling) < len(run):
            invented.append(before + 1)
        offset = end
    return invented


# Pairs


def pair(text: str, tokenizer_a, tokenizer_b) -> Pairing:
    """Returns the positions of the NFC of `text` at which both tokenizers end a token.

    The end of the text is one, and so is an end inside a character; position 0 of either model
    never is.

    Raises:
      UserError: a tokenizer drops or changes characters of this text.
    """
    ends = [byte_ends(text, tokenizer).ends for tokenizer in (tokenizer_a, tokenizer_b)]
    byte_end, positions, statistics = pair_many(ends)
    return Pairing(*positions.T, byte_end, *statistics.coverage)


def pair_many(ends: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, PairingStatistics]:
    """Returns (byte_end [n], positions [n, models], counts) of the ends common to all models.

    ``ends`` are each model's token ends of one text. A position is the last token at that end.
    Pairs with position 0 of any model are left out: it attends to itself alone and has an outlying
    norm.
    """
    common = functools.reduce(np.intersect1d, ends[1:], np.unique(ends[0]))
    common = common[common > 0]
    positions = [np.searchsorted(e, common, side="right") - 1 for e in ends]
    positions = np.stack(positions, axis=-1).astype(np.int32)  # [spans, models]
    kept = (positions > 0).all(axis=1)
    lengths = np.diff(positions, axis=0, prepend=np.full((1, len(ends)), -1, np.int32))
    bins = (
        np.bincount(of_model, minlength=MAX_SPAN + 1)
        for of_model in np.minimum(lengths, MAX_SPAN).T
    )
    statistics = PairingStatistics(
        texts=1,
        ends=tuple(len(np.unique(e[e > 0])) for e in ends),
        common=len(common),
        first_positions=int((~kept).sum()),
        one_to_one=int((lengths == 1).all(axis=1).sum()),
        span_tokens=tuple(tuple(counts[1:].tolist()) for counts in bins),
    )
    return common[kept], positions[kept], statistics


class PairingStatistics(NamedTuple):
    """Counts of paired texts, added with `+`; tuples have an entry per model.

    A span is the text between two neighbouring common ends.
    """

    texts: int
    ends: tuple[int, ...]  # distinct token ends
    common: int  # ends common to all models, before masking: as many as there are spans
    first_positions: int  # common ends masked because they hold a model's position 0
    one_to_one: int  # spans that are one token in every model
    span_tokens: tuple[tuple[int, ...], ...]  # [models][MAX_SPAN] spans of 1, 2, .. tokens

    def __add__(self, other: PairingStatistics) -> PairingStatistics:
        return jax.tree.map(operator.add, self, other)

    @property
    def coverage(self) -> tuple[float, ...]:
        """Common ends / ends of each model; 1 where a model has no end."""
        return tuple(self.common / n if n else 1.0 for n in self.ends)

    def to_json(self, models: Sequence[str]) -> dict:
        """Returns JSON values, per-model ones under the model's name."""
        bins = [str(n) for n in range(1, MAX_SPAN)] + [f"{MAX_SPAN}+"]
        return {
            "texts": self.texts,
            "common_ends": self.common,
            "first_positions_masked": self.first_positions,
            "pairs": self.common - self.first_positions,
            "one_to_one_spans": self.one_to_one / self.common if self.common else None,
            "models": {
                model: {
                    "ends": self.ends[i],
                    "coverage": self.coverage[i],
                    "tokens_per_span": dict(zip(bins, self.span_tokens[i])),
                }
                for i, model in enumerate(models)
            },
        }


# Windows

_SPACE = re.compile(rb"(?<!\s)\s")  # where whitespace begins: windows are cut here if possible


class Window(NamedTuple):
    """A stretch of a document that every model can read at once."""

    document: int  # index into the documents given
    start: int  # byte of the NFC document at which it begins
    tokens: tuple[TokenEnds, ...]  # per model; ends count from the window's first byte


class Windows(NamedTuple):
    """All windows of some documents in order, and counts of what was dropped."""

    windows: tuple[Window, ...]
    not_rebuilt: tuple[int, ...]  # per model: windows whose tokens' bytes are not the text
    too_long: int  # single characters of more tokens than a model reads


class _Piece(NamedTuple):
    """A stretch of a document that may still be too long for a window."""

    document: int
    start: int
    data: bytes


def windows(texts: Sequence[str], tokenizers: Sequence, *, limits: Sequence[int]) -> Windows:
    """Returns consecutive windows of the NFC documents, at most `limits` tokens per model.

    The text is cut first and then tokenized, at whitespace if some is near, else between
    characters. A window that a tokenizer does not rebuild is dropped and counted.
    """
    if min(limits) < 2:
        raise UserError(
            f"A window of {min(limits)} tokens holds no pair, as the first position is masked: "
            "text.window_tokens and every model's context must leave room for 2 or more."
        )
    pieces = [_Piece(i, 0, normalize(text).encode()) for i, text in enumerate(texts)]
    kept, not_rebuilt, too_long = [], [0] * len(tokenizers), 0
    while pieces:
        unread, texts = [], [piece.data.decode() for piece in pieces]
        for piece, *tokens in zip(pieces, *(byte_ends_batch(texts, t) for t in tokenizers)):
            if all(len(t.ids) <= limit for t, limit in zip(tokens, limits)):
                not_rebuilt = [n + (t.ends is None) for n, t in zip(not_rebuilt, tokens)]
                if piece.data and all(t.ends is not None for t in tokens):
                    kept.append(Window(piece.document, piece.start, tuple(tokens)))
            elif len(piece.data.decode()) == 1:
                too_long += 1
            else:
                unread += _cut_up(piece, tokens, limits=limits)
        pieces = unread
    kept.sort(key=lambda window: (window.document, window.start))
    return Windows(tuple(kept), tuple(not_rebuilt), too_long)


def _cut_up(piece: _Piece, tokens: Sequence[TokenEnds], *, limits) -> list[_Piece]:
    """Returns a piece in two or more parts that should fit, by its token ends.

    Cut at or before where a model's tokens are too many: at nearby whitespace, else between two
    characters, and a character on at least.
    """
    size, parts, start = len(piece.data), [], 0
    # Tokens that do not rebuild the text are taken to end at equal distances.
    ends = [
        np.linspace(0, size, max(1, len(t.ids)) + 1)[1:].astype(int) if t.ends is None else t.ends
        for t in tokens
    ]
    spaces = np.array([match.start() for match in _SPACE.finditer(piece.data)], np.int32)
    is_inside = np.frombuffer(piece.data, np.uint8) & 0xC0 == 0x80  # a continuation byte of UTF-8
    characters = np.append(np.flatnonzero(~is_inside), size)
    while start < size:
        stop = size
        for of_model, limit in zip(ends, limits):
            first = int(np.searchsorted(of_model, start, side="right"))
            left = len(of_model) - first
            # The last two windows share the rest equally, so that none is a mere remainder.
            last = left if left <= limit else min(limit, (left + 1) // 2)
            stop = min(stop, int(of_model[first + last - 1]))
        stop = stop if start else min(stop, size - 1)  # the piece as it is does not fit
        if stop < size:
            after_start = int(np.searchsorted(characters, start, side="right"))
            character = max(after_start, int(np.searchsorted(characters, stop, side="right")) - 1)
            space = int(np.searchsorted(spaces, stop, side="right")) - 1
            near = space >= 0 and spaces[space] > start and 2 * spaces[space] >= start + stop
            stop = int(spaces[space] if near else characters[character])
        parts.append(_Piece(piece.document, piece.start + start, piece.data[start:stop]))
        start = stop
    return parts
