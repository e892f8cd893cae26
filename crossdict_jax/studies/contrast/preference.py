"""What a language model prefers of two texts, and how much of it rests on features at a site.

Everything goes through ``tap``: the text up to a site is read once, what follows starts from the
site's activations, changed or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import models, modules
from crossdict_jax.causal.directions import strengths
from crossdict_jax.causal.inject import read_site
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.studies.contrast.sets import ContrastSet
from crossdict_jax.studies.reading import Reading, read_texts
from crossdict_jax.training.mesh import DATA, make_mesh, put, shard

SEQ_STEP = 8  # lengths are filled up to a multiple: few programs for many sets
AT_ONCE = 16  # draws, and features of a draw, are filled up to a multiple: one program for all
STEPS = 8  # of integrated gradients; 1 would be gradient times activation


def read_pairs(pairs: ContrastSet, tokenizers, **rules) -> tuple[Reading, int]:
    """Returns what all models read, texts 2i and 2i + 1 a pair, and how many pairs are nested.

    Nested pairs are left out: of them one text's tokens begin the other's ("do" and "does" letter
    by letter), so that the shorter cannot be less likely.

    Args:
      rules: ``bos`` and ``contexts`` of ``read_texts``.
    """
    texts = [text for both in zip(pairs.good, pairs.bad) for text in both]
    reading = read_texts(texts, tokenizers, **rules, group=2)
    kept = []
    for good in range(0, len(reading.kept), 2):
        ends = (min(len(r[good]), len(r[good + 1])) for r in reading.tokens.values())
        sides = zip(reading.tokens.values(), ends)
        if not any((r[good][:n] == r[good + 1][:n]).all() for r, n in sides):
            kept += [good, good + 1]
    return reading.take(np.array(kept, int)), (len(reading.kept) - len(kept)) // 2


class Reader:
    """A language model and the texts of pairs: 2i is the good text of pair i, 2i + 1 the bad.

    Attributes:
      tokens: int32 [texts, seq], filled up behind.
      scored: bool [texts, seq], tokens whose log-probability counts: from the first one in which
        the texts of a pair differ. A model without a BOS says nothing about its first token.
      edited: bool [texts, seq], the tokens at which features are read and ablated.
    """

    def __init__(
        self,
        lm: LanguageModel,
        reading: Reading,
        model: str,
        *,
        batch_size: int,
        whole_span: bool = False,
        dtype: str = "float32",
    ):
        """
        Args:
          model: its name in ``reading``.
          batch_size: texts per forward (but for a pair on every device).
          whole_span: features are read and ablated at all tokens of a span, not at its last one.
          dtype: of the inputs of matrix products.
        """
        self._lm, self._dtype, self._mesh = lm, jnp.dtype(dtype), make_mesh()
        self._graphdef, params = modules.split(lm)
        self._params = jax.device_put(params, shard(self._mesh))
        self._size = math.ceil(batch_size / (2 * self._mesh.size)) * 2 * self._mesh.size
        self._x: dict[Site, np.ndarray] = {}
        self._text, self._position = reading.text, reading.position[model]
        self._first = reading.first[model] if whole_span else self._position
        ids = reading.tokens[model]
        longest = max(map(len, ids), default=0)
        self.tokens = np.zeros((len(ids), math.ceil(longest / SEQ_STEP) * SEQ_STEP), np.int32)
        self.scored = np.zeros(self.tokens.shape, bool)
        for i, text in enumerate(ids):
            self.tokens[i, : len(text)] = text
            other = ids[i ^ 1][: len(text)]
            differs = int(np.argmax(text[: len(other)] != other))
            self.scored[i, max(differs, 1) : len(text)] = True
        self.edited = self.spread(np.ones((len(self._text), 1), bool))[..., 0]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Returns values [rows, n] at the edited tokens of each row, [texts, seq, n]; else 0."""
        dense = np.zeros((*self.tokens.shape, values.shape[1]), values.dtype)
        lengths = self._position - self._first + 1
        row = np.repeat(np.arange(len(lengths)), lengths)
        step = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        dense[self._text[row], self._first[row] + step] = values[row]
        return dense

    def activations(self, site: Site) -> np.ndarray:
        """Returns the activations at a site, float32 [texts, seq, d_model]."""
        if site not in self._x:
            models.check_site(self._lm.config, site, self._lm.name)
            read = partial(read_site, self._graphdef, site, self._dtype, self._params)
            self._x[site] = self._over_batches(read, self.tokens)
        return self._x[site]

    def row_activations(self, site: Site) -> np.ndarray:
        """Returns the activations at the paired positions, float32 [rows, d_model]."""
        return self.activations(site)[self._text, self._position]

    def strength(self, site: Site, dictionary: Dictionary, features: np.ndarray) -> np.ndarray:
        """Returns the model's own features at the edited tokens, float32 [texts, seq, features]."""
        dense = np.zeros((*self.edited.shape, len(features)), np.float32)
        dense[self.edited] = strengths(dictionary, self.activations(site)[self.edited], features)
        return dense

    def preference(self) -> np.ndarray:
        """Returns log p(good) - log p(bad) in nats, float64 [pairs]."""
        program = partial(_preference, self._graphdef, self._dtype, self._params)
        return self._over_batches(program, self.tokens, self.scored).astype(np.float64)

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
        arrays = self.tokens, self.scored, self.activations(site), strength
        parts = []
        for start in range(0, len(vectors), AT_ONCE):
            chunk = put(vectors[start : start + AT_ONCE], shard(self._mesh))
            program = partial(_ablated, self._graphdef, site, self._dtype, self._params, chunk)
            parts.append(self._over_batches(program, *arrays))
        return np.concatenate(parts, axis=1)[:, :count].T.astype(np.float64)

    def attribution(self, site: Site, dictionary: Dictionary, *, steps: int = STEPS) -> np.ndarray:
        """Returns what each feature adds to the preference, float32 [pairs, width], in nats.

        The integrated gradient (``steps`` equal ones from no feature at all to what is there) of
        the preference, times the feature, summed over the edited tokens of both texts: a linear
        approximation of what ablating the feature takes away. x = x_hat + error, and the error
        stays as it is (Marks et al. 2024, arXiv 2403.19647, section 3).
        """
        graphs, params = self._with(dictionary)
        program = partial(_attribution, graphs, site, self._dtype, steps, params)
        x = self.activations(site)
        return self._over_batches(program, self.tokens, self.scored, self.edited, x)

    def edges(
        self,
        lower: tuple[Site, Dictionary],
        upper: tuple[Site, Dictionary],
        features: Sequence[int],
    ) -> np.ndarray:
        """Returns what features of a lower site add through some of a higher one.

        Float32 [pairs, features, width of the lower]: the gradient of the preference with respect
        to the upper feature, times that of the upper feature with respect to the lower one, times
        the lower one, summed over tokens (Marks et al. 2024, section 3.2). Paths that go round
        the upper dictionary, through its error, are not in it.
        """
        sites, dictionaries = zip(lower, upper)
        graphs, params = self._with(*dictionaries)
        features = jnp.asarray(features, jnp.int32)
        program = partial(_edges, graphs, sites, self._dtype, params, features)
        x = map(self.activations, sites)
        return self._over_batches(program, self.tokens, self.scored, self.edited, *x)

    def _with(self, *dictionaries: Dictionary):
        """(graphs, parameters) of the model and of dictionaries."""
        graphs, params = zip(*map(modules.split, dictionaries))
        params = jax.device_put(params, shard(self._mesh))
        return (self._graphdef, *graphs), (self._params, *params)

    def _over_batches(self, program: Callable, *arrays: np.ndarray) -> np.ndarray:
        """What a program gives of arrays [texts, ...]: a row for each text, or for each pair."""
        n, parts = len(arrays[0]), []
        for start in range(0, n, self._size):
            batch = (a[start : start + self._size] for a in arrays)
            full = (np.pad(b, [(0, self._size - len(b))] + [(0, 0)] * (b.ndim - 1)) for b in batch)
            parts.append(np.asarray(program(*(put(a, shard(self._mesh, DATA)) for a in full))))
        per_row = self._size // len(parts[0])  # texts of a row
        return np.concatenate(parts)[: n // per_row]


def _prefers(lm, dtype, tokens, scored, tap=None) -> jax.Array:
    """The preference [pairs]."""
    log_p = jax.nn.log_softmax(lm.logits(tokens, tap=tap, dtype=dtype)[:, :-1], axis=-1)
    chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    of_texts = jnp.sum(jnp.where(scored[:, 1:], chosen, 0.0), axis=1)
    return of_texts[::2] - of_texts[1::2]


def _prefers_with(lm, site, dtype, tokens, scored, x) -> jax.Array:
    """The preference [pairs] with x [texts, seq, d_model] in place of the site's activations."""
    return _prefers(lm, dtype, tokens, scored, lambda at, y: x if at == site else y)


@partial(jax.jit, static_argnums=(0, 1))
def _preference(graphdef, dtype, params, tokens, scored) -> jax.Array:
    return _prefers(modules.merge(graphdef, params), dtype, tokens, scored)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _ablated(graphdef, site, dtype, params, vectors, tokens, scored, x, strength) -> jax.Array:
    """The preference without the directions of each draw, [pairs, draws]."""
    lm = modules.merge(graphdef, params)

    def without(directions):  # [features, d_model]
        taken = jnp.einsum("tsf,fd->tsd", strength, directions, precision="highest")
        return _prefers_with(lm, site, dtype, tokens, scored, x - taken)

    return jax.lax.map(without, vectors).T


def _coded(dictionary: Dictionary, x: jax.Array):
    """(features [texts, seq, width] of x, what decodes them with the error of x_hat left in)."""

    def decoded(f):
        return dictionary.decode(f.reshape(-1, f.shape[-1])).reshape(x.shape)

    f = dictionary.encode(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)
    error = x - decoded(f)
    return f, lambda f: decoded(f) + error


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attribution(graphs, site, dtype, steps, params, tokens, scored, edited, x) -> jax.Array:
    lm, dictionary = map(modules.merge, graphs, params)
    f, decoded = _coded(dictionary, x)

    def total(f):
        y = jnp.where(edited[..., None], decoded(f), x)
        return _prefers_with(lm, site, dtype, tokens, scored, y).sum()

    def add(sums, alpha):
        return sums + jax.grad(total)(alpha * f), None

    alphas = jnp.arange(1, steps + 1, dtype=jnp.float32) / steps
    sums, _ = jax.lax.scan(add, jnp.zeros_like(f), alphas)
    return _of_pairs(f * sums / steps, edited)


def _of_pairs(contributions: jax.Array, edited: jax.Array) -> jax.Array:
    """Sums over the edited tokens of both texts of each pair, [pairs, width]."""
    of_texts = jnp.sum(jnp.where(edited[..., None], contributions, 0.0), axis=1)
    return of_texts[::2] + of_texts[1::2]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _edges(graphs, sites, dtype, params, features, tokens, scored, edited, low, high) -> jax.Array:
    lm, d_low, d_high = map(modules.merge, graphs, params)
    at_edit = edited[..., None]
    f_low, decoded_low = _coded(d_low, low)
    f_high, decoded_high = _coded(d_high, high)

    def total(f):
        y = jnp.where(at_edit, decoded_high(f), high)
        return _prefers_with(lm, sites[1], dtype, tokens, scored, y).sum()

    weight = jnp.where(at_edit, jax.grad(total)(f_high), 0.0)  # [texts, seq, width of the upper]

    def through(f, feature):
        seen = {}
        x = jnp.where(at_edit, decoded_low(f), low)

        def tap(site, y):
            seen[site] = x if site == sites[0] else y
            return seen[site]

        lm.logits(tokens, tap=tap, dtype=dtype)
        upper, _ = _coded(d_high, seen[sites[1]])
        return jnp.sum(weight[..., feature] * upper[..., feature])

    def of(feature):
        return _of_pairs(f_low * jax.grad(through)(f_low, feature), edited)

    return jnp.moveaxis(jax.lax.map(of, features), 0, 1)
