"""The sums of ``sums`` by kernels for GPUs: one program a group, over the rows that belong to it.

No atomics: the same bits from run to run. On CPUs they run in Pallas's interpreter, for tests.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from crossdict_jax.ops.sums import sorted_by, starts_of
from crossdict_jax.training.mesh import on_own_members, platform

TERMS = 16  # rows that a program reads at once: features that are active everywhere take few turns
COLUMNS = 512  # of a row, at most, that a program reads at once
load = partial(triton.load, other=0)


def sum_by_group(
    group: jax.Array, n_groups: int, weights: jax.Array, index: jax.Array, table: jax.Array
) -> jax.Array:
    """Returns what ``sums.sum_by_group`` does."""
    return _sums(starts_of(group, n_groups), weights, index, table)


def sum_by_key(
    keys: jax.Array, n_keys: int, weights: jax.Array, index: jax.Array, table: jax.Array
) -> jax.Array:
    """Returns what ``sums.sum_by_key`` does."""
    order, starts = sorted_by(keys, n_keys)
    return _sums(starts, weights[order], index[order], table)


def _sums(starts: jax.Array, weights: jax.Array, index: jax.Array, table: jax.Array) -> jax.Array:
    """The sums [groups, d] of weight * table[index] over entries starts[i] to starts[i + 1]."""
    n, d = len(starts) - 1, table.shape[1]
    block = min(COLUMNS, pl.next_power_of_2(d))

    def kernel(starts, weights, table, index, sums):
        group, columns = pl.program_id(0), pl.program_id(1) * block + jnp.arange(block)
        first, end = starts[group], starts[group + 1]

        def add(turn, total):
            entries = first + turn * TERMS + jnp.arange(TERMS)
            here = entries < end
            weight, row = (load(a.at[entries], mask=here) for a in (weights, index))
            x = _rows(table, row, here, columns)
            return total + jnp.sum(weight.astype(jnp.float32)[:, None] * x, axis=0)

        turns = pl.cdiv(end - first, TERMS)
        total = jax.lax.fori_loop(0, turns, add, jnp.zeros(block))
        triton.store(sums.at[group, columns], total, mask=columns < d)

    return _call(kernel, (n, pl.cdiv(d, block)), (n, d), starts, weights, table, index)


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

    return _call(kernel, (pl.cdiv(n, TERMS),), (n,), a, a_index, b, b_index)


def _rows(table, rows: jax.Array, here: jax.Array, columns: jax.Array) -> jax.Array:
    """Float32 [rows, columns], 0 where there is nothing."""
    mask = here[:, None] & (columns < table.shape[1])[None, :]
    return load(table.at[rows[:, None], columns[None, :]], mask=mask).astype(jnp.float32)


def _call(kernel, grid: tuple[int, ...], shape: tuple[int, ...], *arrays: jax.Array) -> jax.Array:
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    how = {"compiler_params": triton.CompilerParams(), "interpret": platform() == "cpu"}
    return on_own_members(pl.pallas_call(kernel, out, grid=grid, **how), *arrays)
