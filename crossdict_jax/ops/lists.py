"""Codes as lists of their active entries: but for the encoder, they cost k, not the width.

With B rows, d dimensions, F features and k active ones, a dense step takes five products of 2 B d F
operations: encoder, decoder, and the gradients of the code and both weights. Here each but the
encoder's is 2 B k d, and the pre-activations are the only [B, F] array.
"""

import dataclasses
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp

from crossdict_jax.ops import kernels, sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
    """The active features of rows, row after row and rising along each.

    Attributes:
      values: float32 [entries], never negative; 0 after the last row's entries.
      features: int32 [entries].
      rows: int32 [entries]; any after the last row's entries.
      counts: int32 [batch], entries of each row.
      width: number of features (static).
      kernels: whether sums of entries are taken by kernels of their own (static).
    """

    values: jax.Array
    features: jax.Array
    rows: jax.Array
    counts: jax.Array
    width: int = dataclasses.field(metadata={"static": True})
    kernels: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def sums(self) -> ModuleType:
        """What sums entries."""
        return kernels if self.kernels else sums


@jax.custom_vjp
def encoded(code: Entries, u: jax.Array, W_enc: jax.Array, bias: jax.Array) -> Entries:
    """Returns a known code of u W_enc + bias with gradients in W_enc and bias.

    They pass through the active entries alone.
    """
    return code


def _encode_backward(saved, gradient: Entries):
    code, u = saved
    active, width = code.values > 0, code.width  # values that are not numbers have no gradient
    weights = jnp.where(active, gradient.values, 0.0)
    keys = jnp.where(active, code.features, width)
    W_gradient, totals = code.sums.sum_by_key(keys, width, weights, code.rows, u)
    return None, None, W_gradient.T, totals


encoded.defvjp(lambda code, u, W_enc, bias: (code, (code, u)), _encode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def decode_entries(code: Entries, W_dec: jax.Array, ends: tuple[int, ...], dtype=None) -> jax.Array:
    """Returns what each part of the width adds to the decoding, float32 [batch, parts, d]."""
    return _decode_forward(code, W_dec, ends, dtype)[0]


def _decode_forward(code: Entries, W_dec: jax.Array, ends: tuple[int, ...], dtype):
    values, W_dec = (a if dtype is None else a.astype(dtype) for a in (code.values, W_dec))
    n = len(ends) * len(code.counts)
    index = code.rows * len(ends) + sum(code.features >= end for end in ends[:-1])
    index = jnp.where(jnp.arange(len(values)) < code.counts.sum(), index, n)  # the rest: nowhere
    parts = code.sums.sum_by_group(index, n, values, code.features, W_dec)
    return parts.reshape(-1, len(ends), parts.shape[1]), (code, values, W_dec, index)


def _decode_backward(ends, dtype, saved, gradient):
    code, values, W_dec, index = saved
    gradient = gradient.reshape(-1, gradient.shape[-1])
    if code.kernels:  # as dense products do; lists have no use for fewer bytes
        gradient = gradient.astype(W_dec.dtype)
    index = jnp.minimum(index, len(gradient) - 1)
    values_gradient = code.sums.dots(gradient, index, W_dec, code.features)
    keys = jnp.where(code.values > 0, code.features, code.width)  # as above: they are sorted once
    W_gradient, _ = code.sums.sum_by_key(keys, code.width, values, index, gradient)
    nothing = {"features": None, "rows": None, "counts": None}
    return dataclasses.replace(code, values=values_gradient, **nothing), W_gradient


decode_entries.defvjp(_decode_forward, _decode_backward)
