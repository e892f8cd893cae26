"""The device mesh: ensemble members over one axis, batch rows over the other."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MEMBER, DATA = "member", "data"
PyTree = Any
_PLANNED: ContextVar[tuple[list, int] | None] = ContextVar("planned machine", default=None)


@contextlib.contextmanager
def planned(devices: Sequence[Any], memory: int) -> Iterator[None]:
    """Within, meshes are of devices that need not be here, and ``put`` gives shapes for them.

    Args:
      devices: as a topology of ``jax.experimental.topologies`` has them.
      memory: bytes of each.
    """
    token = _PLANNED.set((list(devices), memory))
    try:
        yield
    finally:
        _PLANNED.reset(token)


def all_devices() -> list:
    """Returns the devices to work on: all that there are, or those that are ``planned``."""
    return _PLANNED.get()[0] if _PLANNED.get() else jax.devices()


def device_memory() -> int | None:
    """Returns the bytes of a device's memory; None where it does not tell."""
    if _PLANNED.get():
        return _PLANNED.get()[1]
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def platform() -> str:
    """Returns what kind of device is traced for: that of the mesh, or else the usual one."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def make_mesh(*, members: int = 1, devices: list | None = None) -> Mesh:
    """Returns a (member, data) mesh over all devices.

    As many as divide both the ensemble and the machine hold different members, because members
    never talk to each other; the others share the batch.
    """
    devices = all_devices() if devices is None else devices
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


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Returns a pytree of arrays on the devices; each process hands over only the rows it holds."""
    if _PLANNED.get():
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), tree
    )


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


def on_own_rows(function: Callable, rows: PyTree) -> PyTree:
    """Returns function(rows) of a pytree of rows, of which each device computes its own alone.

    Under a mesh whose data axis has more than one device; else a plain call. For what the
    partitioner would gather all rows for: selection, sorting, gathers.
    """
    if devices_of_rows() == 1:
        return function(rows)
    spread = PartitionSpec(DATA)
    # Unchecked: loops inside start from constants, which the check holds to be the same everywhere.
    return jax.shard_map(function, in_specs=(spread,), out_specs=spread, check_vma=False)(rows)


def devices_of_rows() -> int:
    """Returns over how many devices the rows are spread that code speaks of as a whole.

    1 without a mesh, and within what each device computes by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or DATA in mesh.manual_axes else mesh.shape[DATA]
