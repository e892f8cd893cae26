"""Causal attention, and the rotation of queries and keys by position."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.training.mesh import devices_of_rows, platform

BLOCK = 128  # queries of a block, on CPUs
SCORES = 2**19  # float32 that stay in a core's cache


@partial(jax.jit, static_argnames=("scale", "dtype"))  # traced once for all layers
def attend(query, key, value, *, scale: float, dtype: jnp.dtype, past) -> jax.Array:
    """Causal softmax attention, float32 [batch, seq, heads * d_head].

    query is [batch, seq, heads, d_head]; key and value may have fewer heads, each serving an
    equal run of query heads. ``past`` is (keys, values, length) or None.
    """
    batch, seq, heads, d_head = query.shape
    product = partial(_product, dtype)
    if past is None and platform() == "cpu" and seq > BLOCK:
        return _attend_in_blocks(product, query * scale, key, value)
    if past is None:
        q, k, v = (x.astype(dtype) for x in (query, key, value))
        with jax.default_matmul_precision("highest"):
            out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True)
        return out.astype(jnp.float32).reshape(batch, seq, -1)
    # The past's keys stay apart: joined with the new ones they would be copied for every edit
    # (under vmap).
    query = query.reshape(batch, seq, key.shape[2], -1, d_head) * scale
    *seen, length = past
    sides = seen, (key, value)
    scores = [product("bskgd,btkd->bkgst", query, keys) for keys, _ in sides]
    old = jnp.arange(scores[0].shape[-1])[None, :] < length[:, None]  # [batch, capacity]
    new = jnp.tril(jnp.ones((seq, seq), bool))
    visible = old[:, None, None, None, :], new[None, None, None]
    scores = [jnp.where(seen, score, -jnp.inf) for seen, score in zip(visible, scores)]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    weights = jnp.split(weights, (old.shape[1],), axis=-1)
    out = sum(product("bkgst,btkd->bskgd", w, values) for w, (_, values) in zip(weights, sides))
    return out.reshape(batch, seq, heads * d_head)


def _product(dtype: jnp.dtype, axes: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """``einsum`` with inputs in ``dtype`` and float32 sums."""
    a, b, exact = a.astype(dtype), b.astype(dtype), jax.lax.Precision.HIGHEST
    return jnp.einsum(axes, a, b, precision=exact, preferred_element_type=jnp.float32)


def _attend_in_blocks(product: Callable, query, key, value) -> jax.Array:
    """``attend`` on a CPU: a few texts at a time, and a block of their queries.

    The scores stay in the cache, and keys behind a block are not read: on two cores 3 to 6 times
    as fast as all at once for 16 texts of 560 tokens and 9 heads.
    """
    batch, seq, heads, d_head = query.shape
    devices = math.gcd(batch, devices_of_rows())  # each has its texts in sequence
    limit = max(1, SCORES // (heads * BLOCK * seq))
    few = max(n for n in range(1, limit + 1) if batch // devices % n == 0)

    def attend_few(texts):
        query, key, value = (x.reshape(-1, *x.shape[2:]) for x in texts)
        query = query.reshape(len(query), seq, key.shape[2], -1, d_head).transpose(0, 2, 3, 1, 4)
        key, value, blocks = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3), []
        for start in range(0, seq, BLOCK):
            stop = min(start + BLOCK, seq)
            scores = product("bkgsd,bkdt->bkgst", query[:, :, :, start:stop], key[..., :stop])
            visible = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
            scores = jnp.where(visible[None, None, None], scores, -jnp.inf)
            weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
            out = product("bkgst,bktd->bkgsd", weights, value[:, :, :stop])
            blocks.append(out / weights.sum(axis=-1, keepdims=True))
        out = jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4)
        return out.reshape(devices, few, seq, -1)

    texts = (x.reshape(devices, -1, few, *x.shape[1:]) for x in (query, key, value))
    out = jax.lax.map(attend_few, tuple(x.swapaxes(0, 1) for x in texts))
    return out.swapaxes(0, 1).reshape(batch, seq, -1)


@jax.jit  # as attend
def rotate(x: jax.Array, rotary: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """x [batch, seq, heads, d_head] with its first dims turned by position, halves paired.

    The tables are [seq, dims / 2], or [batch, seq, dims / 2] if rows differ in position.
    """
    cos, sin = (table[..., None, :] for table in rotary)
    if cos.ndim == 3:
        cos, sin = cos[None], sin[None]
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
