"""Codes as lists of their active entries: what they cost is k, not the width, but for the encoder.

With B rows, d dimensions, F features and k active ones, a step through dense matrices takes five
products of 2 B d F operations: the encoder, the decoder, and the gradients of the code and of both
weights. Here only the encoder's stays; each of the other four is 2 B k d (``sums``). No [B, F]
array but the pre-activations is formed.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from crossdict_jax.ops.sums import dots, sum_by_group, sum_by_key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """The active features of rows, row after row and rising along each.

    Attributes:
      values: float32 [entries], never negative; 0 after the last row's entries.
      features: int32 [entries], which feature.
      rows: int32 [entries], which row; after the last row's entries any.
      counts: int32 [batch], how many entries each row has.
      width: how many features there are (static).
    """

    values: jax.Array
    features: jax.Array
    rows: jax.Array
    counts: jax.Array
    width: int = dataclasses.field(metadata={"static": True})


@jax.custom_vjp
def encoded(code: Entries, u: jax.Array, W_enc: jax.Array, bias: jax.Array) -> Entries:
    """Returns a code of u W_enc + bias, found before; now with gradients in u, W_enc and bias.

    They pass through the active entries alone.
    """
    return code


def _encode_backward(saved, gradient: Entries):
    code, u, W_enc = saved
    active, width = code.values > 0, code.width  # values that are not numbers have no gradient
    weights = jnp.where(active, gradient.values, 0.0)
    u_gradient = sum_by_group(*_rows(code), weights, code.features, W_enc.T)
    keys = jnp.where(active, code.features, width)
    W_gradient = sum_by_key(keys, width, weights, code.rows, u).T
    bias_gradient = jnp.zeros(width).at[code.features].add(weights)
    return None, u_gradient, W_gradient, bias_gradient


encoded.defvjp(lambda code, u, W_enc, bias: (code, (code, u, W_enc)), _encode_backward)


def _rows(code: Entries, ends: tuple[int, ...] = (0,)) -> tuple[jax.Array, int]:
    """Returns where entries are, row * parts + part [entries], and how many of these there are.

    Args:
      ends: rising, where each part of the width ends and the next begins.
    """
    n = len(ends) * len(code.counts)
    parts = code.rows * len(ends) + sum(code.features >= end for end in ends[:-1])
    return jnp.where(jnp.arange(len(parts)) < code.counts.sum(), parts, n), n


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def decode_parts(code: Entries, W_dec: jax.Array, ends: tuple[int, ...], dtype=None) -> jax.Array:
    """Returns what each part of the width adds to the decoding, float32 [batch, parts, d]."""
    values, W_dec = (a if dtype is None else a.astype(dtype) for a in (code.values, W_dec))
    sums = sum_by_group(*_rows(code, ends), values, code.features, W_dec)
    return sums.reshape(len(code.counts), len(ends), -1)


def _decode_backward(ends, dtype, saved, gradient):
    code, W_dec = saved
    values, W_dec = (a if dtype is None else a.astype(dtype) for a in (code.values, W_dec))
    parts, n = _rows(code, ends)
    parts, gradient = jnp.minimum(parts, n - 1), gradient.reshape(n, -1)
    values_gradient = dots(gradient, parts, W_dec, code.features)
    keys = jnp.where(values > 0, code.features, code.width)
    W_gradient = sum_by_key(keys, code.width, values, parts, gradient)
    return Entries(values_gradient, None, None, None, code.width), W_gradient


decode_parts.defvjp(
    lambda code, W_dec, ends, dtype: (decode_parts(code, W_dec, ends, dtype), (code, W_dec)),
    _decode_backward,
)
