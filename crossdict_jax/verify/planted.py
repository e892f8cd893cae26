"""Planted views: sparse features whose truth is known, seen by several models in superposition.

A row is a text position; its codes are the activations of the true features. View m shows
``x_m = codes @ directions_m + noise``, in fewer dimensions than there are features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossdict_jax import stats
from crossdict_jax.activations.pairing import pair_many

HIGHEST_FREQUENCY = 0.5  # a feature that is nearly always active is not sparse
FOLLOWS = 0.5  # share of rows in which the second of a correlated pair follows the first
SPREAD = 0.25  # std of the logarithm of an active feature's amplitude; its mean is 1
VOCABULARY = 64  # tokens of a view, Zipf; features of the token are functions of them
# ``streams``: words, letters of the alphabet, words of a text
WORDS, LETTERS, WORDS_PER_DOCUMENT = 120, 12, 40
PIECES = 3  # tokens of a word at most, each of two bytes or more
_TRUTH, _CODES, _CLASSES, _BURSTS, _NOISE, _TEXT = range(6)  # independent streams of one seed


@dataclass(frozen=True)
class PlantedConfig:
    """What is planted; shares are of the features."""

    rows: int = 8192  # text positions
    documents: int = 128  # of equally many rows
    features: int = 64  # true features, more than dimensions: superposition
    widths: tuple[int, ...] = (24, 32)  # dimensions of each view
    exclusive: float = 0.25  # share that one view alone sees, dealt out evenly; 1: unrelated views
    active: float = 4.0  # active features a row, on average
    zipf: float = 0.5  # frequency of the r-th most frequent feature: r ** -zipf
    noise: float = 0.02  # standard deviation in every dimension; directions have length 1
    correlated: int = 0  # pairs of features that tend to fire together
    children: int = 0  # features that fire only where a more frequent one, their parent, does
    burstiness: float = 0.0  # std of a feature's relative frequency between documents
    from_token: float = 0.0  # share that is a function of the current token


@dataclass(frozen=True)
class Truth:
    """What is the same in every row."""

    directions: tuple[np.ndarray, ...]  # per view float32 [features, width], length 1; 0 if unseen
    seen: np.ndarray  # bool [views, features]
    frequency: np.ndarray  # float [features], planted probability of being active
    parent: np.ndarray  # int [features], the feature without which it cannot fire; -1 for none
    partner: np.ndarray  # int [features], the feature that it tends to follow; -1 for none
    from_token: np.ndarray  # bool [features], whether it is a function of the current token

    def exclusive(self, view: int) -> np.ndarray:
        """bool [features]: seen by this view alone."""
        return self.seen[view] & (self.seen.sum(0) == 1)


@dataclass(frozen=True)
class Views:
    """Paired rows of several views, and the truth behind them."""

    x: tuple[np.ndarray, ...]  # per view float32 [rows, width]
    codes: np.ndarray  # float32 [rows, features], the true activations; zero where inactive
    tokens: tuple[np.ndarray, ...]  # per view int32 [rows], the token that ends at the row
    document: np.ndarray  # int32 [rows], ascending
    truth: Truth

    def split(self, test_fraction: float = 0.25) -> tuple[Views, Views]:
        """Returns (training, test) rows of whole documents; the last are the test."""
        documents = np.unique(self.document)
        test = self.document >= documents[round(len(documents) * (1 - test_fraction))]
        parts = []
        for rows in (~test, test):
            x, tokens = (tuple(a[rows] for a in each) for each in (self.x, self.tokens))
            parts.append(Views(x, self.codes[rows], tokens, self.document[rows], self.truth))
        return tuple(parts)


def views(config: PlantedConfig, seed: int) -> Views:
    """Returns planted rows: equal settings and seeds give equal bits."""
    truth, n_views = plant(config, seed), len(config.widths)
    document = (np.arange(config.rows) * config.documents // config.rows).astype(np.int32)
    tokens = _zipf_draws(stats.generator(seed, _TEXT), VOCABULARY, config.rows)
    codes = _codes(config, truth, seed, document, tokens)
    x = _show(config, truth, seed, [codes] * n_views)
    return Views(x, codes, (tokens,) * n_views, document, truth)


def plant(config: PlantedConfig, seed: int) -> Truth:
    """Returns the truth of a seed: directions, frequencies, who sees what, who follows whom."""
    rng = stats.generator(seed, _TRUTH)
    n_views, features = len(config.widths), config.features
    exclusive = rng.permutation(features)[: round(config.exclusive * features)]
    owners = np.arange(len(exclusive))[None, :] % n_views  # over all frequencies
    seen = np.ones((n_views, features), bool)
    seen[:, exclusive] = owners == np.arange(n_views)[:, None]
    from_token = np.zeros(features, bool)
    from_token[rng.permutation(features)[: round(config.from_token * features)]] = True
    # Each feature has one relation at most, the first of two is the more frequent one, and both or
    # neither are functions of the token.
    free = rng.permutation(features)
    kinds = [free[from_token[free] == kind] for kind in (False, True)]
    twos = np.concatenate([np.sort(k[: len(k) // 2 * 2].reshape(-1, 2), axis=1) for k in kinds])
    twos = rng.permutation(twos)
    parent, partner = np.full((2, features), -1)
    families, couples = twos[: config.children], twos[config.children :][: config.correlated]
    parent[families[:, 1]] = families[:, 0]
    partner[couples[:, 1]] = couples[:, 0]
    directions = []
    for width, sees in zip(config.widths, seen):
        unit = stats.normalised(rng.standard_normal((features, width))).astype(np.float32)
        directions.append(unit * sees[:, None].astype(np.float32))
    # Zipf frequencies, descending, capped, with sum ``active``.
    weights = (1.0 + np.arange(features)) ** -config.zipf
    for n in range(features):  # that are capped
        left = config.active - HIGHEST_FREQUENCY * n
        rest = left * weights[n:] / weights[n:].sum()
        if rest[0] <= HIGHEST_FREQUENCY:
            break
    frequencies = np.append(np.full(n, HIGHEST_FREQUENCY), rest)
    return Truth(tuple(directions), seen, frequencies, parent, partner, from_token)


def _zipf_draws(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    weights = 1.0 / (1.0 + np.arange(n))
    return rng.choice(n, size, p=weights / weights.sum()).astype(np.int32)


def _codes(config: PlantedConfig, truth: Truth, seed: int, document, classes) -> np.ndarray:
    """Returns codes float32 [rows, features]; ``classes`` [rows] fix the features of the token."""
    relative = np.ones((document.max() + 1, 1))  # frequency in each document, mean 1
    if config.burstiness > 0:
        shape, rng = config.burstiness**-2, stats.generator(seed, _BURSTS)
        relative = rng.gamma(shape, 1 / shape, (len(relative), config.features))
    by_row = _draw(truth, stats.generator(seed, _CODES), relative[document])
    by_class = _draw(truth, stats.generator(seed, _CLASSES), np.ones((classes.max() + 1, 1)))
    return np.where(truth.from_token[None, :], by_class[classes], by_row)


def _draw(truth: Truth, rng: np.random.Generator, relative: np.ndarray) -> np.ndarray:
    """Returns independent rows of codes at ``frequency * relative`` [rows, features or 1]."""
    shape = (len(relative), len(truth.frequency))
    uniform = rng.random(shape, np.float32)
    second = np.flatnonzero(truth.partner >= 0)
    follows = rng.random((len(relative), len(second))) < FOLLOWS
    uniform[:, second] = np.where(follows, uniform[:, truth.partner[second]], uniform[:, second])
    child = truth.parent >= 0
    # Conditional on the parent's firing, so that the child's frequency stays as planted.
    of_child = truth.frequency / truth.frequency[truth.parent]
    chance = np.where(child[None, :], of_child[None, :], truth.frequency[None, :] * relative)
    fires = uniform < chance
    fires[:, child] &= fires[:, truth.parent[child]]
    amplitude = np.exp(SPREAD * rng.standard_normal(shape, np.float32) - SPREAD**2 / 2)
    return np.where(fires, amplitude, 0.0).astype(np.float32)


def _show(
    config: PlantedConfig, truth: Truth, seed: int, codes: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Returns what each view shows of its codes."""
    rng = stats.generator(seed, _NOISE)
    x = (f @ directions for f, directions in zip(codes, truth.directions))
    return tuple(a + config.noise * rng.standard_normal(a.shape, np.float32) for a in x)


def streams(config: PlantedConfig, seed: int, *, shift: int = 0) -> Views:
    """Returns planted rows where the tokens of all views end together in a text, as it is paired.

    Each view cuts words into tokens of two bytes or more by its own table: ends of words are
    common, ends within words partly. Features of the token are functions of the last two bytes,
    so any view's current token determines them; all others are drawn anew at every byte.

    Args:
      config: ``rows`` follow from the text; ``documents`` is their number.
      shift: tokens by which every view but the first is read too late: a mistake to find.
    """
    truth, n_views = plant(config, seed), len(config.widths)
    rng = stats.generator(seed, _TEXT)
    alphabet = np.arange(ord("a"), ord("a") + LETTERS, dtype=np.uint8)
    words: dict[bytes, None] = {}  # different ones, each with the space before it
    while len(words) < WORDS:
        words[b" " + rng.choice(alphabet, rng.integers(3, 10)).tobytes()] = None
    lexicon = list(words)
    cuts = [[_cuts(len(word), rng) for word in lexicon] for _ in range(n_views)]
    documents = [_zipf_draws(rng, WORDS, WORDS_PER_DOCUMENT) for _ in range(config.documents)]
    texts = [b"".join(lexicon[w] for w in document) for document in documents]

    n_rows, first = [], 0
    tokens, last_bytes = ([[] for _ in range(n_views)] for _ in range(2))
    for document, text in zip(documents, texts):
        begins = np.cumsum([0, *(len(lexicon[w]) for w in document)])
        ends = [np.concatenate([b + table[w] for b, w in zip(begins, document)]) for table in cuts]
        positions = pair_many(ends)[1]
        positions[:, 1:] += shift
        positions = positions[(positions < [len(e) for e in ends]).all(1)]
        for view, (end, rows) in enumerate(zip(ends, positions.T)):
            tokens[view] += [text[end[row - 1] : end[row]] for row in rows]
            last_bytes[view].append(first + end[rows] - 1)
        n_rows.append(len(positions))
        first += len(text)

    byte_document = np.repeat(np.arange(len(texts)), list(map(len, texts)))
    letters = np.frombuffer(b"".join(texts), np.uint8).astype(np.int64)
    _, last_two = np.unique(np.append(0, letters[:-1]) * 256 + letters, return_inverse=True)
    at_bytes = _codes(config, truth, seed, byte_document, last_two)
    codes = [at_bytes[np.concatenate(rows)] for rows in last_bytes]
    return Views(
        x=_show(config, truth, seed, codes),
        codes=codes[0],
        tokens=tuple(np.unique(t, return_inverse=True)[1].astype(np.int32) for t in tokens),
        document=np.repeat(np.arange(len(texts), dtype=np.int32), n_rows),
        truth=truth,
    )


def _cuts(length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns where the tokens of a word end: at least two bytes apart, the last at its end."""
    positions = 2 * np.arange(1, length // 2) + rng.integers(0, 1 + length % 2)
    wanted = rng.integers(0, min(PIECES - 1, len(positions)) + 1)
    return np.append(np.sort(rng.choice(positions, wanted, replace=False)), length)


def best_cosines(decoder: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (cosine [features], row [features]) of the decoder row nearest to each direction.

    ``decoder`` is [width, d], ``directions`` [features, d]; one of length zero gives NaN and -1.
    """
    lengths, norms = (np.linalg.norm(rows, axis=1) for rows in (directions, decoder))
    cosines = directions @ decoder.T / np.maximum(np.outer(lengths, norms), 1e-30)
    seen = lengths > 0
    return np.where(seen, cosines.max(1), np.nan), np.where(seen, cosines.argmax(1), -1)
