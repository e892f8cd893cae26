"""The device mesh: ensemble members over one axis, batch rows over the other."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MEMBER, DATA = "member", "data"


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
