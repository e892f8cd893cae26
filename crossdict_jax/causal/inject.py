"""Adds vectors to a language model's activations at positions of texts, reads what they change.

The text before a position is read once; every vector at every dose then costs a few tokens, not a
text, because attention looks back on the keys that were kept. All of them are arguments of one
compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import models, modules
from crossdict_jax.models import LanguageModel, Past, Site
from crossdict_jax.training.mesh import DATA, make_mesh, put, shard

AT_ONCE = 16  # vectors whose edited predictions lie in memory together


class Positions(NamedTuple):
    """Where texts are edited; all int [n].

    Attributes:
      text: index into the texts.
      first: the first token that is edited.
      last: the last one; the prediction after it is read.
      end: the last token of the continuation, ``last`` where there is none.
    """

    text: np.ndarray
    first: np.ndarray
    last: np.ndarray
    end: np.ndarray

    def take(self, rows: np.ndarray) -> Positions:
        return Positions(*(column[rows] for column in self))


class _Chunk(NamedTuple):
    """The few tokens of every position that are read again for every vector."""

    tokens: jax.Array  # int32 [n, seq], from ``first`` on
    x: jax.Array  # [n, seq, d_model], the site's activations without an edit
    edited: jax.Array  # float32 [n, seq], 1 where the vector is added
    start: jax.Array  # int32 [n], position of the first token
    read: jax.Array  # int32 [n, reads], indices into the chunk
    following: jax.Array  # int32 [n, reads], the token after each
    scored: jax.Array  # float32 [n, reads], 1 where that token belongs to the continuation


class Ready(NamedTuple):
    """A model that has read the texts up to n positions: keys and values, and what comes next."""

    n: int
    layers: dict
    chunk: _Chunk


class Injector:
    """A language model, a site, texts, the site's activations in them, and positions of interest.

    Attributes:
      tokens: int32 [texts, seq].
      x: [texts, seq, d_model], the activations at the site.
      clean: float32 [n, d_model], those at the last edited token of each position.
    """

    def __init__(
        self,
        lm: LanguageModel,
        site: Site,
        texts: Sequence[np.ndarray],
        positions: Positions,
        *,
        batch_size: int,
        dtype: str = "float32",
    ):
        """Reads every text once, as deep as the site.

        Args:
          texts: int32 [tokens] each, with a BOS where the model wants one.
          batch_size: texts per forward (but for one on every device).
          dtype: of the inputs of matrix products.
        """
        models.check_site(lm.config, site, lm.name)
        self.positions, self.vocab_size = positions, lm.config.vocab_size
        self._mesh = make_mesh()
        graphdef, params = modules.split(lm)
        params = jax.device_put(params, shard(self._mesh))
        self._model = (graphdef, site, jnp.dtype(dtype), params)
        self.tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
        for row, text in zip(self.tokens, texts):
            row[: len(text)] = text
        size, parts = self._multiple(batch_size), []
        for start in range(0, len(texts), size):
            tokens = self._put(_lengthened(self.tokens[start : start + size], size))
            parts.append(np.asarray(read_site(*self._model, tokens)))
        self.x = np.concatenate(parts)[: len(texts)]
        self.clean = self.x[positions.text, positions.last]

    @cached_property
    def median_norm(self) -> float:
        """The median norm of the activations at the positions."""
        return float(np.median(np.linalg.norm(self.clean, axis=1)))

    def ready(
        self,
        rows: np.ndarray | slice = slice(None),
        *,
        size: int,
        span: int | None,
        reads: int = 1,
        same_texts: Ready | None = None,
    ) -> Ready:
        """Reads the texts up to some of the positions; returns what the methods below take.

        Args:
          rows: which positions.
          size: they are filled up to this number: one compiled program for all features.
          span: edited tokens of a position, at most (the last ones of more); None: all of the text
            before it but its first token.
          reads: predictions read from ``last`` on, at most; 1 is the one after it.
          same_texts: of the same rows and size with another span or reads: nothing is read again.
        """
        positions, length = self.positions.take(rows), self.tokens.shape[1]
        n, size = len(positions.text), self._multiple(size)
        text, first, last, end = positions.take(np.minimum(np.arange(size), n - 1))
        if span is None:
            first, span = np.minimum(1, last), length
        first = np.maximum(first, last - span + 1)
        at = first[:, None] + np.arange(span + reads - 1)[None, :]
        inside = np.minimum(at, length - 1)
        after = last[:, None] + np.arange(reads)[None, :]
        chunk = _Chunk(
            tokens=self.tokens[text[:, None], inside],
            x=self.x[text[:, None], inside],
            edited=(at <= last[:, None]).astype(np.float32),
            start=first.astype(np.int32),
            read=(after - first[:, None]).astype(np.int32),
            following=self.tokens[text[:, None], np.minimum(after + 1, length - 1)],
            scored=(after < end[:, None]).astype(np.float32),
        )
        chunk = _Chunk(*map(self._put, chunk))
        if same_texts is not None:
            return Ready(n, same_texts.layers, chunk)
        texts = self._put(self.tokens[text]), self._put(self.x[text])
        return Ready(n, _look_back(*self._model, *texts), chunk)

    def log_probs(self, ready: Ready, vectors: np.ndarray) -> np.ndarray:
        """Returns log p of every token after each position, float32 [1 + vectors, n, vocab].

        The first entry is without an edit, the others with one vector [d_model] added.
        """
        vectors = np.concatenate([np.zeros_like(vectors[:1]), vectors])
        out = _log_probs(*self._model, *ready[1:], put(vectors, shard(self._mesh)))
        return np.asarray(out)[:, : ready.n]

    def changes(
        self, ready: Ready, vectors: np.ndarray, watched: Mapping[int, float], *, limit: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (mean change of log p of the watched tokens, KL(clean || edited)).

        Both float32 [vectors, n], in nats, of the prediction after each position.

        Args:
          vectors: [vectors, d_model], each added alone.
          watched: {token: weight in the mean}, 1 to ``limit`` of them.
          limit: what ``watched`` is filled up to: one program for all features.
        """
        ids = np.resize(np.array(list(watched), np.int32), limit)
        weight = np.zeros(limit, np.float32)
        weight[: len(watched)] = list(watched.values())
        weight /= weight.sum()
        ids, weight = (put(a, shard(self._mesh)) for a in (ids, weight))
        out = _changes(*self._model, *ready[1:], self._vectors(vectors), ids, weight)
        return tuple(np.asarray(part)[: len(vectors), : ready.n] for part in out)

    def continuations(self, ready: Ready, vectors: np.ndarray, strength: np.ndarray) -> np.ndarray:
        """Returns the change of log p of each position's continuation, float32 [vectors, n].

        Args:
          vectors: [vectors, d_model].
          strength: [vectors, n], by which a vector is multiplied at each position.
        """
        strength = np.pad(strength, ((0, 0), (0, len(ready.chunk.start) - ready.n)))
        out = _continuations(*self._model, *ready[1:], *map(self._vectors, (vectors, strength)))
        return np.asarray(out)[: len(vectors), : ready.n]

    def _vectors(self, rows: np.ndarray) -> jax.Array:
        n = math.ceil(len(rows) / AT_ONCE) * AT_ONCE
        return put(_lengthened(rows.astype(np.float32), n), shard(self._mesh))

    def _multiple(self, size: int) -> int:
        return math.ceil(size / self._mesh.size) * self._mesh.size

    def _put(self, array: np.ndarray) -> jax.Array:
        return put(array, shard(self._mesh, DATA))


def _lengthened(rows: np.ndarray, n: int) -> np.ndarray:
    """The rows, and zeros up to n rows."""
    return np.pad(rows, ((0, n - len(rows)),) + ((0, 0),) * (rows.ndim - 1))


@partial(jax.jit, static_argnums=(0, 1, 2))
def read_site(graphdef, site, dtype, params, tokens) -> jax.Array:
    """Returns the activations [batch, seq, d_model] at a site."""
    seen = {}

    def tap(at, y):
        seen[at] = y
        return y

    modules.merge(graphdef, params).logits(tokens, tap=tap, dtype=dtype)
    return seen[site]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _look_back(graphdef, site, dtype, params, tokens, x) -> dict:
    """Keys and values of every layer that an edit at the site can reach."""
    lm = modules.merge(graphdef, params)
    _, layers = lm.extend(tokens, tap=lambda at, y: x if at == site else y, dtype=dtype)
    lowest = {"resid_pre": site.layer, "resid_post": site.layer + 1}.get(site.kind, 0)
    return {layer: memory for layer, memory in layers.items() if layer >= lowest}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _log_probs(graphdef, site, dtype, params, layers, chunk, vectors) -> jax.Array:
    edit = _editor(graphdef, site, dtype, params, layers, chunk)
    return jax.lax.map(lambda v: edit(v)[:, 0], vectors)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _changes(graphdef, site, dtype, params, layers, chunk, vectors, watched, weight):
    edit = _editor(graphdef, site, dtype, params, layers, chunk)
    clean = edit(jnp.zeros_like(vectors[0]))[:, 0]  # [n, vocab]
    p = jnp.exp(clean)

    def change(vector):
        difference = edit(vector)[:, 0] - clean
        kl = -jnp.sum(p * difference, axis=-1)
        return difference[:, watched] @ weight, jnp.maximum(kl, 0.0)  # below zero it is rounding

    return jax.lax.map(change, vectors, batch_size=AT_ONCE)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _continuations(graphdef, site, dtype, params, layers, chunk, vectors, strength):
    edit = _editor(graphdef, site, dtype, params, layers, chunk)

    def score(log_probs):
        chosen = jnp.take_along_axis(log_probs, chunk.following[..., None], axis=-1)[..., 0]
        return jnp.sum(chosen * chunk.scored, axis=-1)

    clean = score(edit(jnp.zeros_like(vectors[0])))
    return jax.lax.map(
        lambda pair: score(edit(*pair)) - clean, (vectors, strength), batch_size=AT_ONCE
    )


def _editor(graphdef, site, dtype, params, layers, chunk: _Chunk):
    """Returns (vector [d_model], strength [n]) -> log p, [n, reads, vocab]."""
    lm = modules.merge(graphdef, params)
    top = Site(lm.config.n_layers - 1, "resid_post")
    past = Past(layers, chunk.start) if layers else None

    def edit(vector, strength=None):
        scale = chunk.edited if strength is None else chunk.edited * strength[:, None]
        delta = scale[:, :, None] * vector[None, None, :]

        def tap(at, y):
            if at == site:
                y = chunk.x + delta
            if at == top:  # what is not read needs no logits
                y = jnp.take_along_axis(y, chunk.read[:, :, None], axis=1)
            return y

        logits, _ = lm.extend(chunk.tokens, past, tap=tap, dtype=dtype)
        return jax.nn.log_softmax(logits, axis=-1)

    return edit
