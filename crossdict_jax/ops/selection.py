"""Which values are the largest, of each row or of all: found exactly, and without a sort of all.

Non-negative floats order as their bit patterns do, so what is looked for are integers (``bits``).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

BITS = 31  # of a non-negative float
ROUGH = 16  # leading bits of a first guess: two or three digits of a value
GROUP = 16  # neighbours of which a first guess reads the largest only
MASK = 32  # neighbours whose choice is written into one integer


def kth_largest(
    z: jax.Array, k: int, *, axis: int | tuple[int, ...] = 1, bits: int = BITS
) -> jax.Array:
    """Returns the k-th largest value along ``axis`` of non-negative z [batch, width], exactly.

    31 halvings of the integer range find the value with compares and sums alone: several times
    faster than a sort on CPU, and, unlike ``lax.top_k``, sharded rows stay where they are.

    Args:
      bits: how many leading bits are found; of fewer than all, the result is a lower bound.
    """
    patterns = bits_of(z)

    def count(chosen):
        of_rows = _count(chosen)
        return of_rows if axis == 1 else jnp.sum(of_rows, axis=0, keepdims=True)

    def halve(i, low):
        candidate = low | (jnp.int32(1) << (BITS - 1 - i))
        return jnp.where(count(patterns >= candidate) >= k, candidate, low)

    low = jax.lax.fori_loop(0, bits, halve, jnp.zeros_like(count(patterns >= 0)))
    return jax.lax.bitcast_convert_type(jnp.squeeze(low, axis), jnp.float32)


def _count(chosen: jax.Array) -> jax.Array:
    """Returns how many there are in each row of bool [batch, width], int32 [batch, 1].

    Added up in two turns, the first of vectors: XLA's CPU backend writes out what it adds up along
    a row in one. The barrier keeps the two apart.
    """
    batch, width = chosen.shape
    size = _group_size(width, most=MASK)
    parts = jnp.sum(chosen.reshape(batch, size, width // size), axis=1, dtype=jnp.int32)
    return jnp.sum(jax.lax.optimization_barrier(parts), axis=1, keepdims=True)


def top_k(z: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns each row's k largest values of relu(z) [batch, width], and where, along the row.

    Of equals the first ones. The k largest lie in the k groups with the largest maxima. With groups
    of about sqrt(width / k) features, there are as many groups to choose from as features in the
    chosen ones: 2 sqrt(width k) numbers are looked at closely in place of width. No ``lax.top_k``:
    XLA's CPU backend runs it on one core.
    """
    batch, width = z.shape
    size = _group_size(width, most=int((width / k) ** 0.5))
    grouped = z.reshape(batch, width // size, size)
    groups = _largest(jax.nn.relu(grouped.max(axis=2)), k)
    candidates = jnp.take_along_axis(grouped, groups[:, :, None], axis=1).reshape(batch, k * size)
    candidates = jax.nn.relu(candidates)
    places = _largest(candidates, k)
    values = jnp.take_along_axis(candidates, places, axis=1)
    return values, jnp.take_along_axis(groups, places // size, axis=1) * size + places % size


def _largest(z: jax.Array, k: int) -> jax.Array:
    """Returns where each row's k largest of non-negative z [batch, width] are, rising [batch, k].

    Of equals the first. If there are more than k that equal the k-th or exceed it, the column
    before which equals are taken is found as the value is: by halving.
    """
    width = z.shape[1]
    low, columns = bits_of(kth_largest(z, k))[:, None], jnp.arange(width)[None, :]

    def least(end):
        return low + (columns >= end)

    def halve(i, last):
        candidate = last | (jnp.int32(1) << (halvings - 1 - i))
        return jnp.where(_count(bits_of(z) >= least(candidate)) < k, candidate, last)

    tied = jnp.any(_count(bits_of(z) >= low) > k)
    halvings = width.bit_length()
    last = jax.lax.fori_loop(0, jnp.where(tied, halvings, 0), halve, jnp.zeros_like(low))
    masks = _masks(z, least(jnp.where(tied, last + 1, width)))
    counts = jax.lax.population_count(masks).astype(jnp.int32)
    ends, nth = jnp.cumsum(counts, axis=1), jnp.arange(k)[None, :]
    which = jnp.sum(ends[:, None, :] <= nth[:, :, None], axis=2, dtype=jnp.int32)
    mask, first = (jnp.take_along_axis(a, which, axis=1) for a in (masks, ends - counts))
    size = width // masks.shape[1]
    return which * size + _bit(mask, nth - first, size)


def _bit(mask: jax.Array, nth: jax.Array, size: int) -> jax.Array:
    """Returns the place in uint32 ``mask`` of its nth bit, int32: those before are deleted."""
    for i in range(size - 1):
        mask = jnp.where(i < nth, mask & (mask - 1), mask)
    return jax.lax.population_count((mask & -mask) - 1).astype(jnp.int32) % size


def _group_size(width: int, *, most: int) -> int:
    """The largest power of two that divides the width and is at most ``most``."""
    size = 1
    while width % (2 * size) == 0 and 2 * size <= most:
        size *= 2
    return size


# ---------------------------------------------------------------- the largest of all rows


def room(n: int, batch: int, width: int) -> int:
    """Returns how many entries are kept place for where the n largest are to be found."""
    return min(n + max(n, width), batch * width)


def least_of_largest(z: jax.Array, n: int) -> jax.Array:
    """Returns int32 [batch]: bits from which on z [batch, width] has its n largest, or some more.

    At most ``room(n, ...)`` values are that large. The n-th largest of the maxima of groups is a
    lower bound of what is looked for, and most often a close one. Where too many values exceed it,
    it is raised. All that equal the n-th largest are above it, unless there is no room: then the
    first rows' are.

    Where fewer than n are positive, all those are above it.
    """
    batch, width = z.shape
    size = _group_size(width, most=min(GROUP, width * batch // (2 * n)))
    maxima = jax.nn.relu(z).reshape(batch, width // size, size).max(axis=2)
    low = bits_of(kth_largest(maxima, n, axis=(0, 1), bits=ROUGH))
    return _with_room(z, n, jnp.maximum(low, 1), jnp.int32(2**BITS - 1))


def least_from(z: jax.Array, least: jax.Array, n: int) -> jax.Array:
    """Returns int32 [batch]: bits of ``least`` [], or of more in last rows if there is no room.

    Args:
      z: [batch, width], rows of a batch whose n-th largest value is ``least``.
    """
    low = jnp.maximum(bits_of(least), 1)
    return _with_room(z, n, low, low + 1)


def bits_of(z: jax.Array) -> jax.Array:
    """Returns int32 that order as relu(z) does; of what is not a number, the greatest.

    The sign is dropped: -0.0 is a zero, and some NaN have one.
    """
    return jax.lax.bitcast_convert_type(jax.nn.relu(z), jnp.int32) & (2**BITS - 1)


def _with_room(z: jax.Array, n: int, low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns least bits [batch] that n values of z or more have, but no more than there is room.

    Of two bounds (n values or more have ``low``; fewer have ``high``) the lower is raised by
    halving while there are too many. If they meet, many values are equal: then the rows before a
    bound have ``low`` and all others one more, and that bound is found by halving, too.
    """
    batch, width = z.shape
    most, rows = room(n, batch, width), jnp.arange(batch, dtype=jnp.int32)

    def least(low, end):
        return low + (rows >= end)

    def taken(low, end):
        return count_from(z, least(low, end))

    def too_many(bounds):
        return (bounds.taken > most) & (bounds.by_value | (bounds.end - bounds.start > 1))

    def narrowed(bounds):
        by_value = bounds.by_value
        low = jnp.where(by_value, bounds.low + (bounds.high - bounds.low) // 2, bounds.low)
        end = jnp.where(by_value, batch, bounds.start + (bounds.end - bounds.start) // 2)
        now = taken(low, end)
        enough = now >= n
        return _Bounds(
            low=jnp.where(enough, low, bounds.low),
            high=jnp.where(by_value & ~enough, low, bounds.high),
            start=jnp.where(by_value | enough, bounds.start, end),
            end=jnp.where(enough, end, bounds.end),
            taken=jnp.where(enough, now, bounds.taken),
        )

    first = _Bounds(low, high, jnp.int32(0), jnp.int32(batch), taken(low, batch))
    found = jax.lax.while_loop(too_many, narrowed, first)
    return least(found.low, found.end)


class _Bounds(NamedTuple):
    """Between which bits, and which rows, the least that is taken lies."""

    low: jax.Array
    high: jax.Array
    start: jax.Array
    end: jax.Array
    taken: jax.Array  # values that are at least ``low`` in rows before ``end``, or greater

    @property
    def by_value(self) -> jax.Array:
        return self.high - self.low > 1


def _masks(z: jax.Array, least: jax.Array) -> jax.Array:
    """Returns uint32 [batch, groups]: a bit for each of a group of neighbours, 1 from least on.

    Args:
      least: int32 [batch, width], or 1 in place of either.
    """
    batch, width = z.shape
    size = _group_size(width, most=MASK)
    large = (bits_of(z) >= least).reshape(batch, width // size, size)
    bits = large.astype(jnp.uint32) << jnp.arange(size, dtype=jnp.uint32)[None, None, :]
    return jnp.sum(bits, axis=2, dtype=jnp.uint32)


class Entries(NamedTuple):
    """Chosen entries of an array [batch, width], row by row, and along each row.

    Attributes:
      rows, columns: int32 [room]; of what comes after the last entry, any that exist.
      counts: int32 [batch], how many entries a row has.
    """

    rows: jax.Array
    columns: jax.Array
    counts: jax.Array


def count_from(z: jax.Array, least: jax.Array) -> jax.Array:
    """Returns int32 []: how many values of z [batch, width] have the bits ``least`` [batch]."""
    return jnp.sum(jax.lax.population_count(_masks(z, least[:, None])), dtype=jnp.int32)


def entries_from(z: jax.Array, least: jax.Array, *, room: int) -> Entries:
    """Returns where z [batch, width] has at least the bits ``least`` [batch], in ``room`` places.

    Each entry knows its mask, as the masks' counts repeated, and finds its own bit in it.
    """
    masks = _masks(z, least[:, None])
    counts = jax.lax.population_count(masks).astype(jnp.int32)
    masks, flat = masks.reshape(-1), counts.reshape(-1)
    first = jnp.cumsum(flat) - flat
    which = jnp.repeat(jnp.arange(len(masks)), flat, total_repeat_length=room)
    mask, before = masks[which], jnp.arange(room) - first[which]
    size = z.shape[1] // counts.shape[1]
    rows, group = which // counts.shape[1], which % counts.shape[1]
    return Entries(rows, group * size + _bit(mask, before, size), counts.sum(axis=1))
