"""Sparse codes of rows, and their decoding: a reference of dense products, or lists.

A code is an array of features [batch, width] or ``Entries``: the same values and gradients, but
for the order of sums.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from crossdict_jax.ops.lists import Entries, decode_entries, encoded
from crossdict_jax.ops.products import matmul
from crossdict_jax.ops.selection import entries_from, fastest_products
from crossdict_jax.training.mesh import platform

Code = jax.Array | Entries


def activity(code: Code) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (bool [width], active in some row; active features per row []; smallest active []).

    The last is infinity if none is active.
    """
    if isinstance(code, Entries):
        values, batch, counts = code.values, len(code.counts), code.values > 0
        active = jnp.zeros(code.width, bool).at[code.features].max(counts)
    else:
        values, batch, counts = code, len(code), code > 0
        active = jnp.any(counts, axis=0)
        if platform() != "cpu":  # two reductions would write and read what they share
            counts = jnp.sum(counts, axis=0, dtype=jnp.int32)
            active = counts > 0
    l0 = jnp.sum(counts, dtype=jnp.float32) / batch
    return active, l0, jnp.min(jnp.where(values > 0, values, jnp.inf))


def sparse_code(
    u: jax.Array,
    W_enc: jax.Array,
    bias: jax.Array,
    threshold: Callable[[jax.Array], jax.Array],
    n: int,
    dtype=None,
    products: str | None = None,
) -> Code:
    """Returns the values of relu(z), z = u W_enc + bias, that reach a threshold.

    Args:
      u: rows [batch, d]; they get no gradient.
      W_enc, bias: [d, width] and [width].
      threshold: of z [batch, width], without a gradient: [] for all rows, or [batch].
      n: how many values reach it, but for equal ones.
      dtype: of the product's inputs; sums stay float32.
      products: "dense", or "lists" or "kernels" for ``Entries``; None: the fastest.
    """
    u = jax.lax.stop_gradient(u)
    z = matmul(u, W_enc, dtype) + bias[None, :]
    fixed = jax.lax.stop_gradient(z)
    lowest = jax.lax.stop_gradient(threshold(fixed))
    products = products or fastest_products(z.size, n)
    if products == "dense":
        reaching = _reaching if platform() == "cpu" else _reaching_once
        return reaching(z, lowest.reshape(-1, 1))
    limit = min(n + len(z), z.size)  # one more for each row, in case values are equal
    rows, features, counts = entries_from(fixed, lowest, limit=limit)
    values = jnp.where(jnp.arange(limit) < counts.sum(), fixed[rows, features], 0.0)
    kernels = products == "kernels"
    if kernels and dtype is not None:  # of the gradient's product, too
        u = u.astype(dtype)
    return encoded(Entries(values, features, rows, counts, z.shape[1], kernels), u, W_enc, bias)


def _reaching(z: jax.Array, lowest: jax.Array) -> jax.Array:
    return jnp.where((z < lowest) | (z <= 0), 0.0, z)  # NaN stays visible


# The same, whose gradient reads from the code what is active: accelerators write no mask beside it.
_reaching_once = jax.custom_vjp(_reaching)
_reaching_once.defvjp(
    lambda z, lowest: (_reaching(z, lowest),) * 2,
    lambda f, gradient: (jnp.where(f == 0, 0.0, gradient), None),
)


def decode(code: Code, W_dec: jax.Array, dtype=None) -> jax.Array:
    """Returns the sums [batch, d] of the active features' rows of W_dec [width, d].

    ``dtype`` is that of values and W_dec; sums stay float32.
    """
    return decode_parts(code, W_dec, (len(W_dec),), dtype)[:, 0]


def decode_parts(code: Code, W_dec: jax.Array, ends: tuple[int, ...], dtype=None) -> jax.Array:
    """Returns what each part of the width adds to the decoding, float32 [batch, parts, d].

    ``ends`` rise: where each part ends and the next begins; the last is the width.
    """
    if isinstance(code, Entries):
        return decode_entries(code, W_dec, ends, dtype)
    slices = [slice(a, b) for a, b in itertools.pairwise((0, *ends))]
    return jnp.stack([matmul(code[:, part], W_dec[part], dtype) for part in slices], axis=1)
