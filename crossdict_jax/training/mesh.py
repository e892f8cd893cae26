"""The device mesh: ensemble members over one axis, batch rows over the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MEMBER, DATA = "member", "data"
PyTree = Any


def make_mesh(*, members: int = 1, devices: list | None = None) -> Mesh:
    """Returns a (member, data) mesh over all devices.

    As many devices as divide both the ensemble and the machine hold different members, because
    members never talk to each other; the others share the batch.
    """
    devices = jax.devices() if devices is None else devices
    over_members = math.gcd(members, len(devices))
    return jax.make_mesh(
        (over_members, len(devices) // over_members),
        (MEMBER, DATA),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def shard(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Returns the sharding that lays an array's leading dimensions over the named mesh axes."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns ``array`` as a global array; each process hands over only the rows it holds."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def to_bits(array: np.ndarray) -> np.ndarray:
    """Returns bfloat16 rows as uint16, and others as they are: what ``from_bits`` reads.

    Of a bfloat16 array that a loop gathers from XLA's CPU backend makes a float32 copy, whole.
    """
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def from_bits(array: jax.Array) -> jax.Array:
    """Returns rows that went through ``to_bits``: those that were bfloat16 as float32."""
    if array.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(array, jnp.bfloat16).astype(jnp.float32)
    return array


def on_own_rows(function: Callable, *rows: PyTree, table=None, total: bool = False) -> PyTree:
    """Returns function(*rows, [table=table]), where each device computes on its own rows alone.

    Under a mesh (``jax.set_mesh``) whose data axis has more than one device; else a plain call.
    For what the partitioner would gather all rows for: selection, sorting, gathers.

    Args:
      rows: pytrees of arrays with a leading axis of rows.
      table: what all devices have whole.
      total: whether results are sums over rows, to be summed over devices; else they are rows.
    """

    def own(rows, table):
        result = function(*rows) if table is None else function(*rows, table=table)
        return jax.lax.psum(result, DATA) if total else result

    if devices_of_rows() == 1:
        return function(*rows) if table is None else function(*rows, table=table)
    spread, whole = PartitionSpec(DATA), PartitionSpec()
    specs = {"in_specs": (spread, whole), "out_specs": whole if total else spread}
    # Unchecked: loops inside start from constants, which the check holds to be the same everywhere.
    return jax.shard_map(own, **specs, check_vma=False)(rows, table)


def devices_of_rows() -> int:
    """Returns over how many devices the rows of arrays are spread that code speaks of as whole."""
    return jax.sharding.get_abstract_mesh().shape[DATA] if is_shared() else 1


def is_shared() -> bool:
    """Returns whether code speaks of arrays as whole that several devices share.

    Not without a mesh, nor within what each device computes on its own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and DATA not in mesh.manual_axes
