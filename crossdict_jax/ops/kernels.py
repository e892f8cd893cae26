"""The sums of ``sums`` by kernels for GPUs: one program a group, over the rows that belong to it.

No atomics: the same bits from run to run. On CPUs they run in Pallas's interpreter, for tests.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from crossdict_jax.ops.sums import order_of
from crossdict_jax.training.mesh import on_own_members, platform

TERMS = 16  # rows that a program reads at once: features that are active everywhere take few turns
COLUMNS = 512  # of a row, at most, that a program reads at once
load = partial(triton.load, other=0)


def sum_by_group(
    group: jax.Array, n_groups: int, weights: jax.Array, index: jax.Array, table: jax.Array
) -> jax.Array:
    """Returns what ``sums.sum_by_group`` does."""
    return _sums(_starts(group, n_groups), weights, index, table)[0]


def sum_by_key(
    keys: jax.Array, n_keys: int, weights: jax.Array, index: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns what ``sums.sum_by_key`` does."""
    order = order_of(keys, n_keys)
    return _sums(_starts(keys[order], n_keys), weights[order], index[order], table)


@partial(jax.jit, static_argnums=1)  # equal calls are one
def _starts(group: jax.Array, n_groups: int) -> jax.Array:
    """Where each group of rising entries begins, and the last ends: int [n_groups + 1]."""
    n, block = len(group), min(COLUMNS, pl.next_power_of_2(n_groups + 1))

    def kernel(group, starts):
        wanted = pl.program_id(0) * block + jnp.arange(block)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) // 2
            before = (low < high) & (load(group.at[middle], mask=low < high) < wanted)
            return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

        bounds = jnp.zeros(block, jnp.int32), jnp.full(block, n, jnp.int32)
        start, _ = jax.lax.fori_loop(0, n.bit_length(), halve, bounds)
        triton.store(starts.at[wanted], start, mask=wanted <= n_groups)

    out = jax.ShapeDtypeStruct((n_groups + 1,), jnp.int32)
    return _call(kernel, (pl.cdiv(n_groups + 1, block),), out, group)


def _sums(
    starts: jax.Array, weights: jax.Array, index: jax.Array, table: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of entries starts[i] to starts[i + 1]: the sums [groups, d] of weight * table[index], and
    those of weights [groups].
    """
    n, d = len(starts) - 1, table.shape[1]
    block = min(COLUMNS, pl.next_power_of_2(d))

    def kernel(starts, weights, table, index, sums, totals):
        group, columns = pl.program_id(0), pl.program_id(1) * block + jnp.arange(block)
        first, end = starts[group], starts[group + 1]

        def add(turn, before):
            entries = first + turn * TERMS + jnp.arange(TERMS)
            here = entries < end
            weight, row = (load(a.at[entries], mask=here) for a in (weights, index))
            weight, x = weight.astype(jnp.float32), _rows(table, row, here, columns)
            return before[0] + jnp.sum(weight[:, None] * x, axis=0), before[1] + jnp.sum(weight)

        start = jnp.zeros(block), jnp.float32(0)
        total, weight = jax.lax.fori_loop(0, pl.cdiv(end - first, TERMS), add, start)
        triton.store(sums.at[group, columns], total, mask=columns < d)
        totals[group] = weight  # the same by every block of columns

    out = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.float32)
    return _call(kernel, (n, pl.cdiv(d, block)), out, starts, weights, table, index)


def dots(a: jax.Array, a_index: jax.Array, b: jax.Array, b_index: jax.Array) -> jax.Array:
    """Returns what ``sums.dots`` does."""
    n, d = len(a_index), a.shape[1]
    block = min(COLUMNS, pl.next_power_of_2(d))

    def kernel(a, a_index, b, b_index, products):
        entries = pl.program_id(0) * TERMS + jnp.arange(TERMS)
        here = entries < n
        a_row, b_row = (load(index.at[entries], mask=here) for index in (a_index, b_index))

        def add(turn, total):
            columns = turn * block + jnp.arange(block)
            x = _rows(a, a_row, here, columns) * _rows(b, b_row, here, columns)
            return total + jnp.sum(x, axis=1)

        total = jax.lax.fori_loop(0, pl.cdiv(d, block), add, jnp.zeros(TERMS))
        triton.store(products.at[entries], total, mask=here)

    out = jax.ShapeDtypeStruct((n,), jnp.float32)
    return _call(kernel, (pl.cdiv(n, TERMS),), out, a, a_index, b, b_index)


def _rows(table, rows: jax.Array, here: jax.Array, columns: jax.Array) -> jax.Array:
    """Float32 [rows, columns], 0 where there is nothing."""
    mask = here[:, None] & (columns < table.shape[1])[None, :]
    return load(table.at[rows[:, None], columns[None, :]], mask=mask).astype(jnp.float32)


def _call(kernel, grid: tuple[int, ...], out, *arrays: jax.Array):
    how = {"compiler_params": triton.CompilerParams(), "interpret": platform() == "cpu"}
    return on_own_members(pl.pallas_call(kernel, out, grid=grid, **how), *arrays)
