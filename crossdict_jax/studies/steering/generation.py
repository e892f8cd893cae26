"""Text that a language model writes while a vector is added to its activations at a site.

The prompt is read once and its keys are kept; every new token then costs one position. The whole
of it, many texts with a vector each, is one compiled program.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import models, modules
from crossdict_jax.models import LanguageModel, Past, Site
from crossdict_jax.training.mesh import DATA, make_mesh, put, shard


class Starts(NamedTuple):
    """Texts to be continued, as arrays with a row for each.

    Attributes:
      tokens: int32 [n, longest], the prompts, filled up on the right with anything.
      length: int32 [n], tokens of each prompt, 1 or more.
      first: int32 [n], the position from which on the vector is added.
      vector: float32 [n, d_model].
      prompt, sample: int32 [n], which random numbers are drawn: those of equal ones are equal.
    """

    tokens: np.ndarray
    length: np.ndarray
    first: np.ndarray
    vector: np.ndarray
    prompt: np.ndarray
    sample: np.ndarray

    def take(self, rows: np.ndarray) -> Starts:
        return Starts(*(column[rows] for column in self))


class Writer:
    """A language model that continues texts, and what its compiled program took.

    Attributes:
      tokens, seconds: written so far, and how long that took without compiling.
    """

    def __init__(self, lm: LanguageModel, site: Site, *, batch_size: int, dtype: str = "float32"):
        """Args:
        site: where vectors are added.
        batch_size: texts at once (rounded up to a whole number for every device).
        dtype: of the inputs of matrix products.
        """
        models.check_site(lm.config, site, lm.name)
        self._mesh = make_mesh()
        self._graphdef, params = modules.split(lm)
        self._params = jax.device_put(params, shard(self._mesh))
        self._site, self._dtype = site, jnp.dtype(dtype)
        self._size = math.ceil(batch_size / self._mesh.size) * self._mesh.size
        self.tokens, self.seconds = 0, 0.0

    def write(
        self, starts: Starts, *, count: int, temperature: float, top_p: float, seed: int
    ) -> np.ndarray:
        """Returns the continuations, int32 [n, count].

        The draw of a text depends on the seed, its prompt, its sample and its own logits alone,
        not on what is written beside it.

        Args:
          count: new tokens of every text; with the prompt no more than the model reads.
          temperature: 0 takes the likeliest token.
          top_p: tokens are drawn among the likeliest that hold this share of the probability
            (Holtzman et al. 2020, section 3.1).
        """
        how = (np.float32(temperature), np.float32(top_p), np.uint32(seed))
        how = tuple(put(np.asarray(value), shard(self._mesh)) for value in how)
        written, program = [], None
        for rows in self._batches(len(starts.length)):
            batch = Starts(*(put(column, shard(self._mesh, DATA)) for column in starts.take(rows)))
            if program is None:  # all batches have one shape
                static = (self._graphdef, self._site, self._dtype, count)
                program = _write.lower(*static, self._params, batch, how).compile()
            began = time.perf_counter()
            written.append(np.asarray(program(self._params, batch, how)))
            self.seconds += time.perf_counter() - began
            self.tokens += count * len(np.unique(rows))  # the last batch repeats a row
        return np.concatenate(written)[: len(starts.length)]

    def surprise(self, tokens: np.ndarray) -> np.ndarray:
        """Returns -log p of every token after the first, without an edit, [n, seq - 1] in nats.

        Args:
          tokens: int32 [n, seq].
        """
        parts = []
        for rows in self._batches(len(tokens)):
            batch = put(tokens[rows], shard(self._mesh, DATA))
            parts.append(np.asarray(_surprise(self._graphdef, self._dtype, self._params, batch)))
        return np.concatenate(parts)[: len(tokens)]

    def _batches(self, n: int):
        """Yields row numbers, equally many at a time; the last row fills the last ones up."""
        size = min(self._size, math.ceil(n / self._mesh.size) * self._mesh.size)
        for at in range(0, n, size):
            yield np.minimum(np.arange(at, at + size), n - 1)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _write(graphdef, site, dtype, count, params, starts: Starts, how) -> jax.Array:
    temperature, top_p, seed = how
    lm = modules.merge(graphdef, params)
    top = Site(lm.config.n_layers - 1, "resid_post")
    row = jnp.arange(len(starts.length))

    def read(tokens, position, past, last):
        """The logits after one token of each row, [n, vocab], and the keys of all of them."""
        added = (position >= starts.first[:, None])[..., None] * starts.vector[:, None, :]

        def tap(here, y):
            if here == site:
                y = y + added
            if here == top:  # what is not read needs no logits
                y = jnp.take_along_axis(y, last[:, None, None], axis=1)
            return y

        logits, layers = lm.extend(tokens, past, tap=tap, dtype=dtype)
        return logits[:, 0], layers

    def step(carry, i):
        logits, layers, length = carry
        token = _draw(logits, _keys(seed, starts, i), temperature, top_p)
        past = Past(layers, length)
        logits, new = read(token[:, None], length[:, None], past, jnp.zeros_like(length))
        layers = {
            layer: tuple(old.at[row, length].set(one[:, 0]) for old, one in zip(both, new[layer]))
            for layer, both in layers.items()
        }
        return (logits, layers, length + 1), token

    places = jnp.arange(starts.tokens.shape[1])[None, :]
    logits, layers = read(starts.tokens, places, None, starts.length - 1)
    room = ((0, 0), (0, count), (0, 0), (0, 0))
    layers = jax.tree.map(lambda keys: jnp.pad(keys, room), layers)
    _, tokens = jax.lax.scan(step, (logits, layers, starts.length), jnp.arange(count))
    return tokens.T


def _keys(seed, starts: Starts, i) -> jax.Array:
    """A key for every row at step i."""

    def one(prompt, sample):
        key = jax.random.fold_in(jax.random.key(seed), prompt)
        return jax.random.fold_in(jax.random.fold_in(key, sample), i)

    return jax.vmap(one)(starts.prompt, starts.sample)


def _draw(logits, keys, temperature, top_p) -> jax.Array:
    """A token of every row, int32 [n], of logits [n, vocab]."""

    def sample():
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
        p = jax.nn.softmax(ranked, axis=-1)
        ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, ranked, -jnp.inf)
        place = jax.vmap(jax.random.categorical)(keys, ranked)
        return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(
        temperature == 0, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32), sample
    )


@partial(jax.jit, static_argnums=(0, 1))
def _surprise(graphdef, dtype, params, tokens) -> jax.Array:
    logits = modules.merge(graphdef, params).logits(tokens, dtype=dtype)[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
