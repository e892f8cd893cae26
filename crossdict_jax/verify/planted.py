"""Planted views: sparse features whose truth is known, seen by several models in superposition.

A row is a text position. Its *codes* say which of ``features`` true features are active and how
strongly; view m shows ``x_m = codes @ directions_m + offset_m + noise``, in fewer dimensions than
there are features. Each feature is shared by all views or exclusive to one. Everything that methods
of this field claim to find (directions, partners across views, exclusivity, what lies beyond the
current token) can therefore be scored against what was planted.

    planted = views(PlantedConfig(), seed=0)
    planted.x[0], planted.x[1]      # [rows, 24], [rows, 32]
    planted.codes, planted.shared   # [rows, 64], bool [64]

``streams`` plants the same in a text that every view cuts into tokens of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from crossdict_jax.activations.pairing import pair_many
from crossdict_jax.errors import UserError

HIGHEST_FREQUENCY = 0.5  # a feature that is nearly always active is no sparse feature
AMPLITUDES = ("lognormal", "exponential")
_TRUTH, _CODES, _CLASSES, _BURSTS, _NOISE, _TEXT = range(6)  # independent streams of one seed


@dataclass(frozen=True)
class PlantedConfig:
    """What is planted; shares are of the features, counts are whole numbers."""

    rows: int = 8192  # text positions
    documents: int = 128  # stretches of equally many rows
    features: int = 64  # true features, more than dimensions: superposition
    widths: tuple[int, ...] = (24, 32)  # dimensions of each view
    exclusive: float = 0.25  # share that one view alone sees, dealt out evenly; 1: unrelated views
    active: float = 4.0  # active features a row, on average
    zipf: float = 0.5  # frequency of the r-th most frequent feature is as r ** -zipf
    amplitude: str = "lognormal"  # or exponential: of an active feature, mean 1
    spread: float = 0.25  # lognormal: standard deviation of the logarithm
    noise: float = 0.02  # standard deviation in every dimension; directions have length 1
    offset: float = 0.0  # length of the constant vector of each view
    correlated: int = 0  # pairs of features that tend to fire together
    correlation: float = 0.5  # share of rows where the second of a pair follows the first
    children: int = 0  # features that fire only where a more frequent one, their parent, does
    burstiness: float = 0.0  # std of a feature's relative frequency between documents, 0: none
    from_token: float = 0.0  # share that is a function of the current token alone
    vocabulary: int = 64  # tokens, Zipf; what features of the token are functions of


@dataclass(frozen=True)
class TextConfig:
    """The synthetic text of ``streams``, and how each view cuts it."""

    words: int = 120  # in the lexicon; their frequencies are Zipf
    letters: int = 12  # in the alphabet
    words_per_document: int = 40
    pieces: int = 3  # tokens of a word at most, each of two bytes or more


@dataclass(frozen=True)
class Truth:
    """What is the same in every row.

    Attributes:
      directions: per view float32 [features, width], length 1; zero where the view sees nothing.
      offsets: per view float32 [width].
      seen: bool [views, features].
      frequency: float [features], planted probability of being active.
      parent: int [features], the feature without which it cannot fire; -1 for none.
      partner: int [features], the feature that it tends to follow; -1 for none.
      from_token: bool [features], whether it is a function of the current token.
    """

    directions: tuple[np.ndarray, ...]
    offsets: tuple[np.ndarray, ...]
    seen: np.ndarray
    frequency: np.ndarray
    parent: np.ndarray
    partner: np.ndarray
    from_token: np.ndarray

    @property
    def shared(self) -> np.ndarray:
        """bool [features]: seen by all views."""
        return self.seen.all(0)

    def exclusive(self, view: int) -> np.ndarray:
        """bool [features]: seen by this view alone."""
        return self.seen[view] & (self.seen.sum(0) == 1)


@dataclass(frozen=True)
class Views:
    """Paired rows of several views, and the truth behind them.

    Attributes:
      x: per view float32 [rows, width].
      codes: float32 [rows, features], the true activations; zero where inactive.
      tokens: per view int32 [rows], the token that ends at the row.
      document: int32 [rows], ascending.
      truth: what is the same in every row.
    """

    x: tuple[np.ndarray, ...]
    codes: np.ndarray
    tokens: tuple[np.ndarray, ...]
    document: np.ndarray
    truth: Truth

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shared(self) -> np.ndarray:
        """bool [features]: seen by all views."""
        return self.truth.shared

    @property
    def directions(self) -> tuple[np.ndarray, ...]:
        """Per view float32 [features, width]."""
        return self.truth.directions

    def exclusive(self, view: int) -> np.ndarray:
        """bool [features]: seen by this view alone."""
        return self.truth.exclusive(view)

    def take(self, rows: np.ndarray) -> Views:
        """Returns the rows of these numbers, or where a mask is True."""
        return dataclasses.replace(
            self,
            x=tuple(x[rows] for x in self.x),
            codes=self.codes[rows],
            tokens=tuple(tokens[rows] for tokens in self.tokens),
            document=self.document[rows],
        )

    def split(self, test_fraction: float = 0.25) -> tuple[Views, Views]:
        """Returns (training, test) rows, whole documents each; the last documents are the test."""
        documents = np.unique(self.document)
        first = documents[round(len(documents) * (1 - test_fraction))]
        return self.take(self.document < first), self.take(self.document >= first)


@dataclass(frozen=True)
class Streams:
    """A text as each view's tokens, with an activation at the end of every token.

    Attributes:
      texts: the documents, bytes (ASCII).
      ends: per view and document int32 [tokens], the byte at which each token ends.
      ids: per view and document int32 [tokens].
      x: per view and document float32 [tokens, width].
      codes: per view and document float32 [tokens, features].
      truth: what is the same everywhere.
    """

    texts: tuple[bytes, ...]
    ends: tuple[tuple[np.ndarray, ...], ...]
    ids: tuple[tuple[np.ndarray, ...], ...]
    x: tuple[tuple[np.ndarray, ...], ...]
    codes: tuple[tuple[np.ndarray, ...], ...]
    truth: Truth

    def paired(self, *, shift: int = 0) -> Views:
        """Returns the rows at which every view ends a token, as the pipeline pairs them.

        Args:
          shift: tokens by which every view but the first is read too late: a mistake to find.
        """
        parts = [self._positions(d, shift) for d in range(len(self.texts))]
        document = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])

        def gather(per_view):
            return tuple(
                np.concatenate([array[p[:, v]] for array, p in zip(per_view[v], parts)])
                for v in range(len(per_view))
            )

        return Views(
            x=gather(self.x),
            codes=gather(self.codes)[0],
            tokens=gather(self.ids),
            document=document,
            truth=self.truth,
        )

    def _positions(self, document: int, shift: int) -> np.ndarray:
        """Returns positions [pairs, views] of one document's tokens."""
        ends = [view[document] for view in self.ends]
        _, positions = pair_many(ends)
        positions = positions + shift * (np.arange(len(ends)) > 0)[None, :]
        inside = (positions >= 0) & (positions < np.asarray([len(e) for e in ends])[None, :])
        return positions[inside.all(1)]


# ---------------------------------------------------------------- rows


def views(config: PlantedConfig, seed: int) -> Views:
    """Returns planted rows: equal settings and seeds give equal bits.

    Raises:
      UserError: a setting cannot be planted.
    """
    truth = plant(config, seed)
    document = (np.arange(config.rows) * config.documents // config.rows).astype(np.int32)
    tokens = _zipf_draws(_generator(seed, _TEXT), config.vocabulary, config.rows)
    codes = _codes(config, truth, seed, document=document, classes=tokens)
    return Views(
        x=_show(config, truth, codes, seed),
        codes=codes,
        tokens=(tokens,) * len(config.widths),
        document=document,
        truth=truth,
    )


def plant(config: PlantedConfig, seed: int) -> Truth:
    """Returns the truth of a seed: directions, frequencies, who sees what, who follows whom."""
    _check(config)
    rng = _generator(seed, _TRUTH)
    frequency = _frequencies(config)
    seen = _seen(config, rng)
    from_token = np.zeros(config.features, bool)
    from_token[rng.permutation(config.features)[: round(config.from_token * config.features)]] = (
        True
    )
    parent, partner = _relatives(config, rng, from_token)
    return Truth(
        directions=tuple(
            _unit(rng, config.features, width) * sees[:, None].astype(np.float32)
            for width, sees in zip(config.widths, seen)
        ),
        offsets=tuple(config.offset * _unit(rng, 1, width)[0] for width in config.widths),
        seen=seen,
        frequency=frequency,
        parent=parent,
        partner=partner,
        from_token=from_token,
    )


def _check(config: PlantedConfig) -> None:
    most = HIGHEST_FREQUENCY * config.features
    allowed = {
        "rows": (config.rows >= 1, "1 or more"),
        "documents": (1 <= config.documents <= config.rows, "1 or more, and at most the rows"),
        "features": (config.features >= 1, "1 or more"),
        "widths": (min(config.widths, default=0) >= 1, "one number or more, each 1 or more"),
        "exclusive": (0 <= config.exclusive <= 1, "between 0 and 1"),
        "active": (0 < config.active <= most, f"above 0 and at most {most:g}, half the features"),
        "amplitude": (config.amplitude in AMPLITUDES, f"one of {', '.join(AMPLITUDES)}"),
        "correlation": (0 <= config.correlation <= 1, "between 0 and 1"),
        "burstiness": (config.burstiness >= 0, "0 or more"),
        "from_token": (0 <= config.from_token <= 1, "between 0 and 1"),
        "vocabulary": (config.vocabulary >= 1, "1 or more"),
    }
    for name, (fits, words) in allowed.items():
        if not fits:
            raise UserError(f"{name}={getattr(config, name)} must be {words}.")


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))


def _frequencies(config: PlantedConfig) -> np.ndarray:
    """Returns Zipf frequencies, descending, none above the highest, whose sum is ``active``."""
    weights = (1.0 + np.arange(config.features)) ** -config.zipf
    capped = np.zeros(config.features, bool)
    while True:
        rest = config.active - HIGHEST_FREQUENCY * capped.sum()
        scaled = rest * weights / weights[~capped].sum() if not capped.all() else weights
        over = ~capped & (scaled > HIGHEST_FREQUENCY)
        if not over.any():
            return np.where(capped, HIGHEST_FREQUENCY, scaled)
        capped |= over


def _seen(config: PlantedConfig, rng: np.random.Generator) -> np.ndarray:
    """Returns who sees what, bool [views, features]; exclusive ones have all frequencies."""
    n_views = len(config.widths)
    chosen = rng.permutation(config.features)[: round(config.exclusive * config.features)]
    seen = np.ones((n_views, config.features), bool)
    seen[:, chosen] = np.arange(len(chosen))[None, :] % n_views == np.arange(n_views)[:, None]
    return seen


def _relatives(config: PlantedConfig, rng, from_token) -> tuple[np.ndarray, np.ndarray]:
    """Returns (parent, partner) [features], -1 for none.

    Nobody has two relations, the first of each two is the more frequent one, and both are
    functions of the token or both are not.
    """
    free = rng.permutation(config.features)
    kinds = [free[from_token[free] == kind] for kind in (False, True)]
    twos = np.concatenate([np.sort(k[: len(k) // 2 * 2].reshape(-1, 2), axis=1) for k in kinds])
    twos = rng.permutation(twos)
    wanted = config.children + config.correlated
    if wanted > len(twos):
        raise UserError(
            f"children={config.children} and correlated={config.correlated} make {wanted} pairs of "
            f"features, and {config.features} features hold only {len(twos)}; lower them."
        )
    parent, partner = np.full((2, config.features), -1)
    families, couples = twos[: config.children], twos[config.children : wanted]
    parent[families[:, 1]] = families[:, 0]
    partner[couples[:, 1]] = couples[:, 0]
    return parent, partner


def _unit(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    rows = rng.standard_normal((n, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _zipf_draws(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    weights = 1.0 / (1.0 + np.arange(n))
    return rng.choice(n, size, p=weights / weights.sum()).astype(np.int32)


def _codes(config: PlantedConfig, truth: Truth, seed: int, *, document, classes) -> np.ndarray:
    """Returns codes float32 [rows, features]; ``classes`` [rows] fix the features of the token."""
    n_classes = int(classes.max()) + 1 if len(classes) else 0
    bursts = _bursts(config, _generator(seed, _BURSTS), int(document.max()) + 1)
    by_row = _draw(config, truth, _generator(seed, _CODES), bursts[document])
    by_class = _draw(config, truth, _generator(seed, _CLASSES), np.ones((n_classes, 1)))
    return np.where(truth.from_token[None, :], by_class[classes], by_row)


def _bursts(config: PlantedConfig, rng, documents: int) -> np.ndarray:
    """Returns how much more often each feature fires in each document; mean 1."""
    if config.burstiness == 0:
        return np.ones((documents, 1))
    shape = config.burstiness**-2
    return rng.gamma(shape, 1 / shape, (documents, config.features))


def _draw(config: PlantedConfig, truth: Truth, rng, relative: np.ndarray) -> np.ndarray:
    """Returns independent rows of codes at ``frequency * relative`` [rows, features or 1]."""
    shape = (len(relative), config.features)
    uniform = rng.random(shape, np.float32)
    followed = np.flatnonzero(truth.partner >= 0)
    follows = rng.random((len(relative), len(followed))) < config.correlation
    uniform[:, followed] = np.where(
        follows, uniform[:, truth.partner[followed]], uniform[:, followed]
    )
    born = truth.parent >= 0
    # A child's own draw is conditional on its parent's firing, so its frequency stays as planted.
    own = np.where(born, truth.frequency / truth.frequency[truth.parent], truth.frequency)
    chance = np.where(born[None, :], own[None, :], own[None, :] * relative)
    fires = uniform < chance
    fires[:, born] &= fires[:, truth.parent[born]]
    return np.where(fires, _amplitudes(config, rng, shape), 0.0).astype(np.float32)


def _amplitudes(config: PlantedConfig, rng, shape: tuple[int, int]) -> np.ndarray:
    if config.amplitude == "exponential":
        return rng.standard_exponential(shape, np.float32)
    logs = config.spread * rng.standard_normal(shape, np.float32)
    return np.exp(logs - config.spread**2 / 2)


def _show(config: PlantedConfig, truth: Truth, codes: np.ndarray, seed: int) -> tuple:
    """Returns what each view shows of the codes [rows, features], with noise of its own."""
    rng = _generator(seed, _NOISE)
    return tuple(
        codes @ d
        + o[None, :]
        + config.noise * rng.standard_normal((len(codes), len(o)), np.float32)
        for d, o in zip(truth.directions, truth.offsets)
    )


# ---------------------------------------------------------------- text


def streams(config: PlantedConfig, text: TextConfig, seed: int) -> Streams:
    """Returns planted activations at the token ends of a text that each view cuts its own way.

    Words are cut into tokens by a table of each view; ends of words are common, ends within words
    partly. Every token has two bytes or more, and the features of the token are functions of the
    last two bytes: whatever view reads them, its current token determines them, and its context
    does not matter. All other features are drawn anew at every byte: no token determines them.

    Args:
      config: ``rows`` and ``vocabulary`` follow from the text; ``documents`` is their number.
    """
    truth = plant(config, seed)
    rng = _generator(seed, _TEXT)
    lexicon = _lexicon(text, rng)
    cuts = [_cuts(text, lexicon, rng) for _ in config.widths]
    words = [_zipf_draws(rng, text.words, text.words_per_document) for _ in range(config.documents)]
    texts = tuple(b"".join(lexicon[w] for w in document) for document in words)
    ends, ids = zip(*(_cut(words, lexicon, table) for table in cuts))
    codes = _codes_of_bytes(config, truth, seed, texts)
    codes = tuple(tuple(c[e - 1] for c, e in zip(codes, view)) for view in ends)
    return Streams(texts, ends, ids, _show_streams(config, truth, codes, seed), codes, truth)


def _lexicon(text: TextConfig, rng: np.random.Generator) -> list[bytes]:
    """Returns different words, each with the space before it."""
    alphabet = np.arange(ord("a"), ord("a") + text.letters, dtype=np.uint8)
    words: dict[bytes, None] = {}
    while len(words) < text.words:
        words[b" " + rng.choice(alphabet, rng.integers(3, 10)).tobytes()] = None
    return list(words)


def _cuts(text: TextConfig, lexicon: list[bytes], rng: np.random.Generator) -> list[np.ndarray]:
    """Returns where the tokens of each word end: two bytes apart or more, the last at its end."""
    tables = []
    for word in lexicon:
        places = 2 * np.arange(1, len(word) // 2) + rng.integers(0, 1 + len(word) % 2)
        wanted = rng.integers(0, min(text.pieces - 1, len(places)) + 1)
        inner = np.sort(rng.choice(places, wanted, replace=False))
        tables.append(np.append(inner, len(word)))
    return tables


def _cut(words: list[np.ndarray], lexicon: list[bytes], table: list[np.ndarray]) -> tuple:
    """Returns (ends, ids) per document of a text of words, cut by a table."""
    pieces = [np.split(np.frombuffer(w, np.uint8), t[:-1]) for w, t in zip(lexicon, table)]
    known = sorted({p.tobytes() for word in pieces for p in word})
    number = {piece: i for i, piece in enumerate(known)}
    ids = [np.asarray([number[p.tobytes()] for p in word], np.int32) for word in pieces]
    sizes = [np.diff(t, prepend=0) for t in table]
    return (
        tuple(np.cumsum(np.concatenate([sizes[w] for w in d])).astype(np.int32) for d in words),
        tuple(np.concatenate([ids[w] for w in d]) for d in words),
    )


def _codes_of_bytes(config: PlantedConfig, truth: Truth, seed: int, texts) -> list[np.ndarray]:
    """Returns codes [bytes, features] of each text: those of its prefix up to that byte."""
    document = np.repeat(np.arange(len(texts)), [len(t) for t in texts])
    every = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64)
    last_two = np.append(0, every[:-1]) * 256 + every
    _, classes = np.unique(last_two, return_inverse=True)
    codes = _codes(config, truth, seed, document=document, classes=classes)
    return np.split(codes, np.cumsum([len(t) for t in texts])[:-1])


def _show_streams(config: PlantedConfig, truth: Truth, codes, seed: int) -> tuple:
    rng = _generator(seed, _NOISE)

    def shown(c, d, o):
        noise = config.noise * rng.standard_normal((len(c), len(o)), np.float32)
        return c @ d + o[None, :] + noise

    return tuple(
        tuple(shown(c, d, o) for c in view)
        for view, d, o in zip(codes, truth.directions, truth.offsets)
    )


# ---------------------------------------------------------------- scoring


def best_cosines(decoder: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (cosine [features], row [features]) of the decoder row nearest to each direction.

    A direction of length zero, a feature that the view does not see, gives NaN and -1.

    Args:
      decoder: [width, d].
      directions: [features, d].
    """
    seen = np.linalg.norm(directions, axis=1) > 0
    length = np.linalg.norm(decoder, axis=1, keepdims=True)
    rows = decoder / np.where(length > 0, length, 1)
    unit = directions[seen] / np.linalg.norm(directions[seen], axis=1, keepdims=True)
    cosines = unit @ rows.T
    best = cosines.argmax(1)
    cosine, row = np.full(len(seen), np.nan), np.full(len(seen), -1)
    cosine[seen], row[seen] = cosines[np.arange(len(best)), best], best
    return cosine, row
