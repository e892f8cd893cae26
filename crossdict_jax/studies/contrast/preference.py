"""What a language model prefers of two texts, and how much of it rests on features at a site.

The text up to a site is read once; what follows starts from the site's activations, changed or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.causal.directions import strengths
from crossdict_jax.causal.finished_run import FinishedRun
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.models import Site
from crossdict_jax.models.run import Passages, Runner, pad
from crossdict_jax.studies.contrast.sets import ContrastSet
from crossdict_jax.studies.reading import Reading, read_texts

SEQ_STEP = 8  # lengths are filled up to a multiple: few programs for many sets
AT_ONCE = 16  # draws, and features of a draw, are filled up to a multiple: one program for all
STEPS = 8  # of integrated gradients; 1 would be gradient times activation
Coded = tuple[Site, Dictionary]


def read_pairs(run: FinishedRun, pairs: ContrastSet) -> tuple[Reading, int]:
    """Returns what all models read, texts 2i and 2i + 1 a pair, and how many pairs are nested.

    Nested pairs are left out: of them one text's tokens begin the other's ("do" and "does" letter
    by letter), so that the shorter cannot be less likely.
    """
    texts = [text for both in zip(pairs.good, pairs.bad) for text in both]
    reading = read_texts(run, texts, group=2)
    kept = []
    for good in range(0, len(reading.kept), 2):
        both = [passages.tokens[good : good + 2] for passages in reading.passages.values()]
        ends = [min(map(len, texts)) for texts in both]
        if not any((a[:n] == b[:n]).all() for (a, b), n in zip(both, ends)):
            kept += [good, good + 1]
    return reading.take(np.array(kept, int)), (len(reading.kept) - len(kept)) // 2


class Reader:
    """A language model and the texts of pairs: 2i is the good text of pair i, 2i + 1 the bad.

    Attributes:
      passages: of the texts; features are read and ablated at the tokens that are edited.
      tokens: int32 [texts, seq], filled up behind.
      scored: bool [texts, seq], tokens whose log-probability counts: from the first one in which
        the texts of a pair differ. A model without a BOS says nothing about its first token.
      edited: bool [texts, seq].
    """

    def __init__(self, runner: Runner, passages: Passages):
        self.runner, self.passages = runner, passages
        self._x: dict[Site, np.ndarray] = {}
        texts = passages.tokens
        self._within = passages.within(np.arange(len(texts)))
        seq = math.ceil(max(map(len, texts)) / SEQ_STEP) * SEQ_STEP
        self.tokens = pad(texts, (len(texts), min(seq, runner.config.context)))
        self.scored, self.edited = np.zeros((2, *self.tokens.shape), bool)
        self.edited[self._within.edited] = True
        for i, text in enumerate(texts):
            other = texts[i ^ 1][: len(text)]
            differs = int(np.argmax(text[: len(other)] != other))
            self.scored[i, max(differs, 1) : len(text)] = True

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Returns values [rows, n] at the edited tokens of each row, [texts, seq, n]; else 0."""
        dense = np.zeros((*self.tokens.shape, values.shape[1]), values.dtype)
        dense[self._within.edited] = values[self._within.edited_by]
        return dense

    def x(self, site: Site) -> np.ndarray:
        """Returns the activations at a site, float32 [texts, seq, d_model]."""
        if site not in self._x:
            self._x |= self.runner.read(self.tokens, [site])
        return self._x[site]

    def strength(self, site: Site, dictionary: Dictionary, features: np.ndarray) -> np.ndarray:
        """Returns the model's own features at the edited tokens, float32 [texts, seq, features]."""
        dense = np.zeros((*self.edited.shape, len(features)), np.float32)
        dense[self.edited] = strengths(dictionary, self.x(site)[self.edited], features)
        return dense

    @cached_property
    def preference(self) -> np.ndarray:
        """log p(good) - log p(bad) in nats, float64 [pairs]."""
        return self.runner.run(_prefers, self.tokens, self.scored, group=2).astype(np.float64)

    def unigram_preference(self, counts: np.ndarray) -> np.ndarray:
        """Returns log p(good) - log p(bad), float64 [pairs], by how often tokens occur alone.

        Args:
          counts: [vocabulary], of each token in other text; one is added to each.
        """
        log_p = np.log((counts + 1) / (counts.sum() + len(counts)))
        sums = np.sum(log_p[self.tokens] * self.scored, axis=1)
        return sums[::2] - sums[1::2]

    def ablated(self, site: Site, strength: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Returns the preference without features, float64 [draws, pairs].

        Args:
          strength: [texts, seq, features], how strongly each is there (``strength``, ``spread``).
          vectors: [draws, features, d_model]: every draw's directions, taken out together, each
            times its strength.
        """
        count, rest = len(vectors), -vectors.shape[1] % AT_ONCE
        vectors = np.pad(vectors.astype(np.float32), ((0, -count % AT_ONCE), (0, rest), (0, 0)))
        strength = np.pad(strength, ((0, 0), (0, 0), (0, rest)))
        arrays = self.tokens, self.scored, self.x(site), strength
        parts = [
            self.runner.run(_ablated, *arrays, static=(site,), shared=(some,), group=2)
            for some in np.split(vectors, len(vectors) // AT_ONCE)
        ]
        return np.concatenate(parts, axis=1)[:, :count].T.astype(np.float64)

    def attribution(self, site: Site, dictionary: Dictionary, *, steps: int = STEPS) -> np.ndarray:
        """Returns what each feature adds to the preference, float32 [pairs, width], in nats.

        The integrated gradient (``steps`` equal ones from no feature at all to what is there) of
        the preference, times the feature, summed over the edited tokens of both texts: a linear
        approximation of what ablating the feature takes away. x = x_hat + error, and the error
        stays as it is (Marks et al. 2024, arXiv 2403.19647, section 3).
        """
        arrays = self.tokens, self.scored, self.edited, self.x(site)
        settings = {"static": (site, steps), "shared": (dictionary,), "group": 2}
        return self.runner.run(_attribution, *arrays, **settings)

    def edges(self, lower: Coded, upper: Coded, features: Sequence[int]) -> np.ndarray:
        """Returns what features of a lower site add through some of a higher one.

        Float32 [pairs, features, width of the lower]: the gradient of the preference with respect
        to the upper feature, times that of the upper feature with respect to the lower one, times
        the lower one, summed over tokens (Marks et al. 2024, section 3.2). Paths that go round
        the upper dictionary, through its error, are not in it.
        """
        sites, dictionaries = zip(lower, upper)
        arrays = self.tokens, self.scored, self.edited, *map(self.x, sites)
        shared = *dictionaries, np.array(features, np.int32)
        return self.runner.run(_edges, *arrays, static=(sites,), shared=shared, group=2)


# ---------------------------------------------------------------- compiled programs


def _prefers(lm, tokens, scored, tap=None) -> jax.Array:
    """The preference [pairs]."""
    log_p = jax.nn.log_softmax(lm.logits(tokens, tap=tap)[:, :-1], axis=-1)
    chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    of_texts = jnp.sum(jnp.where(scored[:, 1:], chosen, 0.0), axis=1)
    return of_texts[::2] - of_texts[1::2]


def _prefers_with(lm, site, tokens, scored, x) -> jax.Array:
    """The preference [pairs] with x [texts, seq, d_model] in place of the site's activations."""
    return _prefers(lm, tokens, scored, lambda at, y: x if at == site else y)


def _ablated(lm, site, vectors, tokens, scored, x, strength) -> jax.Array:
    """The preference without the directions of each draw, [pairs, draws]."""

    def without(directions):  # [features, d_model]
        taken = jnp.einsum("tsf,fd->tsd", strength, directions, precision="highest")
        return _prefers_with(lm, site, tokens, scored, x - taken)

    return jax.lax.map(without, vectors).T


def _coded(dictionary: Dictionary, x: jax.Array):
    """(features [texts, seq, width] of x, what decodes them with the error of x_hat left in)."""

    def decoded(f):
        return dictionary.decode(f.reshape(-1, f.shape[-1])).reshape(x.shape)

    f = dictionary.encode(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)
    error = x - decoded(f)
    return f, lambda f: decoded(f) + error


def _of_pairs(contributions: jax.Array, edited: jax.Array) -> jax.Array:
    """Sums over the edited tokens of both texts of each pair, [pairs, width]."""
    of_texts = jnp.sum(jnp.where(edited[..., None], contributions, 0.0), axis=1)
    return of_texts[::2] + of_texts[1::2]


def _attribution(lm, site, steps, dictionary, tokens, scored, edited, x) -> jax.Array:
    f, decoded = _coded(dictionary, x)

    def total(f):
        y = jnp.where(edited[..., None], decoded(f), x)
        return _prefers_with(lm, site, tokens, scored, y).sum()

    def add(sums, alpha):
        return sums + jax.grad(total)(alpha * f), None

    alphas = jnp.arange(1, steps + 1, dtype=jnp.float32) / steps
    sums, _ = jax.lax.scan(add, jnp.zeros_like(f), alphas)
    return _of_pairs(f * sums / steps, edited)


def _edges(lm, sites, d_low, d_high, features, tokens, scored, edited, low, high) -> jax.Array:
    at_edit = edited[..., None]
    f_low, decoded_low = _coded(d_low, low)
    f_high, decoded_high = _coded(d_high, high)

    def total(f):
        y = jnp.where(at_edit, decoded_high(f), high)
        return _prefers_with(lm, sites[1], tokens, scored, y).sum()

    weight = jnp.where(at_edit, jax.grad(total)(f_high), 0.0)  # [texts, seq, width of the upper]

    def through(f, feature):
        seen = {}
        x = jnp.where(at_edit, decoded_low(f), low)

        def tap(site, y):
            seen[site] = x if site == sites[0] else y
            return seen[site]

        lm.logits(tokens, tap=tap)
        upper, _ = _coded(d_high, seen[sites[1]])
        return jnp.sum(weight[..., feature] * upper[..., feature])

    def of(feature):
        return _of_pairs(f_low * jax.grad(through)(f_low, feature), edited)

    return jnp.moveaxis(jax.lax.map(of, features), 0, 1)
