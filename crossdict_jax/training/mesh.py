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
GPUS = ("gpu", "cuda")  # what JAX calls the platform, here and of absent devices
PyTree = Any
_PLANNED: ContextVar[tuple] = ContextVar("planned devices and memory", default=(None, None))


@contextlib.contextmanager
def planned(devices: Sequence[Any], memory: int) -> Iterator[None]:
    """Within, meshes are of absent devices, and ``put`` gives shapes for them.

    Args:
      devices: of a topology of ``jax.experimental.topologies``.
      memory: bytes of each.
    """
    token = _PLANNED.set((list(devices), memory))
    try:
        yield
    finally:
        _PLANNED.reset(token)


def all_devices() -> list:
    """Returns all devices, or those that are ``planned``."""
    return _PLANNED.get()[0] or jax.devices()


def device_memory() -> int | None:
    """Returns the bytes of a device's memory; None if unknown."""
    memory = _PLANNED.get()[1]
    return memory or (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def platform() -> str:
    """Returns the platform that is traced for: the mesh's, or else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def product_dtype(setting: str) -> jnp.dtype:
    """Returns the type of products' inputs that a ``matmul_dtype`` setting means on this machine.

    "auto" is bfloat16 on accelerators, whose units are made for it, and float32 on CPUs. Parameters
    in training, closed forms and metrics are float32 always.
    """
    if setting == "auto":
        setting = "float32" if all_devices()[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(setting)


def compiler_options() -> dict[str, bool]:
    """Returns compiler options of GPUs: no sort for the k largest of rows, products by cuBLAS.

    It adds biases while it writes a product, which the compiler's own kernels do in a second pass.
    """
    fast = all_devices()[0].platform in GPUS and jax.__version_info__ < (0, 11)
    options = {"xla_gpu_experimental_use_raft_select_k": True, "xla_gpu_enable_triton_gemm": False}
    return options if fast else {}


def make_mesh(*, members: int = 1, batch: int = 0, devices: list | None = None) -> Mesh:
    """Returns a (member, data) mesh over all devices that can share the work evenly.

    The member axis is as large as divides both the ensemble and the machine, because members never
    talk to each other; as many of the others as divide them and ``batch`` (0: all) share its rows.
    """
    devices = all_devices() if devices is None else devices
    n = math.gcd(members, len(devices))
    shape, auto = (n, math.gcd(batch, len(devices) // n)), (AxisType.Auto, AxisType.Auto)
    used = devices[: math.prod(shape)]
    return jax.make_mesh(shape, (MEMBER, DATA), axis_types=auto, devices=used)


def shard(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """Returns the sharding of an array's leading dimensions over these mesh axes."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def shapes_of(tree: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
    """Returns a pytree of arrays as their shapes and dtypes, laid out so."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def put(tree: PyTree, sharding: NamedSharding) -> PyTree:
    """Returns a pytree of arrays on the devices; each process sends only its rows."""
    if _PLANNED.get()[0]:
        return shapes_of(tree, sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda a: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index]), tree
    )


def put_filled(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns an array on the devices, with zeros at the end where they cannot share it evenly."""
    parts = [sharding.mesh.shape.get(axis, 1) for axis in sharding.spec]
    parts += [1] * (array.ndim - len(parts))
    shape = tuple(math.ceil(size / n) * n for size, n in zip(array.shape, parts))
    if shape == array.shape:
        return put(array, sharding)
    if _PLANNED.get()[0]:
        return put(jax.ShapeDtypeStruct(shape, array.dtype), sharding)

    def part(index):
        x = array[index]
        return np.pad(x, [(0, a - b) for a, b in zip(sharding.shard_shape(shape), x.shape)])

    return jax.make_array_from_callback(shape, sharding, part)


def to_bits(array: np.ndarray) -> np.ndarray:
    """Returns bfloat16 rows as uint16, others as they are, for ``from_bits``.

    XLA's CPU backend copies a bfloat16 array to float32, whole, if a loop gathers from it.
    """
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def from_bits(array: jax.Array) -> jax.Array:
    """Returns rows of ``to_bits``, bfloat16 ones as float32."""
    if array.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(array, jnp.bfloat16).astype(jnp.float32)
    return array


def on_own_rows(function: Callable, rows: PyTree) -> PyTree:
    """Returns function(rows), each device computing its own rows alone.

    A plain call if the mesh's data axis has one device. For what the partitioner would gather all
    rows for: selection, sorting, gathers.
    """
    if devices_of_rows() == 1:
        return function(rows)
    spread = PartitionSpec(DATA)
    # Unchecked: loops inside start from constants, which the check takes for equal everywhere.
    return jax.shard_map(function, in_specs=(spread,), out_specs=spread, check_vma=False)(rows)


def on_own_members(function: Callable, *arrays: jax.Array) -> jax.Array:
    """Returns function(*arrays), each device computing its own members alone.

    For kernels, which the partitioner cannot divide; on one device to a member's rows.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return function(*arrays)
    whole = PartitionSpec()
    return jax.shard_map(function, in_specs=whole, out_specs=whole, check_vma=False)(*arrays)


def devices_of_rows() -> int:
    """Returns over how many devices the rows of the current code are spread.

    1 without a mesh, and inside ``on_own_rows``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or DATA in mesh.manual_axes else mesh.shape[DATA]
