"""Codes of a few active features a row: what they cost is k, not the width, but for the encoder.

With B rows, d dimensions, F features and k active ones, a step through dense matrices takes five
products of 2 B d F operations: the encoder, the decoder, and the gradients of the code and of both
weights. Here only the encoder's stays; each of the other four is 2 B k d: a sum of weighted rows
for each row's entries or for each feature's, or an inner product for each entry (``sums``). No
[B, F] array but the pre-activations is formed.

Rows that are spread over devices stay where they are; only the weights' gradients, and what a
selection over all rows counts, are summed over devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from crossdict_jax.ops import selection
from crossdict_jax.ops.sums import LANES, dots, sum_by_group, sum_by_unequal_group
from crossdict_jax.training.mesh import on_own_rows

MEASURED = ("cpu",)  # backends on which a list of entries is known to cost less than products
SHARE = 32  # there, up to this part of the width: longer ones take more memory and save little
LARGE = 2**20  # pre-activations of a batch; of fewer, compiling both ways outweighs the saving


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Code:
    """The active features of rows as a list of entries, row after row.

    A row has as many as it needs. On several devices each has its own rows' list.

    Attributes:
      values: float32 [entries], never negative; 0 says that an entry is not used.
      features: int32 [entries], which feature; none twice in a row among the used.
      rows: int32 [entries], which row; after the last row's entries any.
      counts: int32 [batch], how many entries each row has.
      width: how many features there are (static).
    """

    values: jax.Array
    features: jax.Array
    rows: jax.Array
    counts: jax.Array
    width: int = dataclasses.field(metadata={"static": True})

    @property
    def batch(self) -> int:
        """How many rows there are."""
        return len(self.counts)

    @property
    def used(self) -> jax.Array:
        """Bool [entries], which entries are."""
        return self.values > 0

    def dense(self) -> jax.Array:
        """Returns the features [batch, width]."""
        return on_own_rows(_dense, self)


def _dense(code: Code) -> jax.Array:
    zeros = jnp.zeros((code.batch, code.width))
    return zeros.at[code.rows, code.features].add(code.values)


def active_rows(f: jax.Array | Code) -> jax.Array:
    """Returns in how many rows each feature is active, int32 [width], of features or their code."""
    if not isinstance(f, Code):
        return jnp.sum(f > 0, axis=0, dtype=jnp.int32)
    return on_own_rows(lambda code: jnp.diff(_by_feature(code)[1]), f, total=True)


# ---------------------------------------------------------------- select


def top_k(z: jax.Array, k: int) -> Code:
    """Returns the k largest of relu(z) [batch, width] of each row; of equals the first.

    Features rise along a row.
    """

    def own(z):
        values, features = selection.top_k(z, k)
        rows = jnp.repeat(jnp.arange(len(z)), k)
        return values.reshape(-1), features.reshape(-1), rows, jnp.full(len(z), k)

    values, *where = on_own_rows(own, z)
    return Code(values, *where, z.shape[1])


def batch_top_k(z: jax.Array, n: int) -> Code:
    """Returns the n largest of relu(z) [batch, width] in all rows, and all that equal the n-th.

    But where that takes more places than there are (``selection.room``, 2 n or more): then of those
    that equal the n-th the first rows'. Features rise along a row.
    """
    code = _candidates(z, n)
    least = _nth_largest(code, n)
    return dataclasses.replace(code, values=jnp.where(code.values >= least, code.values, 0.0))


def nth_largest(z: jax.Array, n: int) -> jax.Array:
    """Returns the n-th largest value [] of relu(z) [batch, width] in all rows, exactly."""
    return _nth_largest(_candidates(z, n), n)


def _candidates(z: jax.Array, n: int) -> Code:
    """Returns a code of the n largest values, and perhaps some more."""
    return _entries_from(z, selection.least_of_largest(z, n), n)


def _nth_largest(code: Code, n: int) -> jax.Array:
    return selection.kth_largest(code.values[:, None], n, axis=(0, 1))


def all_from(z: jax.Array, least: jax.Array, n: int) -> Code:
    """Returns the values of relu(z) from ``least`` [] on: of rows of a batch, z [part, width].

    Args:
      least: the n-th largest value of the batch; see ``batch_top_k``.
    """
    return _entries_from(z, selection.least_from(z, least, n), n)


def _entries_from(z: jax.Array, least: jax.Array, n: int) -> Code:
    room = selection.room(n, *z.shape)
    return _all_from(z, least, lambda own: min(room, own.size))


def _all_from(z: jax.Array, least: jax.Array, room_of: Callable[[jax.Array], int]) -> Code:
    """Returns the values of z [batch, width] from the bits ``least`` [batch] on.

    Args:
      room_of: a device's own rows of z -> how many places there are for theirs.
    """

    def own(z, least):
        rows, features, counts = selection.entries_from(z, least, room=room_of(z))
        there = jnp.arange(len(rows)) < counts.sum()
        return jnp.where(there, z[rows, features], 0.0), features, rows, counts

    return Code(*on_own_rows(own, z, least), z.shape[1])


def positive(f: jax.Array) -> Code:
    """Returns all positive values of f [batch, width], of which ``few_are_positive``."""
    return _all_from(f, _positive(f), _room)


def lists_pay(batch: int, width: int) -> bool:
    """Whether lists of all positive values [batch, width] can save time, on this backend."""
    return jax.default_backend() in MEASURED and width >= SHARE and batch * width >= LARGE


def few_are_positive(f: jax.Array) -> jax.Array:
    """Returns bool []: whether each device's rows of f [batch, width] have few positive values.

    At most width // SHARE a row on average, and none that is not a number: a list has no such.
    """

    def own(f):
        few = selection.count_from(f, _positive(f)) <= _room(f)
        return (few & ~jnp.isnan(f).any())[None]

    return on_own_rows(own, f).all()


def _positive(f: jax.Array) -> jax.Array:
    return jnp.ones(len(f), jnp.int32)  # bits of the least positive float


def _room(f: jax.Array) -> int:
    return len(f) * (f.shape[1] // SHARE)


# ---------------------------------------------------------------- encode and decode


def encode(
    u: jax.Array,
    W_enc: jax.Array,
    bias: jax.Array,
    given: tuple[jax.Array, ...],
    select: Callable[..., Code],
    dtype=None,
) -> Code:
    """Returns select(u W_enc + bias, *given), with gradients through the selected alone.

    Args:
      u: rows [batch, d].
      W_enc: [d, width].
      bias: [width].
      given: what else ``select`` reads; gets no gradient.
      select: what to keep of pre-activations [batch, width].
      dtype: of the product's inputs; sums stay float32.
    """
    z = jnp.matmul(_as(u, dtype), _as(W_enc, dtype), preferred_element_type=jnp.float32)
    z = jax.lax.stop_gradient(z + bias[None, :])
    return selected(z, u, W_enc, bias, given, select)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def selected(z, u, W_enc, bias, given, select) -> Code:
    """Returns select(z, *given) of z = u W_enc + bias, computed before; else as ``encode``.

    What would be z's gradient goes to u, W_enc and bias.
    """
    return select(z, *given)


def _selected_forward(z, u, W_enc, bias, given, select):
    code = select(z, *given)
    return code, (u, W_enc, code)


def _selected_backward(select, kept, gradient: Code):
    u, W_enc, code = kept
    weights = jnp.where(code.used, gradient.values, 0.0)
    d = len(W_enc)
    of_u = on_own_rows(_sum_by_row, code, weights, table=W_enc.T)[:, 0]
    with_ones = jnp.pad(u, ((0, 0), (0, LANES)), constant_values=1.0)  # for the bias
    of_both = on_own_rows(_sum_by_feature, code, weights, code.rows, with_ones, total=True)
    return None, of_u, of_both[:, :d].T, of_both[:, d], None


selected.defvjp(_selected_forward, _selected_backward)


def decode(code: Code, W_dec: jax.Array, dtype=None) -> jax.Array:
    """Returns the sums [batch, d] of the active features' rows of W_dec [width, d].

    Args:
      dtype: that values and W_dec are rounded to; sums stay float32.
    """
    return decode_parts(code, W_dec, (code.width,), dtype)[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def decode_parts(code: Code, W_dec: jax.Array, ends: tuple[int, ...], dtype=None) -> jax.Array:
    """Returns what each part of the width adds to the decoding, float32 [batch, parts, d].

    Args:
      code: one whose features rise along a row, if there are several parts.
      ends: rising, where each part ends and the next begins; the last is the width.
      dtype: see ``decode``.
    """
    decoded = partial(_sum_by_row, ends=ends)
    return on_own_rows(decoded, code, _as(code.values, dtype), table=_as(W_dec, dtype))


def _decode_forward(code, W_dec, ends, dtype):
    return decode_parts(code, W_dec, ends, dtype), (code, W_dec)


def _decode_backward(ends, dtype, kept, gradient):
    code, W_dec = kept

    def own_dots(code, gradient, *, table):
        rows = gradient.reshape(-1, table.shape[1])
        return dots(rows, _part_of(code, ends), table, code.features, code.used)

    def own_sums(code, gradient):
        rows = gradient.reshape(-1, W_dec.shape[1])
        return _sum_by_feature(code, _as(code.values, dtype), _part_of(code, ends), rows)

    of_values = on_own_rows(own_dots, code, gradient, table=_as(W_dec, dtype))
    integers = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), code)
    of_W = on_own_rows(own_sums, code, gradient, total=True)
    return dataclasses.replace(integers, values=of_values), of_W


decode_parts.defvjp(_decode_forward, _decode_backward)


def _as(a: jax.Array, dtype) -> jax.Array:
    return a if dtype is None else a.astype(dtype)


# ---------------------------------------------------------------- sums by row and by feature


def _part_of(code: Code, ends: tuple[int, ...]) -> jax.Array:
    """Returns int [entries], row * parts + part: which part of the width of which row it is in."""
    return code.rows * len(ends) + sum(code.features >= end for end in ends[:-1])


def _sum_by_row(code: Code, weights: jax.Array, *, table: jax.Array, ends=(0,)) -> jax.Array:
    """Returns, for each part of each row, the sum of weight * table[feature]: [batch, parts, d]."""
    starts, counts = jnp.cumsum(code.counts) - code.counts, code.counts
    if len(ends) > 1:
        there = jnp.arange(len(code.rows)) < counts.sum()
        parts = jnp.where(there, _part_of(code, ends), len(ends) * code.batch)
        starts = jnp.searchsorted(parts, jnp.arange(len(ends) * code.batch + 1))
        starts, counts = starts[:-1], jnp.diff(starts)
    sums = sum_by_group(starts, counts, weights, code.features, table)
    return sums.reshape(code.batch, len(ends), -1)


def _sum_by_feature(code: Code, weights: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns, for each feature, the sum [width, d] of weight * rows[index] over its entries."""
    order, starts = _by_feature(code)
    weights, index = weights[order], index[order]
    return sum_by_unequal_group(starts[:-1], jnp.diff(starts), weights, index, rows)


def _by_feature(code: Code) -> tuple[jax.Array, jax.Array]:
    """Returns all places sorted by feature, unused last, and where features start [width + 1]."""
    width = code.width
    features = jnp.where(code.used, code.features, width)
    order = _sorting(features, width)
    return order, jnp.searchsorted(features[order], jnp.arange(width + 1)).astype(jnp.int32)


def _sorting(features: jax.Array, most: int) -> jax.Array:
    """Returns the order that sorts integers [n] of 0 to ``most``; equals stay as they are.

    Sorts single integers, several times faster than pairs: a place, and above it as many bits of a
    feature as there is space for; the lowest bits first.
    """
    n = len(features)
    place_bits = (n - 1).bit_length()
    own_bits = 32 - place_bits
    features, places = features.astype(jnp.uint32), jnp.arange(n, dtype=jnp.uint32)
    order = None  # no lookup by ``places``: it would keep equal sorts of a step from being one
    for shift in range(0, most.bit_length(), own_bits):
        part = (features if order is None else features[order]) >> shift
        keys = jnp.sort(part << place_bits | places)
        place = keys & jnp.uint32(2**place_bits - 1)
        order = place if order is None else order[place]
    return order.astype(jnp.int32)
