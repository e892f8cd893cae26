"""A batch's rows in parts: what is computed of one part at a time, and added up in a fixed order.

The order of a float sum decides its last bits, and training amplifies these without bound. Here a
part is computed whole, on one device, and parts are added as a tree of neighbours:
(p0 + p1) + (p2 + p3). Devices that share a batch hold the subtrees. So any mesh whose data axis is
a power of two that divides the number of parts gives the bits of a single device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from crossdict_jax.training.mesh import DATA, devices_of_rows, is_shared, on_own_rows

PyTree = Any


def mapped(function: Callable, rows: PyTree, parts: int, *given: PyTree) -> PyTree:
    """Returns the rows [batch, ...] that ``function(rows, *given)`` makes of every part's.

    Args:
      function: reads traced values through its arguments alone.
      rows: pytree of arrays with a leading axis of rows.
      parts: how many; they divide the batch.
      given: what all parts read.
    """

    def own(pieces, given):
        return jax.lax.map(lambda piece: function(piece, *given), pieces)

    devices = devices_of_rows()
    if parts % devices:
        return jax.tree.map(join, own(split(rows, parts), given))

    def neighbours(rows, *, table):
        there = own(_neighbours(rows, parts // devices), table)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), there)

    return on_own_rows(neighbours, rows, table=given)


def summed(function: Callable, rows: PyTree, parts: int, *given: PyTree) -> tuple[PyTree, PyTree]:
    """Returns the sum of what every part gives to be added up, and the rest of each [parts, ...].

    Args:
      function: (rows, *given) -> (pytree to be added up, pytree of the rest).
      rows, parts, given: see ``mapped``.
    """

    def own(pieces, given):
        return _tree(lambda piece: function(piece, *given), pieces)

    devices = devices_of_rows()
    if parts % devices:
        return own(split(rows, parts), given)

    def neighbours(rows, given):
        total, rest = own(_neighbours(rows, parts // devices), given)
        return _over_devices(total, devices), rest

    if not is_shared():
        return neighbours(rows, given)
    spread, whole = PartitionSpec(DATA), PartitionSpec()
    specs = {"in_specs": (spread, whole), "out_specs": (whole, spread)}
    return jax.shard_map(neighbours, **specs, check_vma=False)(rows, given)


def _neighbours(rows: PyTree, parts: int) -> PyTree:
    """Returns rows [batch, d] as [parts, batch / parts, d] in their order."""
    return jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), rows)


def split(rows: PyTree, parts: int) -> PyTree:
    """Returns rows [batch, d] as [parts, batch / parts, d]: part j has rows j, j + parts, ...

    So rows that are spread over devices stay where they are.
    """
    return jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), rows)


def join(split: jax.Array) -> jax.Array:
    """Returns what ``split`` took apart, [batch, d]."""
    return split.swapaxes(0, 1).reshape(-1, *split.shape[2:])


def _tree(function: Callable, pieces: PyTree) -> tuple[PyTree, PyTree]:
    """Returns what ``summed`` does: of two halves, each summed so, as long as they are equal."""
    n = len(jax.tree.leaves(pieces)[0])
    if n == 1:
        total, rest = function(jax.tree.map(lambda a: a[0], pieces))
        return total, jax.tree.map(lambda a: a[None], rest)
    halves = n % 2 == 0
    if halves:
        pieces = jax.tree.map(lambda a: a.reshape(2, n // 2, *a.shape[1:]), pieces)
        function = partial(_tree, function)

    def add(total, piece):
        more, rest = function(piece)
        return jax.tree.map(jnp.add, total, more), rest

    like, _ = jax.eval_shape(function, jax.tree.map(lambda a: a[0], pieces))
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    total, rest = jax.lax.scan(add, nothing, pieces)
    return total, jax.tree.map(lambda a: a.reshape(n, *a.shape[2:]), rest) if halves else rest


def _over_devices(own: PyTree, devices: int) -> PyTree:
    """Returns the sum of all devices' own, the same on each: neighbours first, then pairs, ..."""
    if devices & (devices - 1):
        return jax.lax.psum(own, DATA)
    for level in range(devices.bit_length() - 1):
        pairs = [(i, i ^ 2**level) for i in range(devices)]
        others = jax.tree.map(partial(jax.lax.ppermute, axis_name=DATA, perm=pairs), own)
        own = jax.tree.map(jnp.add, own, others)
    return own
