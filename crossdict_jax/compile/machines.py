"""Machines that programs can be compiled for: facts with their sources, and their devices."""

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

from crossdict_jax.errors import UserError


@dataclass(frozen=True)
class Device:
    """What one device has and what programs reach on it, in bytes, seconds, and these a second."""

    platform: str
    memory: float  # what JAX takes of it
    bfloat16: float  # operations of matrix products
    float32: float  # those at full precision
    bandwidth: float  # of its memory
    network: float  # out of it, in a ring of its own host or pod
    outside: float  # in a ring of several hosts
    launch: float  # least time of any operation
    wait: float  # idle time where the host reads the condition of a loop or branch
    per_host: int


# TPUs: https://docs.cloud.google.com/tpu/docs/v5e (and v5p, v6e): peaks of 197, 459 and 918 TFLOP/s
# in bfloat16; 16 GB, 95 GiB and 32 GB, of which the compiler gives away what stands here; 819, 2765
# and 1638 GB/s; links of 400, 1200 and 800 GB/s in both directions of 4, 6 and 4 ports, of which a
# ring uses two. Assumed: 80 % of a peak is reached, float32 takes six bfloat16 products (XLA's
# precision "highest"), and no operation takes less than 1.3 us.
# H100 SXM5, NVIDIA's data sheet: 80 GB, of which JAX takes three quarters; 3.35 TB/s, of which nine
# tenths are reached; 989 TFLOP/s in bfloat16, of which 790 have been measured by others, 67 in
# float32; NVLink of 450 GB/s one way, an adapter of 400 Gbit/s each to other hosts. Assumed: 50 of
# the 67 TFLOP/s, 1.5 us a kernel, 15 us where the host reads a condition.
# cpu: this computer's own, at guessed rates, to try the command.
DEVICES = {
    "v5e": Device("tpu", 15.75 * 2**30, 158e12, 26e12, 819e9, 100e9, 100e9, 1.3e-6, 0, 8),
    "v5p": Device("tpu", 95 * 2**30, 367e12, 61e12, 2765e9, 200e9, 200e9, 1.3e-6, 0, 4),
    "v6e": Device("tpu", 31.25 * 2**30, 734e12, 122e12, 1638e9, 200e9, 200e9, 1.3e-6, 0, 8),
    "h100": Device("cuda", 63.7e9, 790e12, 50e12, 3.0e12, 450e9, 50e9, 1.5e-6, 15e-6, 8),
    "cpu": Device("cpu", 16e9, 1e11, 1e11, 2e10, 1e10, 1e10, 1e-6, 0, 1),
}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
DEEP = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"}
GPUS = {n: f"1x{math.ceil(n / 8)}x{min(n, 8)}" for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)}
# {number in the name: shape}; Google's v5p counts cores, two per device.
SHAPES = {"v5e": FLAT, "v5p": DEEP, "v6e": FLAT, "h100": GPUS, "cpu": {1: "1"}}
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ENVIRONMENT = {  # without it compilers look for the devices
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
INSTALL = {  # platform -> (modules, any of which has its compiler, and what installs one)
    "tpu": (("libtpu",), 'pip install "jax[tpu]"'),
    "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), 'pip install "jax[cuda13]"'),
}


@dataclass(frozen=True)
class Machine:
    """Devices of a kind, which need not be here."""

    name: str
    device: Device
    shape: str  # in which they are connected

    @property
    def count(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def network(self) -> float:
        """Bytes a second that leave a device in a ring through the whole machine."""
        return self.device.network if self.count <= self.device.per_host else self.device.outside

    def devices(self) -> list[Any]:
        """Returns its devices as JAX knows them; UserError if their compiler is not installed."""
        platform, kind = self.device.platform, self.name.partition("-")[0]
        os.environ.update(ENVIRONMENT | os.environ)
        import jax
        from jax.experimental import topologies

        if platform not in INSTALL:
            return jax.devices()[: self.count]
        modules, install = INSTALL[platform]
        if not any(map(importlib.util.find_spec, modules)):
            raise UserError(f"--machine={self.name} needs a compiler that is not here: {install}.")
        options = {"topology_name": f"{kind}:{self.shape}"}
        if self.count == 1:  # of the TPUs; else a host has four
            options["chips_per_host_bounds"] = (1, 1, 1)
        if platform == "cuda":
            options = {"topology_name": kind, "target_config": H100, "topology": self.shape}
        try:
            return list(topologies.get_topology_desc(platform=platform, **options).devices)
        except (NotImplementedError, RuntimeError) as error:
            reason = [*str(error).splitlines(), type(error).__name__][0]
            raise UserError(
                f"--machine={self.name}: its compiler does not start ({reason}); end what else "
                f"uses it, or {install} again, in an environment of its own."
            ) from error


def machine(name: str) -> Machine:
    """Returns the machine of a name like v5e-8; UserError that says which there are."""
    kind, _, number = name.partition("-")
    if number not in map(str, SHAPES.get(kind, ())):
        names = ", ".join(f"{k}-{'|'.join(map(str, sizes))}" for k, sizes in SHAPES.items())
        raise UserError(f"--machine={name} is none of {names}.")
    return Machine(name, DEVICES[kind], SHAPES[kind][int(number)])
