"""Codes of a few active features a row: what they cost is k, not the width, but for the encoder.

With B rows, d dimensions, F features and k active ones, a step through dense matrices takes five
products of 2 B d F operations: the encoder, the decoder, and the gradients of the code and of both
weights. Here only the encoder's stays; each of the other four is 2 B k d, a sum of k weighted rows
(``weighted_sum``), k inner products (``dots``), or, for the weights, a sum over the rows that a
feature is active on (``sum_by_feature``). No [B, F] array but the pre-activations is formed.

All sums have a fixed order, on any device: no atomics, the same bits from run to run. Rows that are
spread over devices stay where they are; only the weights' gradients are summed over devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.training.mesh import on_own_rows

TERMS = 16  # added up in one fused loop: more compile longer, fewer write the sum more often
LANES = 16  # floats that a CPU's widest registers hold


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Code:
    """The active features of rows: value 0 says that a place is not used.

    Attributes:
      values: float32 [batch, places], never negative; the used ones first in every row.
      features: int32 [batch, places], which feature; none twice in a row among the used.
      width: how many features there are (static).
    """

    values: jax.Array
    features: jax.Array
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def used(self) -> jax.Array:
        """Bool [batch, places], which places are; the first ones of every row."""
        return self.values > 0

    def dense(self) -> jax.Array:
        """Returns the features [batch, width]."""
        rows = jnp.arange(len(self.values))[:, None]
        return jnp.zeros((len(self.values), self.width)).at[rows, self.features].add(self.values)


def active_rows(f: jax.Array | Code) -> jax.Array:
    """Returns in how many rows each feature is active, int32 [width], of features or their code."""
    if not isinstance(f, Code):
        return jnp.sum(f > 0, axis=0, dtype=jnp.int32)
    return on_own_rows(lambda code: jnp.diff(_by_feature(code)[1]), f, total=True)


def top_k(z: jax.Array, k: int) -> Code:
    """Returns the k largest of relu(z) [batch, width], exactly; of equals the first ones.

    The k largest lie in the k groups with the largest maxima. With groups of about
    sqrt(width / k) features, there are as many groups to choose from as features in the chosen
    ones: 2 sqrt(width k) numbers are sorted out in place of width.
    """
    values, features = on_own_rows(partial(_top_k, k=k), z)
    return Code(jax.nn.relu(values), features, z.shape[1])


def _top_k(z: jax.Array, *, k: int) -> tuple[jax.Array, jax.Array]:
    batch, width = z.shape
    size = _group_size(width, k)
    grouped = z.reshape(batch, width // size, size)
    groups = jnp.sort(jax.lax.top_k(grouped.max(axis=2), k)[1], axis=1)  # equals stay in order
    candidates = jnp.take_along_axis(grouped, groups[:, :, None], axis=1)
    values, places = jax.lax.top_k(candidates.reshape(batch, k * size), k)
    return values, jnp.take_along_axis(groups, places // size, axis=1) * size + places % size


def _group_size(width: int, k: int) -> int:
    """The largest power of two that divides the width and is at most sqrt(width / k)."""
    size = 1
    while width % (2 * size) == 0 and (2 * size) ** 2 * k <= width:
        size *= 2
    return size


# ---------------------------------------------------------------- encode and decode


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def encode(
    u: jax.Array,
    W_enc: jax.Array,
    bias: jax.Array,
    select: Callable[[jax.Array], Code],
    dtype=None,
) -> Code:
    """Returns select(u W_enc + bias), with gradients in all three through the selected alone.

    Args:
      u: rows [batch, d].
      W_enc: [d, width].
      bias: [width].
      select: what to keep of pre-activations [batch, width].
      dtype: of the product's inputs; sums stay float32.
    """
    z = jnp.matmul(_as(u, dtype), _as(W_enc, dtype), preferred_element_type=jnp.float32)
    return select(z + bias[None, :])


def _encode_forward(u, W_enc, bias, select, dtype):
    code = encode(u, W_enc, bias, select, dtype)
    return code, (u, W_enc, code)


def _encode_backward(select, dtype, kept, gradient: Code):
    u, W_enc, code = kept
    weights = jnp.where(code.used, gradient.values, 0.0)
    d = len(W_enc)
    of_u = on_own_rows(weighted_sum, weights, code.features, code.used, table=W_enc.T)
    with_ones = jnp.pad(u, ((0, 0), (0, LANES)), constant_values=1.0)  # for the bias
    of_both = on_own_rows(sum_by_feature, code, weights, with_ones, total=True)
    return of_u, of_both[:, :d].T, of_both[:, d]


encode.defvjp(_encode_forward, _encode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def decode(code: Code, W_dec: jax.Array, dtype=None) -> jax.Array:
    """Returns the sums [batch, d] of the active features' rows of W_dec [width, d].

    Args:
      dtype: that values and W_dec are rounded to; sums stay float32.
    """
    values, table = _as(code.values, dtype), _as(W_dec, dtype)
    return on_own_rows(weighted_sum, values, code.features, code.used, table=table)


def _decode_forward(code, W_dec, dtype):
    return decode(code, W_dec, dtype), (code, W_dec)


def _decode_backward(dtype, kept, gradient):
    code, W_dec = kept
    of_values = on_own_rows(dots, gradient, code.features, code.used, table=_as(W_dec, dtype))
    values = _as(code.values, dtype)
    of_W = on_own_rows(sum_by_feature, code, values, gradient, total=True)
    integers_have_none = np.zeros(code.features.shape, jax.dtypes.float0)
    return Code(of_values, integers_have_none, code.width), of_W


decode.defvjp(_decode_forward, _decode_backward)


def _as(a: jax.Array, dtype) -> jax.Array:
    return a if dtype is None else a.astype(dtype)


# ---------------------------------------------------------------- sums over few rows


def weighted_sum(
    weights: jax.Array, index: jax.Array, used: jax.Array, table: jax.Array
) -> jax.Array:
    """Returns sum_j weights[:, j] table[index[:, j]], float32 [n, d].

    ``TERMS`` gathers stand side by side in one loop over the output, so that none is written out.

    Args:
      weights: [n, m].
      index: int [n, m], rows of the table.
      used: bool [n, m], true first in every row; what comes after has weight 0.
      table: [rows, d].
    """
    weights, index = (_padded(a, TERMS) for a in (weights, index))

    def add(turn, total):
        block = partial(jax.lax.dynamic_slice_in_dim, start_index=turn * TERMS, slice_size=TERMS)
        weight, row = block(weights, axis=1).astype(jnp.float32), block(index, axis=1)
        for j in range(TERMS):
            total = total + weight[:, j, None] * _entries(table, row[:, j]).astype(jnp.float32)
        return total

    turns = -(-_most(used) // TERMS)
    return jax.lax.fori_loop(0, turns, add, jnp.zeros((len(index), table.shape[1])))


def dots(rows: jax.Array, index: jax.Array, used: jax.Array, table: jax.Array) -> jax.Array:
    """Returns the inner products, float32 [n, m], of rows[i] with table[index[i, j]].

    Computed as ``LANES`` running sums side by side, one in each lane of a register, that are added
    up at the end: a loop over one running sum would take one element at a time.

    Args:
      rows: [n, d].
      index: int [n, m], rows of the table.
      used: bool [n, m]; where none is, nothing is computed.
      table: [rows, d].
    """
    span = LANES * TERMS
    rows, table = (_padded(a, span) for a in (rows, table))

    def add(turn, sums):
        block = partial(jax.lax.dynamic_slice_in_dim, start_index=turn * span, slice_size=span)
        row, column = block(rows, axis=1).astype(jnp.float32), block(table, axis=1)
        for at in range(0, span, LANES):
            part = slice(at, at + LANES)
            sums = sums + row[:, None, part] * _entries(column[:, part], index)
        return sums

    turns = jnp.where(_most(used) > 0, rows.shape[1] // span, 0)
    sums, lanes = jax.lax.fori_loop(0, turns, add, jnp.zeros((*index.shape, LANES))), LANES
    while lanes > 1:
        lanes //= 2
        sums = sums[..., :lanes] + sums[..., lanes:]
    return sums[..., 0]


def _padded(a: jax.Array, block: int) -> jax.Array:
    """Pads columns with zeros to two blocks or more.

    Of one alone the compiler would see that every turn of a loop reads the same, compute it before
    the loop, and write out each gather.
    """
    missing = max(-a.shape[1] % block, 2 * block - a.shape[1])
    return jnp.pad(a, ((0, 0), (0, missing)))


def _most(used: jax.Array) -> jax.Array:
    """Returns how many places are used in the row that uses most.

    Loops end there: what no row uses costs nothing. And a loop whose end is known only while it
    runs is one that the compiler does not merge with what is around it, which would compute the
    indices anew for every element of the output.
    """
    return jnp.max(jnp.sum(used, axis=1, dtype=jnp.int32))


def sum_by_feature(code: Code, weights: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns, for each feature, the sum of weight * row over the rows it is active on.

    Active places are sorted by feature; then ``TERMS`` neighbours of equal feature are added
    at a time, the sums again, and so on: a tree, at most log(batch) deep, of gathers alone.

    Args:
      weights: [batch, places], one for each place of the code.
      rows: [batch, d].

    Returns:
      float32 [width, d].
    """
    (batch, places), width = code.features.shape, code.width
    order, starts = _by_feature(code)
    starts, counts = starts[:-1], jnp.diff(starts)
    most, n_chunks = batch, batch * places  # entries of one feature, and of all
    weights = _entries(weights.reshape(-1), order)
    index = order // places
    while True:
        last = most <= TERMS
        n_chunks = width if last else n_chunks // TERMS + width
        chunks = _chunks(starts, counts, n_chunks, one_each=last)
        weight = jnp.where(chunks.used, _entries(weights, chunks.entries), 0.0)
        rows = weighted_sum(weight, _entries(index, chunks.entries), chunks.used, rows)
        if last:
            return rows
        starts, counts, most = chunks.starts, chunks.counts, math.ceil(most / TERMS)
        weights, index = jnp.ones(n_chunks), jnp.arange(n_chunks)


class _Chunks(NamedTuple):
    """Which entries are added up together.

    Attributes:
      entries: int [chunks, TERMS], and ``used``: bool, whether there is one at all.
      starts: int [width], each feature's first chunk; ``counts``: how many it has.
    """

    entries: jax.Array
    used: jax.Array
    starts: jax.Array
    counts: jax.Array


def _chunks(starts: jax.Array, counts: jax.Array, n_chunks: int, *, one_each: bool) -> _Chunks:
    """Cuts each feature's entries, ``counts`` of them from ``starts`` on, into chunks."""
    width = len(counts)
    n = jnp.ones(width, jnp.int32) if one_each else -(-counts // TERMS)
    first = jnp.cumsum(n) - n
    feature = jnp.repeat(jnp.arange(width), n, total_repeat_length=n_chunks)
    within = jnp.arange(n_chunks) - first[feature]
    entries = (starts[feature] + within * TERMS)[:, None] + jnp.arange(TERMS)[None, :]
    used = entries < (starts + counts)[feature][:, None]
    return _Chunks(jnp.where(used, entries, 0), used, first, n)


def _by_feature(code: Code) -> tuple[jax.Array, jax.Array]:
    """Returns all places sorted by feature, unused last, and where features start [width + 1].

    Place and feature share one integer to be sorted, where both fit into it.
    """
    width = code.width
    features = jnp.where(code.used, code.features, width).reshape(-1)
    n = features.size
    if (width + 1) * n < 2**32:
        keys = jnp.sort(features.astype(jnp.uint32) * n + jnp.arange(n, dtype=jnp.uint32))
        order, features = (keys % n).astype(jnp.int32), (keys // n).astype(jnp.int32)
    else:
        order = jnp.argsort(features, stable=True)
        features = features[order]
    return order, jnp.searchsorted(features, jnp.arange(width + 1)).astype(jnp.int32)


def _entries(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds")
