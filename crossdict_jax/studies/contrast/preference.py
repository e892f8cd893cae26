"""What a language model prefers of two texts, and how much of it rests on features at a site.

Everything goes through ``tap``: the text up to a site is read once, what follows starts from the
site's activations, changed or not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import models, modules
from crossdict_jax.activations import pairing
from crossdict_jax.causal.directions import strengths
from crossdict_jax.causal.inject import read_site
from crossdict_jax.dictionaries import Dictionary
from crossdict_jax.models import LanguageModel, Site
from crossdict_jax.studies.contrast.sets import ContrastSet
from crossdict_jax.training.mesh import DATA, make_mesh, put, shard

SEQ_STEP = 8  # lengths are filled up to a multiple: few programs for many sets
AT_ONCE = 16  # draws, and features of a draw, are filled up to a multiple: one program for all


@dataclass(frozen=True)
class Reading:
    """The texts of pairs as one model reads them: 2i is the good text of pair i, 2i + 1 the bad.

    Attributes:
      tokens: int32 [texts, seq], filled up behind.
      scored: bool [texts, seq], tokens whose log-probability counts: from the first one in which
        the texts of a pair differ. A model without a BOS says nothing about its first token.
      first, position: int [rows], the span of tokens up to each paired position.
    """

    tokens: np.ndarray
    scored: np.ndarray
    first: np.ndarray
    position: np.ndarray


@dataclass(frozen=True)
class Readings:
    """One set of pairs as all models read it; a row is a text position, the same in all of them.

    Attributes:
      text: int [rows], the text of each row.
      of: model name -> its reading.
      too_long, not_rebuilt, nested: pairs that were left out because a text exceeds some model's
        context, because some tokenizer changes its characters, or because one text's tokens begin
        the other's ("do" and "does" letter by letter: the shorter can't be less likely).
    """

    text: np.ndarray
    of: Mapping[str, Reading]
    too_long: int = 0
    not_rebuilt: int = 0
    nested: int = 0

    @property
    def n_pairs(self) -> int:
        return len(next(iter(self.of.values())).tokens) // 2

    def take(self, pairs: np.ndarray) -> Readings:
        """Returns the readings of these pairs alone."""
        texts = np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)
        place = np.full(2 * self.n_pairs, -1)
        place[texts] = np.arange(len(texts))
        rows = np.flatnonzero(place[self.text] >= 0)
        of = {
            name: Reading(r.tokens[texts], r.scored[texts], r.first[rows], r.position[rows])
            for name, r in self.of.items()
        }
        return dataclasses.replace(self, text=place[self.text[rows]], of=of)


def read(
    pairs: ContrastSet,
    tokenizers: Mapping[str, object],
    *,
    bos: Mapping[str, int | None],
    contexts: Mapping[str, int],
) -> Readings:
    """Returns what all models read of the pairs that every one of them can read.

    Args:
      bos: per model the id put in front of every text, or None.
      contexts: per model its positions, the BOS among them.
    """
    texts = [text for both in zip(pairs.good, pairs.bad) for text in both]
    tokens = {name: pairing.byte_ends_batch(texts, t) for name, t in tokenizers.items()}
    fronts = {name: [] if bos[name] is None else [bos[name]] for name in tokenizers}
    kept, too_long, not_rebuilt, nested = [], 0, 0, 0
    for pair in range(len(pairs)):
        both = {name: read[2 * pair : 2 * pair + 2] for name, read in tokens.items()}
        if any(t is None for ts in both.values() for t in ts):
            not_rebuilt += 1
        elif any(len(fronts[n]) + len(t.ids) > contexts[n] for n, ts in both.items() for t in ts):
            too_long += 1
        elif any(_nested(*(t.ids for t in ts)) for ts in both.values()):
            nested += 1
        else:
            kept.append(both)
    ends = [[both[n][side].ends for n in tokenizers] for both in kept for side in (0, 1)]
    text, positions = paired_rows(ends)
    positions = positions.reshape(len(text), len(tokenizers))
    of = {
        name: _reading([t for both in kept for t in both[name]], fronts[name], text, position)
        for name, position in zip(tokenizers, positions.T)
    }
    return Readings(text, of, too_long, not_rebuilt, nested)


def _nested(a: np.ndarray, b: np.ndarray) -> bool:
    n = min(len(a), len(b))
    return bool((a[:n] == b[:n]).all())


def paired_rows(ends: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (text [rows], positions [rows, models], without a BOS) of the common ends of texts.

    Args:
      ends: per text and model the byte ends of its tokens.
    """
    found = [pairing.pair_many(of_models)[1] for of_models in ends]
    if not found:
        return np.zeros(0, int), np.zeros((0, 0), int)
    return np.repeat(np.arange(len(ends)), list(map(len, found))), np.concatenate(found)


def _reading(texts: list, front: list[int], text: np.ndarray, position: np.ndarray) -> Reading:
    ids = [np.concatenate([front, t.ids]).astype(np.int32) for t in texts]
    longest = max(map(len, ids), default=0)
    tokens = np.zeros((len(ids), math.ceil(longest / SEQ_STEP) * SEQ_STEP), np.int32)
    scored = np.zeros(tokens.shape, bool)
    for i, own in enumerate(ids):
        tokens[i, : len(own)] = own
        other = ids[i ^ 1][: len(own)]
        begin = int(np.argmax(own[: len(other)] != other))
        scored[i, max(begin, 1) : len(own)] = True
    same = text[1:] == text[:-1]
    before = np.zeros(len(position), int)
    before[1:][same] = position[:-1][same]
    first = np.minimum(before + 1, position) + len(front)
    return Reading(tokens, scored, first, position + len(front))


def unigram_preference(reading: Reading, counts: np.ndarray) -> np.ndarray:
    """Returns log p(good) - log p(bad), float64 [pairs], by how often tokens occur alone.

    Args:
      counts: [vocabulary], of each token in other text; one is added to each.
    """
    log_p = np.log((counts + 1) / (counts.sum() + len(counts)))
    sums = np.sum(log_p[reading.tokens] * reading.scored, axis=1)
    return sums[::2] - sums[1::2]


class Reader:
    """A language model and the texts of pairs."""

    def __init__(
        self,
        lm: LanguageModel,
        readings: Readings,
        name: str,
        *,
        batch_size: int,
        whole_span: bool = False,
        dtype: str = "float32",
    ):
        """
        Args:
          name: of the model in ``readings``.
          batch_size: pairs per forward (but for one on every device).
          whole_span: features are read and ablated at all tokens of a span, not at its last one.
          dtype: of the inputs of matrix products.
        """
        self._lm, self._dtype = lm, jnp.dtype(dtype)
        self._mesh = make_mesh()
        self._graphdef, params = modules.split(lm)
        self._params = jax.device_put(params, shard(self._mesh))
        self._text, self._reading = readings.text, readings.of[name]
        self._first = self._reading.first if whole_span else self._reading.position
        self.n_pairs = readings.n_pairs
        self._size = math.ceil(batch_size / self._mesh.size) * self._mesh.size
        self._x: dict[Site, np.ndarray] = {}

    @cached_property
    def edited(self) -> np.ndarray:
        """bool [texts, seq]: the tokens at which features are read and ablated."""
        return self.spread(np.ones((len(self._text), 1), bool))[..., 0]

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Returns values [rows, n] at the edited tokens of each row, [texts, seq, n]; else 0."""
        shape = *self._reading.tokens.shape, values.shape[1]
        dense = np.zeros(shape, values.dtype)
        lengths = self._reading.position - self._first + 1
        row = np.repeat(np.arange(len(lengths)), lengths)
        step = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        dense[self._text[row], self._first[row] + step] = values[row]
        return dense

    # ------------------------------------------------------------ what is read

    def activations(self, site: Site) -> np.ndarray:
        """Returns the activations at a site, float32 [texts, seq, d_model]."""
        if site not in self._x:
            models.check_site(self._lm.config, site, self._lm.name)
            how = self._graphdef, site, self._dtype, self._params
            self._x[site] = self._join(
                read_site(*how, t) for (t,) in self._batches(self._reading.tokens)
            )
        return self._x[site]

    def row_activations(self, site: Site) -> np.ndarray:
        """Returns the activations at the paired positions, float32 [rows, d_model]."""
        return self.activations(site)[self._text, self._reading.position]

    def own_strength(
        self, site: Site, dictionary: Dictionary, features: Sequence[int]
    ) -> np.ndarray:
        """Returns the model's own features at the edited tokens, float32 [texts, seq, features]."""
        x = self.activations(site)[self.edited]
        dense = np.zeros((*self.edited.shape, len(features)), np.float32)
        dense[self.edited] = strengths(dictionary, x, np.asarray(features, int))
        return dense

    def preference(self) -> np.ndarray:
        """Returns log p(good) - log p(bad) in nats, float64 [pairs]."""
        how = self._graphdef, self._dtype, self._params
        parts = (_plain_preference(*how, *batch) for batch in self._batches(*self._scored))
        return self._join(parts, self.n_pairs).astype(np.float64)

    @property
    def _scored(self) -> tuple[np.ndarray, np.ndarray]:
        return self._reading.tokens, self._reading.scored

    # ------------------------------------------------------------ what it rests on

    def ablated(self, site: Site, strength: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """Returns the preference without features, float64 [draws, pairs].

        Args:
          strength: [texts, seq, features], how strongly each is there (``own_strength``,
            ``spread``).
          vectors: [draws, features, d_model]: every draw's directions, taken out together, each
            times its strength.
        """
        how = self._graphdef, site, self._dtype, self._params
        count, n = vectors.shape[:2]
        vectors = _filled(vectors.astype(np.float32), math.ceil(count / AT_ONCE) * AT_ONCE)
        rest = -n % AT_ONCE
        vectors = np.pad(vectors, ((0, 0), (0, rest), (0, 0))).reshape(
            -1, AT_ONCE, n + rest, vectors.shape[2]
        )
        strength = np.pad(strength, ((0, 0), (0, 0), (0, rest)))
        chunks = [put(chunk, shard(self._mesh)) for chunk in vectors]
        parts = []
        for batch in self._batches(*self._scored, self.activations(site), strength):
            found = [np.asarray(_ablated(*how, *batch, chunk)) for chunk in chunks]
            parts.append(np.concatenate(found)[:count].T)
        return self._join(parts, self.n_pairs).T.astype(np.float64)

    def attribution(self, site: Site, dictionary: Dictionary, *, steps: int) -> np.ndarray:
        """Returns what each feature adds to the preference, float32 [pairs, width], in nats.

        The integrated gradient (``steps`` equal ones from no feature at all to what is there) of
        the preference, times the feature, summed over the edited tokens of both texts: a linear
        approximation of what ablating the feature takes away. One step is gradient times
        activation. x = x_hat + error, and the error stays as it is (Marks et al. 2024,
        arXiv 2403.19647, section 3).
        """
        graphs, params = self._both(dictionary)
        how = graphs, site, self._dtype, steps, params
        batches = self._batches(*self._scored, self.edited, self.activations(site))
        return self._join((_attribution(*how, *batch) for batch in batches), self.n_pairs)

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
        (low, d_low), (high, d_high) = lower, upper
        graphs, params = self._both(d_low, d_high)
        how = graphs, (low, high), self._dtype, params, jnp.asarray(features, jnp.int32)
        x = self.activations(low), self.activations(high)
        batches = self._batches(*self._scored, self.edited, *x)
        return self._join((_edges(*how, *batch) for batch in batches), self.n_pairs)

    def _both(self, *dictionaries: Dictionary):
        """(graphs, parameters) of the model and of dictionaries."""
        graphs, params = zip(*map(modules.split, dictionaries))
        params = jax.device_put(params, shard(self._mesh))
        return (self._graphdef, *graphs), (self._params, *params)

    def _batches(self, *arrays: np.ndarray):
        """Yields arrays [texts, ...] in equal batches on the devices, filled up with zeros."""
        size = 2 * self._size
        for at in range(0, len(arrays[0]), size):
            parts = (a[at : at + size] for a in arrays)
            yield tuple(put(_filled(p, size), shard(self._mesh, DATA)) for p in parts)

    def _join(self, parts, n: int | None = None) -> np.ndarray:
        n = 2 * self.n_pairs if n is None else n
        return np.concatenate([np.asarray(part) for part in parts])[:n]


def _filled(rows: np.ndarray, n: int) -> np.ndarray:
    return np.pad(rows, ((0, n - len(rows)),) + ((0, 0),) * (rows.ndim - 1))


def _log_p(logits: jax.Array, tokens: jax.Array, scored: jax.Array) -> jax.Array:
    """The log-probability of the scored tokens of each text, [texts]."""
    log_p = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(scored[:, 1:], chosen, 0.0), axis=1)


def _difference(log_p: jax.Array) -> jax.Array:
    return log_p[::2] - log_p[1::2]  # [pairs]


def _prefers(lm, site, dtype, tokens, scored, x) -> jax.Array:
    """The preference [pairs] with x [texts, seq, d_model] in place of the site's activations."""
    logits = lm.logits(tokens, tap=lambda here, y: x if here == site else y, dtype=dtype)
    return _difference(_log_p(logits, tokens, scored))


def _encoded(dictionary: Dictionary, x: jax.Array) -> jax.Array:
    f = dictionary.encode(x.reshape(-1, x.shape[-1]))
    return f.reshape(*x.shape[:2], -1)  # [texts, seq, width]


def _decoded(dictionary: Dictionary, f: jax.Array) -> jax.Array:
    x = dictionary.decode(f.reshape(-1, f.shape[-1]))
    return x.reshape(*f.shape[:2], -1)  # [texts, seq, d_model]


@partial(jax.jit, static_argnums=(0, 1))
def _plain_preference(graphdef, dtype, params, tokens, scored) -> jax.Array:
    logits = modules.merge(graphdef, params).logits(tokens, dtype=dtype)
    return _difference(_log_p(logits, tokens, scored))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _ablated(graphdef, site, dtype, params, tokens, scored, x, strength, vectors) -> jax.Array:
    lm = modules.merge(graphdef, params)

    def without(directions):  # [features, d_model]
        taken = jnp.einsum("tsf,fd->tsd", strength, directions, precision="highest")
        return _prefers(lm, site, dtype, tokens, scored, x - taken)

    return jax.lax.map(without, vectors)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _attribution(graphs, site, dtype, steps, params, tokens, scored, edited, x) -> jax.Array:
    lm, dictionary = map(modules.merge, graphs, params)
    f = _encoded(dictionary, x)
    error = x - _decoded(dictionary, f)

    def total(f):
        y = jnp.where(edited[..., None], _decoded(dictionary, f) + error, x)
        return _prefers(lm, site, dtype, tokens, scored, y).sum()

    alphas = jnp.arange(1, steps + 1, dtype=jnp.float32) / steps
    add = lambda sums, alpha: (sums + jax.grad(total)(alpha * f), None)  # noqa: E731
    sums, _ = jax.lax.scan(add, jnp.zeros_like(f), alphas)
    return _of_pairs(f * sums / steps, edited)


def _of_pairs(contributions: jax.Array, edited: jax.Array) -> jax.Array:
    """Sums over the edited tokens of both texts of each pair, [pairs, width]."""
    of_texts = jnp.sum(jnp.where(edited[..., None], contributions, 0.0), axis=1)
    return of_texts[::2] + of_texts[1::2]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _edges(graphs, sites, dtype, params, features, tokens, scored, edited, low, high) -> jax.Array:
    lm, d_low, d_high = map(modules.merge, graphs, params)
    here = edited[..., None]
    f_high = _encoded(d_high, high)
    error_high = high - _decoded(d_high, f_high)
    f_low = _encoded(d_low, low)
    error_low = low - _decoded(d_low, f_low)

    def total(f):
        y = jnp.where(here, _decoded(d_high, f) + error_high, high)
        return _prefers(lm, sites[1], dtype, tokens, scored, y).sum()

    weight = jnp.where(here, jax.grad(total)(f_high), 0.0)  # [texts, seq, width of the upper]

    def through(f, feature):
        seen = {}
        x = jnp.where(here, _decoded(d_low, f) + error_low, low)

        def tap(site, y):
            y = x if site == sites[0] else y
            seen[site] = y
            return y

        lm.logits(tokens, tap=tap, dtype=dtype)
        own = _encoded(d_high, seen[sites[1]])[..., feature]
        return jnp.sum(weight[..., feature] * own)

    def of(feature):
        return _of_pairs(f_low * jax.grad(through)(f_low, feature), edited)

    return jnp.moveaxis(jax.lax.map(of, features), 0, 1)
