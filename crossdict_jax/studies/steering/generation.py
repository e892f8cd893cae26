"""Text that a language model writes while a vector is added to its activations at a site.

The prompt is read once and its keys are kept; every new token then costs one position. The whole
of it, many texts with a vector each, is one compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax import models, modules
from crossdict_jax.models import LanguageModel, Past, Site
from crossdict_jax.training.mesh import DATA, make_mesh, put, shard

BATCH_SIZE = 64  # texts at once


class Starts(NamedTuple):
    """Texts to be continued, as arrays with a row for each.

    Attributes:
      tokens: int32 [n, longest], the prompts, filled up on the right with anything.
      length: int32 [n], tokens of each prompt, 1 or more.
      vector: float32 [n, d_model], added wherever a new token is predicted: from the prompt's last
        token on.
      prompt, sample: int32 [n], which random numbers are drawn: those of equal ones are equal.
    """

    tokens: np.ndarray
    length: np.ndarray
    vector: np.ndarray
    prompt: np.ndarray
    sample: np.ndarray

    def take(self, rows: np.ndarray) -> Starts:
        return Starts(*(column[rows] for column in self))


class Writer:
    """A language model that continues texts."""

    def __init__(
        self,
        lm: LanguageModel,
        site: Site,
        *,
        batch_size: int = BATCH_SIZE,
        dtype: str = "float32",
    ):
        """Args:
        site: where vectors are added.
        batch_size: texts at once (rounded up to a whole number for every device).
        dtype: of the inputs of matrix products.
        """
        models.check_site(lm.config, site, lm.name)
        self._mesh = make_mesh()
        self._graphdef, params = modules.split(lm)
        self._params = jax.device_put(params, shard(self._mesh))
        self._site, self._dtype, self._size = site, jnp.dtype(dtype), batch_size

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
        sampling = np.float32(temperature), np.float32(top_p), np.uint32(seed)
        static = self._graphdef, self._site, self._dtype, count
        parts = [
            np.asarray(_write(*static, self._params, Starts(*batch), sampling))
            for batch in self._batches(*starts)
        ]
        return np.concatenate(parts)[: len(starts.length)]

    def surprise(self, tokens: np.ndarray) -> np.ndarray:
        """Returns -log p of every token after the first, without an edit, [n, seq - 1] in nats.

        Args:
          tokens: int32 [n, seq].
        """
        program = partial(_surprise, self._graphdef, self._dtype, self._params)
        parts = [np.asarray(program(batch)) for (batch,) in self._batches(tokens)]
        return np.concatenate(parts)[: len(tokens)]

    def _batches(self, *arrays: np.ndarray) -> Iterator[tuple[jax.Array, ...]]:
        """Yields equally many rows at a time; the last row fills the last ones up."""
        n, devices = len(arrays[0]), self._mesh.size
        size = math.ceil(min(self._size, n) / devices) * devices
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1)
            yield tuple(put(array[rows], shard(self._mesh, DATA)) for array in arrays)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _write(graphdef, site, dtype, count, params, starts: Starts, sampling) -> jax.Array:
    temperature, top_p, seed = sampling
    lm = modules.merge(graphdef, params)
    top = Site(lm.config.n_layers - 1, "resid_post")
    row = jnp.arange(len(starts.length))

    def read(tokens, position, past, last):
        """The logits after one token of each row, [n, vocab], and the keys of all of them."""
        edited = position >= starts.length[:, None] - 1
        added = edited[..., None] * starts.vector[:, None, :]

        def tap(at, y):
            if at == site:
                y = y + added
            if at == top:  # what is not read needs no logits
                y = jnp.take_along_axis(y, last[:, None, None], axis=1)
            return y

        logits, layers = lm.extend(tokens, past, tap=tap, dtype=dtype)
        return logits[:, 0], layers

    def step(carry, i):
        logits, layers, length = carry
        token = draw(logits, keys(i), temperature, top_p)
        past = Past(layers, length)
        logits, new = read(token[:, None], length[:, None], past, jnp.zeros_like(length))
        layers = {
            layer: tuple(old.at[row, length].set(k[:, 0]) for old, k in zip(both, new[layer]))
            for layer, both in layers.items()
        }
        return (logits, layers, length + 1), token

    def keys(i):
        """A key for every row at step i."""

        def fold(prompt, sample):
            key = jax.random.fold_in(jax.random.key(seed), prompt)
            return jax.random.fold_in(jax.random.fold_in(key, sample), i)

        return jax.vmap(fold)(starts.prompt, starts.sample)

    positions = jnp.arange(starts.tokens.shape[1])[None, :]
    logits, layers = read(starts.tokens, positions, None, starts.length - 1)
    room = ((0, 0), (0, count), (0, 0), (0, 0))
    layers = jax.tree.map(lambda kept: jnp.pad(kept, room), layers)
    _, tokens = jax.lax.scan(step, (logits, layers, starts.length), jnp.arange(count))
    return tokens.T


def draw(logits: jax.Array, keys: jax.Array, temperature, top_p) -> jax.Array:
    """Returns a token of every row, int32 [n], of logits [n, vocab]; see ``Writer.write``."""

    def sample():
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1) / temperature
        p = jax.nn.softmax(ranked, axis=-1)
        ranked = jnp.where(jnp.cumsum(p, axis=-1) - p < top_p, ranked, -jnp.inf)
        rank = jax.vmap(jax.random.categorical)(keys, ranked)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    return jax.lax.cond(
        temperature == 0, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32), sample
    )


@partial(jax.jit, static_argnums=(0, 1))
def _surprise(graphdef, dtype, params, tokens) -> jax.Array:
    logits = modules.merge(graphdef, params).logits(tokens, dtype=dtype)[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
