"""Sums of a few rows of a table, for sparse codes in place of matrix products.

The order of sums is fixed: no atomics, the same bits from run to run.
"""

import jax
import jax.numpy as jnp

TERMS = 16  # added up in one fused loop: more compile longer, fewer write the sum more often
LANES = 16  # floats that a CPU's widest registers hold
GROUPS = 256  # summed together, in as many turns as the largest of them needs
CHUNK = 64  # entries of one group at most, where groups are too unequal to be summed as they are


def sum_by_group(
    group: jax.Array, n_groups: int, weights: jax.Array, index: jax.Array, table: jax.Array
) -> jax.Array:
    """Returns, for each group of neighbouring entries, the sum of weight * table[index].

    For groups of about equal size: those of one size are summed together.

    Args:
      group: int [entries], rising; ``n_groups`` for entries that belong to none.
      weights: [entries].
      index: int [entries], rows of the table.
      table: [rows, d].

    Returns:
      float32 [n_groups, d].
    """
    starts = _starts(group, n_groups)
    sums, position = _sums(starts[:-1], jnp.diff(starts), weights, index, table)
    return _at(sums, position)


def sum_by_key(
    keys: jax.Array, n_keys: int, weights: jax.Array, index: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns ``sum_by_group`` of entries in any order and groups of any size, and by key the sums
    of weights, float32 [n_keys]. A key of ``n_keys`` is none.

    Entries are sorted by key and cut into chunks of at most ``CHUNK`` of one key; chunks are
    summed, then keys: so a few large groups cannot drive up the cost.
    """
    totals = jnp.zeros(n_keys).at[keys].add(weights.astype(jnp.float32), mode="drop")
    order = order_of(keys, n_keys)
    starts, weights, index = _starts(keys[order], n_keys), weights[order], index[order]
    starts, counts = starts[:-1], jnp.diff(starts)
    n = len(keys)
    chunks = -(-counts // CHUNK)  # of each key
    n_chunks = n // CHUNK + n_keys  # at most, and some of them hold nothing
    first = jnp.cumsum(chunks) - chunks
    key = jnp.repeat(jnp.arange(n_keys), chunks, total_repeat_length=n_chunks)
    offset = (jnp.arange(n_chunks) - first[key]) * CHUNK
    sizes = jnp.clip(counts[key] - offset, 0, CHUNK)
    parts, part = _sums(starts[key] + offset, sizes, weights, index, table)
    sums, position = _sums(first, chunks, jnp.ones(n_chunks), part, parts)
    return _at(sums, position), totals


def order_of(keys: jax.Array, n_keys: int) -> jax.Array:
    """Returns the order of rising keys, int32 [entries]."""
    n = len(keys)
    if (n_keys + 1) * n < 2**32:  # key and position in one integer sort much faster than a pair
        packed = keys.astype(jnp.uint32) * n + jnp.arange(n, dtype=jnp.uint32)
        return (jnp.sort(packed) % n).astype(jnp.int32)
    return jnp.argsort(keys)


def _starts(group: jax.Array, n_groups: int) -> jax.Array:
    """Where each group of rising entries begins, and the last ends: int32 [n_groups + 1]."""
    return jnp.searchsorted(group, jnp.arange(n_groups + 1)).astype(jnp.int32)


def _sums(
    starts: jax.Array, counts: jax.Array, weights: jax.Array, index: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of groups from large to small, and each group's position among them.

    ``GROUPS`` groups together, in as many turns as the largest needs (none, if all are empty). In
    a turn ``TERMS`` gathers share one loop over the output, so none is written out.

    Args:
      starts, counts: int [groups], first entry and number of entries.
    """
    n, d, size, last = len(starts), table.shape[1], min(GROUPS, len(starts)), len(weights) - 1
    order = jnp.argsort(counts, descending=True)
    position = jnp.zeros_like(order).at[order].set(jnp.arange(n), unique_indices=True)

    def block(groups):
        starts, counts = groups

        def add(turn, total):
            offset = turn * TERMS + jnp.arange(TERMS)[None, :]
            entries = jnp.minimum(starts[:, None] + offset, last)
            weight = jnp.where(offset < counts[:, None], _at(weights, entries), 0)
            # Else the compiler looks up weights and indices anew for every element of the output.
            weight, row = jax.lax.optimization_barrier((weight, _at(index, entries)))
            for j in range(TERMS):
                term = _at(table, row[:, j]).astype(jnp.float32)
                total = total + weight[:, j, None].astype(jnp.float32) * term
            return total

        turns = -(-jnp.max(counts) // TERMS)
        return jax.lax.fori_loop(0, turns, add, jnp.zeros((size, d)))

    blocks = [jnp.pad(a[order], (0, -n % size)).reshape(-1, size) for a in (starts, counts)]
    return jax.lax.map(block, blocks).reshape(-1, d)[:n], position


def dots(a: jax.Array, a_index: jax.Array, b: jax.Array, b_index: jax.Array) -> jax.Array:
    """Returns the inner products, float32 [entries], of a[a_index] with b[b_index].

    ``LANES`` running sums, one per lane of a register, are added up at the end: a loop over one
    running sum would take one element at a time.

    Args:
      a, b: [rows, d], of any number of rows each.
      a_index, b_index: int [entries].
    """
    span, missing = LANES * TERMS, -a.shape[1] % (LANES * TERMS)  # of a row: what one turn reads
    turns = (a.shape[1] + missing) // span
    padded = (jnp.pad(table.astype(jnp.float32), ((0, 0), (0, missing))) for table in (a, b))
    a, b = (table.reshape(-1, span) for table in padded)

    def add(turn, sums):
        index = jax.lax.optimization_barrier((a_index * turns + turn, b_index * turns + turn))
        # One index for all lookups of a turn: reading many costs more than the sums.
        for first in range(0, span, LANES):
            lanes = slice(first, first + LANES)
            sums = sums + _at(a[:, lanes], index[0]) * _at(b[:, lanes], index[1])
        return sums

    sums, lanes = jax.lax.fori_loop(0, turns, add, jnp.zeros((len(a_index), LANES))), LANES
    while lanes > 1:
        lanes //= 2
        sums = sums[:, :lanes] + sums[:, lanes:]
    return sums[:, 0]


def _at(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds")
