"""Sums of a few rows of a table: what sparse codes need in place of products of matrices.

All have a fixed order, on any device: no atomics, the same bits from run to run.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

TERMS = 16  # added up in one fused loop: more compile longer, fewer write the sum more often
LANES = 16  # floats that a CPU's widest registers hold
GROUPS = 256  # summed together, in as many turns as the largest of them needs
CHUNK = 64  # entries of one group at most, where groups are too unequal to be summed as they are
ENTRIES = 8192  # whose inner products are taken together


def sum_by_group(
    starts: jax.Array, counts: jax.Array, weights: jax.Array, index: jax.Array, table: jax.Array
) -> jax.Array:
    """Returns, for each group of neighbouring entries, the sum of weight * table[index].

    Groups of about equal size are summed together: what is added in vain is little.

    Args:
      starts: int [groups], the first entry of each.
      counts: int [groups], how many entries it has.
      weights: [entries].
      index: int [entries], rows of the table.
      table: [rows, d].

    Returns:
      float32 [groups, d].
    """
    order, place = _by_size(counts)
    return _at(_sums(starts[order], counts[order], weights, index, table), place)


def sum_by_unequal_group(
    starts: jax.Array, counts: jax.Array, weights: jax.Array, index: jax.Array, table: jax.Array
) -> jax.Array:
    """Returns what ``sum_by_group`` does, at a cost that no few large groups can drive up.

    Groups are cut into chunks of ``CHUNK`` entries; these are summed, then the sums of each group.
    """
    n = -(-counts // CHUNK)
    n_chunks = len(weights) // CHUNK + len(counts)  # at most, and some of them hold nothing
    first = jnp.cumsum(n) - n
    group = jnp.repeat(jnp.arange(len(counts)), n, total_repeat_length=n_chunks)
    within = (jnp.arange(n_chunks) - first[group]) * CHUNK
    sizes = jnp.clip(counts[group] - within, 0, CHUNK)
    order, place = _by_size(sizes)
    parts = _sums((starts[group] + within)[order], sizes[order], weights, index, table)
    return sum_by_group(first, n, jnp.ones(n_chunks), place, parts)


def _by_size(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the order of groups from large to small, and each group's place in it."""
    order = jnp.argsort(counts, descending=True)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)


def _sums(
    starts: jax.Array, counts: jax.Array, weights: jax.Array, index: jax.Array, table: jax.Array
) -> jax.Array:
    """See ``sum_by_group``: ``GROUPS`` groups together, as many turns as the largest needs.

    In each turn ``TERMS`` gathers stand side by side in one loop over the output, so that none is
    written out. Groups without entries cost nothing where they come together.
    """
    n, d, size = len(starts), table.shape[1], min(GROUPS, len(starts))
    last = len(weights) - 1

    def block(groups):
        starts, counts = groups

        def add(turn, total):
            within = turn * TERMS + jnp.arange(TERMS)[None, :]
            entries = jnp.minimum(starts[:, None] + within, last)
            weight = jnp.where(within < counts[:, None], _at(weights, entries), 0)
            # Else the compiler looks up weights and indices anew for every element of the output.
            weight, row = jax.lax.optimization_barrier((weight, _at(index, entries)))
            for j in range(TERMS):
                term = _at(table, row[:, j]).astype(jnp.float32)
                total = total + weight[:, j, None].astype(jnp.float32) * term
            return total

        turns = -(-jnp.max(counts) // TERMS)
        return jax.lax.fori_loop(0, turns, add, jnp.zeros((size, d)))

    blocks = tuple(_in_blocks(a, size) for a in (starts, counts))
    return jax.lax.map(block, blocks).reshape(-1, d)[:n]


def dots(a: jax.Array, of_a: jax.Array, b: jax.Array, of_b: jax.Array, used: jax.Array):
    """Returns the inner products, float32 [entries], of a[of_a] with b[of_b].

    Computed as ``LANES`` running sums side by side, one in each lane of a register, that are added
    up at the end: a loop over one running sum would take one element at a time.

    Args:
      a, b: [rows, d], of any number of rows each.
      of_a, of_b: int [entries].
      used: bool [entries]; of neighbours that all are not, nothing is computed.
    """
    n, size, span = len(of_a), min(ENTRIES, len(of_a)), LANES * TERMS
    spans = -(-a.shape[1] // span)  # of a row
    a, b = (_spans(table, spans) for table in (a, b))

    def block(entries):
        of_a, of_b, used = entries

        def add(turn, sums):
            at_a, at_b = jax.lax.optimization_barrier((of_a * spans + turn, of_b * spans + turn))
            # One index for all lookups of a turn: of many, reading them costs more than the sums.
            for first in range(0, span, LANES):
                lanes = slice(first, first + LANES)
                sums = sums + _at(a[:, lanes], at_a) * _at(b[:, lanes], at_b)
            return sums

        turns = jnp.where(used.any(), spans, 0)
        sums, lanes = jax.lax.fori_loop(0, turns, add, jnp.zeros((size, LANES))), LANES
        while lanes > 1:
            lanes //= 2
            sums = sums[:, :lanes] + sums[:, lanes:]
        return sums[:, 0]

    blocks = tuple(_in_blocks(e, size) for e in (of_a, of_b, used))
    return jax.lax.map(block, blocks).reshape(-1)[:n]


def _spans(table: jax.Array, spans: int) -> jax.Array:
    """Returns the rows [n, d] cut into ``spans``, zeros after the last: float32 [n * spans, span].

    A span is what one turn of ``dots`` reads of a row: TERMS pieces of LANES each.
    """
    missing = spans * LANES * TERMS - table.shape[1]
    return jnp.pad(table.astype(jnp.float32), ((0, 0), (0, missing))).reshape(-1, LANES * TERMS)


def _in_blocks(a: jax.Array, size: int) -> jax.Array:
    """Returns [n] as [blocks, size], with zeros after the last."""
    return jnp.pad(a, (0, -len(a) % size)).reshape(-1, size)


def _at(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds")
